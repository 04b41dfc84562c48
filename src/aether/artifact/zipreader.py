"""A strict reader of zip archives (PKWARE APPNOTE 6.3.10): what is in one, agreed on by every record that says so.

Zip tells everything twice, in the central directory and before each content, and programs differ in whom they
believe. Here the two must agree, and every byte of the file must belong to exactly one record, so that no two readers
can see two archives in one file and no content can be counted twice. Files and folders only, stored or deflated.
Putting them on disk is `unzip`'s business.
"""

import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct, error
from typing import BinaryIO, NamedTuple

from aether.artifact.inflate import InvalidArchive
from aether.artifact.reader import Member, clean_name
from aether.artifact.tree import DIRECTORY, FILE, show

_END = Struct("<4s4H2LH")
_END64_PLACE = Struct("<4sLQL")
_END64 = Struct("<4sQ2H2L4Q")
_CENTRAL = Struct("<4s6H3L5H2L")
_LOCAL = Struct("<4s5H3L2H")
_EXTRA = Struct("<2H")
_MAX_COMMENT = 0xFFFF
_MAX_DIRECTORY = 256 << 20
_ALL16, _ALL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _DESCRIBED, _UTF8 = 0x1 | 0x40 | 0x2000, 0x8, 0x800
_KNOWN_FLAGS = 0x6 | _DESCRIBED | _UTF8
_NEWEST_VERSION = 63
"""Of the format, in tenths (APPNOTE 6.3); the low byte of what an entry says it needs."""
_STORED, _DEFLATED = 0, 8
_EXTRA_ZIP64, _EXTRA_NAME = 0x0001, 0x7075
_DOS_FOLDER = 0x10
_READ = _OUT = 1 << 18


@dataclass(frozen=True, slots=True)
class Packed:
    """One member and where its content lies: `packed` bytes from `start`; `crc` is of what they inflate to."""

    member: Member
    method: int
    crc: int
    packed: int
    start: int


