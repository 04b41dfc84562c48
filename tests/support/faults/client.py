"""A client of the API as a careful one is: it repeats what may be repeated while the server is away, and can vanish.

Written beside the product's own client on purpose: it shows that the API's contract is enough to lose nothing.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from typing import Any

PATIENCE_SECS = 25.0
_AGAIN = (502, 503, 504)


class Vanished(Exception):
    """The client was told to vanish: its connections are cut and it never comes back."""


class Client:
    def __init__(self, port: int, token: str) -> None:
        self._port, self._token = port, token
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None
        self._location = ""
        self.vanished = False

    def location(self, method: str, path: str) -> str:
        """Where a redirect points."""
        self.call(method, path)
        return self._location

    def vanish(self) -> None:
        """Cut the connection under way, from another thread."""
        with self._lock:
            self.vanished = True
            if self._connection is not None and self._connection.sock is not None:
                self._connection.sock.shutdown(socket.SHUT_RDWR)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        half_way: threading.Event | None = None,
        again: bool = True,
    ) -> tuple[int, Any]:
        """One call, repeated (`again`) until a server answers it. `half_way` is set when half the body was sent, and
        then the client takes its time."""
        until = time.monotonic() + PATIENCE_SECS
        while True:
            try:
                status, answer = self._once(method, path, body, headers or {}, half_way)
                if status not in _AGAIN or not again:
                    return status, answer
            except (OSError, http.client.HTTPException) as error:
                if self.vanished:
                    raise Vanished from error
                if not again or time.monotonic() > until:
                    raise
            if self.vanished:
                raise Vanished
            if time.monotonic() > until:
                return status, answer
            time.sleep(0.02)

    def _once(
        self, method: str, path: str, body: Any, headers: dict[str, str], half_way: threading.Event | None
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.connect()
            with self._lock:
                if self.vanished:
                    raise Vanished
                self._connection = connection
            payload = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.putrequest(method, path)
            connection.putheader("Authorization", f"Bearer {self._token}")
            for name, value in headers.items():
                connection.putheader(name, value)
            if payload is not None:
                connection.putheader("Content-Length", str(len(payload)))
                if not isinstance(body, bytes):
                    connection.putheader("Content-Type", "application/json")
            connection.endheaders()
            if payload is not None and half_way is not None:
                middle = len(payload) // 2
                connection.send(payload[:middle])
                half_way.set()
                time.sleep(0.06)
                connection.send(payload[middle:])
            elif payload is not None:
                connection.send(payload)
            reply = connection.getresponse()
            raw = reply.read()
            is_json = (reply.getheader("content-type") or "").startswith("application/json")
            self._location = reply.getheader("location") or ""
            return reply.status, json.loads(raw) if raw and is_json else raw
        finally:
            with self._lock:
                self._connection = None
            connection.close()

    def settled(self, deployment_id: str) -> dict[str, Any]:
        """Follow a deployment's events to their end over any number of connections."""
        until = time.monotonic() + PATIENCE_SECS
        while time.monotonic() < until:
            status, text = self.call("GET", f"/deployments/{deployment_id}/events")
            if status != 200:
                raise AssertionError(f"events of {deployment_id}: {status} {text}")
            last = text.decode().strip().rpartition("\n\n")[2].split("\n")
            if last[0] == "event: end":
                return json.loads(last[1].removeprefix("data: "))
        raise AssertionError(f"deployment {deployment_id} did not settle in {PATIENCE_SECS} s")
