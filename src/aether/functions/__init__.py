"""Functions: HTTP handlers that scale from zero, each instance in a microVM of its own."""
