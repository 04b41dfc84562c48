"""Telling other processes of this machine that a file has changed, without anybody having to poll it.

A process that waits has a named pipe in a folder beside the file; whoever has committed writes one byte into each.
The byte says only "look again". Pipes are used because a path to a socket has room for some hundred characters only.
What a process that is killed leaves is cleared by the next one that writes to it and finds no reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

_HALF_MADE_SECS = 60.0
_GIVE_UP = 5


class Ear:
    """Calls `heard` in the event loop whenever another process told."""

    def __init__(self, folder: Path, heard: Callable[[], None]) -> None:
        self._folder = folder
        self._heard = heard
        self._path: Path | None = None
        self._reader = self._writer = -1
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def name(self) -> str:
        return "" if self._path is None else self._path.name

    def open(self) -> None:
        """Raises OSError."""
        for attempt in range(_GIVE_UP):
            try:
                self._path = self._make()
                break
            except FileNotFoundError:
                # another process has tidied up in this very moment
                self.close()
                if attempt == _GIVE_UP - 1:
                    raise
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._reader, self._on_readable)

    def _make(self) -> Path:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        _clear(self._folder)
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        half, whole = self._folder / f".{name}", self._folder / name
        os.mkfifo(half, 0o600)
        self._reader = os.open(half, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        # its own writer, or the pipe would be at its end, which is always readable, when others close theirs
        self._writer = os.open(half, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        # it gets a name that others write to only now: whoever finds no reader may take it for a dead one's
        return half.rename(whole)

    def close(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._reader)
            self._loop = None
        for opened in (self._reader, self._writer):
            if opened >= 0:
                os.close(opened)
        self._reader = self._writer = -1
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def _on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        self._heard()


def tell(folder: Path, but: str) -> None:
    """Wake every process that has an ear in the folder except the one of that name.

    Never blocks and never raises: who is not told looks by himself a little later."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        if name == but or name.startswith("."):
            continue
        path = folder / name
        try:
            pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENXIO:
                with contextlib.suppress(OSError):
                    path.unlink()
            continue
        try:
            # a pipe that is full holds wakes enough
            with contextlib.suppress(OSError):
                os.write(pipe, b"\0")
        finally:
            os.close(pipe)


def _clear(folder: Path) -> None:
    """Take away what processes left that were killed while they made their ears."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _HALF_MADE_SECS:
                    os.unlink(entry.path)
