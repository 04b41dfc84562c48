"""Roles, the caller of a request, and which apps it acts for; pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

DEFAULT_TEAM = "default"
"""Owns what credentials without a user make: the bootstrap token and static tokens that name nobody."""


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
    """static, bootstrap, session, ci or anonymous."""
    expires_at: int | None = None
    owner: str = DEFAULT_TEAM
    """Who owns an app that this caller makes without naming a team."""
    owners: frozenset[str] = frozenset({DEFAULT_TEAM})
    """Users and teams whose apps this caller may touch; an admin may touch all."""
    apps: frozenset[str] | None = None
    """The only apps a scoped token may touch; None for no such bound."""
    user_id: str | None = None
    session_id: str | None = None
    token_hash: str | None = field(default=None, repr=False)
    """Of the token that the request carried, to ask later whether it still counts."""

    @property
    def teams(self) -> frozenset[str]:
        return self.owners - {self.name} if self.user_id else self.owners

    @property
    def role_sees_all(self) -> bool:
        return self.role is Role.ADMIN

    @property
    def sees_everything(self) -> bool:
        return self.role_sees_all and self.apps is None

    def may_touch(self, app: str, owner: str) -> bool:
        """Whether the app is this caller's at all; what it may do with it is its role's business."""
        if self.apps is not None and app not in self.apps:
            return False
        return self.role_sees_all or owner in self.owners
