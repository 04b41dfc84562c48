"""Drivers that keep keys outside the database."""
