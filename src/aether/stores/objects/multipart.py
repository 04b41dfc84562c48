"""Uploads in parts on a directory, with S3's rules.

    .multipart/<id>/key              which object it will be; locked while the upload is changed
    .multipart/<id>/00001.<etag>     a part that has arrived
    .multipart/<id>/plan             finishing has begun: these parts in this order, and no others any more
    .multipart/<id>/assembled        what has been put together so far

Parts are appended one after the other and taken away as soon as their bytes are on the disk in `assembled`, so that
little is held twice. Where each part belongs is in the plan: killed at any moment, the same `finish` goes on. A
folder without a key was killed when it was begun; the next start takes it away.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import msgspec

from aether.model.errors import BadRequest, NotFound
from aether.model.names import new_id
from aether.model.objects import Part
from aether.stores.objects.parts import bare, check_parts
from aether.stores.objects.signing import MAX_KEY, check_key

_HELD_TWICE_BYTES = 64 * 1024**2
_COPY_BYTES = 8 * 1024**2
_BEGINNING_SECS = 60.0


class Multiparts:
    """Uploads in parts below `root`; every method blocks. `scratch` is a folder that is swept at the start."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self._root = root
        self._scratch = scratch

    def sweep(self) -> None:
        self._root.mkdir(mode=0o700, exist_ok=True)
        for folder in self._root.iterdir():
            with contextlib.suppress(OSError):  # it has a key, or goes at this moment
                if folder.stat().st_mtime < time.time() - _BEGINNING_SECS:
                    folder.rmdir()

    def begin(self, key: str) -> str:
        upload = new_id()
        folder = self._root / upload
        folder.mkdir(mode=0o700)
        part = self._scratch / f"{upload}.key"
        part.write_text(check_key(key))
        part.rename(folder / "key")
        return upload

    def add(self, key: str, upload: str, number: int, received: Path, etag: str) -> None:
        """Take over a file as a part, instead of the one that was there. Raises NotFound, BadRequest."""
        with self._locked(key, upload) as folder:
            if _plan(folder) is not None:
                raise BadRequest("this upload is being finished; it takes no more parts")
            name = _name(number, etag)
            received.rename(folder / name)
            for other in folder.glob(f"{number:05d}.*"):
                if other.name != name:
                    other.unlink()

    def parts(self, key: str, upload: str) -> list[Part]:
        with self._locked(key, upload) as folder:
            return _plan(folder) or sorted(_found(folder), key=lambda part: part.number)

    def finish(self, key: str, upload: str, wanted: Sequence[tuple[int, str]], target: Path) -> None:
        """Raises NotFound, BadRequest."""
        with self._locked(key, upload) as folder:
            plan = _plan(folder)
            if plan is None:
                plan = check_parts(_found(folder), wanted)
                part = folder / "plan.part"
                part.write_bytes(msgspec.json.encode(plan))
                part.rename(folder / "plan")
            elif [(part.number, part.etag) for part in plan] != [(number, bare(etag)) for number, etag in wanted]:
                raise BadRequest("this upload is being finished with other parts")
            assembled = folder / "assembled"
            if assembled.exists() or _path(folder, plan[0]).exists():  # else it has been renamed already
                _assemble(folder, plan, assembled)
                target.parent.mkdir(mode=0o700, exist_ok=True)
                assembled.rename(target)
            self._discard(folder)

    def abort(self, key: str, upload: str) -> None:
        with contextlib.suppress(NotFound), self._locked(key, upload) as folder:
            self._discard(folder)

    def uploads(self, prefix: str) -> list[tuple[str, str, float]]:
        found: list[tuple[str, str, float]] = []
        for folder in self._root.iterdir():
            with contextlib.suppress(FileNotFoundError):
                key = (folder / "key").read_text()
                if key.startswith(prefix):
                    found.append((key, folder.name, (folder / "key").stat().st_mtime))
        return sorted(found)

    @contextlib.contextmanager
    def _locked(self, key: str, upload: str) -> Generator[Path]:
        folder = self._root / check_key(upload)
        gone = NotFound("the upload in parts is over, or was never begun")
        try:
            descriptor = os.open(folder / "key", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise gone from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not folder.exists() or os.pread(descriptor, MAX_KEY + 1, 0).decode() != key:
                raise gone
            yield folder
        finally:
            os.close(descriptor)

    def _discard(self, folder: Path) -> None:
        gone = self._scratch / f"{folder.name}.gone"
        folder.rename(gone)
        shutil.rmtree(gone)


def _found(folder: Path) -> list[Part]:
    """Killed while one part replaced another, both are here: the newer comes last and stands for its number."""
    files = [path for path in folder.iterdir() if path.name[:5].isdigit()]
    newest = {path.name[:5]: path for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)}
    return [Part(int(number), path.stat().st_size, path.name[6:]) for number, path in newest.items()]


def _plan(folder: Path) -> list[Part] | None:
    try:
        return msgspec.json.decode((folder / "plan").read_bytes(), type=list[Part])
    except FileNotFoundError:
        return None


def _name(number: int, etag: str) -> str:
    return f"{number:05d}.{etag}"


def _path(folder: Path, part: Part) -> Path:
    return folder / _name(part.number, part.etag)


def _assemble(folder: Path, plan: list[Part], assembled: Path) -> None:
    target = os.open(assembled, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        offset = held_twice = 0
        copied: list[Path] = []
        for part in plan:
            path = _path(folder, part)
            if path.exists():  # else an earlier attempt has copied it
                _copy(path, target, offset)
                copied.append(path)
                held_twice += part.size_bytes
            offset += part.size_bytes
            if held_twice >= _HELD_TWICE_BYTES or part is plan[-1]:
                os.fsync(target)
                for path in copied:
                    path.unlink()
                copied.clear()
                held_twice = 0
    finally:
        os.close(target)


def _copy(path: Path, target: int, offset: int) -> None:
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        left = os.fstat(source).st_size
        done = 0
        while done < left:
            count = _copied_in_kernel(source, target, left - done, done, offset + done)
            if not count:
                count = os.pwrite(target, os.pread(source, min(_COPY_BYTES, left - done), done), offset + done)
            done += count
    finally:
        os.close(source)


def _copied_in_kernel(source: int, target: int, count: int, at: int, to: int) -> int:
    """0 where the file system or the kernel cannot; some file systems copy nothing by it, only references."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, count, at, to)
    except OSError:
        return 0
