"""Runs an instance as a sandboxed process on this machine."""
