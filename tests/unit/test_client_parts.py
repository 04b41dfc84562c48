"""Which parts are still to be sent, and what a failure of an upload means."""

from __future__ import annotations

import hashlib
import itertools
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.client import parts
from aether.client.failures import Unreached
from aether.client.lanes import Urls
from aether.client.parts import AGAIN, ANEW, FAIL, RESIGN, Life, Patience, Piece
from aether.client.wire import PartUrl
from aether.model.errors import (
    AetherError,
    BadRequest,
    Conflict,
    DigestMismatch,
    Forbidden,
    LocalIOError,
    NetworkError,
    NotFound,
    RateLimited,
    ServiceUnavailable,
    Unauthorized,
    from_wire,
)

DATA = bytes(range(256)) * 40
SIZE = 1000


def md5(piece: Piece) -> str:
    return hashlib.md5(DATA[piece.offset : piece.offset + piece.size], usedforsecurity=False).hexdigest()


def arrived(piece: Piece, etag: str | None = None, size: int | None = None) -> parts.ArrivedPart:
    return {
        "part_number": piece.number,
        "size_bytes": piece.size if size is None else size,
        "etag": md5(piece) if etag is None else etag,
    }


@given(st.integers(1, 10**6), st.integers(100, 10**6))
def test_pieces_cover_everything_once(size: int, part: int) -> None:
    found = parts.pieces(size, part)
    assert [piece.number for piece in found] == list(range(1, len(found) + 1))
    assert found[0].offset == 0
    assert all(a.offset + a.size == b.offset for a, b in itertools.pairwise(found))
    assert found[-1].offset + found[-1].size == size
    assert all(piece.size == part for piece in found[:-1])
    assert 0 < found[-1].size <= part


def test_what_has_arrived_is_not_sent_again() -> None:
    every = parts.pieces(len(DATA), SIZE)
    there = [arrived(every[0]), arrived(every[2], f'"{md5(every[2])}"'), arrived(every[-1])]
    assert set(parts.kept(every, there, md5)[0]) == {1, 3, every[-1].number}
    assert parts.kept(every, there, md5)[1] == {}
    assert parts.kept(every, [], md5) == ({}, {})


def test_another_size_or_md5_and_parts_that_do_not_exist_are_sent_again() -> None:
    every = parts.pieces(len(DATA), SIZE)
    there = [
        arrived(every[0]),
        arrived(every[1], "0" * 32),
        arrived(every[2], size=SIZE - 1),
        {"part_number": 99, "size_bytes": SIZE, "etag": "x"},
        arrived(every[3], '""'),
    ]
    assert parts.kept(every, there, md5) == ({1: md5(every[0])}, {})


def test_etags_that_are_no_md5s_say_nothing() -> None:
    """A directory's are checksums with a length; those of a store that encrypts with its own keys look like MD5s."""
    every = parts.pieces(len(DATA), SIZE)
    assert set(parts.kept(every, [arrived(every[0], "8a1b2c3d3e8"), arrived(every[1], "ffff")], md5)[0]) == {1, 2}
    encrypted = [arrived(every[0], "0123456789abcdef" * 2), arrived(every[1], "fedcba9876543210" * 2)]
    sure, unsure = parts.kept(every, encrypted, md5)
    assert (sure, set(unsure)) == ({}, {1, 2})


@pytest.mark.parametrize(
    ("error", "step"),
    [
        (Unreached("broken"), AGAIN),
        (ServiceUnavailable("away"), AGAIN),
        (RateLimited("slowly"), AGAIN),
        (from_wire(500, "internal", "oops"), AGAIN),
        (from_wire(500, "internal", "oops", {"trace_id": "t"}), FAIL),
        (from_wire(408, "bad_request", "too slow"), AGAIN),
        (from_wire(400, "bad_request", "idle", {"reason": "RequestTimeout"}), AGAIN),
        (ServiceUnavailable("full", {"reason": "disk_full"}), FAIL),
        (Forbidden("expired"), RESIGN),
        (NotFound("no such upload"), ANEW),
        (BadRequest("no"), FAIL),
        (Conflict("over"), FAIL),
        (DigestMismatch("other bytes"), FAIL),
        (Unauthorized("who?"), FAIL),
        (LocalIOError("gone"), FAIL),
        (NetworkError("a certificate that nobody trusts"), FAIL),
    ],
)
def test_what_a_failure_means(error: AetherError, step: str) -> None:
    assert parts.step_after(error) == step


