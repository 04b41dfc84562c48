"""The compressor behind the artifact, loaded on use: ISA-L for speed (levels 0 to 3), zlib for size (4 to 9)."""

import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

_ISAL_MAX_LEVEL = 3


class Inflater(Protocol):
    """Decompresses one gzip member and checks its checksum and length."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _isal() -> Any:
    return import_module("isal.igzip_lib")


def deflater(level: int) -> Callable[[memoryview], bytes]:
    """A function that makes a raw deflate stream (RFC 1951) of its argument."""
    if level <= _ISAL_MAX_LEVEL:
        isal = _isal()
        compress: Callable[[memoryview, int, int], bytes] = isal.compress
        raw: int = isal.COMP_DEFLATE
        return lambda data: compress(data, level, raw)
    return lambda data: zlib.compress(data, level, wbits=-15)


def checksum() -> Callable[[memoryview], int]:
    """CRC-32 (RFC 1952), an order of magnitude faster than zlib's."""
    crc: Callable[[memoryview], int] = import_module("isal.isal_zlib").crc32
    return crc


def inflater() -> tuple[Callable[[], Inflater], type[Exception]]:
    """What starts a gzip member, and the error it raises for damaged input."""
    isal = _isal()
    start: Callable[[int], Inflater] = isal.IgzipDecompressor
    gzip: int = isal.DECOMP_GZIP
    damaged: type[Exception] = isal.IsalError
    return (lambda: start(gzip)), damaged
