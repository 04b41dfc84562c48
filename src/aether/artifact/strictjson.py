"""JSON of supply chain documents: read without leniency, written so that equal values are equal bytes.

Two readers must never see two things in one signed text, so a name given twice, NaN, a byte order mark and text that
is not UTF-8 are refused. What a document means is left to `manifest`, `sbom`, `provenance` and `dsse`.
"""

import json
import re
from typing import Any, NoReturn, cast

from aether.model.errors import BadRequest

MAX_NODES = 8_000_000
"""Commas and colons of a text before it is parsed: a bound on what parsing may cost."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name '{twice[:80]}' stands twice in one object")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def read(data: bytes, what: str) -> Any:
    """The value of the JSON text `data`. Raises BadRequest, in words that begin with `what` ("the manifest")."""
    if data.count(b",") + data.count(b":") > MAX_NODES:
        raise BadRequest(f"{what} has more parts than can be read")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
        if _SURROGATE.search(data):
            # only a pair of these is a character; half of one cannot be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise BadRequest(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise BadRequest(f"{what} cannot be read as JSON: {error}") from None
    return value


def write(value: Any) -> bytes:
    """`value` as compact JSON with sorted names and a newline at the end."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def an_object(value: Any, what: str) -> dict[str, Any]:
    """`value` if it is a JSON object. Raises BadRequest."""
    if not isinstance(value, dict):
        raise BadRequest(f"{what} is not a JSON object")
    return cast(dict[str, Any], value)


def a_list(value: Any, what: str) -> list[Any]:
    """`value` if it is a JSON array. Raises BadRequest."""
    if not isinstance(value, list):
        raise BadRequest(f"{what} is not a list")
    return cast(list[Any], value)


def a_text(value: Any, what: str) -> str:
    """`value` if it is a string that is not empty. Raises BadRequest."""
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{what} is not a text")
    return value
