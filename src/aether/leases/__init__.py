"""Leases: work that one server at a time may do, held under a name in the database that the servers share."""

from aether.leases.service import Lease, LeaseLost, Leases, hold

__all__ = ["Lease", "LeaseLost", "Leases", "hold"]
