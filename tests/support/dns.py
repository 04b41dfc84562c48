"""A resolver on loopback that answers from a dictionary, over UDP and TCP."""

from __future__ import annotations

import ipaddress
import socketserver
import struct
import threading

_KINDS = {1: "A", 16: "TXT", 28: "AAAA"}


class Resolver:
    """`records` maps (name, kind) to values; what is not there does not exist."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], list[str]] = {}
        self.asked: list[tuple[str, str]] = []
        resolver = self

        class Datagram(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                question, sock = self.request
                sock.sendto(resolver.answer(question), self.client_address)

        class Stream(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while len(size := self.rfile.read(2)) == 2:
                    answer = resolver.answer(self.rfile.read(struct.unpack("!H", size)[0]))
                    self.wfile.write(struct.pack("!H", len(answer)) + answer)

        class Streams(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self._servers: list[socketserver.BaseServer] = []
        while not self._servers:
            streams = Streams(("127.0.0.1", 0), Stream)
            try:
                self._servers = [socketserver.UDPServer(streams.server_address, Datagram), streams]
            except OSError:  # somebody has that port for UDP
                streams.server_close()
        self.port = int(streams.server_address[1])
        self._threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in self._servers]

    def __enter__(self) -> Resolver:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join(5)
            server.server_close()

    def answer(self, question: bytes) -> bytes:
        labels: list[str] = []
        at = 12
        while size := question[at]:
            labels.append(question[at + 1 : at + 1 + size].decode())
            at += 1 + size
        (kind,) = struct.unpack_from("!H", question, at + 1)
        asked = ".".join(labels).lower(), _KINDS.get(kind, str(kind))
        self.asked.append(asked)
        values = [_data(asked[1], value) for value in self.records.get(asked, [])]
        known = any(name == asked[0] for name, _ in self.records)
        head = question[:2] + struct.pack("!HHHHH", 0x8180 | (0 if known else 3), 1, len(values), 0, 0)
        body = b"".join(b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 0, len(data)) + data for data in values)
        return head + question[12 : at + 5] + body


def _data(kind: str, value: str) -> bytes:
    if kind != "TXT":
        return ipaddress.ip_address(value).packed
    raw = value.encode()
    return b"".join(bytes([len(part)]) + part for part in (raw[i : i + 255] for i in range(0, len(raw), 255)))
