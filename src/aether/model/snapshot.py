"""What a consistent copy of the database says about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`objects` are the keys of every object that the copy needs, `key_ids` name the keys that seal its secrets."""

    schema: str
    objects: Sequence[str]
    key_ids: Sequence[str]
    counts: Mapping[str, int]
    """Rows of the tables that people count."""
