"""Drivers that run something."""
