"""Packing a tree into an artifact in one pass: tar, both digests, the manifest and the compressed bytes.

The calling thread reads files into reused buffers and hashes each one where it lies; worker threads hash the tar and
compress whole segments. Only the caller runs much Python, so the interpreter lock is seldom fought over.
Segments end at places that depend on names and on offsets within large files, never on what was packed before them
elsewhere; each is a gzip member of its own, and their concatenation is an ordinary `.tar.gz`.

What is packed is decided by the caller (`aether.build`); headers are made in `headers`, links judged in `links`.
"""

import os
import stat
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import NoReturn, TextIO
from zlib import crc32

from aether.artifact import headers
from aether.artifact.links import escapes
from aether.artifact.pipeline import CAPACITY, Pipeline
from aether.artifact.prefetch import Prefetch
from aether.artifact.tree import DIRECTORY, FILE, LINK, Entry, show
from aether.model.errors import ConfigError, LocalIOError

SEGMENT_MIN = 256 << 10
"""Bytes of tar before a segment may end at a file's name."""
SEGMENT_CUT = 512 << 10
"""Large files are cut every so many bytes, counted from their own header."""
_NAME_MASK = 31
_NO_FOLLOW = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_EVERY = 256
"""Entries between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A written artifact. Sizes are bytes; digests are 64 lower-case hex characters; `files` counts regular files."""

    artifact: Path
    manifest: Path
    digest: str
    content_digest: str
    size_bytes: int
    tar_bytes: int
    files: int