def test_patience_ends_after_a_minute_and_some_attempts() -> None:
    patience = Patience()
    assert [patience.step(Unreached("x"), now) for now in (0, 100, 200, 300)] == [AGAIN] * 4, "slow attempts count"
    assert patience.step(Unreached("x"), 400) == FAIL
    patience = Patience()
    assert {patience.step(Unreached("x"), now / 10) for now in range(599)} == {AGAIN}
    assert patience.step(Unreached("x"), 60) == FAIL


def test_a_store_that_refuses_every_url_is_believed() -> None:
    patience = Patience()
    steps = [patience.step(error, 0) for error in (Forbidden("a"), Forbidden("b"), Unreached("c"), Forbidden("d"))]
    assert steps == [RESIGN, RESIGN, AGAIN, RESIGN]
    assert [patience.step(Forbidden("e"), 0), patience.step(Forbidden("f"), 0)] == [RESIGN, FAIL]


def test_refusing_a_url_that_may_have_expired_says_nothing_of_the_store() -> None:
    patience, life = Patience(), Life(asked=10, secs=2)
    assert {patience.step(Forbidden("expired"), 12 + now / 10, life) for now in range(500)} == {RESIGN}
    assert patience.step(Forbidden("expired"), 72, life) == FAIL, "but it does not go on for ever"
    patience = Patience()
    used = [Life(0, 900), Life(10, 2), Life(100, 900), Life(100, None)]
    steps = [patience.step(Forbidden("no"), 101, life) for life in used]
    assert steps == [RESIGN, RESIGN, RESIGN, FAIL], "an expired one between them makes valid ones no better"


def test_a_url_is_used_in_the_first_half_of_its_life() -> None:
    assert Life(10, 4).is_young(11.9)
    assert not Life(10, 4).is_young(12)
    assert Life(10, None).is_young(1e9), "a server that does not say how long it lives"


class Signing:
    """A server that signs URLs which live for ten seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[list[int]] = []
        self.urls = Urls(range(1, 13), self.sign, lambda: self.now)

    def sign(self, numbers: list[int]) -> list[PartUrl]:
        self.asked.append(numbers)
        made = {"method": "PUT", "url": f"/{self.now}", "headers": {}, "size_bytes": 1, "expires_at": ""}
        return [cast("PartUrl", {**made, "part_number": n, "expires_in_secs": 10}) for n in numbers]


def test_urls_are_signed_ahead_and_thrown_away_when_they_are_old() -> None:
    it = Signing()
    for number in (1, 2, 3):
        it.urls.of(number)
    it.now = 4.9
    assert it.urls.of(4)[0]["url"] == "/0.0"
    assert it.asked == [[1, 2, 3, 4, 5, 6, 7, 8]]
    it.now = 5
    url, life = it.urls.of(5)
    assert (url["url"], life.asked) == ("/5", 5)
    assert it.asked[1:] == [[5, 6, 7, 8, 9, 10, 11, 12]]


def test_a_url_that_was_refused_is_signed_again_by_itself() -> None:
    it = Signing()
    it.urls.of(1)
    assert it.urls.of(1, alone=True)[0]["part_number"] == 1
    assert it.asked[1:] == [[1]]
    it.urls.of(2)
    assert len(it.asked) == 2, "the others are still good"


@given(st.integers(2, 50), st.floats(0, 1))
def test_pauses_grow_and_stay_short(attempt: int, draw: float) -> None:
    assert 0.1 <= parts.pause_before(attempt, draw) <= 4
    assert parts.pause_before(attempt + 1, draw) >= parts.pause_before(attempt, draw)
