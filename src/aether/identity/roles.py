"""Roles and what each includes; pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Role(IntEnum):
    """Ordered: a role may do everything that a smaller one may."""

    READER = 1
    DEPLOYER = 2
    ADMIN = 3

    @property
    def label(self) -> str:
        return self.name.lower()

    @classmethod
    def parse(cls, label: str) -> Role:
        """Raises KeyError for an unknown label."""
        return cls[label.upper()]


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of a request. `expires_at` is microseconds since the epoch, None for never."""

    name: str
    role: Role
    kind: str
    """static, bootstrap, session or anonymous."""
    expires_at: int | None = None
