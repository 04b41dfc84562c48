"""The HTTP data path: raw-protocol proxy, routing table, balancing and limits.

`Edge` and `RouteTable` are what others use; import them from `aether.edge.server` and `aether.edge.table`.
"""
