"""Apps, their releases, configuration and logs."""
