"""Aether: packages what a developer built into a content-addressed artifact and runs it."""

__version__ = "0.1.0"
