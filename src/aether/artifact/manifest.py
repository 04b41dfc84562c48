"""The manifest of an artifact: every member's path, kind, mode, size and SHA-256, as `pack` writes it.

Read strictly, because the server keeps manifests that strangers send; whether an archive is what its manifest says is
`aether.artifact.inspect`'s business.
"""

import binascii
import json
from base64 import b64decode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from aether.artifact import strictjson
from aether.artifact.headers import MODE_DIRECTORY, MODE_EXECUTABLE, MODE_FILE, MODE_LINK
from aether.artifact.inflate import InvalidArchive
from aether.artifact.reader import clean_name
from aether.artifact.tree import DIRECTORY, FILE, LINK, show
from aether.model.errors import AetherError, BadRequest, DigestMismatch
from aether.model.names import check_digest

MAX_BYTES = 256 << 20
"""Longest manifest that is read: more than half a million members with long names."""
MAX_ENTRIES = 500_000
VERSION = 1
_KINDS = {"file": FILE, "directory": DIRECTORY, "symlink": LINK}
_EXECUTABLE = f"{MODE_EXECUTABLE:04o}"
_MODES = {
    FILE: (f"{MODE_FILE:04o}", _EXECUTABLE),
    DIRECTORY: (f"{MODE_DIRECTORY:04o}",),
    LINK: (f"{MODE_LINK:04o}",),
}
_FIELDS = {
    FILE: frozenset({"path", "type", "mode", "size", "sha256"}),
    DIRECTORY: frozenset({"path", "type", "mode"}),
    LINK: frozenset({"path", "type", "mode", "target"}),
}
_HEX = frozenset("0123456789abcdef")
_NAMES = frozenset({"version", "entries", "files", "tar_bytes", "size_bytes", "content_digest", "digest"})


class Listed(NamedTuple):
    """A member as the manifest lists it; `size` and `sha256` are a file's, `target` a link's."""

    path: bytes
    kind: str
    executable: bool
    size: int
    sha256: str
    target: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that was read; entries are sorted by path, each path once."""

    entries: list[Listed]
    digest: str
    content_digest: str
    size_bytes: int
    tar_bytes: int
    files: int


def _bytes(value: Any, what: str) -> bytes:
    """A name: a text, or {"base64": ...} where its bytes are not UTF-8. Raises BadRequest."""
    if isinstance(value, str):
        try:
            return value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRequest(f"{what} is not text that can be written") from None
    coded = strictjson.an_object(value, what)
    try:
        name = b64decode(strictjson.a_text(coded.get("base64"), what), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{what} is not base64") from None
    if len(coded) != 1 or not _no_text(name):
        raise BadRequest(f"{what} is a text and written as base64, or has more fields than that")
    return name


def _no_text(name: bytes) -> bool:
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def _count(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise BadRequest(f"{what} is not a number of bytes or files")
    return value


def _refuse(path: bytes, what: str) -> NoReturn:
    raise BadRequest(f"'{show(path[:120])}' in the manifest {what}")


def _entry(item: Any) -> Listed:
    what = "an entry of the manifest"
    entry = strictjson.an_object(item, what)
    kind = _KINDS.get(str(entry.get("type")))
    if kind is None or entry.keys() != _FIELDS[kind]:
        raise BadRequest(f"{what} is not that of a file, a directory or a symlink")
    path = _bytes(entry["path"], "the path of an entry of the manifest")
    try:
        if clean_name(path) != path or not path:
            _refuse(path, "is not a clean name")
    except InvalidArchive as error:
        raise BadRequest(f"the manifest: {error.message}") from None
    if entry["mode"] not in _MODES[kind]:
        _refuse(path, "has a mode that archives do not have")
    if kind == FILE:
        size, digest = entry["size"], entry["sha256"]
        if type(size) is not int or size < 0:
            _refuse(path, "has a size that is none")
        if type(digest) is not str or len(digest) != 64 or not _HEX.issuperset(digest):
            _refuse(path, "has no SHA-256 in 64 lower-case hex characters")
        return Listed(path, FILE, entry["mode"] == _EXECUTABLE, size, digest, b"")
    target = _bytes(entry["target"], "the target of a link in the manifest") if kind == LINK else b""
    return Listed(path, kind, True, 0, "", target)


def _entries(items: list[Any]) -> Iterator[Listed]:
    previous = b""
    for item in items:
        entry = _entry(item)
        if entry.path <= previous:
            _refuse(entry.path, "is not in its place, or listed twice")
        previous = entry.path
        yield entry


def read_entries(lines: Iterable[bytes]) -> Iterator[Listed]:
    """The members in lines of a manifest that this program has written itself, in whatever selection.

    `pack` writes a line for each member; lines before and after them are passed over.
    """
    for line in lines:
        if line.startswith(b'{"path":'):
            yield _entry(json.loads(line.rstrip(b",")))


def read(data: bytes) -> Manifest:
    """The manifest in `data`. Raises BadRequest for anything that `pack` would not have written."""
    what = "the manifest"
    if len(data) > MAX_BYTES:
        raise BadRequest(f"{what} is larger than {MAX_BYTES} bytes")
    value = strictjson.an_object(strictjson.read(data, what), what)
    if value.get("version") != VERSION or type(value.get("version")) is not int:
        raise BadRequest(f"{what} is not one of version {VERSION}")
    if value.keys() != _NAMES:
        odd = ", ".join(sorted(name[:40] for name in value.keys() ^ _NAMES))
        raise BadRequest(f"{what} lacks fields, or has others than it should: {odd}")
    items = strictjson.a_list(value["entries"], f"'entries' of {what}")
    if len(items) > MAX_ENTRIES:
        raise BadRequest(f"{what} lists more than {MAX_ENTRIES} members")
    entries = list(_entries(items))
    files = _count(value["files"], f"'files' of {what}")
    if files != sum(entry.kind == FILE for entry in entries):
        raise BadRequest(f"{what} says {files} files and lists another number")
    tar_bytes = _count(value["tar_bytes"], f"'tar_bytes' of {what}")
    if tar_bytes < sum(entry.size for entry in entries):
        raise BadRequest(f"{what} lists more bytes than the archive has")
    digests: list[str] = []
    for name in ("digest", "content_digest"):
        try:
            digests.append(check_digest(strictjson.a_text(value[name], f"'{name}'")))
        except AetherError as error:
            raise BadRequest(f"'{name}' of {what}: {error.message}") from None
    size_bytes = _count(value["size_bytes"], f"'size_bytes' of {what}")
    return Manifest(entries, digests[0], digests[1], size_bytes, tar_bytes, files)


def check(data: bytes, digest: str) -> Manifest:
    """The manifest in `data` if it is that of the artifact `digest`. Raises BadRequest, DigestMismatch."""
    found = read(data)
    if found.digest != digest:
        raise DigestMismatch(f"the manifest is that of {found.digest}, not that of {digest}")
    return found
