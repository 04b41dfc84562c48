"""Key-value stores: drivers of the port in `aether.model.kv`."""
