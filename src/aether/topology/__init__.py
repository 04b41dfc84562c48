"""Composition root: which driver serves which port. The only package that knows all of them.

`serve` runs a server, alone or among others that share its database; `doctor` says what it would find.
"""

from aether.topology.doctor import Check, doctor
from aether.topology.plane import Ready
from aether.topology.serving import serve

__all__ = ["Check", "Ready", "doctor", "serve"]
