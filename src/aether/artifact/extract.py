"""Unpacking an artifact for the server: complete or absent, and never outside of its folder.

Reading and checking is done in `inflate` and `reader`; here members become files below a private folder that is
renamed at the end. Files are opened relative to folder handles that follow no link, and links are made last, after
all of them were judged together, so that nothing is ever written through one.
Modification times are those of unpacking, not the archive's fixed one: servers of static files derive validators
(ETag, Last-Modified) from size and time, and a fixed time would make a changed file look unchanged.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from queue import Queue
from threading import Event, Thread

from aether.artifact.headers import BLOCK
from aether.artifact.inflate import ArchiveTooLarge, InvalidArchive, inflate
from aether.artifact.links import escapes
from aether.artifact.placing import Folders, is_new, refuse_clashes
from aether.artifact.reader import Pieces, members
from aether.artifact.tree import DIRECTORY, FILE, LINK, show

__all__ = ["ArchiveTooLarge", "ExtractLimits", "ExtractStats", "InvalidArchive", "extract", "flush", "sweep"]

_TEMPORARY = ".extracting-"
_AHEAD = 8


@dataclass(frozen=True, slots=True)
class ExtractLimits:
    """Caps on what may come out of an archive: bytes of tar, members, and bytes out per byte in."""

    max_bytes: int = 4 << 30
    max_entries: int = 500_000
    max_ratio: int = 200


@dataclass(frozen=True, slots=True)
class ExtractStats:
    """What was unpacked; `content_digest` is the SHA-256 of the tar stream as it was read."""

    files: int
    directories: int
    links: int
    bytes: int
    tar_bytes: int
    content_digest: str


def extract(
    archive: Path,
    target: Path,
    *,
    limits: ExtractLimits | None = None,
    durable: bool = False,
    plain: bool = False,
) -> ExtractStats:
    """Unpack `archive` into the new folder `target`, whose parent must exist.

    `plain` refuses links, and names that differ in nothing but case or Unicode composition.

    A killed process leaves no half-made `target`. A lost machine may, unless `durable` puts the data on disk first
    (`flush`, seconds for a large tree); a server can answer sooner by flushing later and noting when that was done.
    Raises InvalidArchive or ArchiveTooLarge (both BadRequest) and leaves nothing, FileExistsError when `target`
    exists, OSError of the disk. Blocks: call it from a thread.
    """
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists already")
    work = target.parent / f"{_TEMPORARY}{os.getpid()}-{os.urandom(6).hex()}"
    work.mkdir(mode=0o755)
    try:
        with _Pump(archive, limits or ExtractLimits()) as pump:
            stats = _unpack(pump, work, limits or ExtractLimits(), plain)
        if durable:
            flush(work)
        # rename(2) would replace an empty folder silently; an artifact without members is such a folder
        if target.exists():
            raise FileExistsError(f"{target} exists already")
        work.rename(target)
        if durable:
            _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return stats


def sweep(parent: Path) -> int:
    """Remove what killed extractions left in `parent`; returns how many. Call it before any extraction starts."""
    left = [item for item in parent.iterdir() if item.name.startswith(_TEMPORARY)]
    for item in left:
        shutil.rmtree(item)
    return len(left)


class _Pump:
    """Decompresses and hashes in a thread of its own, a bounded number of pieces ahead; iterate for the pieces."""

    def __init__(self, archive: Path, limits: ExtractLimits) -> None:
        self._archive, self._limits = archive, limits
        self._queue: Queue[bytes | BaseException | None] = Queue(_AHEAD)
        self._stop = Event()
        self._thread = Thread(target=self._run, name="aether-inflate")
        self.content_digest = ""
        self.tar_bytes = 0

    def __enter__(self) -> "_Pump":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get()
            self._thread.join(0.01)

    def _run(self) -> None:
        hashed = sha256()
        try:
            with self._archive.open("rb", buffering=0) as source:
                limits = self._limits
                for piece in inflate(source, max_bytes=limits.max_bytes, max_ratio=limits.max_ratio):
                    hashed.update(piece)
                    self.tar_bytes += len(piece)
                    self._queue.put(piece)
                    if self._stop.is_set():
                        return
            self.content_digest = hashed.hexdigest()
            self._queue.put(None)
        except BaseException as error:  # noqa: BLE001 (raised again by the thread that unpacks)
            self._queue.put(error)

    def __iter__(self) -> Iterator[bytes]:
        while (piece := self._queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def _unpack(pump: _Pump, work: Path, limits: ExtractLimits, plain: bool) -> ExtractStats:
    stream = Pieces(iter(pump))
    known: dict[bytes, str] = {b"": DIRECTORY}
    links: dict[bytes, bytes] = {}
    files = size = 0
    with Folders(work) as folders:
        for member in members(stream):
            if len(known) > limits.max_entries:
                raise ArchiveTooLarge(f"the archive has more than {limits.max_entries} members")
            if is_new(member, known, folders):
                if member.kind == FILE:
                    folders.file(member, stream)
                    files += 1
                    size += member.size
                elif member.kind == LINK:
                    if plain:
                        raise InvalidArchive(f"'{show(member.name)}' is a link; only files and folders are taken")
                    links[member.name] = member.target
                else:
                    folders.make(member.name)
            if member.kind == FILE:
                stream.take(-member.size % BLOCK)
        for name, target in links.items():
            if escapes(name, target, links):
                raise InvalidArchive(f"'{show(name)}' links to '{show(target)}', outside of the archive")
        for name, target in links.items():
            folders.link(name, target)
    if plain:
        refuse_clashes(known)
    directories = sum(kind == DIRECTORY for kind in known.values()) - 1
    return ExtractStats(files, directories, len(links), size, pump.tar_bytes, pump.content_digest)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush(folder: Path) -> None:
    """Put everything on the file system that holds `folder` on disk: one call instead of one per file."""
    import ctypes

    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
        if syncfs is None:
            os.sync()
        elif syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(folder))
    finally:
        os.close(fd)
