"""Where package managers keep what they downloaded, and how to find a package's distribution there.

Nothing here downloads or writes. What is found is returned only if it has the hash that the lockfile promises.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from aether.build.inventory.evidence import Distribution, has_hash, read_index, read_tarball, read_zip
from aether.build.inventory.promises import Promise
from aether.build.managers import Manager
from aether.build.tools import clean_environment

_PATIENCE_S = 20
Keep = Callable[[Promise], "Distribution | None"]
"""Finds the distribution that a promise is about; None when it is not at hand."""


def keep_of(manager: Manager, root: Path, installed: Path | None) -> Keep:
    """The keep of a package manager, for the project in `root` whose dependencies were installed in `installed`."""
    tarballs = ProjectTarballs(root)
    if manager.name == "npm":
        first: Keep = NpmCache(_asked(manager, root, "config", "get", "cache"))
    elif manager.name == "pnpm":
        first = PnpmStore(_store_of(installed) or _asked(manager, root, "store", "path"))
    elif manager.berry:
        everywhere = _asked(manager, root, "config", "get", "globalFolder")
        first = BerryCache([*([everywhere / "cache"] if everywhere else []), root / ".yarn" / "cache"])
    else:
        first = YarnCache(_asked(manager, root, "cache", "dir"))
    return lambda promise: (tarballs if promise.tarball and promise.integrity else first)(promise)


def _asked(manager: Manager, cwd: Path, *words: str) -> Path | None:
    """What the package manager answers when asked for one of its folders."""
    try:
        done = subprocess.run(
            [*manager.tool.argv, *words],
            cwd=cwd,
            env={**clean_environment(), **manager.env},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    folder = Path(lines[-1].strip().strip('"')) if done.returncode == 0 and lines else None
    return folder if folder is not None and folder.is_dir() else None


def _store_of(installed: Path | None) -> Path | None:
    """The store that pnpm noted in what it installed."""
    if installed is None:
        return None
    try:
        notes = (installed / "node_modules" / ".modules.yaml").read_text("utf-8", "replace")
    except OSError:
        return None
    found = re.search(r"""^\s*["']?storeDir["']?\s*:\s*["']?([^"'\n,]+)""", notes, re.MULTILINE)
    return Path(found.group(1).strip()) if found else None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


class ProjectTarballs:
    """Distributions that are files of the project."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, promise: Promise) -> Distribution | None:
        path = self._root / promise.tarball
        if not Path(os.path.normpath(path)).is_relative_to(self._root):
            return None
        data = _read(path)
        return read_tarball(data) if data is not None and has_hash(data, promise.integrity) else None


class NpmCache:
    """npm's `_cacache`: content by its SHA-512, and an index from URLs to it."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder / "_cacache" if folder is not None else None

    def __call__(self, promise: Promise) -> Distribution | None:
        if self._folder is None or not promise.integrity:
            return None
        for name, digest in (*promise.integrity, *self._indexed(promise.resolved)):
            kind = name.replace("-", "").lower()
            data = _read(self._folder / "content-v2" / kind / digest[:2] / digest[2:4] / digest[4:])
            if data is not None and has_hash(data, promise.integrity):
                return read_tarball(data)
        return None

    def _indexed(self, url: str) -> Iterable[tuple[str, str]]:
        """The hash under which an answer from `url` is kept, for lockfiles that promise an older one."""
        if self._folder is None or not url:
            return
        key = f"make-fetch-happen:request-cache:{url}"
        name = hashlib.sha256(key.encode()).hexdigest()
        bucket = _read(self._folder / "index-v5" / name[:2] / name[2:4] / name[4:]) or b""
        for line in reversed(bucket.splitlines()):
            try:
                entry = json.loads(line.partition(b"\t")[2])
                algorithm, _, coded = str(entry["integrity"]).partition("-")
                if entry["key"] == key and algorithm == "sha512":
                    yield "SHA-512", base64.b64decode(coded).hex()
                    return
            except (ValueError, KeyError, TypeError):
                continue


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9@]+", "-", name.lower())


class YarnCache:
    """Yarn 1's cache: a folder for each package, with the tarball it was unpacked from."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @cached_property
    def _names(self) -> list[tuple[str, str]]:
        """Folders, each with the plain letters and digits of its name."""
        try:
            return [(_plain(name), name) for name in sorted(os.listdir(self._folder))] if self._folder else []
        except OSError:
            return []

    def __call__(self, promise: Promise) -> Distribution | None:
        if self._folder is None or not promise.integrity:
            return None
        start = _plain(f"npm-{promise.name}-{promise.version}-")
        # a package with an alias is kept under that; what follows '#' in its address is in the folder's name too
        _, _, mark = promise.resolved.partition("#")
        for plain, name in self._names:
            if plain.startswith(start) or (mark and f"-{mark}" in name):
                for data in self._tarballs(name):
                    if has_hash(data, promise.integrity):
                        return read_tarball(data)
        return None

    def _tarballs(self, name: str) -> Iterator[bytes]:
        assert self._folder is not None
        modules = self._folder / name / "node_modules"
        for pattern in ("*/.yarn-tarball.tgz", "@*/*/.yarn-tarball.tgz"):
            for path in modules.glob(pattern):
                data = _read(path)
                if data is not None:
                    yield data


class BerryCache:
    """The zips of Yarn 2 and later, in its global folder or in the project."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders

    @cached_property
    def _zips(self) -> list[tuple[str, Path]]:
        found: list[tuple[str, Path]] = []
        for folder in self._folders:
            try:
                found += [(name, folder / name) for name in sorted(os.listdir(folder)) if name.endswith(".zip")]
            except OSError:
                continue
        return found

    def __call__(self, promise: Promise) -> Distribution | None:
        if not promise.checksum:
            return None
        start = re.compile(rf"{re.escape(promise.name.replace('/', '-'))}-[a-z]+-")
        for name, path in self._zips:
            if start.match(name) and (promise.version in name or "-npm-" not in name):
                data = _read(path)
                if data is not None and hashlib.sha512(data).hexdigest() == promise.checksum:
                    return read_zip(data, promise.name)
        return None


class PnpmStore:
    """pnpm's store: an index of files for each distribution, named after its integrity."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def __call__(self, promise: Promise) -> Distribution | None:
        digest = next((digest for name, digest in promise.integrity if name == "SHA-512"), None)
        if self._folder is None or digest is None:
            return None
        data = _read(self._folder / "files" / digest[:2] / f"{digest[2:]}-index.json")
        if data is not None:
            return read_index(data)
        # since its version 10 the index is a folder beside the files, and names carry the package
        folder, start = self._folder / "index" / digest[:2], digest[2:64]
        try:
            names = sorted(name for name in os.listdir(folder) if name.startswith(start))
        except OSError:
            return None
        for name in names:
            data = _read(folder / name)
            if data is not None:
                return read_index(data)
        return None
