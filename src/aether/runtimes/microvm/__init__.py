"""Runs an instance as a microVM: code images, the guest that boots, and the monitors that boot it."""
