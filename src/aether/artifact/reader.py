"""A strict reader of tar streams: members one after the other, every name checked, nothing written.

Reads POSIX ustar with pax records and GNU long names. Only regular files, directories and symbolic links are let
through. Where members go on disk is `extract`'s business.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple
from zlib import adler32

from aether.artifact.headers import BLOCK
from aether.artifact.inflate import InvalidArchive
from aether.artifact.tree import DIRECTORY, FILE, LINK, show

_MAX_META = 1 << 20
_MAX_NAME, _MAX_PART, _MAX_DEPTH = 4095, 255, 128
_KINDS = {b"0": FILE, b"\0": FILE, b"7": FILE, b"5": DIRECTORY, b"2": LINK}
_REFUSED = {b"1": "a hard link", b"3": "a device", b"4": "a device", b"6": "a named pipe", b"S": "a sparse file"}


class Member(NamedTuple):
    """A member of an archive; `size` bytes of content follow and must be consumed. `target` is a link's."""

    name: bytes
    kind: str
    executable: bool
    size: int
    target: bytes


class Pieces:
    """Bytes drawn from an iterator of pieces, in the amounts asked for."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._view = memoryview(b"")
        self.given = 0

    def _more(self) -> bool:
        piece = next(self._pieces, None)
        if piece is None:
            return False
        self._view = memoryview(piece)
        return True

    def take(self, size: int) -> bytes:
        """Exactly `size` bytes; raises InvalidArchive when the stream ends before."""
        view = self._view
        if len(view) >= size:
            self._view = view[size:]
            return bytes(view[:size])
        parts: list[bytes] = []
        self.each(size, lambda part: parts.append(bytes(part)))
        return b"".join(parts)

    def each(self, size: int, use: Callable[[memoryview], object]) -> None:
        """Hand `size` bytes to `use` as they lie, in one or several calls."""
        while size:
            if not self._view and not self._more():
                raise InvalidArchive("the archive is truncated")
            part = self._view[:size]
            self._view = self._view[len(part) :]
            size -= len(part)
            use(part)

    def rest(self) -> Iterator[memoryview]:
        """What is left of the stream."""
        while self._view or self._more():
            view, self._view = self._view, memoryview(b"")
            yield view


def _number(field: bytes, what: str) -> int:
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits else 0
    except ValueError as error:
        raise InvalidArchive(f"the archive is damaged: a header's {what} is not a number") from error


def _check_sum(header: bytes) -> None:
    if header.isascii():
        total = (adler32(header[:148], 0) & 0xFFFF) + (adler32(header[156:], 0) & 0xFFFF) + 256
    else:
        total = sum(header) - sum(header[148:156]) + 256
    if total != _number(header[148:156], "checksum"):
        raise InvalidArchive("the archive is damaged: a header's checksum is wrong")


def clean_name(raw: bytes) -> bytes:
    """`raw` without a leading './' and trailing '/'; empty for the root. Raises InvalidArchive if it leads out."""
    if raw.startswith(b"/"):
        raise InvalidArchive(f"'{show(raw)}' is an absolute name")
    name = raw.rstrip(b"/")
    while name.startswith(b"./"):
        name = name[2:].lstrip(b"/")
    if name in (b".", b""):
        if not raw:
            raise InvalidArchive("a member has no name")
        return b""
    if len(name) > _MAX_NAME or b"\0" in name or name.count(b"/") > _MAX_DEPTH:
        raise InvalidArchive(f"'{show(name[:80])}' cannot be a file name")
    if b"//" in name or b"." in name:
        for part in name.split(b"/"):
            if part in (b"", b".", b".."):
                raise InvalidArchive(f"'{show(raw)}' leads out of the folder it is unpacked in")
    if len(name) > _MAX_PART and max(map(len, name.split(b"/"))) > _MAX_PART:
        raise InvalidArchive(f"'{show(name[:80])}' cannot be a file name")
    return name


def _pax(body: bytes) -> dict[bytes, bytes]:
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(body):
        space = body.find(b" ", at, at + 20)
        digits = body[at:space] if space > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        record = body[space + 1 : at + length]
        key, equals, value = record[:-1].partition(b"=")
        if length <= space - at + 2 or at + length > len(body) or not equals or record[-1:] != b"\n":
            raise InvalidArchive("the archive is damaged: an extended header cannot be read")
        records[key] = value
        at += length
    return records


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def members(stream: Pieces) -> Iterator[Member]:
    """Members in order; before the next one is asked for, the content and padding of this one must be consumed.

    Raises InvalidArchive. Returns after the end blocks were seen and only zeros followed.
    """
    extra: dict[bytes, bytes] = {}
    while True:
        header = stream.take(BLOCK)
        if not header.rstrip(b"\0"):
            break
        _check_sum(header)
        if header[257:262] != b"ustar":
            raise InvalidArchive("the archive is damaged: a header is not a tar header")
        size = _number(header[124:136], "size")
        kind = header[156:157]
        if kind in (b"x", b"g", b"L", b"K"):
            if size > _MAX_META:
                raise InvalidArchive("an extended header is unreasonably long")
            body = stream.take(size)
            stream.take(-size % BLOCK)
            if kind == b"x":
                extra.update(_pax(body))
            elif kind != b"g":
                extra[b"path" if kind == b"L" else b"linkpath"] = body.rstrip(b"\0")
            elif {b"path", b"linkpath", b"size"} & _pax(body).keys():
                raise InvalidArchive("the archive sets names for all its members at once")
            continue
        name = _text(header[:100])
        if header[262:263] == b"\0" and header[345:346] != b"\0":
            name = _text(header[345:500]) + b"/" + name
        target = _text(header[157:257])
        if extra:
            name = extra.get(b"path", name)
            target = extra.get(b"linkpath", target)
            size = _size(extra, size)
            extra = {}
        what = _KINDS.get(kind)
        if what is None:
            raise InvalidArchive(f"'{show(name)}' is {_REFUSED.get(kind, 'of an unknown kind')}")
        if what == FILE and name.endswith(b"/"):
            what = DIRECTORY
        if what != FILE and size:
            raise InvalidArchive(f"'{show(name)}' is not a file and yet has content")
        yield Member(clean_name(name), what, bool(_number(header[100:108], "mode") & 0o111), size, target)
    if stream.take(BLOCK).rstrip(b"\0"):
        raise InvalidArchive("the archive is damaged: its end is not marked")
    for view in stream.rest():
        if bytes(view).rstrip(b"\0"):
            raise InvalidArchive("the archive is followed by bytes that do not belong to it")


def _size(extra: dict[bytes, bytes], size: int) -> int:
    text = extra.get(b"size")
    if text is None:
        return size
    if not text.isdigit() or len(text) > 18:
        raise InvalidArchive("the archive is damaged: an extended header's size is not a number")
    return int(text)
