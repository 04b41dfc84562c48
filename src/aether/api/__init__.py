"""The HTTP API: routes, the callers' rights, errors as an envelope, and the description of it all."""
