"""Trace context and spans, without any library: ids by W3C Trace Context (level 1), carried by context variables.

Whoever does work says `with span("unpack"):`. Unless the composition root installed a recorder (see `otlp`), that
costs one look at a variable. A span carries the ids that log lines and error answers carry: there is one id space.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
INTERNAL, SERVER = "internal", "server"
Value = str | int | float | bool

trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_span_id: ContextVar[str] = ContextVar("span_id", default="")
"""Of the span that new ones become children of; empty at the root."""
_sampled: ContextVar[bool] = ContextVar("sampled", default=False)


class Span:
    """One piece of work. Times are nanoseconds since the epoch."""

    __slots__ = ("attributes", "end_ns", "failure", "kind", "name", "parent_id", "span_id", "start_ns", "trace_id")

    def __init__(
        self,
        name: str,
        trace_id: str,
        span_id: str,
        parent_id: str = "",
        *,
        kind: str = INTERNAL,
        start_ns: int | None = None,
        attributes: Mapping[str, Value] | None = None,
    ) -> None:
        self.name = name
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent_id = parent_id
        self.kind = kind
        self.start_ns = time.time_ns() if start_ns is None else start_ns
        self.end_ns = 0
        self.attributes: dict[str, Value] = dict(attributes or {})
        self.failure: str | None = None
        """Why the work failed; None when it did not."""

    def end(self, failure: str | None = None) -> None:
        """Give the span to the recorder; once."""
        self.end_ns = time.time_ns()
        self.failure = failure or self.failure
        if _recorder is not None:
            _recorder.record(self)


class Recorder(Protocol):
    """Where spans go. Neither may block or raise."""

    def samples(self, trace_id: str, parent: bool | None) -> bool:
        """Whether a trace is recorded; `parent` is what the caller decided, None without one."""
        ...

    def record(self, span: Span) -> None: ...


_recorder: Recorder | None = None


def install(recorder: Recorder | None) -> None:
    """From now on spans go there; None ends it."""
    global _recorder
    _recorder = recorder


def new_span_id() -> str:
    return os.urandom(8).hex()


def span_id_of(key: str) -> str:
    """A span id that follows from `key`: the same in every process that knows the key."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def trace_id_from(traceparent: str | None) -> str:
    """The trace id of an incoming `traceparent`, or a new one (32 lower-case hex) when absent or malformed."""
    return _parsed(traceparent)[0]


def request_id_from(given: str | None) -> str:
    """An incoming request id when it is short and harmless to print, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else os.urandom(12).hex()


def accept(traceparent: str | None) -> None:
    """Go on in the trace of an incoming request, or begin one."""
    found, parent, sampled = _parsed(traceparent)
    trace_id.set(found)
    _span_id.set(parent)
    _sampled.set(_recorder is not None and _recorder.samples(found, sampled))


def resume(trace: str | None, parent_id: str) -> None:
    """Go on, outside any request, in a trace that was recorded with some piece of work."""
    request_id.set(None)
    trace_id.set(trace)
    _span_id.set(parent_id)
    _sampled.set(trace is not None and _recorder is not None and _recorder.samples(trace, True))


def begin(
    name: str,
    attributes: Mapping[str, Value] | None = None,
    *,
    kind: str = INTERNAL,
    start_ns: int | None = None,
    span_id: str | None = None,
    root: bool = False,
) -> Span | None:
    """A span whose end is the caller's to say; it becomes nobody's parent. None when the trace is not recorded."""
    trace = trace_id.get()
    if _recorder is None or trace is None or not _sampled.get():
        return None
    parent = "" if root else _span_id.get()
    return Span(name, trace, span_id or new_span_id(), parent, kind=kind, start_ns=start_ns, attributes=attributes)


@contextmanager
def span(name: str, attributes: Mapping[str, Value] | None = None, *, kind: str = INTERNAL) -> Generator[Span | None]:
    """What happens inside, as one span; an exception marks it as failed. Yields None when it is not recorded."""
    made = begin(name, attributes, kind=kind)
    if made is None:
        yield None
        return
    token = _span_id.set(made.span_id)
    failure: str | None = None
    try:
        yield made
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"[:500]
        raise
    finally:
        _span_id.reset(token)
        made.end(failure)


def _parsed(traceparent: str | None) -> tuple[str, str, bool | None]:
    """(trace id, parent span id, whether the caller records); a new trace when there is none."""
    match = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    if match is None or match[1] == "0" * 32 or match[2] == "0" * 16:
        return os.urandom(16).hex(), "", None
    return match[1], match[2], bool(int(match[3], 16) & 1)
