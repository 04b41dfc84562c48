"""Cursors, credentials, trace ids, times, roles and log lines."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from litestar import Request
from litestar.exceptions import InternalServerException

from aether.api.auth import token_of
from aether.api.errors import on_http_exception
from aether.api.paging import decode_cursor, encode_cursor, page
from aether.identity.roles import Role
from aether.model.errors import BadRequest
from aether.model.times import from_iso, to_iso
from aether.observability import logging as logs
from aether.observability.tracing import request_id_from, trace_id_from


@given(number=st.integers(-(2**63), 2**63 - 1), text=st.text(max_size=50))
def test_a_cursor_gives_back_its_keys(number: int, text: str) -> None:
    cursor = encode_cursor(number, text)
    assert decode_cursor(cursor, int, str) == (number, text)
    with pytest.raises(BadRequest):
        decode_cursor(cursor, str, int)


@given(st.text(min_size=1, max_size=80))
def test_a_made_up_cursor_is_a_bad_request(text: str) -> None:
    try:
        found = decode_cursor(text, int, str)
    except BadRequest:
        return
    assert found is not None
    assert [type(key) for key in found] == [int, str]


@given(rows=st.lists(st.integers(), max_size=30), limit=st.integers(1, 10))
def test_pages_show_everything_once(rows: list[int], limit: int) -> None:
    seen: list[int] = []
    start = 0
    while True:
        one = page(rows[start : start + limit + 1], limit, lambda row: row, lambda row: (row,))
        seen += one.items
        start += limit
        if one.next_cursor is None:
            break
    assert seen == rows


@given(st.binary(max_size=100))
def test_credentials_never_crash(header: bytes) -> None:
    for prefix in (b"", b"Bearer ", b"Basic ", b"basic " + base64.b64encode(header)):
        token_of({b"authorization": prefix + header})


def test_credentials() -> None:
    assert token_of({b"authorization": b"Bearer  abc "}) == ("abc", False)
    assert token_of({b"authorization": b"Basic " + base64.b64encode(b"me:a:b")}) == ("a:b", True)
    assert token_of({b"authorization": b"Basic " + base64.b64encode(b"no-colon")}) == (None, True)
    assert token_of({}) == (None, False)


def test_trace_ids() -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    assert trace_id_from(f"00-{trace}-00f067aa0ba902b7-01") == trace
    assert trace_id_from(f"01-{trace}-00f067aa0ba902b7-01-more") == trace
    for bad in (None, "", f"ff-{trace}-00f067aa0ba902b7-01", f"00-{trace.upper()}-00f067aa0ba902b7-01"):
        assert trace_id_from(bad) not in (trace, "", None)
    assert request_id_from("ok-1") == "ok-1"
    for bad in (None, "", "a b", "a\n", "é", "x" * 129):
        assert request_id_from(bad) != bad


@given(st.integers(0, 4_000_000_000_000_000))
def test_times_round_trip(moment: int) -> None:
    assert from_iso(to_iso(moment)) == moment


def test_a_sender_that_goes_away_is_no_failure_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    gone = InternalServerException("client disconnected prematurely")
    answer = on_http_exception(Request({"type": "http"}), gone)  # type: ignore[typeddict-item]
    assert (answer.status_code, answer.content.code) == (400, "bad_request")
    assert not caplog.records


def test_times_are_fixed_width() -> None:
    assert to_iso(0) == "1970-01-01T00:00:00.000000Z"
    assert from_iso("1970-01-01T01:00:00+01:00") == 0
    with pytest.raises(BadRequest):
        from_iso("yesterday")


def test_roles_include_smaller_ones() -> None:
    assert Role.READER < Role.DEPLOYER < Role.ADMIN
    assert Role.parse("deployer").label == "deployer"
    with pytest.raises(KeyError):
        Role.parse("god")


@pytest.fixture
def clean_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("clean_logging")
def test_json_logs_carry_fields_and_foreign_loggers() -> None:
    out = io.StringIO()
    logs.configure("info", "json", out)
    logs.logger("x").info("it happened", app="shop", odd="\x1b[31m")
    logging.getLogger("library").warning("other %s", "thing")
    logs.logger("x").debug("not shown")
    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert (first["event"], first["level"], first["app"]) == ("it happened", "info", "shop")
    assert first["time"].endswith("Z")
    assert second["event"] == "other thing"
    assert "\x1b" not in out.getvalue()


@pytest.mark.usefixtures("clean_logging")
def test_text_logs_escape_control_bytes_and_show_traces() -> None:
    out = io.StringIO()
    logs.configure("info", "text", out)
    try:
        raise ValueError("bad \x1b[31m")
    except ValueError as error:
        logs.logger("x").error("failed\r\nforged line", exc_info=error)
    shown = out.getvalue()
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert "failed\\r\\nforged line" in shown
    assert "ValueError" in shown