def pack(
    entries: Sequence[Entry],
    out_dir: Path,
    *,
    level: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write `app-<digest>.tar.gz` and `app-<digest>.manifest.json` into `out_dir`, which is made if absent.

    `level` 0 to 3 is ISA-L's, 4 to 9 zlib's (slower, smaller). `progress(done, total)` counts entries.
    Folders that entries live in are added when missing. Both files appear complete or not at all.

    Raises ConfigError for names and links that may not be packed, LocalIOError when a file cannot be read, changes
    while it is read, or the artifact cannot be written (a full disk leaves nothing behind).
    """
    members, targets = _prepare(entries)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalIOError(f"cannot make folder {out_dir}: {error.strerror}") from error
    part = out_dir / f".pack-{os.getpid()}-{os.urandom(4).hex()}.part"
    listing = part.with_suffix(".json.part")
    try:
        with part.open("xb", buffering=0) as out, listing.open("x", encoding="ascii", newline="\n") as listed:
            files, pipeline = _write(out, listed, members, targets, level, progress)
        digest, content_digest = pipeline.digest, pipeline.content_digest
        artifact = out_dir / f"app-{digest}.tar.gz"
        manifest = out_dir / f"app-{digest}.manifest.json"
        listing.rename(manifest)
        part.rename(artifact)
    except OSError as error:
        raise LocalIOError(f"cannot write the artifact into {out_dir}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
        listing.unlink(missing_ok=True)
    return Packed(artifact, manifest, digest, content_digest, pipeline.size_bytes, pipeline.tar_bytes, files)


def _prepare(entries: Sequence[Entry]) -> tuple[list[Entry], dict[bytes, bytes]]:
    """Entries by name with missing folders added, and the targets of links, all of them safe."""
    members = sorted(entries)
    folders = {b""}
    missing: list[Entry] = []
    targets: dict[bytes, bytes] = {}
    previous = b""
    for name, source, kind in members:
        if name == previous or not name:
            raise ConfigError(f"'{show(name)}' would be packed twice")
        previous = name
        if kind == DIRECTORY:
            folders.add(name)
        elif kind == LINK:
            try:
                targets[name] = os.readlink(source)
            except OSError as error:
                _cannot_read(name, error)
        parent = name.rpartition(b"/")[0]
        while parent not in folders:
            folders.add(parent)
            missing.append(Entry(parent, b"", DIRECTORY))
            parent = parent.rpartition(b"/")[0]
    if missing:
        _check_parents(missing, members)
        members = sorted(members + missing)
    for part in {part for folder in folders for part in folder.split(b"/")} & {b"..", b"."}:
        raise ConfigError(f"a name with '{show(part)}' in it cannot be packed")
    for name, target in targets.items():
        if escapes(name, target, targets):
            raise ConfigError(
                f"'{show(name)}' links to '{show(target)}', outside of what is packed: "
                "make it a relative link inside the project, copy the file, or list it in .aetherignore"
            )
    return members, targets


def _check_parents(missing: list[Entry], members: list[Entry]) -> None:
    taken = {name for name, _, kind in members if kind != DIRECTORY}
    for name, _, _ in missing:
        if name in taken:
            raise ConfigError(f"'{show(name)}' would be packed as a file and as a folder")


def _cannot_read(name: bytes, error: OSError) -> NoReturn:
    raise LocalIOError(f"cannot read '{show(name)}': {error.strerror}") from error


def _changed(name: bytes) -> NoReturn:
    raise LocalIOError(f"'{show(name)}' changed while it was read: stop what writes to it and try again")


def _write(
    out: FileIO,
    listed: TextIO,
    members: list[Entry],
    targets: dict[bytes, bytes],
    level: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, Pipeline]:
    """Write the artifact and its manifest and have both on disk; returns the number of files and the digests."""
    lines: list[str] = []
    files = 0
    total = len(members)
    listed.write('{"version":1,"entries":[')
    between = "\n"
    with Pipeline(out, level) as pipeline, Prefetch(members) as prefetch:
        reader = _Reader(pipeline)
        for index, (name, source, kind) in enumerate(members):
            if index % _EVERY == 0:
                prefetch.reached(index)
                if progress is not None:
                    progress(index, total)
                if lines:
                    listed.write(between + ",\n".join(lines))
                    lines.clear()
                    between = ",\n"
            if kind == FILE:
                lines.append(reader.file(name, source))
                files += 1
            elif kind == DIRECTORY:
                reader.put(name, headers.header(name + b"/", headers.MODE_DIRECTORY, 0, headers.TYPE_DIRECTORY))
                lines.append(f'{{"path":{_json(name)},"type":"directory","mode":"0755"}}')
            else:
                target = targets[name]
                reader.put(name, headers.header(name, headers.MODE_LINK, 0, headers.TYPE_LINK, target))
                lines.append(f'{{"path":{_json(name)},"type":"symlink","mode":"0777","target":{_json(target)}}}')
        reader.end()
        listed.write(
            (between if lines else "") + ",\n".join(lines) + f'\n],"files":{files},"tar_bytes":{pipeline.tar_bytes},'
            f'"size_bytes":{pipeline.size_bytes},"content_digest":"{pipeline.content_digest}",'
            f'"digest":"{pipeline.digest}"}}\n'
        )
        listed.flush()
        os.fsync(listed.fileno())
        pipeline.flush()
        if progress is not None:
            progress(total, total)
    return files, pipeline


class _Reader:
    """Lays headers and contents into segments and decides where a segment ends."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._view, self._at = pipeline.buffer(), 0

    def _cut(self) -> None:
        self._view, self._at = self._pipeline.submit(self._at), 0

    def put(self, name: bytes, block: bytes) -> None:
        """Append a member without content."""
        self._make_room(name, len(block))
        at = self._at
        end = self._at = at + len(block)
        self._view[at:end] = block

    def end(self) -> None:
        """Append the end of the archive and wait until everything is written."""
        self.put(b"", headers.END)
        self._pipeline.finish(self._at)

    def _make_room(self, name: bytes, size: int) -> None:
        at = self._at
        if at + size > CAPACITY or (at >= SEGMENT_MIN and not crc32(name) & _NAME_MASK):
            self._cut()

    def file(self, name: bytes, source: bytes) -> str:
        """Append a regular file and return its line of the manifest."""
        try:
            fd = os.open(source, _NO_FOLLOW)
        except OSError as error:
            _cannot_read(name, error)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                _changed(name)
            size = found.st_size
            mode = headers.MODE_EXECUTABLE if found.st_mode & 0o111 else headers.MODE_FILE
            block = headers.file_header(name, mode, size)
            padding = -size % 512
            need = len(block) + size + padding
            if need > SEGMENT_CUT:
                digest = self._large(name, fd, block, size, padding, found.st_mtime_ns)
            else:
                # one byte more is asked for than expected, so that a file that grew shows itself
                self._make_room(name, need + 1)
                view, at = self._view, self._at
                start = at + len(block)
                end = start + size
                view[at:start] = block
                if os.readv(fd, [view[start : end + 1]]) != size:
                    _changed(name)
                digest = sha256(view[start:end]).hexdigest()
                self._at = end + padding
                view[end : end + padding] = bytes(padding)
        except OSError as error:
            _cannot_read(name, error)
        finally:
            os.close(fd)
        return f'{{"path":{_json(name)},"type":"file","mode":"{mode:04o}","size":{size},"sha256":"{digest}"}}'

    def _large(self, name: bytes, fd: int, block: bytes, size: int, padding: int, mtime_ns: int) -> str:
        if self._at:
            self._cut()
        hashed = sha256()
        view, at = self._view, len(block)
        view[:at] = block
        left = size
        while left:
            want = min(left, SEGMENT_CUT - at)
            if want <= 0:
                self._at = at
                self._cut()
                view, at = self._view, 0
                continue
            got = os.readv(fd, [view[at : at + want]])
            if not got:
                _changed(name)
            hashed.update(view[at : at + got])
            at += got
            left -= got
        after = os.fstat(fd)
        if after.st_size != size or after.st_mtime_ns != mtime_ns:
            _changed(name)
        view[at : at + padding] = bytes(padding)
        self._at = at + padding
        return hashed.hexdigest()


def _json(name: bytes) -> str:
    """`name` as a JSON string; bytes that are not UTF-8 become an object {"base64": ...} so that nothing is lost."""
    try:
        return encode_basestring_ascii(name.decode("utf-8"))
    except UnicodeDecodeError:
        return f'{{"base64":"{b64encode(name).decode("ascii")}"}}'
