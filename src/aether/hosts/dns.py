"""Asking a recursive resolver for TXT, A and AAAA records: one question, UDP first, TCP for a long answer.

The operating system's resolver cannot be asked for TXT, and which one answers must be the operator's choice.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import struct
from pathlib import Path

A, AAAA, TXT = 1, 28, 16
_IN = 1
_TRUNCATED = 0x0200
_NO_SUCH_NAME = 3
_TRIES = 2
_WAIT_SECS = 3.0


class DnsError(Exception):
    """There is no usable answer; the message says why."""


def system_resolvers(path: Path = Path("/etc/resolv.conf")) -> list[tuple[str, int]]:
    """The name servers of this machine."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    words = [line.split() for line in lines]
    return [(w[1].partition("%")[0], 53) for w in words if len(w) > 1 and w[0] == "nameserver"]


def parse_resolver(text: str) -> tuple[str, int]:
    """`address`, `address:port` or `[address]:port`. Raises ValueError."""
    host, _, port = text.rpartition(":") if text.count(":") == 1 or text.startswith("[") else (text, "", "")
    if text.startswith("[") and not text.rpartition("]")[2]:
        host, port = text, ""
    address = str(ipaddress.ip_address((host or text).strip("[]")))
    return address, int(port or 53)


async def lookup(name: str, kind: int, resolvers: list[tuple[str, int]]) -> list[str]:
    """The values of these records, none when the name or the record does not exist. Raises DnsError."""
    if not resolvers:
        raise DnsError("this machine has no resolver: set AETHER_DNS_SERVER")
    problem = ""
    for server in resolvers[:3] * _TRIES:
        question = ask(name, kind, os.urandom(2))
        try:
            async with asyncio.timeout(_WAIT_SECS):
                answer = await _udp(question, server)
                if struct.unpack_from("!H", answer, 2)[0] & _TRUNCATED:
                    answer = await _tcp(question, server)
            return read(answer, question, kind)
        except TimeoutError:
            problem = f"the resolver {server[0]} did not answer in time"
        except (OSError, asyncio.IncompleteReadError, struct.error, IndexError, ValueError) as error:
            problem = f"the resolver {server[0]} cannot be asked: {error}"
        except DnsError as error:
            problem = str(error)
    raise DnsError(problem)


def ask(name: str, kind: int, ident: bytes) -> bytes:
    """A question with recursion desired."""
    labels = b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split("."))
    return ident + struct.pack("!HHHHH", 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, _IN)


def read(answer: bytes, question: bytes, kind: int) -> list[str]:
    """The values in the answer section. Raises DnsError, and ValueError, IndexError or struct.error for nonsense."""
    ident, flags, questions, answers = struct.unpack_from("!2sHHH", answer)
    if ident != question[:2] or not flags & 0x8000 or answer[12 : len(question)] != question[12:] or questions != 1:
        raise DnsError("the resolver answered another question")
    code = flags & 0xF
    if code == _NO_SUCH_NAME:
        return []
    if code:
        raise DnsError(f"the resolver refused the question (code {code})")
    at = len(question)
    found: list[str] = []
    for _ in range(answers):
        at = _skip_name(answer, at)
        record, _, _, size = struct.unpack_from("!HHIH", answer, at)
        at += 10
        data = answer[at : at + size]
        if len(data) != size:
            raise DnsError("the resolver's answer is cut short")
        if record == kind:
            found.append(_text(data) if kind == TXT else str(ipaddress.ip_address(data)))
        at += size
    return found


def _skip_name(message: bytes, at: int) -> int:
    while length := message[at]:
        if length & 0xC0:
            return at + 2
        at += 1 + length
    return at + 1


def _text(data: bytes) -> str:
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        parts.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    return b"".join(parts).decode("utf-8", "replace")


class _Answer(asyncio.DatagramProtocol):
    def __init__(self, ident: bytes) -> None:
        self._ident = ident
        self.came: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        # what does not carry our id is somebody else's, or a guess
        if not self.came.done() and data[:2] == self._ident and len(data) >= 12:
            self.came.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.came.done():
            self.came.set_exception(exc)


async def _udp(question: bytes, server: tuple[str, int]) -> bytes:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(lambda: _Answer(question[:2]), remote_addr=server)
    try:
        transport.sendto(question)
        return await protocol.came
    finally:
        transport.close()


async def _tcp(question: bytes, server: tuple[str, int]) -> bytes:
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(struct.pack("!H", len(question)) + question)
        (size,) = struct.unpack("!H", await reader.readexactly(2))
        return await reader.readexactly(size)
    finally:
        writer.close()
