"""Body framing: an incremental, strict decoder of the chunked coding and its encoder, pure.

RFC 9112 section 7.1. Chunk extensions and trailer fields are checked for form and dropped: nothing behind the edge
may depend on them, and both have been used to smuggle requests.
"""

from __future__ import annotations

import re
from typing import Final

_SIZE_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER_LINE: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")
_MAX_LINE: Final = 4096
_MAX_TRAILERS: Final = 16384

_SIZE, _DATA, _DATA_END, _TRAILERS, _DONE = range(5)

LAST_CHUNK: Final = b"0\r\n\r\n"


class ChunkError(Exception):
    """The chunked coding is broken; the message cannot be trusted from here on."""


class ChunkedDecoder:
    """Takes the coded bytes in any split and gives the payload; `done` once the last chunk and trailers are read."""

    __slots__ = ("_left", "_line", "_state", "_trailer_bytes", "done", "rest")

    def __init__(self) -> None:
        self._state = _SIZE
        self._left = 0
        self._line = b""
        self._trailer_bytes = 0
        self.done = False
        self.rest = b""
        """Bytes after the end of the message."""

    def feed(self, data: bytes) -> bytes:
        """The payload found in `data`. Raises ChunkError; not to be called again once `done`."""
        out: list[bytes] = []
        at = 0
        size = len(data)
        while at < size:
            state = self._state
            if state == _DATA:
                part = data[at : at + self._left]
                out.append(part)
                at += len(part)
                self._left -= len(part)
                if not self._left:
                    self._state = _DATA_END
                continue
            stop = data.find(b"\n", at)
            if stop < 0:
                self._line += data[at:]
                self._check_partial(state)
                break
            line = self._line + data[at : stop + 1]
            self._line = b""
            at = stop + 1
            if line[-2:-1] != b"\r":
                raise ChunkError("a chunk line does not end in CRLF")
            self._take_line(state, line[:-2])
            if self.done:
                self.rest = data[at:]
                break
        return out[0] if len(out) == 1 else b"".join(out)

    def _take_line(self, state: int, line: bytes) -> None:
        if state == _DATA_END:
            if line:
                raise ChunkError("a chunk is longer than its size says")
            self._state = _SIZE
        elif state == _SIZE:
            match = _SIZE_LINE.fullmatch(line) if len(line) <= _MAX_LINE else None
            if match is None:
                raise ChunkError("a chunk size is malformed or too large")
            self._left = int(match[1], 16)
            self._state = _DATA if self._left else _TRAILERS
        elif line:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > _MAX_TRAILERS or not _TRAILER_LINE.fullmatch(line):
                raise ChunkError("a trailer field is malformed or too long")
        else:
            self._state = _DONE
            self.done = True

    def _check_partial(self, state: int) -> None:
        line = self._line
        if state == _DATA_END and line not in (b"", b"\r"):
            raise ChunkError("a chunk is longer than its size says")
        limit = _MAX_TRAILERS if state == _TRAILERS else _MAX_LINE
        if len(line) > limit + 1:
            raise ChunkError("a chunk line is too long")


def encode_chunk(payload: bytes) -> bytes:
    """One chunk of the coding; `payload` must not be empty, because an empty chunk ends the message."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)
