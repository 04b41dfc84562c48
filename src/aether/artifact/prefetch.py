"""Asking the disk for files before they are read, once it turns out that they are not in memory.

A packer that reads one file after the other leaves a disk idle between requests. Whether the disk is needed at all is
seen from the blocks it had to deliver to the reading thread, so that a tree in memory costs nothing more.
"""

import os
import resource
from collections.abc import Sequence
from threading import Condition, Thread
from types import TracebackType

from aether.artifact.tree import FILE, Entry

_AHEAD = 1024
_BATCH = 16
_THREADS = 4
_COLD_BLOCKS = 256
"""Blocks of 512 bytes delivered between two looks that mean a cold tree."""


class Prefetch:
    """A context around reading `members` in their order; tell it now and then where the reading is.

    A file that cannot be opened is left for the reader to report.
    """

    def __init__(self, members: Sequence[Entry]) -> None:
        self._members = members
        self._changed = Condition()
        self._at = self._next = 0
        self._ended = False
        self._threads: list[Thread] = []
        self._who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
        self._blocks = 0

    def __enter__(self) -> "Prefetch":
        self._blocks = resource.getrusage(self._who).ru_inblock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def reached(self, index: int) -> None:
        """The reading is at `index`; called by the reading thread."""
        if self._threads:
            with self._changed:
                self._at = index
                self._changed.notify_all()
            return
        blocks = resource.getrusage(self._who).ru_inblock
        if blocks - self._blocks > _COLD_BLOCKS and hasattr(os, "posix_fadvise"):
            self._at = self._next = index
            self._threads = [Thread(target=self._run, name="aether-prefetch") for _ in range(_THREADS)]
            for thread in self._threads:
                thread.start()
        self._blocks = blocks

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._ended and self._next >= self._at + _AHEAD:
                    self._changed.wait()
                start = self._next
                if self._ended or start >= len(self._members):
                    return
                self._next = start + _BATCH
            for _, source, kind in self._members[start : start + _BATCH]:
                if kind == FILE:
                    _ask_for(source)


def _ask_for(source: bytes) -> None:
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
    except OSError:
        return
    finally:
        os.close(fd)
