"""Composition root: which driver serves which port. The only package that knows all of them.

`serve` runs the embedded topology (everything on one machine in one process); `doctor` says what it would find.
"""

from aether.topology.doctor import Check, doctor
from aether.topology.embedded import Ready, serve

__all__ = ["Check", "Ready", "doctor", "serve"]
