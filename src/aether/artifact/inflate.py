"""Decompressing an artifact: a sequence of gzip members (RFC 1952), each checked, with bounds against bombs."""

from collections.abc import Iterator
from typing import BinaryIO

from aether.artifact.codec import inflater
from aether.model.errors import BadRequest

_READ = 1 << 20
_OUT = 1 << 20
_MAGIC = b"\x1f\x8b"
RATIO_GRACE = 64 << 20
"""Below so many bytes no ratio is judged: short runs of zeros compress enormously and harm nobody."""


class InvalidArchive(BadRequest):
    """The archive is not one that may be unpacked; nothing was kept of it."""


class ArchiveTooLarge(BadRequest):
    """The archive unpacks to more than the limits allow; nothing was kept of it."""


def inflate(source: BinaryIO, *, max_bytes: int, max_ratio: int) -> Iterator[bytes]:
    """Yield the decompressed bytes in pieces of at most 1 MiB.

    Raises InvalidArchive for damage, truncation and anything behind the last member, ArchiveTooLarge beyond
    `max_bytes` or when more than `max_ratio` bytes come out of each byte that went in.
    """
    start, damaged = inflater()
    data = source.read(_READ)
    if not data:
        raise InvalidArchive("the archive is empty")
    taken, given = len(data), 0
    while data:
        if len(data) < len(_MAGIC):
            more = source.read(_READ)
            taken += len(more)
            data += more
        if not data.startswith(_MAGIC):
            what = "is followed by bytes that do not belong to it" if given else "is not gzip"
            raise InvalidArchive(f"the archive {what}")
        member = start()
        while not member.eof:
            if member.needs_input and not data:
                data = source.read(_READ)
                if not data:
                    raise InvalidArchive("the archive is truncated")
                taken += len(data)
            try:
                piece = member.decompress(data, _OUT)
            except damaged as error:
                raise InvalidArchive(f"the archive is damaged: {error}") from error
            data = b""
            given += len(piece)
            if given > max_bytes:
                raise ArchiveTooLarge(f"the archive unpacks to more than {max_bytes} bytes")
            if given > RATIO_GRACE and given > taken * max_ratio:
                raise ArchiveTooLarge(f"the archive unpacks to more than {max_ratio} times its size")
            if piece:
                yield piece
        data = member.unused_data
        if not data:
            data = source.read(_READ)
            taken += len(data)
