"""This process's standard streams joined to a run on the server, until the run has ended.

One poll loop moves bytes both ways; neither a full pipe behind stdout nor a command that reads nothing keeps the
connection from being answered (see `aether.api.relay` for the messages). A terminal is put into raw mode and set back
however this ends, short of kill -9.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections import deque

from aether.client.websocket import BINARY, TEXT, WebSocket
from aether.model.errors import NetworkError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

    from aether.client.transport import Transport

WINDOW_BYTES = 256 * 1024
ALIVE_S = 15.0
SILENCE_S = 45.0
_CHUNK = 16 * 1024
_PIPE_BYTES = 4096
"""So much can be written to a pipe that has room without waiting."""
_STDIN, _STDOUT, _STDERR = 0, 1, 2


class Hangup(KeyboardInterrupt):
    """SIGHUP or SIGTERM: leave, which ends the run."""

    def __init__(self, number: int) -> None:
        super().__init__("terminated")
        self.exit_code = 128 + number


def attach(transport: Transport, path: str, *, terminal: bool) -> dict[str, Any]:
    """Join the run at `path`; returns the server's word on how it ended.

    Raises NetworkError when the connection breaks (the run ends then), BrokenPipeError when nobody reads stdout,
    KeyboardInterrupt at the second Ctrl-C (the first goes to the command).
    """
    socket = WebSocket(transport.upgrade(path))
    try:
        with _Signals(terminal) as signals:
            if terminal:
                with _Raw(_STDIN):
                    return _Session(socket, signals, terminal=True).run()
            return _Session(socket, signals, terminal=False).run()
    finally:
        socket.close()


class _Session:
    def __init__(self, socket: WebSocket, signals: _Signals, *, terminal: bool) -> None:
        self._socket = socket
        self._signals = signals
        self._terminal = terminal
        self._reading = True
        self._unread = 0
        """Bytes of stdin that the command has not been given yet."""
        self._output: dict[int, deque[bytes]] = {_STDOUT: deque(), _STDERR: deque()}
        self._end: dict[str, Any] | None = None
        self._heard = self._said = time.monotonic()

    def run(self) -> dict[str, Any]:
        self._tell({"type": "ready", **self._size()})
        while True:
            self._wait()
            if self._end is not None and not any(self._output.values()):
                return self._end
            if self._socket.closed and self._end is None:
                raise NetworkError("the server ended the connection; the run is ended with it")

    def _wait(self) -> None:
        poll = select.poll()
        if not self._socket.closed:
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._socket.waiting_bytes else 0))
        poll.register(self._signals.wakeup, select.POLLIN)
        if self._reading and self._unread < WINDOW_BYTES and not self._end:
            poll.register(_STDIN, select.POLLIN)
        for fd, pieces in self._output.items():
            if pieces:
                poll.register(fd, select.POLLOUT)
        ready = {fd for fd, _ in poll.poll(1000)}
        for number in self._signals.taken():
            self._signalled(number)
        if self._socket.fileno() in ready or not self._socket.closed:
            self._socket.flush()
            self._hear()
        if _STDIN in ready:
            self._read()
        for fd, pieces in self._output.items():
            if fd in ready and pieces:
                self._write(fd, pieces)
        self._keep_alive()

    def _hear(self) -> None:
        for opcode, payload in self._socket.receive():
            self._heard = time.monotonic()
            if opcode == BINARY and payload[:1] in (b"\x01", b"\x02"):
                self._output[payload[0]].append(payload[1:])
                continue
            message = json.loads(payload)
            if message.get("type") == "ack":
                self._unread -= int(message["bytes"])
            elif message.get("type") == "end":
                self._end = message

    def _read(self) -> None:
        try:
            data = os.read(_STDIN, _CHUNK)
        except OSError:
            data = b""  # a closed stdin, or a terminal that hung up
        if data:
            self._unread += len(data)
            self._send(BINARY, data)
        else:
            self._reading = False
            self._tell({"type": "eof"})

    def _write(self, fd: int, pieces: deque[bytes]) -> None:
        piece = pieces[0]
        written = os.write(fd, piece[:_PIPE_BYTES])
        if written == len(piece):
            pieces.popleft()
        else:
            pieces[0] = piece[written:]
        if not self._socket.closed:
            self._tell({"type": "ack", "bytes": written})

    def _signalled(self, number: int) -> None:
        if number == signal.SIGWINCH:
            if self._terminal:
                self._tell({"type": "resize", **self._size()})
        elif number == signal.SIGINT and not self._signals.interrupted:
            self._signals.interrupted = True
            self._tell({"type": "signal", "number": int(signal.SIGINT)})
        elif number == signal.SIGINT:
            raise KeyboardInterrupt("interrupted twice: the run is ended")
        else:
            raise Hangup(number)

    def _keep_alive(self) -> None:
        now = time.monotonic()
        if self._end is None and now - self._heard > SILENCE_S:
            raise NetworkError(
                f"the server has said nothing for {SILENCE_S:.0f} s; the run is ended with the connection"
            )
        if now - self._said > ALIVE_S and not self._socket.closed:
            self._tell({"type": "alive"})

    def _tell(self, message: dict[str, Any]) -> None:
        self._send(TEXT, json.dumps(message).encode())

    def _send(self, opcode: int, payload: bytes) -> None:
        self._said = time.monotonic()
        self._socket.send(opcode, payload)

    def _size(self) -> dict[str, int]:
        if not self._terminal:
            return {}
        try:
            size = os.get_terminal_size(_STDIN)
        except OSError:
            return {}
        return {"rows": size.lines, "columns": size.columns}


class _Raw:
    """While entered, the terminal hands every key on as it is."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[Any] = []

    def __enter__(self) -> None:
        import termios
        import tty

        self._before = termios.tcgetattr(self._fd)
        tty.setraw(self._fd)

    def __exit__(self, *_: object) -> None:
        import termios

        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)


class _Signals:
    """While entered, signals are collected instead of acted upon; `wakeup` is readable when there is one."""

    def __init__(self, terminal: bool) -> None:
        self._numbers: list[int] = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
        if terminal:
            self._numbers.append(signal.SIGWINCH)
        self._before: dict[int, Any] = {}
        self._taken: list[int] = []
        self.interrupted = False
        self.wakeup, self._alarm = -1, -1

    def __enter__(self) -> _Signals:
        self.wakeup, self._alarm = os.pipe()
        os.set_blocking(self._alarm, False)
        signal.set_wakeup_fd(self._alarm, warn_on_full_buffer=False)
        for number in self._numbers:
            # an ignored signal (nohup, a job in the background) stays ignored
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self.wakeup)
        os.close(self._alarm)

    def taken(self) -> list[int]:
        if select.select([self.wakeup], [], [], 0)[0]:
            os.read(self.wakeup, 4096)
        taken, self._taken = self._taken, []
        return taken

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._taken.append(number)
