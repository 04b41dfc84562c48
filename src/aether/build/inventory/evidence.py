"""Holding installed files against the distribution they came from, file by file.

A distribution (a gzipped tar from a registry, one of Yarn's zips) proves something only when its own bytes have the
hash that the lockfile promises; that is checked before it is opened. pnpm keeps no distribution, but an index of its
files made when it unpacked one: that index is taken at its word.
"""

import hashlib
import io
import json
import posixpath
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module

from aether.artifact.manifest import Listed
from aether.artifact.tree import FILE
from aether.build.inventory.contents import Contents, as_mapping
from aether.build.inventory.promises import Hashes, hashes

_SHOWN = 3
_FILES = 200_000

Digests = tuple[str, ...]
"""Hashes that a file may have, in hex."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """The files of a distribution by their path within the package, and the algorithm of their hashes."""

    files: Mapping[bytes, Digests]
    algorithm: str = "sha256"


def has_hash(data: bytes, promised: Hashes) -> bool:
    """Whether `data` has every hash that was promised (at least one)."""
    return bool(promised) and all(
        hashlib.new(name.replace("-", "").lower(), data).hexdigest() == digest for name, digest in promised
    )


def read_tarball(data: bytes) -> Distribution | None:
    """The files of a package's gzipped tar as package managers unpack them; None when it cannot be read."""
    files: dict[bytes, Digests] = {}
    igzip, damaged = import_module("isal.igzip"), import_module("isal.isal_zlib").error
    try:
        with tarfile.open(fileobj=io.BytesIO(igzip.decompress(data)), mode="r:", errors="surrogateescape") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                # the first folder is called package, or whatever whoever packed it liked
                name = posixpath.normpath(member.name).partition("/")[2]
                if content is not None and name and len(files) < _FILES:
                    files[name.encode("utf-8", "surrogateescape")] = _digests(content.read())
    except (tarfile.TarError, OSError, EOFError, ValueError, damaged):
        return None
    return Distribution(files)


def _digests(content: bytes) -> Digests:
    found = hashlib.sha256(content).hexdigest()
    if content.startswith(b"#!"):
        line, newline, rest = content.partition(b"\n")
        if line.endswith(b"\r"):
            # npm mends the first line of programs that were written on Windows
            return found, hashlib.sha256(line.rstrip(b"\r") + newline + rest).hexdigest()
    return (found,)


def read_zip(data: bytes, package: str) -> Distribution | None:
    """The files of `package` in one of Yarn's zips; None when it cannot be read."""
    files: dict[bytes, Digests] = {}
    prefix = f"node_modules/{package}/"
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for item in archive.infolist():
                name = item.filename.removeprefix(prefix)
                # Yarn installs what is bundled like everything else, and leaves the bundled copy in the zip
                if name == item.filename or item.is_dir() or name.startswith("node_modules/") or len(files) >= _FILES:
                    continue
                files[name.encode("utf-8", "surrogateescape")] = _digests(archive.read(item))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        return None
    return Distribution(files)


def read_index(data: bytes) -> Distribution | None:
    """The files that an index of pnpm's store lists; None when it cannot be read."""
    try:
        listed = as_mapping(as_mapping(json.loads(data)).get("files"))
    except ValueError:
        return None
    files: dict[bytes, Digests] = {}
    for name, item in listed.items():
        found = hashes(str(as_mapping(item).get("integrity", "")))
        if not found or found[0][0] != "SHA-512":
            return None
        files[name.encode("utf-8", "surrogateescape")] = (found[0][1],)
    return Distribution(files, "sha512") if files else None


@dataclass(frozen=True, slots=True)
class Difference:
    """How installed files differ from a distribution; paths are within the package."""

    changed: tuple[bytes, ...]
    added: tuple[bytes, ...]
    missing: tuple[bytes, ...]

    def __bool__(self) -> bool:
        return bool(self.changed or self.added or self.missing)

    def told(self) -> str:
        """`2 changed (index.js, lib/x.js), 1 added (build/x.node)`."""
        parts: list[str] = []
        for what, paths in (("changed", self.changed), ("added", self.added), ("missing", self.missing)):
            if paths:
                names = [path.decode("utf-8", "backslashreplace") for path in paths[:_SHOWN]]
                more = ", ..." if len(paths) > _SHOWN else ""
                parts.append(f"{len(paths)} {what} ({', '.join(names)}{more})")
        return ", ".join(parts)


def compare(
    contents: Contents, installed: Iterable[Listed], root: bytes, distribution: Distribution, inner: Iterable[bytes]
) -> Difference:
    """`installed` files of the package in `root` ('' or with '/' at its end) against its distribution.

    `inner` are folders of other packages below it, which are compared by themselves. What the user's own rules keep
    out of the artifact is not missing.
    """
    here = {member.path[len(root) :]: member for member in installed if member.kind == FILE}
    promised = {
        path: digests
        for path, digests in distribution.files.items()
        if not any((root + path).startswith(folder) for folder in inner)
    }
    changed = [
        path
        for path, digests in promised.items()
        if path in here and _digest(contents, here[path], distribution.algorithm) not in digests
    ]
    missing = [path for path in promised.keys() - here.keys() if not contents.left_out(root + path)]
    added = [path for path in here.keys() - promised.keys() if not _is_bookkeeping(path)]
    renamed = [path for path in missing if _npmignore(path) in added and path.endswith(b".gitignore")]
    for path in renamed:
        # npm unpacks .gitignore under the name .npmignore
        member = here[_npmignore(path)]
        if _digest(contents, member, distribution.algorithm) in promised[path]:
            missing.remove(path)
            added.remove(_npmignore(path))
    return Difference(tuple(sorted(changed)), tuple(sorted(added)), tuple(sorted(missing)))


def _npmignore(path: bytes) -> bytes:
    return path.removesuffix(b".gitignore") + b".npmignore"


def _is_bookkeeping(path: bytes) -> bool:
    return path == b"node_modules/.package-lock.json" or path.startswith(b"node_modules/.bin/")


def _digest(contents: Contents, member: Listed, algorithm: str) -> str:
    return member.sha256 if algorithm == "sha256" else contents.hash_again(member.path, algorithm)
