"""Requests without pause to an app, from several threads, each connection used once."""

from __future__ import annotations

import threading
import time

from support.server import Server


class Hammer:
    """Sends from entry to exit; what came back is in `answers` and `failures`."""

    def __init__(self, up: Server, app: str, threads: int = 4) -> None:
        self._up, self._app = up, app
        self._stop = threading.Event()
        self.answers: list[tuple[int, str]] = []
        self.failures: list[Exception] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self._up.get(self._app))
            except Exception as error:
                self.failures.append(error)

    def wait(self, answers: int, secs: float = 30.0) -> None:
        """Let so many more answers come."""
        wanted, deadline = len(self.answers) + answers, time.monotonic() + secs
        while len(self.answers) < wanted:
            assert time.monotonic() < deadline, f"fewer than {answers} answers in {secs} s"
            time.sleep(0.01)

    def __enter__(self) -> Hammer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
