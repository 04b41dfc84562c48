"""A backup put in the place of a data directory: read once into a folder beside it, verified, then renamed.

Until the rename nothing of the old is touched and nothing of the new counts, so a restore that is killed at any
moment is repeated as if it had never begun. Blocking code.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from aether.backup.format import (
    DATABASE,
    FORMAT,
    HEADER,
    KEPT_ELSEWHERE,
    KEPT_SEALED,
    KEYS_PLAIN,
    KEYS_SEALED,
    MAC,
    MANIFEST,
    UIDS,
    BackupKeys,
    Kdf,
    check_member,
    decode_keys,
    manifest_line,
)
from aether.model.errors import ConfigError, Conflict, LocalIOError
from aether.model.snapshot import Snapshot

_BLOCK_BYTES = 1 << 20
_MAX_DOCUMENT_BYTES = 64 << 20
_HOW = "the backup is not whole: it was cut or altered"


@dataclass(frozen=True, slots=True)
class Restored:
    """What a backup held. `before` is where the old data directory went, when there was one."""

    header: Mapping[str, Any]
    members: int
    size_bytes: int
    before: Path | None = None


@dataclass(frozen=True, slots=True)
class Tools:
    """What a reader needs of others. `passphrase` is asked at most once, when the keys are sealed with one."""

    check: Callable[[Path], Snapshot]
    passphrase: Callable[[], str]


def verify(source: IO[bytes], tools: Tools, scratch: Path) -> Restored:
    """Read a backup whole and put it nowhere. Raises LocalIOError, ConfigError."""
    with _beside(scratch) as folder:
        return _read(source, folder, tools)


def restore(source: IO[bytes], target: Path, tools: Tools, *, force: bool) -> Restored:
    """Make `target` what the backup holds. With `force` a directory that is there is kept under another name.

    Raises Conflict when the directory holds something, LocalIOError for a broken backup, ConfigError for a wrong
    passphrase or a backup of a newer Aether; then `target` is what it was.
    """
    target = Path(os.path.abspath(target))
    _refuse_used(target, force)
    before: Path | None = None
    with _beside(target) as folder:
        found = _read(source, folder, tools)
        os.sync()  # thousands of small files: one call is faster than a flush of each
        _refuse_used(target, force)
        try:
            if target.exists() and any(target.iterdir()):
                before = target.with_name(f"{target.name}.before-restore-{time.strftime('%Y%m%d-%H%M%S')}")
                target.rename(before)
            folder.rename(target)
        except OSError as error:
            if before is not None and not target.exists():
                before.rename(target)
            raise LocalIOError(
                f"{target} cannot be replaced ({error.strerror}): a mount point cannot be; restore below it"
            ) from error
        _flush_folder(target.parent)
    return Restored(found.header, found.members, found.size_bytes, before)


@contextmanager
def _beside(target: Path) -> Generator[Path]:
    """A private folder next to `target` that is gone afterwards unless it was renamed; one at a time."""
    folder = target.with_name(f"{target.name}.restoring")
    lock_file = target.with_name(f"{target.name}.restoring.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LocalIOError(f"nothing can be written beside {target}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another restore into {target} is under way") from None
        shutil.rmtree(folder, ignore_errors=True)  # what a killed restore left
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock_file.unlink(missing_ok=True)
        os.close(lock)


def _refuse_used(target: Path, force: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise LocalIOError(f"{target} is not a directory")
    if not force and target.exists() and any(target.iterdir()):
        raise Conflict(
            f"{target} is not empty: a backup is never merged into one. Give another --data-dir, or --force, which "
            "keeps the old directory under another name"
        )


def _read(source: IO[bytes], folder: Path, tools: Tools) -> Restored:
    try:
        return _Reader(folder, tools).read(source)
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        raise LocalIOError(f"{_HOW} ({error})") from None
    except OSError as error:
        raise LocalIOError(f"the backup cannot be unpacked: {error}") from error


class _Reader:
    """Unpacks into `folder` and computes the manifest on the way."""

    def __init__(self, folder: Path, tools: Tools) -> None:
        self._folder = folder
        self._tools = tools
        self._header: dict[str, Any] = {}
        self._keys: BackupKeys | None = None
        self._links: list[tuple[Path, tarfile.TarInfo]] = []
        self._folders: list[tuple[Path, tarfile.TarInfo]] = []
        self._computed = hashlib.sha256()
        self._members = 0
        self._bytes = 0
        self._proven = False
        self._vouched = False
        self._proof: str | None = None

    def read(self, source: IO[bytes]) -> Restored:
        with tarfile.open(fileobj=source, mode="r|", bufsize=_BLOCK_BYTES) as archive:
            while (info := archive.next()) is not None:
                self._take(archive, info)
                cast("Any", archive).members.clear()  # tarfile remembers every member it saw
        if not self._proven or (self._keys is not None and not self._vouched):
            raise LocalIOError(f"{_HOW} (it has no end)")
        for path, info in self._links:
            path.symlink_to(info.linkname)
            _owned(path, info)
        for path, info in reversed(self._folders):
            _owned(path, info)
            path.chmod(info.mode & 0o7777)
        found = self._tools.check(self._folder / "aether.db")
        if missing := [key for key in found.objects if key not in self._header["missing"] and not self._has(key)]:
            raise LocalIOError(f"{_HOW} ({len(missing)} artifacts that its database names are not in it)")
        return Restored(self._header, self._members, self._bytes)

    def _has(self, key: str) -> bool:
        return (self._folder / "objects" / key).is_file()

    def _take(self, archive: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        check_member(info)
        if self._proven and info.name != MAC:
            raise LocalIOError(f"{_HOW} (something follows its end)")
        if not self._header and info.name != HEADER:
            raise LocalIOError("this is not a backup of Aether")
        content = archive.extractfile(info) if info.isreg() else None
        if info.name in (MANIFEST, MAC):
            assert content is not None
            self._prove(info.name, content, info.size)
            return
        self._members += 1
        self._bytes += info.size
        if content is None:
            digest = hashlib.sha256(info.linkname.encode("utf-8", "surrogateescape")).hexdigest()
            self._place_entry(info)
        elif info.name in (HEADER, KEYS_SEALED, KEYS_PLAIN):
            document = _document(content, info.size)
            digest = hashlib.sha256(document).hexdigest()
            self._place_document(info.name, document)
        else:
            digest = self._place_file(info, content)
        self._computed.update(manifest_line(info, digest))

    def _prove(self, name: str, content: IO[bytes], size: int) -> None:
        if name == MAC:
            given_proof = _document(content, size)
            if self._proof is None or not hmac.compare_digest(given_proof, self._proof.encode()):
                raise LocalIOError("the backup was altered by somebody who does not know its passphrase")
            self._vouched = True
            return
        given, mac, left = hashlib.sha256(), None if self._keys is None else self._keys.mac(), size
        while left:
            block = content.read(min(_BLOCK_BYTES, left))
            if not block:
                raise EOFError("cut in its manifest")
            left -= len(block)
            given.update(block)
            if mac is not None:
                mac.update(block)
        if given.digest() != self._computed.digest():
            raise LocalIOError(f"{_HOW} (its members do not fit its manifest)")
        self._proof = None if mac is None else mac.hexdigest()
        self._proven = True

    # --- members

    def _place_document(self, name: str, document: bytes) -> None:
        if name == HEADER:
            self._header = _header(document)
            if self._header["keys"] == KEPT_SEALED:
                try:
                    kdf = Kdf.from_json(self._header["kdf"])
                except (ValueError, KeyError, TypeError):
                    raise LocalIOError(f"{_HOW} (its first member)") from None
                self._keys = kdf.keys(self._tools.passphrase())
            return
        if name == KEYS_SEALED:
            if self._keys is None:
                raise LocalIOError(f"{_HOW} (keys without a passphrase)")
            document = self._keys.unseal(document)
        for inside, content in decode_keys(document).items():
            path = self._folder / inside
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as out:
                out.write(content)

    def _place_file(self, info: tarfile.TarInfo, content: IO[bytes]) -> str:
        inside = {DATABASE: "aether.db", UIDS: "uids.json"}.get(info.name, info.name)
        path = self._folder / inside
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        digest, left = hashlib.sha256(), info.size
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as out:
            while left:
                block = content.read(min(_BLOCK_BYTES, left))
                if not block:
                    raise EOFError(f"cut in {info.name}")
                digest.update(block)
                left -= len(block)
                out.write(block)
        if inside.startswith("volumes/"):
            _owned(path, info)
            path.chmod(info.mode & 0o7777)
            os.utime(path, (info.mtime, info.mtime))
        elif inside.startswith(("objects/artifacts/", "objects/functions/", "objects/runtimes/")):
            path.chmod(0o400)
        return digest.hexdigest()

    def _place_entry(self, info: tarfile.TarInfo) -> None:
        """Links are made at the very end, so that nothing can be written through one."""
        path = self._folder / info.name
        if info.issym():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._links.append((path, info))
        else:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folders.append((path, info))


def _owned(path: Path, info: tarfile.TarInfo) -> None:
    """Give a file of a volume back to its app; only root can."""
    if os.geteuid() == 0:
        os.chown(path, info.uid, info.gid, follow_symlinks=False)


def _document(content: IO[bytes], size: int) -> bytes:
    if size > _MAX_DOCUMENT_BYTES:
        raise LocalIOError(f"{_HOW} (a member of {size} bytes where a small one belongs)")
    found = content.read(size)
    if len(found) != size:
        raise EOFError("cut")
    return found


def _header(document: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(document)
        number = int(found["format"])
        found["missing"] = set(found["missing"])
        assert isinstance(found["keys"], str)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise LocalIOError("this is not a backup of Aether") from None
    if number > FORMAT:
        raise ConfigError(
            f"the backup has format {number}, made by a newer Aether; this one knows {FORMAT}: update it"
        )
    return found


def keys_are_elsewhere(header: Mapping[str, Any]) -> bool:
    """Whether the restored server needs key files that were not in its backup."""
    return header["keys"] == KEPT_ELSEWHERE


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
