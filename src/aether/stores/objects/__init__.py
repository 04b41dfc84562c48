"""Object stores: drivers of the port that the registry declares."""
