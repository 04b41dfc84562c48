"""Reading a whole artifact without unpacking it: both digests, and every member with the SHA-256 of its content.

Only what an extraction would accept is read to its end (`reader`, `links`); nothing is written. What the members
should be is left to `verification`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, cast

from aether.artifact.extract import ExtractLimits
from aether.artifact.headers import BLOCK
from aether.artifact.inflate import ArchiveTooLarge, InvalidArchive, inflate
from aether.artifact.links import escapes
from aether.artifact.manifest import Listed
from aether.artifact.reader import Pieces, members
from aether.artifact.tree import FILE, LINK, show
from aether.model.errors import BadRequest, LocalIOError

_READ = 1 << 20
_KEPT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found in an artifact. `broken` says why its end was not reached; then only `digest` holds."""

    digest: str
    size_bytes: int
    content_digest: str
    members: dict[bytes, Listed]
    kept: dict[bytes, bytes]
    """Contents of the files that were asked for."""
    broken: str | None = None


class _Counted:
    """A file that is hashed as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hashed = sha256()
        self.size = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._hashed.update(data)
        self.size += len(data)
        return data

    def finish(self) -> str:
        """Read what is left; returns the digest of it all."""
        while self.read(_READ):
            pass
        return self._hashed.hexdigest()


def inspect(path: Path, keep: Callable[[bytes], bool], limits: ExtractLimits | None = None) -> Seen:
    """Read the artifact `path`; contents of files whose name `keep` accepts are kept. Raises LocalIOError."""
    try:
        with path.open("rb", buffering=0) as file:
            source = _Counted(file)
            return _inspect(source, keep, limits or ExtractLimits())
    except OSError as error:
        raise LocalIOError(f"cannot read {path}: {error.strerror}") from error


def _inspect(source: _Counted, keep: Callable[[bytes], bool], limits: ExtractLimits) -> Seen:
    tar = sha256()
    found: dict[bytes, Listed] = {}
    kept: dict[bytes, bytes] = {}
    broken: str | None = None

    def pieces() -> Iterator[bytes]:
        for piece in inflate(cast(BinaryIO, source), max_bytes=limits.max_bytes, max_ratio=limits.max_ratio):
            tar.update(piece)
            yield piece

    try:
        _read_members(Pieces(pieces()), keep, limits, found, kept)
    except BadRequest as error:
        broken = error.message
    return Seen(source.finish(), source.size, tar.hexdigest(), found, kept, broken)


def _read_members(
    stream: Pieces,
    keep: Callable[[bytes], bool],
    limits: ExtractLimits,
    found: dict[bytes, Listed],
    kept: dict[bytes, bytes],
) -> None:
    kept_bytes = 0
    for member in members(stream):
        if not member.name:
            continue
        if member.name in found:
            raise InvalidArchive(f"'{show(member.name)}' is in the archive twice")
        if len(found) >= limits.max_entries:
            raise ArchiveTooLarge(f"the archive has more than {limits.max_entries} members")
        digest = ""
        if member.kind == FILE:
            hashed = sha256()
            if keep(member.name) and kept_bytes + member.size <= _KEPT_BYTES:
                kept[member.name] = content = stream.take(member.size)
                kept_bytes += member.size
                hashed.update(content)
            else:
                stream.each(member.size, hashed.update)
            stream.take(-member.size % BLOCK)
            digest = hashed.hexdigest()
        executable = member.executable or member.kind != FILE
        target = member.target if member.kind == LINK else b""
        found[member.name] = Listed(member.name, member.kind, executable, member.size, digest, target)
    links = {name: one.target for name, one in found.items() if one.kind == LINK}
    for name, target in links.items():
        if escapes(name, target, links):
            raise InvalidArchive(f"'{show(name)}' links to '{show(target)}', outside of the archive")
