"""Structured logs on stderr, as text for people or JSON for machines, with the ids of the request at hand.

Control bytes never reach the terminal: JSON escapes them and the text renderer does the same. Secrets are
kept out by never being handed to a logger; nothing is filtered afterwards.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, TextIO

import msgspec
import structlog

from aether.model.times import now_us, to_iso
from aether.observability import tracing

LEVELS = {"trace": 5, "debug": 10, "info": 20, "warn": 30, "error": 40}
_json = msgspec.json.Encoder(enc_hook=str)
_Event = MutableMapping[str, Any]


def configure(level: str = "info", log_format: str = "auto", stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's root logger once per process.

    `level` is one of LEVELS, `log_format` auto, text or json (auto: text on a terminal, else JSON).
    """
    out = stream or sys.stderr
    as_json = log_format == "json" or (log_format == "auto" and not out.isatty())
    render: Callable[[Any, str, _Event], str] = _render_json if as_json else _render_text
    shared: list[Any] = [structlog.contextvars.merge_contextvars, structlog.stdlib.add_log_level, _ids, _time]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                render,
            ],
            foreign_pre_chain=shared,
        )
    )
    logging.addLevelName(LEVELS["trace"], "TRACE")
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    # those of S3 would even tell what signs a request
    for noisy in ("aiosqlite", "asyncio", "uvicorn", "websockets", "alembic", "aiobotocore", "botocore"):
        logging.getLogger(noisy).setLevel(max(LEVELS[level], logging.WARNING))
    # The API's own layer logs every failure, with ids; uvicorn would tell each a second time without.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose events are `logger.info("what happened", key=value)`."""
    made: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return made


def _ids(_logger: Any, _method: str, event: _Event) -> _Event:
    if (request := tracing.request_id.get()) is not None:
        event.setdefault("request_id", request)
    if (trace := tracing.trace_id.get()) is not None:
        event.setdefault("trace_id", trace)
    return event


def _time(_logger: Any, _method: str, event: _Event) -> _Event:
    event["time"] = to_iso(now_us())
    return event


def _render_json(_logger: Any, _method: str, event: _Event) -> str:
    ordered = {"time": event.pop("time"), "level": event.pop("level"), "event": str(event.pop("event", "")), **event}
    return _json.encode(ordered).decode()


def _render_text(_logger: Any, _method: str, event: _Event) -> str:
    moment, level, text = event.pop("time"), event.pop("level"), str(event.pop("event", ""))
    trace = event.pop("exception", None)
    pairs = " ".join(f"{key}={_printable(str(value))}" for key, value in event.items())
    line = f"{moment} {level:<7} {_printable(text)} {pairs}".rstrip()
    return line if trace is None else f"{line}\n{''.join(c if c == chr(10) else _printable(c) for c in str(trace))}"


def _printable(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
