"""Drivers that keep something."""
