"""Unpacking a zip archive for the server, by the rules and with the promises of `extract`."""

import os
import shutil
from pathlib import Path

from aether.artifact.extract import ExtractLimits
from aether.artifact.inflate import RATIO_GRACE, ArchiveTooLarge, InvalidArchive
from aether.artifact.placing import Folders, is_new, refuse_clashes
from aether.artifact.reader import Pieces
from aether.artifact.tree import DIRECTORY, FILE, show
from aether.artifact.zipreader import Packed, content, entries

_TEMPORARY = ".extracting-"


def unzip(archive: Path, target: Path, *, limits: ExtractLimits | None = None) -> int:
    """Unpack `archive` into the new folder `target`, whose parent must exist; returns the bytes of all files.

    Links are refused, and names that differ in nothing but case. Raises InvalidArchive or ArchiveTooLarge (both
    BadRequest) and leaves nothing, FileExistsError when `target` exists, OSError of the disk. Blocks.
    """
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists already")
    limits = limits or ExtractLimits()
    with archive.open("rb") as source:
        found = entries(source, max_entries=limits.max_entries)
        total = _judge(found, os.fstat(source.fileno()).st_size, limits)
        work = target.parent / f"{_TEMPORARY}{os.getpid()}-{os.urandom(6).hex()}"
        work.mkdir(mode=0o755)
        try:
            known: dict[bytes, str] = {b"": DIRECTORY}
            with Folders(work) as folders:
                for entry in found:
                    stream = Pieces(content(source, entry))
                    if is_new(entry.member, known, folders):
                        if entry.member.kind == FILE:
                            folders.file(entry.member, stream)
                        else:
                            folders.make(entry.member.name)
                    for _ in stream.rest():  # ends at once, or raises: only the end vouches for what was read
                        raise InvalidArchive(f"'{show(entry.member.name)}' is longer than the archive says")
                    if len(known) > limits.max_entries:
                        raise ArchiveTooLarge(f"the archive has more than {limits.max_entries} members")
            refuse_clashes(known)
            work.rename(target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return total


def _judge(found: list[Packed], archive_bytes: int, limits: ExtractLimits) -> int:
    """The bytes that all of `found` unpack to, when they may be."""
    total = sum(entry.member.size for entry in found)
    if total > limits.max_bytes:
        raise ArchiveTooLarge(f"the archive unpacks to more than {limits.max_bytes} bytes")
    if total > RATIO_GRACE and total > archive_bytes * limits.max_ratio:
        raise ArchiveTooLarge(f"the archive unpacks to more than {limits.max_ratio} times its size")
    return total
