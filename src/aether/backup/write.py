"""Making a backup of a data directory: a snapshot first, everything that it needs held fast, then one stream.

Artifacts never change, so a hard link made right after the snapshot keeps what a deletion takes away meanwhile.
Volumes are read as they are: what an app writes during the backup may be in it or not, file by file. Blocking code,
for a thread; memory is bounded by the keys and one block.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import structlog

from aether.backup.format import (
    DATABASE,
    FORMAT,
    HEADER,
    KEPT_ELSEWHERE,
    KEPT_PLAIN,
    KEPT_SEALED,
    KEYS_PLAIN,
    KEYS_SEALED,
    MAC,
    MANIFEST,
    UIDS,
    BackupKeys,
    encode_keys,
    end_of_archive,
    header_bytes,
    header_of,
    manifest_line,
    padding,
)
from aether.model.errors import LocalIOError
from aether.model.names import new_id
from aether.model.snapshot import Snapshot
from aether.model.times import now_us, to_iso

BLOCK_BYTES = 1 << 20
MAX_KEY_BYTES = 16 << 20
_TRIES = 5
_STAGE = "backup-"
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
# made anew by a start, taken from elsewhere in the backup, or of this machine's moment only
_NOT_PRIVATE = frozenset(
    ("aether.db", "aether.db-wal", "aether.db-shm", "aether.db-journal", "objects", "releases", "instances", "logs")
) | frozenset(("volumes", "functions", "run", "up.lock", "up.json", "uids.json", "tmp"))
_log = structlog.stdlib.get_logger("aether.backup")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a backup holds. `keys` None with `plain_keys` False leaves the keys out."""

    keys: BackupKeys | None = None
    plain_keys: bool = False
    volumes: bool = True
    logs: bool = False

    @property
    def kept(self) -> str:
        if self.keys is not None:
            return KEPT_SEALED
        return KEPT_PLAIN if self.plain_keys else KEPT_ELSEWHERE


def sweep(data: Path) -> None:
    """Take away what a killed server was backing up. Raises OSError."""
    for stale in (data / "run").glob(f"{_STAGE}*"):
        shutil.rmtree(stale)


