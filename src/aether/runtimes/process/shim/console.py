"""The standard streams of a run, joined to the one connection that is attached to it.

Messages on an attached connection, one datagram each: `1...` and `2...` from the keeper are stdout and stderr;
`i...` to the keeper are bytes of stdin and `e` is its end. Nothing is buffered beyond one datagram each way: a client
that does not read stops the command's output, and a command that does not read stops the client. When the connection
ends, the keeper ends the command; deciding that is the keeper's.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
from collections.abc import Callable

READ_BYTES = 32 * 1024
_END_OF_TRANSMISSION = b"\x04"
_SET_WINDOW = 0x5414  # TIOCSWINSZ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Loop(Protocol):
        """What the keeper's loop offers."""

        def watch(self, fd: int, handler: Callable[[], None], mask: int = ...) -> None: ...

        def change(self, fd: int, mask: int) -> None: ...

        def unwatch(self, fd: int) -> None: ...


class Console:
    """`stdin` is the descriptor that the command's input is written to; this object owns it."""

    def __init__(
        self,
        loop: Loop,
        stdin: int,
        tty: bool,
        attach_by: float,
        resume: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        os.set_blocking(stdin, False)
        self._loop = loop
        self._stdin = stdin
        self._tty = tty
        self._resume = resume
        self._lost = lost
        self._client: socket.socket | None = None
        self._unsent = b""
        self._unwritten = b""
        self._ending = False
        self._awaiting = False
        self.attach_by = attach_by
        self.waiting = True
        """Nobody has attached yet."""

    @property
    def blocked(self) -> bool:
        """Whether the client has yet to take what was sent last."""
        return bool(self._unsent)

    def attach(self, client: socket.socket) -> None:
        self.waiting = False
        self._client = client
        self._loop.watch(client.fileno(), self._hear)

    def send(self, stream: bytes, data: bytes) -> None:
        """Pass output on; when `blocked` afterwards, the caller reads nothing more until `resume` is called."""
        if self._client is None:
            return
        message = stream + data
        try:
            self._client.send(message)
        except BlockingIOError:
            self._unsent = message
            self._listen()
        except OSError:
            self._drop()

    def resize(self, rows: int, columns: int) -> None:
        if self._tty and self._stdin >= 0:
            fcntl.ioctl(self._stdin, _SET_WINDOW, struct.pack("=HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        """Let the client see the end; nothing is reported as lost any more."""
        client, self._client = self._client, None
        if client is not None:
            self._loop.unwatch(client.fileno())
            client.close()
        self._close_stdin()

    def _listen(self) -> None:
        """Hear what can be acted on: input unless stdin is full, and room to send once something waits."""
        if self._client is not None:
            hear = 0 if self._unwritten or self._ending else select.EPOLLIN
            self._loop.change(self._client.fileno(), hear | (select.EPOLLOUT if self._unsent else 0))

    def _hear(self) -> None:
        client = self._client
        if client is None:
            return
        if self._unsent:
            self._flush(client)
        if self._client is None or self._unwritten or self._ending:
            self._notice_end()
            return
        try:
            message = client.recv(READ_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        kind = message[:1]
        if kind == b"i":
            self._unwritten = message[1:]
            self._write()
        elif kind == b"e":
            self._ending = True
            self._write()
        else:
            self._drop()

    def _notice_end(self) -> None:
        """While nothing is read from it, a client that has gone shows only as a hang-up."""
        if self._client is not None:
            poll = select.poll()
            poll.register(self._client, 0)
            if poll.poll(0):
                self._drop()

    def _flush(self, client: socket.socket) -> None:
        try:
            client.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            self._drop()
            return
        self._unsent = b""
        self._listen()
        self._resume()

    def _write(self) -> None:
        """Bring to the command what the client sent."""
        stdin = self._stdin
        if stdin < 0:
            self._unwritten = b""
            return
        if self._ending and self._tty and not self._unwritten:
            self._unwritten, self._ending = _END_OF_TRANSMISSION, False
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(stdin, self._unwritten) :]
        except BlockingIOError:
            self._await_room()
            return
        except OSError:
            # the command has closed its input: what else is typed goes nowhere, as in a local pipe
            self._close_stdin()
        if self._ending:
            self._close_stdin()
        else:
            self._stop_awaiting()
        self._listen()

    def _await_room(self) -> None:
        if not self._awaiting:
            self._awaiting = True
            self._loop.watch(self._stdin, self._write, select.EPOLLOUT)
        self._listen()

    def _stop_awaiting(self) -> None:
        if self._awaiting:
            self._awaiting = False
            self._loop.unwatch(self._stdin)

    def _close_stdin(self) -> None:
        if self._stdin >= 0:
            self._stop_awaiting()
            os.close(self._stdin)
            self._stdin = -1
        self._unwritten, self._ending = b"", False

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        self._unsent = b""
        self._loop.unwatch(client.fileno())
        client.close()
        if not self._tty:
            self._close_stdin()
        self._lost()
        self._resume()
