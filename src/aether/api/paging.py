"""Opaque cursors and the shape of every list: {"items": [...], "next_cursor": str | null}."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from litestar.params import QueryParameter

from aether.model.errors import BadRequest

T = TypeVar("T")
R = TypeVar("R")
DEFAULT_LIMIT = 50
MAX_LIMIT = 500

Limit = Annotated[int, QueryParameter(name="limit", ge=1, le=MAX_LIMIT, description="Items per page.")]
Cursor = Annotated[str | None, QueryParameter(name="cursor", description="`next_cursor` of the page before.")]


class Page(msgspec.Struct, Generic[T]):
    """One page of a list."""

    items: list[T]
    next_cursor: str | None = None


def encode_cursor(*keys: str | int) -> str:
    """Sort keys of the last item shown, as URL-safe text."""
    return base64.urlsafe_b64encode(msgspec.json.encode(keys)).decode().rstrip("=")


def decode_cursor(cursor: str | None, *kinds: type) -> tuple[Any, ...] | None:
    """The sort keys of `encode_cursor`, checked against `kinds` (str, int). Raises BadRequest."""
    if not cursor:
        return None
    try:
        keys: Any = msgspec.json.decode(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (binascii.Error, ValueError, msgspec.DecodeError):
        keys = None
    if not isinstance(keys, list) or [type(key) for key in keys] != list(kinds) or not all(map(_fits, keys)):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        raise BadRequest("the cursor is not one that this list gave out")
    return tuple(keys)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _fits(key: object) -> bool:
    """Whether a database can compare it with what it keeps."""
    return isinstance(key, str) or (isinstance(key, int) and -(1 << 63) <= key < 1 << 63)


def page(
    rows: Sequence[R], limit: int, show: Callable[[R], T], keys: Callable[[R], tuple[str | int, ...]]
) -> Page[T]:
    """Make a page of rows fetched with `LIMIT limit + 1`: the extra row only tells that there are more."""
    shown = rows[:limit]
    more = encode_cursor(*keys(shown[-1])) if len(rows) > limit and shown else None
    return Page([show(row) for row in shown], more)
