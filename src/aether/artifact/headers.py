"""Tar headers built by hand: POSIX ustar, with pax extended headers (POSIX.1-2001) where a field does not fit.

Everything that differs between machines is fixed: owner 0:0, no names, one modification time, three modes.
"""

from zlib import adler32

BLOCK = 512
FIXED_MTIME = 315532801
"""1980-01-01 00:00:01 UTC; zero would make GNU tar warn of implausibly old files."""

MODE_FILE, MODE_EXECUTABLE, MODE_DIRECTORY, MODE_LINK = 0o644, 0o755, 0o755, 0o777
TYPE_FILE, TYPE_LINK, TYPE_DIRECTORY, TYPE_PAX = b"0", b"2", b"5", b"x"

END = bytes(2 * BLOCK)
"""The two empty blocks that end an archive."""

_NAME, _PREFIX, _LINK = 100, 155, 100
_MAX_OCTAL_SIZE = 1 << 33
_OWNERS = b"0000000\0" * 2
_MTIME = b"%011o\0" % FIXED_MTIME
_BEFORE_PREFIX = b"ustar\x0000" + bytes(64) + b"0000000\0" * 2
_NO_PREFIX = bytes(_PREFIX + 12)
_NO_LINK = bytes(_LINK)
_MODES = {mode: b"%07o\0" % mode + _OWNERS for mode in (MODE_FILE, MODE_EXECUTABLE, MODE_LINK)}
_FILE_TAIL = _MTIME + b"        " + TYPE_FILE + _NO_LINK + _BEFORE_PREFIX + _NO_PREFIX


def _finish(header: bytes) -> bytes:
    # Adler-32 started at zero keeps the plain sum of the bytes in its low half (RFC 1950), modulo 65521;
    # only a header full of high bytes can reach that, and it takes the slow road.
    total = adler32(header, 0) & 0xFFFF if header.isascii() else sum(header)
    return header[:148] + b"%06o\0 " % total + header[156:]


def _split(name: bytes) -> tuple[bytes, bytes] | None:
    """`name` as ustar's (name, prefix), or None when no '/' divides it into fitting parts."""
    if len(name) <= _NAME:
        return name, b""
    cut = name.rfind(b"/", 0, _PREFIX + 1) if len(name) > _PREFIX else name.rfind(b"/", 0, len(name) - 1)
    if cut <= 0 or len(name) - cut - 1 > _NAME:
        return None
    return name[cut + 1 :], name[:cut]


def _header(name: bytes, prefix: bytes, mode: int, size: int, kind: bytes, target: bytes) -> bytes:
    return _finish(
        name.ljust(_NAME, b"\0")
        + _MODES[mode]
        + b"%011o\0" % size
        + _MTIME
        + b"        "
        + kind
        + target.ljust(_LINK, b"\0")
        + _BEFORE_PREFIX
        + prefix.ljust(_PREFIX, b"\0")
        + bytes(12)
    )


def _record(key: bytes, value: bytes) -> bytes:
    """One pax record, "LENGTH key=value\\n", where LENGTH counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if rest + len(str(length)) != length:
        length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)


def padding(size: int) -> int:
    """Zero bytes that follow `size` bytes of content up to the next block."""
    return -size % BLOCK


def header(name: bytes, mode: int, size: int, kind: bytes, target: bytes = b"") -> bytes:
    """The header block(s) of one member; `name` of a directory ends with '/', `target` is a link's."""
    split = _split(name)
    if split is not None and size < _MAX_OCTAL_SIZE and len(target) <= _LINK:
        return _header(split[0], split[1], mode, size, kind, target)
    # names that are not UTF-8 stand here as they are: the record that would announce them (hdrcharset) is one that
    # GNU tar warns of, and readers take the bytes without it
    records: list[bytes] = []
    if len(target) > _LINK:
        records.append(_record(b"linkpath", target))
    if split is None:
        records.append(_record(b"path", name))
    if size >= _MAX_OCTAL_SIZE:
        records.append(_record(b"size", b"%d" % size))
    body = b"".join(records)
    short = split or (name[:_NAME].rstrip(b"/"), b"")
    return b"".join(
        (
            _header(b"././@PaxHeader", b"", MODE_FILE, len(body), TYPE_PAX, b""),
            body,
            bytes(padding(len(body))),
            _header(short[0], short[1], mode, size if size < _MAX_OCTAL_SIZE else 0, kind, target[:_LINK]),
        )
    )


def file_header(name: bytes, mode: int, size: int) -> bytes:
    """`header` of a regular file, with a short way for the common one."""
    if len(name) <= _NAME and size < _MAX_OCTAL_SIZE:
        return _finish(name.ljust(_NAME, b"\0") + _MODES[mode] + b"%011o\0" % size + _FILE_TAIL)
    return header(name, mode, size, TYPE_FILE)
