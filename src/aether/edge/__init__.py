"""The HTTP data path: raw-protocol proxy, routing table, balancing and limits."""
