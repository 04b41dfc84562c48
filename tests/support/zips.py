"""Zip archives put together by hand, so that every field can lie."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from struct import pack


@dataclass
class Item:
    """A member; what is None is told as it is. `local_*` is what stands before the content."""

    name: bytes
    data: bytes = b""
    method: int = 8
    flags: int = 0
    mode: int = 0
    attributes: int = 0
    raw: bytes | None = None
    crc: int | None = None
    size: int | None = None
    packed: int | None = None
    offset: int | None = None
    disk: int = 0
    extra: bytes = b""
    local_name: bytes | None = None
    local_size: int | None = None
    local_flags: int | None = None
    local_method: int | None = None
    local_extra: bytes = b""
    descriptor: bytes = b""
    before: bytes = b""


def deflate(data: bytes) -> bytes:
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    return engine.compress(data) + engine.flush()


def zipped(
    *items: Item,
    count: int | None = None,
    here: int | None = None,
    length: int | None = None,
    start: int | None = None,
    disk: int = 0,
    comment: bytes = b"",
    comment_length: int | None = None,
    gap: bytes = b"",
    end64: bytes = b"",
    after: bytes = b"",
) -> bytes:
    body = directory = b""
    for item in items:
        raw = item.raw if item.raw is not None else deflate(item.data) if item.method == 8 else item.data
        crc = zlib.crc32(item.data) if item.crc is None else item.crc
        size = len(item.data) if item.size is None else item.size
        packed = len(raw) if item.packed is None else item.packed
        body += item.before
        offset = len(body) if item.offset is None else item.offset
        local_name = item.name if item.local_name is None else item.local_name
        local = (crc, packed, size if item.local_size is None else item.local_size)
        flags = item.flags if item.local_flags is None else item.local_flags
        if flags & 8:
            local = (0, 0, 0)
        body += pack(
            "<4s5H3L2H",
            *(b"PK\3\4", 20, flags, item.method if item.local_method is None else item.local_method, 0, 0),
            *local,
            *(len(local_name), len(item.local_extra)),
        )
        body += local_name + item.local_extra + raw + item.descriptor
        directory += pack(
            "<4s6H3L5H2L",
            *(b"PK\1\2", 0x031E, 20, item.flags, item.method, 0, 0, crc, packed, size, len(item.name)),
            *(len(item.extra), 0, item.disk, 0, item.mode << 16 | item.attributes, offset),
        )
        directory += item.name + item.extra
    body += gap
    end = pack(
        "<4s4H2LH",
        b"PK\5\6",
        *(disk, 0, len(items) if here is None else here, len(items) if count is None else count),
        len(directory) if length is None else length,
        len(body) if start is None else start,
        len(comment) if comment_length is None else comment_length,
    )
    return body + directory + end64 + end + comment + after