class Writer:
    """One backup: `prepare`, then the bytes of `stream`, then `close`, whatever happened."""

    def __init__(self, data: Path, version: str, take: Callable[[Path, Path], Snapshot], plan: Plan) -> None:
        self._data = data
        self._version = version
        self._take = take
        self._plan = plan
        self._stage = data / "run" / f"{_STAGE}{new_id()}"
        self._private: dict[str, bytes] = {}
        self._snapshot: Snapshot | None = None
        self._missing: list[str] = []
        self._manifest: IO[bytes] | None = None

    def prepare(self) -> Snapshot:
        """Hold fast what the stream will be made of. Raises LocalIOError."""
        try:
            self._stage.mkdir(mode=0o700, parents=True)
            before = self._read_private()
            snapshot = self._snap()
            for _ in range(_TRIES):
                if not self._missing:
                    break
                _log.info("artifacts were deleted between the snapshot and now; once more")
                snapshot = self._snap()
            self._private = _united(before, self._read_private())
            self._manifest = (self._stage / MANIFEST).open("w+b")
        except OSError as error:
            raise LocalIOError(f"the backup cannot be prepared: {error}") from error
        if self._missing:
            _log.warning("artifacts that the database names are not stored", count=len(self._missing))
        self._snapshot = snapshot
        return snapshot

    def close(self) -> None:
        if self._manifest is not None:
            self._manifest.close()
        shutil.rmtree(self._stage, ignore_errors=True)

    def stream(self) -> Iterator[bytes]:
        """The backup, in blocks. Raises LocalIOError and OSError; what was sent by then is no backup."""
        snapshot, manifest = self._snapshot, self._manifest
        assert snapshot is not None
        assert manifest is not None
        yield from self._document(HEADER, json.dumps(self._header(snapshot), indent=1).encode())
        yield from self._file(DATABASE, self._stage / "aether.db")
        if (self._data / "uids.json").exists():
            yield from self._document(UIDS, (self._data / "uids.json").read_bytes())
        if self._plan.keys is not None:
            yield from self._document(KEYS_SEALED, self._plan.keys.seal(encode_keys(self._private)))
        elif self._plan.plain_keys:
            yield from self._document(KEYS_PLAIN, encode_keys(self._private))
        for key in snapshot.objects:
            if key not in self._missing:
                yield from self._file(f"objects/{key}", self._stage / "objects" / key)
        if self._plan.volumes:
            yield from self._tree("volumes", keep_all=True)
        if self._plan.logs:
            yield from self._tree("logs", keep_all=False)
        mac = None if self._plan.keys is None else self._plan.keys.mac()
        manifest.flush()
        size = manifest.tell()
        manifest.seek(0)
        yield header_bytes(header_of(MANIFEST, size=size))
        while block := manifest.read(BLOCK_BYTES):
            if mac is not None:
                mac.update(block)
            yield block
        yield padding(size)
        if mac is not None:
            proof = mac.hexdigest().encode()
            yield header_bytes(header_of(MAC, size=len(proof))) + proof + padding(len(proof))
        yield end_of_archive()

    # --- what is held

    def _snap(self) -> Snapshot:
        database = self._stage / "aether.db"
        database.unlink(missing_ok=True)
        shutil.rmtree(self._stage / "objects", ignore_errors=True)
        snapshot = self._take(self._data / "aether.db", database)
        self._missing = [key for key in snapshot.objects if not self._hold(key)]
        return snapshot

    def _hold(self, key: str) -> bool:
        source, target = self._data / "objects" / key, self._stage / "objects" / key
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                shutil.copyfile(source, target)
            except FileNotFoundError:
                return False
        return True

    def _read_private(self) -> dict[str, bytes]:
        """Every file that only this server should have. What is not known here counts as private."""
        found: dict[str, bytes] = {}
        total = 0
        for entry in sorted(self._data.iterdir()):
            if entry.name in _NOT_PRIVATE or entry.is_symlink():
                continue
            for path in [entry] if entry.is_file() else sorted(entry.rglob("*")):
                if path.is_symlink() or not path.is_file() or path.name.endswith(".part"):
                    continue
                total += path.stat().st_size
                if total > MAX_KEY_BYTES:
                    raise LocalIOError(
                        f"{path} does not look like a key: the keys are larger than {MAX_KEY_BYTES} bytes"
                    )
                found[path.relative_to(self._data).as_posix()] = path.read_bytes()
        return found

    def _header(self, snapshot: Snapshot) -> dict[str, object]:
        keys = self._plan.keys
        return {
            "format": FORMAT,
            "aether": self._version,
            "created_at": to_iso(now_us()),
            "schema": snapshot.schema,
            "keys": self._plan.kept,
            "kdf": None if keys is None else keys.kdf.to_json(),
            "sealed_with": list(snapshot.key_ids),
            "volumes": self._plan.volumes,
            "logs": self._plan.logs,
            "counts": dict(snapshot.counts),
            "missing": self._missing,
        }

    # --- members

    def _document(self, name: str, content: bytes) -> Iterator[bytes]:
        info = header_of(name, size=len(content))
        yield header_bytes(info) + content + padding(len(content))
        self._note(info, hashlib.sha256(content).hexdigest())

    def _file(self, name: str, path: Path, *, keep_all: bool = False) -> Iterator[bytes]:
        """A file as long as it was when it was opened: what grows meanwhile is cut, what shrinks is filled up."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                return
            info = header_of(name, size=found.st_size, source=found if keep_all else None)
            yield header_bytes(info)
            digest, left = hashlib.sha256(), found.st_size
            while left:
                block = os.read(descriptor, min(BLOCK_BYTES, left))
                if not block:
                    _log.warning("a file became shorter while it was read", file=name)
                    block = b"\0" * min(BLOCK_BYTES, left)
                digest.update(block)
                left -= len(block)
                yield block
        finally:
            os.close(descriptor)
        yield padding(found.st_size)
        self._note(info, digest.hexdigest())

    def _tree(self, name: str, *, keep_all: bool) -> Iterator[bytes]:
        """A folder with everything below it; with `keep_all` also folders, links, owners and modes."""
        for folder, folders, files in os.walk(self._data / name, onerror=_told):
            folders.sort()
            where = Path(folder)
            inside = where.relative_to(self._data).as_posix()
            if keep_all and inside != name:
                yield from self._entry(inside, where)
            for entry in sorted([*files, *(item for item in folders if (where / item).is_symlink())]):
                path = where / entry
                try:
                    if path.is_symlink():
                        if keep_all:
                            yield from self._entry(f"{inside}/{entry}", path)
                        continue
                    yield from self._file(f"{inside}/{entry}", path, keep_all=keep_all)
                except FileNotFoundError:
                    continue  # gone since its folder was read, before anything of it was sent

    def _entry(self, name: str, path: Path) -> Iterator[bytes]:
        """A folder or a symbolic link."""
        try:
            found = path.lstat()
            link = os.readlink(path) if stat.S_ISLNK(found.st_mode) else None
        except FileNotFoundError:
            return
        info = header_of(name, size=0, source=found, link=link)
        if link is None:
            info.type = tarfile.DIRTYPE
        yield header_bytes(info)
        self._note(info, hashlib.sha256((link or "").encode("utf-8", "surrogateescape")).hexdigest())

    def _note(self, info: tarfile.TarInfo, sha256: str) -> None:
        assert self._manifest is not None
        self._manifest.write(manifest_line(info, sha256))


def _told(error: OSError) -> None:
    if error.errno != errno.ENOENT:
        raise error


def _united(before: dict[str, bytes], after: dict[str, bytes]) -> dict[str, bytes]:
    """Files as they are after the snapshot, key lists with the lines they had before it too: a rotation meanwhile may
    have dropped a key that the snapshot still needs."""
    united = dict(after)
    for name, content in before.items():
        if name in united and name.endswith("secrets.key"):
            known: Sequence[bytes] = united[name].splitlines()
            united[name] += b"".join(line + b"\n" for line in content.splitlines() if line not in known)
    return united