class _Record(NamedTuple):
    """What the central directory says of a member."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int
    attributes: int


def entries(source: BinaryIO, *, max_entries: int) -> list[Packed]:
    """The members of the zip archive in `source`, a file that can be read anywhere, in the order of its directory.

    Raises InvalidArchive. Contents are not read: `content` does, and checks them.
    """
    size = source.seek(0, os.SEEK_END)
    count, start, length = _directory(source, size)
    if count > max_entries:
        raise InvalidArchive(f"the archive has more than {max_entries} members")
    body = _at(source, start, length)
    records: list[_Record] = []
    at = 0
    for _ in range(count):
        record, at = _central(body, at)
        records.append(record)
    if at != length:
        raise InvalidArchive("the archive's directory holds more than it says")
    return _placed(source, records, start)


def content(source: BinaryIO, entry: Packed) -> Iterator[bytes]:
    """The bytes of `entry`, in pieces of at most 256 KiB: read to the end before believing any of it.

    Raises InvalidArchive when size or checksum are not as told, at the latest at the end.
    """
    name, left, crc, given = entry.member.name, entry.packed, 0, 0
    stored = entry.method == _STORED
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    source.seek(entry.start)
    held = b""
    while True:
        if not held and left:
            held = source.read(min(left, _READ))
            if not held:
                raise InvalidArchive("the archive is truncated")
            left -= len(held)
        if stored:
            piece, held = held, b""
        else:
            try:
                piece = engine.decompress(held, _OUT)
            except zlib.error as problem:
                raise InvalidArchive(f"the archive is damaged: {problem}") from problem
            held = engine.unconsumed_tail
            if engine.eof and (left or engine.unused_data):
                raise InvalidArchive(f"'{show(name)}' does not end where the archive says")
        given += len(piece)
        if given > entry.member.size:
            raise InvalidArchive(f"'{show(name)}' is longer than the archive says")
        crc = zlib.crc32(piece, crc)
        if piece:
            yield piece
        if not held and not left and (stored or engine.eof or not piece):
            break
    if not stored and not engine.eof:
        raise InvalidArchive(f"'{show(name)}' does not end where the archive says")
    if given != entry.member.size:
        raise InvalidArchive(f"'{show(name)}' is shorter than the archive says")
    if crc != entry.crc:
        raise InvalidArchive(f"'{show(name)}' has the wrong checksum")


# --- the end, which says where the directory is -------------------------------------------------------------------


def _directory(source: BinaryIO, size: int) -> tuple[int, int, int]:
    """How many members the archive has, and where its directory begins and how long it is."""
    tail_at = max(0, size - _END.size - _MAX_COMMENT)
    tail = _at(source, tail_at, size - tail_at)
    found = [at for at in _places(tail, b"PK\5\6") if _comment_fits(tail, at)]
    if not found:
        raise InvalidArchive("the archive is not a zip file, or is truncated")
    if len(found) > 1:
        raise InvalidArchive("the archive ends in two ways")
    _, disk, first_disk, here, count, length, start, _ = _END.unpack_from(tail, found[0])
    if disk or first_disk or here != count:
        raise InvalidArchive("the archive is one of several parts")
    end = tail_at + found[0]
    place = _at(source, end - _END64_PLACE.size, _END64_PLACE.size) if end >= _END64_PLACE.size else b""
    if place.startswith(b"PK\6\7"):
        told = (count, length, start)
        count, length, start, end = _directory64(source, place, end - _END64_PLACE.size)
        for short, full, limit in zip(told, (count, length, start), (_ALL16, _ALL32, _ALL32), strict=True):
            if short not in (full, limit):
                raise InvalidArchive("the archive's two ends do not agree")
    elif count == _ALL16 or _ALL32 in (length, start):
        raise InvalidArchive("the archive points to a zip64 record that is not there")
    if start + length != end:
        raise InvalidArchive("the archive's directory is not where the archive says")
    if length > _MAX_DIRECTORY:
        raise InvalidArchive("the archive's directory is unreasonably long")
    return count, start, length


def _directory64(source: BinaryIO, place: bytes, place_at: int) -> tuple[int, int, int, int]:
    """The same from the zip64 record: members, begin and length of the directory, and where the record begins."""
    _, disk, at, disks = _END64_PLACE.unpack(place)
    if disk or disks != 1:
        raise InvalidArchive("the archive is one of several parts")
    if at + _END64.size != place_at:
        raise InvalidArchive("the archive's zip64 record is not where the archive says")
    signature, length, _, _, disk, first, here, count, size, start = _END64.unpack(_at(source, at, _END64.size))
    if signature != b"PK\6\6" or length != _END64.size - 12 or disk or first or here != count:
        raise InvalidArchive("the archive's zip64 record is damaged")
    return count, size, start, at


def _comment_fits(tail: bytes, at: int) -> bool:
    """Whether the record at `at` says of its comment that it ends where the file ends."""
    length = int.from_bytes(tail[at + _END.size - 2 : at + _END.size], "little")
    return at + _END.size + length == len(tail)


def _places(text: bytes, what: bytes) -> Iterator[int]:
    at = text.find(what)
    while at >= 0:
        yield at
        at = text.find(what, at + 1)


# --- the directory ------------------------------------------------------------------------------------------------


def _central(body: bytes, at: int) -> tuple[_Record, int]:
    """The record of the directory at `at`, and where the next one begins."""
    try:
        (mark, _, needed, flags, method, _, _, crc, packed, size, name_len, extra_len, note_len, disk, _, attributes,
         offset) = _CENTRAL.unpack_from(body, at)  # fmt: skip
    except error as problem:
        raise InvalidArchive("the archive's directory is cut off") from problem
    after = at + _CENTRAL.size + name_len + extra_len + note_len
    if mark != b"PK\1\2" or after > len(body):
        raise InvalidArchive("the archive's directory is damaged")
    name_at = at + _CENTRAL.size
    name = body[name_at : name_at + name_len]
    extra = _extra(body[name_at + name_len : name_at + name_len + extra_len], name)
    wide = iter(_wide(extra, [size, packed, offset], name))
    size = next(wide) if size == _ALL32 else size
    packed = next(wide) if packed == _ALL32 else packed
    offset = next(wide) if offset == _ALL32 else offset
    if disk:
        raise InvalidArchive("the archive is one of several parts")
    if flags & _ENCRYPTED:
        raise InvalidArchive(f"'{show(name)}' is encrypted")
    if flags & ~_KNOWN_FLAGS or needed & 0xFF > _NEWEST_VERSION:
        raise InvalidArchive(f"'{show(name)}' needs a way of packing that is not known here")
    if method not in (_STORED, _DEFLATED):
        raise InvalidArchive(f"'{show(name)}' is neither stored nor deflated")
    if method == _STORED and packed != size:
        raise InvalidArchive(f"'{show(name)}' has two sizes")
    return _Record(name, flags, method, crc, packed, size, offset, attributes), after


def _extra(field: bytes, name: bytes) -> dict[int, bytes]:
    """The extra fields by their number. Some writers pad with up to three zero bytes."""
    found: dict[int, bytes] = {}
    at = 0
    while len(field) - at >= _EXTRA.size:
        kind, length = _EXTRA.unpack_from(field, at)
        at += _EXTRA.size
        if at + length > len(field) or kind in found:
            raise InvalidArchive(f"'{show(name)}' has an extra field that cannot be read")
        found[kind] = field[at : at + length]
        at += length
    if field[at:].strip(b"\0"):
        raise InvalidArchive(f"'{show(name)}' has an extra field that cannot be read")
    if (other := found.get(_EXTRA_NAME)) is not None and other[5:] != name:
        raise InvalidArchive(f"'{show(name)}' has two names")
    return found


def _wide(extra: dict[int, bytes], fields: list[int], name: bytes) -> list[int]:
    """The 64-bit values that stand in for those of `fields` that are all ones; no more and no fewer may be there."""
    field = extra.get(_EXTRA_ZIP64)
    wanted = sum(value == _ALL32 for value in fields)
    if field is None:
        if wanted:
            raise InvalidArchive(f"'{show(name)}' points to a zip64 field that is not there")
        return []
    if len(field) != 8 * wanted:
        raise InvalidArchive(f"'{show(name)}' has a zip64 field of the wrong length")
    return [int.from_bytes(field[at : at + 8], "little") for at in range(0, len(field), 8)]


# --- the members --------------------------------------------------------------------------------------------------


def _placed(source: BinaryIO, records: list[_Record], end: int) -> list[Packed]:
    """The members of `records`, whose contents must fill the file up to `end` without a gap or an overlap."""
    found: dict[int, Packed] = {}
    at = 0
    for record in sorted(records, key=lambda record: record.offset):
        if record.offset < at:
            raise InvalidArchive(f"'{show(record.name)}' overlaps another member")
        if record.offset > at:
            raise InvalidArchive("the archive holds bytes that belong to no member")
        start = _local(source, record, end)
        if start + record.packed > end:
            raise InvalidArchive(f"'{show(record.name)}' reaches beyond the archive")
        found[record.offset] = Packed(_member(record), record.method, record.crc, record.packed, start)
        at = start + record.packed
        if record.flags & _DESCRIBED:
            at += _descriptor(source, record, at, end)
    if at != end:
        raise InvalidArchive("the archive holds bytes that belong to no member")
    return [found[record.offset] for record in records]


def _local(source: BinaryIO, record: _Record, end: int) -> int:
    """Where the content of `record` begins; what stands before it must say the same as the directory."""
    if record.offset + _LOCAL.size > end:
        raise InvalidArchive(f"'{show(record.name)}' reaches beyond the archive")
    mark, _, flags, method, _, _, crc, packed, size, name_len, extra_len = _LOCAL.unpack(
        _at(source, record.offset, _LOCAL.size)
    )
    start = record.offset + _LOCAL.size + name_len + extra_len
    if mark != b"PK\3\4" or start > end:
        raise InvalidArchive(f"'{show(record.name)}' is not where the archive's directory says")
    tail = _at(source, record.offset + _LOCAL.size, name_len + extra_len)
    name = tail[:name_len]
    extra = _extra(tail[name_len:], record.name)
    if (name, flags, method) != (record.name, record.flags, record.method):
        raise InvalidArchive(f"'{show(record.name)}' is '{show(name)}' or packed otherwise in another place")
    if flags & _DESCRIBED:
        # what is described behind the content may be missing here, but it may not be another
        same = crc in (0, record.crc) and size in (0, _ALL32, record.size) and packed in (0, _ALL32, record.packed)
        if not same:
            raise InvalidArchive(f"'{show(record.name)}' has two sizes")
        return start
    wide = iter(_wide(extra, [size, packed], record.name))
    size = next(wide) if size == _ALL32 else size
    packed = next(wide) if packed == _ALL32 else packed
    if (crc, packed, size) != (record.crc, record.packed, record.size):
        raise InvalidArchive(f"'{show(record.name)}' has two sizes")
    return start


def _descriptor(source: BinaryIO, record: _Record, at: int, end: int) -> int:
    """How long the description behind the content of `record` is: with or without a mark, of 32 or 64 bits."""
    body = _at(source, at, min(24, end - at))
    for mark in (b"PK\7\x08", b""):
        for width in (4, 8):
            told = mark + record.crc.to_bytes(4, "little")
            if record.packed < 1 << 8 * width and record.size < 1 << 8 * width:
                told += record.packed.to_bytes(width, "little") + record.size.to_bytes(width, "little")
                if body.startswith(told) and _follows(source, at + len(told), end):
                    return len(told)
    raise InvalidArchive(f"'{show(record.name)}' has two sizes")


def _follows(source: BinaryIO, at: int, end: int) -> bool:
    """Whether another member, or the directory, begins at `at`."""
    return at == end or (at + 4 <= end and _at(source, at, 4) == b"PK\3\4")


def _member(record: _Record) -> Member:
    name = record.name
    if b"\\" in name:
        raise InvalidArchive(f"'{show(name)}' has a backslash in its name")
    try:
        name.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise InvalidArchive(f"'{show(name)}' is not UTF-8") from problem
    mode = record.attributes >> 16
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFLNK:
        raise InvalidArchive(f"'{show(name)}' is a link; only files and folders are taken")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise InvalidArchive(f"'{show(name)}' is neither a file nor a folder")
    folder = name.endswith(b"/")
    if (folder == (kind == stat.S_IFREG) and kind) or (record.attributes & _DOS_FOLDER and not folder):
        raise InvalidArchive(f"'{show(name)}' is a file by its name and a folder by its kind, or the other way round")
    if folder and record.size:
        raise InvalidArchive(f"'{show(name)}' is not a file and yet has content")
    clean = clean_name(name)
    if not clean and not folder:
        raise InvalidArchive("a member has no name")
    return Member(clean, DIRECTORY if folder else FILE, bool(mode & 0o111), record.size, b"")


def _at(source: BinaryIO, offset: int, length: int) -> bytes:
    source.seek(offset)
    data = source.read(length)
    if len(data) != length:
        raise InvalidArchive("the archive is truncated")
    return data
