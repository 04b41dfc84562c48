"""Runs an instance as a Firecracker microVM inside of its jailer; the guest is that of `aether.runtimes.microvm`."""
