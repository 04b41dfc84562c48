"""Passwords: argon2id with the parameters of RFC 9106 section 4 (second recommendation: 64 MiB, three passes).

Checking costs the same whether the user exists, has a password, or is disabled, so that time tells no names.
Work runs in threads, few at once: each takes 64 MiB.
"""

from __future__ import annotations

import asyncio

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from aether.model.errors import BadRequest

MIN_CHARS, MAX_CHARS = 8, 1024
_AT_ONCE = 2


class Passwords:
    """Hashes and checks passwords."""

    def __init__(self, hasher: PasswordHasher | None = None) -> None:
        self._hasher = hasher or PasswordHasher()
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._nobody: str | None = None

    async def hash(self, password: str) -> str:
        """Raises BadRequest for a password that is too short or too long."""
        if not MIN_CHARS <= len(password) <= MAX_CHARS:
            raise BadRequest(f"a password has {MIN_CHARS} to {MAX_CHARS} characters", {"field": "password"})
        async with self._turn:
            return await asyncio.to_thread(self._hasher.hash, password.encode("utf-8", "surrogatepass"))

    async def matches(self, password: str, hashed: str | None) -> bool:
        """Whether `password` is the one of `hashed`; None stands for nobody's and never matches."""
        if self._nobody is None:
            self._nobody = await self.hash("a password that nobody has")
        given = password[:MAX_CHARS].encode("utf-8", "surrogatepass")
        async with self._turn:
            right = await asyncio.to_thread(self._verify, hashed or self._nobody, given)
        return right and hashed is not None and len(password) <= MAX_CHARS

    def is_outdated(self, hashed: str) -> bool:
        """Whether `hashed` was made with other parameters than new ones are."""
        return self._hasher.check_needs_rehash(hashed)

    def _verify(self, hashed: str, given: bytes) -> bool:
        try:
            return self._hasher.verify(hashed, given)
        except (VerificationError, InvalidHashError):
            return False
