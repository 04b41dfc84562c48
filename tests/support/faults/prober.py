"""A visitor of one app: asks without pause, one connection for each request, and remembers every answer."""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """`at` is when the request was sent, `until` when its answer or failure came; `status` 0 is no answer."""

    at: float
    until: float
    status: int
    text: str

    @property
    def deployment(self) -> str:
        return self.text.split()[0] if self.status == 200 else ""

    @property
    def boot(self) -> str:
        return self.text.split()[1] if self.status == 200 else ""


class Prober:
    PAUSE_SECS = 0.008

    def __init__(self, port: int, app: str) -> None:
        self._port, self._app = port, app
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"prober of {app}")
        self.answers: list[Answer] = []

    def ask(self, path: str = "/") -> Answer:
        begun = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=15)
        try:
            connection.request("GET", path, headers={"Host": f"{self._app}.localhost", "Connection": "close"})
            reply = connection.getresponse()
            text, status = reply.read().decode(), reply.status
        except (OSError, http.client.HTTPException) as error:
            text, status = type(error).__name__, 0
        finally:
            connection.close()
        return Answer(begun, time.monotonic(), status, text)

    def _run(self) -> None:
        while not self._stop.wait(self.PAUSE_SECS):
            self.answers.append(self.ask())

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
