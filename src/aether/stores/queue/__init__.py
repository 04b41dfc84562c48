"""Queues: drivers of the port in `aether.model.queue`."""
