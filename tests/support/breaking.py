"""A small real HTTP server that answers, and breaks, as a test's handlers say."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from typing import Any

Handler = Callable[["Exchange"], None]


@dataclass(frozen=True)
class Seen:
    """What a request was; an Exchange lives as long as its connection and serves many."""

    command: str
    path: str
    headers: Message
    body: bytes
    client_address: tuple[str, int]


class Exchange(http.server.BaseHTTPRequestHandler):
    """One request; the test's handler answers it, or does not."""

    protocol_version = "HTTP/1.1"
    server: Server  # type: ignore[assignment]

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = b"" if self.path.startswith("/early") else self.rfile.read(length)
        with self.server.lock:
            self.server.seen.append(Seen(self.command, self.path, self.headers, self.body, self.client_address))
            number = len([other for other in self.server.seen if other.path.split("?")[0] == self.path.split("?")[0]])
        self.number = number
        self.server.routes[self.path.split("?")[0]](self)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_any

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def reply(self, content: Any = None, status: int = 200, **headers: str) -> None:
        payload = b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def begin_chunks(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def cut(self) -> None:
        """End the connection without a word."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.routes: dict[str, Handler] = {}
        self.seen: list[Seen] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def paths(self) -> list[str]:
        return [seen.path for seen in self.seen]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that the test broke."""


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
