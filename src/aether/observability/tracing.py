"""Request and trace ids, carried through a request by context variables (W3C Trace Context, level 1)."""

from __future__ import annotations

import os
import re
from contextvars import ContextVar

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def trace_id_from(traceparent: str | None) -> str:
    """The trace id of an incoming `traceparent`, or a new one (32 lower-case hex) when absent or malformed."""
    match = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    if match is None or match[1] == "0" * 32 or match[2] == "0" * 16:
        return os.urandom(16).hex()
    return match[1]


def request_id_from(given: str | None) -> str:
    """An incoming request id when it is short and harmless to print, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else os.urandom(12).hex()
