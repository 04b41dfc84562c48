"""The trace that a command's requests belong to."""

from __future__ import annotations

import os
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_VALUE = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def traceparent(environ: Mapping[str, str]) -> str:
    """The trace that the caller, such as a CI job, names in TRACEPARENT, else a new one that asks to be recorded."""
    given = environ.get("TRACEPARENT", "")
    return given if _VALUE.fullmatch(given) else f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"
