"""The server's side of the nursery (see `shim.nursery`): one process, started when it is first needed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

from aether.runtimes.process.shim.processes import send, started

_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from shim.nursery import main; main()"
_END_SECS = 5.0


class Nursery:
    """Forks keepers that share the lifeline `lifeline`; `folder` is where its process stands."""

    def __init__(self, folder: Path, lifeline: int) -> None:
        self._folder = folder
        self._lifeline = lifeline
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._starting = asyncio.Lock()

    async def ready(self) -> socket.socket:
        """The connection to the nursery, which is started if there is none. Raises OSError."""
        async with self._starting:
            if self._control is None:
                await self._end()
                await self._start()
            assert self._control is not None
            return self._control

    async def keeper(self, plan: bytes, folder: Path, lock: int, errors: int, limit_secs: float) -> bytes:
        """Fork a keeper; returns what it says, nothing when it ended before.

        Raises OSError when none was forked, BlockingIOError when too many are being forked, and TimeoutError after it
        ended one that says nothing.
        """
        said = await self._fork(plan, folder, lock, errors, limit_secs)
        if said is None:  # the nursery was killed, and that is noticed here first
            said = await self._fork(plan, folder, lock, errors, limit_secs)
        if said is None:
            raise ConnectionResetError("what forks keepers ends")
        return said

    async def _fork(self, plan: bytes, folder: Path, lock: int, errors: int, limit_secs: float) -> bytes | None:
        """As `keeper`; None when there is no nursery any more that could have forked one."""
        control = await self.ready()
        ours, theirs = socket.socketpair()
        opened: list[int] = []
        try:
            opened.append(os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            opened.append(_memory(plan))
            socket.send_fds(control, [b"k"], [lock, opened[0], errors, opened[1], theirs.fileno()])
        except (BrokenPipeError, ConnectionResetError):
            ours.close()
            self._forget(control)
            return None
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            for fd in opened:
                os.close(fd)
        reader, writer = await asyncio.open_connection(sock=ours)
        pid = 0
        try:
            async with asyncio.timeout(limit_secs):
                if not (first := await reader.readline()):
                    self._forget(control)
                    return None
                pid = int(first)
                return await reader.readline()
        except TimeoutError:
            if pid:
                send(pid, started(pid), signal.SIGKILL)
            raise
        finally:
            writer.close()

    def _forget(self, control: socket.socket) -> None:
        if self._control is control:
            self._control = None
        control.close()

    async def close(self) -> None:
        """End the nursery; the next keeper gets another."""
        async with self._starting:
            await self._end()

    async def _end(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if (process := self._process) is not None:
            self._process = None
            try:
                async with asyncio.timeout(_END_SECS):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    async def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", "-E", "-c", _BOOT, os.fspath(Path(__file__).parent), str(self._lifeline)),
                cwd=self._folder,
                env={},
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                pass_fds=(self._lifeline,),
                start_new_session=True,
            )
        ours.setblocking(False)
        self._control = ours


def _memory(data: bytes) -> int:
    fd = os.memfd_create("plan", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
