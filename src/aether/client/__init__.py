"""The typed API client that the CLI, the tests and other programs use."""
