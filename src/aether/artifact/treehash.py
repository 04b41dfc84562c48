"""One hash for the installed bytes of a component, computed from what an archive's members are.

    aether-tree-v1    over the files and links of a component, by the bytes of their path relative to its root:
                      SHA-256 of the concatenation of "MODE SHA256 PATH\\0", where MODE is 0644, 0755 or 0777 (a link)
                      and SHA256 is that of the file's content, or of the link's target

    folder            a component is its folder without the folders of components inside it
    record            a component is what the RECORD of its .dist-info folder names, and the bytecode made from that

Modes, contents and names come from the archive (or its manifest), so that whoever has the artifact can compute the
hash again; `aether verify` does.
"""

import csv
from collections.abc import Iterable, Mapping
from hashlib import sha256
from io import StringIO
from typing import NamedTuple

from aether.artifact.headers import MODE_EXECUTABLE, MODE_FILE, MODE_LINK
from aether.artifact.manifest import Listed
from aether.artifact.tree import DIRECTORY, LINK

RULE = "aether-tree-v1"
FOLDER, RECORD = "folder", "record"
_MODES = {False: b"%04o" % MODE_FILE, True: b"%04o" % MODE_EXECUTABLE}
_LINK = b"%04o" % MODE_LINK


class Tree(NamedTuple):
    """The hash of a component and how many files and links it is over."""

    sha256: str
    files: int


def tree_of(members: Iterable[Listed], root: bytes) -> Tree:
    """The hash of `members`, whose paths all begin with `root` ('' or ending with '/'), in any order."""
    hashed = sha256()
    cut, files = len(root), 0
    for path, kind, executable, _, digest, target in sorted(members):
        if kind == DIRECTORY:
            continue
        files += 1
        if kind == LINK:
            hashed.update(b"%b %b %b\0" % (_LINK, sha256(target).hexdigest().encode(), path[cut:]))
        else:
            hashed.update(b"%b %b %b\0" % (_MODES[executable], digest.encode(), path[cut:]))
    return Tree(hashed.hexdigest(), files)


def by_folder(members: Iterable[Listed], folders: Iterable[bytes]) -> dict[bytes, list[Listed]]:
    """The members of each of `folders` ('' is the root): each member belongs to the innermost one it lies in."""
    found: dict[bytes, list[Listed]] = {folder: [] for folder in folders}
    owners: dict[bytes, bytes | None] = {folder: folder for folder in found}
    for member in members:
        owner = _owner(member.path.rpartition(b"/")[0], owners)
        if owner is not None:
            found[owner].append(member)
    return found


def _owner(folder: bytes, owners: dict[bytes, bytes | None]) -> bytes | None:
    """The innermost component at or above `folder`; what is found out is kept in `owners`."""
    passed: list[bytes] = []
    while folder not in owners:
        passed.append(folder)
        if not folder:
            owners[folder] = None
            break
        folder = folder.rpartition(b"/")[0]
    owner = owners[folder]
    for one in passed:
        owners[one] = owner
    return owner


class Recorded(NamedTuple):
    """A line of a RECORD: the path in the archive, and the SHA-256 in URL-safe base64 (empty: none was written)."""

    path: bytes
    sha256: str


def read_record(content: bytes, dist_info: bytes) -> list[Recorded]:
    """The lines of a RECORD in the archive's folder `dist_info`; lines that lead out of site-packages and its
    neighbours are left out. What is no RECORD has no lines.
    """
    site = dist_info.rpartition(b"/")[0]
    prefix = site + b"/" if site else b""
    found: list[Recorded] = []
    try:
        for row in csv.reader(StringIO(content.decode("utf-8"), newline="")):
            if len(row) < 2 or not row[0]:
                continue
            name = row[0].encode("utf-8")
            # pip installs programs beside lib/python and moves them into the target folder's own bin
            name = name.removeprefix(b"../../") if name.startswith(b"../../bin/") else name
            if name.startswith((b"/", b"../")) or b"/../" in name:
                continue
            algorithm, _, digest = row[1].partition("=")
            found.append(Recorded(prefix + name, digest if algorithm == "sha256" else ""))
    except (ValueError, csv.Error):
        return []
    return found


def by_record(record: Iterable[Recorded], members: Mapping[bytes, Listed], folders: "Bytecode") -> list[Listed]:
    """The members that a RECORD names, with the bytecode made from its modules."""
    found = {line.path: members[line.path] for line in record if line.path in members}
    for path in list(found):
        for made in folders.of(path):
            found[made.path] = made
    return list(found.values())


class Bytecode:
    """Bytecode files by the module that each was compiled from."""

    def __init__(self, members: Iterable[Listed]) -> None:
        self._made: dict[bytes, list[Listed]] = {}
        for member in members:
            folder, _, name = member.path.rpartition(b"/")
            if name.endswith(b".pyc") and folder.endswith(b"__pycache__"):
                module = folder.removesuffix(b"__pycache__") + name.partition(b".")[0] + b".py"
                self._made.setdefault(module, []).append(member)

    def of(self, module: bytes) -> list[Listed]:
        """What was compiled from the file `module`."""
        return self._made.get(module, [])
