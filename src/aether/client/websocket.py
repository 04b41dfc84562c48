"""A WebSocket client on a plain or TLS socket that never blocks: frames in and out of buffers (RFC 6455).

It is driven by its user's poll loop; what the messages mean is the user's.
"""

from __future__ import annotations

import os
import ssl
import struct

from aether.model.errors import NetworkError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

TEXT, BINARY, _CLOSE, _PING, _PONG = 0x1, 0x2, 0x8, 0x9, 0xA
MAX_MESSAGE_BYTES = 1 << 20
_READ_BYTES = 64 * 1024


class Frames:
    """Bytes into messages; pure. Raises NetworkError for what no server sends."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._parts = bytearray()
        self._kind = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(opcode, payload) of every message that is complete by now; control frames among them."""
        self._data += data
        while (frame := self._next()) is not None:
            final, opcode, payload = frame
            if opcode >= _CLOSE:
                yield opcode, payload
                continue
            if bool(opcode) == bool(self._kind):
                raise NetworkError("the server broke the WebSocket protocol")
            self._kind = opcode or self._kind
            self._parts += payload
            if len(self._parts) > MAX_MESSAGE_BYTES:
                raise NetworkError("the server sent a message that is too long")
            if final:
                kind, whole = self._kind, bytes(self._parts)
                self._kind = 0
                self._parts.clear()
                yield kind, whole

    def _next(self) -> tuple[bool, int, bytes] | None:
        data = self._data
        if len(data) < 2:
            return None
        size, at = data[1] & 0x7F, 2
        if size == 126:
            if len(data) < 4:
                return None
            size, at = struct.unpack_from("!H", data, 2)[0], 4
        elif size == 127:
            if len(data) < 10:
                return None
            size, at = struct.unpack_from("!Q", data, 2)[0], 10
        if data[0] & 0x70 or data[1] & 0x80 or size > MAX_MESSAGE_BYTES:
            raise NetworkError("the server broke the WebSocket protocol")
        if len(data) < at + size:
            return None
        payload = bytes(data[at : at + size])
        final, opcode = bool(data[0] & 0x80), data[0] & 0x0F
        del data[: at + size]
        return final, opcode, payload


def frame(opcode: int, payload: bytes) -> bytes:
    """One masked frame, as clients must send them."""
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    key = os.urandom(4)
    mask = (key * (size // 4 + 1))[:size]
    masked = (int.from_bytes(payload, "big") ^ int.from_bytes(mask, "big")).to_bytes(size, "big")
    return head + key + masked


class WebSocket:
    """`closed` once the server has ended the connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._frames = Frames()
        self._out = bytearray()
        self.closed = False

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def waiting_bytes(self) -> int:
        """How much has yet to be sent."""
        return len(self._out)

    def send(self, opcode: int, payload: bytes) -> None:
        """Queue a message and send what goes at once."""
        self._out += frame(opcode, payload)
        self.flush()

    def flush(self) -> None:
        """Raises NetworkError."""
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return
        except OSError as error:
            raise NetworkError(f"the connection broke ({error.strerror or error})") from error

    def receive(self) -> list[tuple[int, bytes]]:
        """Messages that have come. Raises NetworkError when the connection broke."""
        found: list[tuple[int, bytes]] = []
        while not self.closed:
            try:
                data = self._sock.recv(_READ_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except OSError as error:
                raise NetworkError(f"the connection broke ({error.strerror or error})") from error
            if not data:
                self.closed = True
                break
            for opcode, payload in self._frames.feed(data):
                if opcode == _PING:
                    self.send(_PONG, payload)
                elif opcode == _CLOSE:
                    self.closed = True
                elif opcode != _PONG:
                    found.append((opcode, payload))
        return found

    def close(self) -> None:
        """Say goodbye if that goes at once, and close."""
        if not self.closed and not self._out:
            try:
                self.send(_CLOSE, struct.pack("!H", 1000))
            except NetworkError:
                self._out.clear()
        self._sock.close()
