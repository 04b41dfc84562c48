"""Values of secrets hidden in what apps print, where it is read.

Line by line, values of at least eight bytes: shorter ones would hide half of every log. What an app cuts, encodes or
reverses is not found; this saves from accidents, not from the app.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MASK = "****"
MIN_BYTES = 8


class Masker:
    """Knows the values of some secrets. A value of several lines is hidden line by line."""

    def __init__(self, values: Iterable[str]) -> None:
        lines = {line.strip() for value in values for line in value.splitlines()}
        # the longest first, so that one value that is a part of another does not leave the rest of it
        known = sorted((line for line in lines if len(line.encode()) >= MIN_BYTES), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, known))) if known else None

    @property
    def knows_any(self) -> bool:
        return self._pattern is not None

    def mask(self, text: str) -> str:
        return text if self._pattern is None else self._pattern.sub(MASK, text)
