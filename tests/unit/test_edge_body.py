"""The chunked coding: any split gives the same payload, and broken codings are refused in any split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.edge.body import LAST_CHUNK, ChunkedDecoder, ChunkError, encode_chunk

GOOD = {
    "one chunk": (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "empty": (b"0\r\n\r\n", b""),
    "extension": (b'5;a=b;c="d"\r\nhello\r\n0;x\r\n\r\n', b"hello"),
    "space before extension": (b"5 ;a\r\nhello\r\n0\r\n\r\n", b"hello"),
    "capital size": (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    "leading zeros": (b"0005\r\nhello\r\n000\r\n\r\n", b"hello"),
    "trailers": (b"1\r\nx\r\n0\r\nX-Sum: 1\r\nY: 2\r\n\r\n", b"x"),
    "line ends in payload": (b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n"),
}

BAD = {
    "no size": b"\r\nhello\r\n0\r\n\r\n",
    "not a number": b"g\r\n",
    "negative": b"-1\r\n",
    "prefix 0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "space before size": b" 5\r\nhello\r\n0\r\n\r\n",
    "too large": b"10000000000000000\r\n",
    "far too large": b"f" * 5000 + b"\r\n",
    "bare LF after size": b"5\nhello\r\n0\r\n\r\n",
    "bare CR in extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "NUL in extension": b"5;\x00\r\nhello\r\n0\r\n\r\n",
    "endless extension": b"5;" + b"a" * 9000,
    "data too long": b"5\r\nhello!\r\n0\r\n\r\n",
    "no CRLF after data": b"5\r\nhello0\r\n\r\n",
    "bare LF after data": b"5\r\nhello\n0\r\n\r\n",
    "bare LF at the end": b"0\r\n\n",
    "trailer without colon": b"0\r\nnothing\r\n\r\n",
    "trailer folded": b"0\r\nA: b\r\n c\r\n\r\n",
    "trailer with space before colon": b"0\r\nA : b\r\n\r\n",
    "trailer with NUL": b"0\r\nA: \x00\r\n\r\n",
    "endless trailers": b"0\r\n" + b"A: bbbbbbbbbbbbbbbbbbbbbbbbbbbbb\r\n" * 2000,
    "endless trailer line": b"0\r\nA: " + b"b" * 40000,
}


def decode(raw: bytes, cuts: list[int]) -> tuple[bytes, bytes]:
    """Payload and the rest, feeding `raw` in pieces that end at `cuts`."""
    decoder = ChunkedDecoder()
    payload = b""
    at = 0
    for cut in [*sorted({c % (len(raw) + 1) for c in cuts}), len(raw)]:
        if cut > at:
            payload += decoder.feed(raw[at:cut])
            at = cut
        if decoder.done:
            return payload, decoder.rest + raw[at:]
    raise EOFError


@pytest.mark.parametrize(("raw", "payload"), GOOD.values(), ids=GOOD.keys())
def test_good_in_whole_and_byte_by_byte(raw: bytes, payload: bytes) -> None:
    assert decode(raw + b"GET /", []) == (payload, b"GET /")
    assert decode(raw + b"GET /", list(range(len(raw)))) == (payload, b"GET /")


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD.keys())
def test_bad_in_whole_and_byte_by_byte(raw: bytes) -> None:
    with pytest.raises(ChunkError):
        decode(raw, [])
    with pytest.raises(ChunkError):
        decode(raw, list(range(len(raw))))


@given(st.lists(st.binary(min_size=1, max_size=40)), st.lists(st.integers(0, 5000)), st.binary(max_size=20))
def test_round_trip_in_any_split(payloads: list[bytes], cuts: list[int], rest: bytes) -> None:
    raw = b"".join(map(encode_chunk, payloads)) + LAST_CHUNK + rest
    assert decode(raw, cuts) == (b"".join(payloads), rest)


@given(
    st.lists(st.sampled_from([b"1", b"0", b"a", b"\r\n", b"\r", b"\n", b";", b"A: b", b"3\r\nabc\r\n"]), max_size=14),
    st.lists(st.integers(0, 60)),
)
def test_a_split_never_changes_the_verdict(pieces: list[bytes], cuts: list[int]) -> None:
    raw = b"".join(pieces)

    def verdict(cuts: list[int]) -> tuple[bytes, bytes] | type[Exception]:
        try:
            return decode(raw, cuts)
        except (ChunkError, EOFError) as error:
            return type(error)

    assert verdict(cuts) == verdict([])
