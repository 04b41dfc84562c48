"""Sends the parts of an upload over several connections at once, each part until it has arrived.

    Urls     signed URLs for parts, asked for in batches, thrown away at the first failure and when they grow old
    Lanes    one thread and one connection for each lane; whoever waits is told of every part

The thread that calls `run` only waits, so that Ctrl-C ends an upload at once: connections are cut, nobody writes any
more, and what has arrived stays with the server, which the next upload of the same artifact goes on from. What a
failure means is decided in `parts`; beginning an upload again is the caller's.
"""

from __future__ import annotations

import random
import threading
import time

from aether.client.parts import AGAIN, RESIGN, Life, Patience, pause_before
from aether.model.errors import AetherError, NetworkError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aether.client.parts import Piece
    from aether.client.transport import Transport
    from aether.client.upload import SourceFile
    from aether.client.wire import PartUrl

LANES = 4
BATCH = 8
"""URLs asked for at once: few enough that they are used while they are fresh."""
END_S = 2.0
"""How long lanes that were cut off may take to end; what is left of them dies with the process."""


class _Stopped(Exception):
    """The upload was given up: this lane has nothing to do any more."""


class Urls:
    """`sign` gets numbers of parts and returns their URLs; only one thread at a time is in it."""

    def __init__(
        self,
        numbers: Sequence[int],
        sign: Callable[[list[int]], list[PartUrl]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sign = sign
        self._clock = clock
        self._unsigned = list(numbers)
        self._signed: dict[int, tuple[PartUrl, Life]] = {}
        self._lock = threading.Lock()

    def of(self, number: int, *, alone: bool = False) -> tuple[PartUrl, Life]:
        """A URL to be used at once. `alone`: one that was refused is signed again without the next ones, which would
        only grow old."""
        with self._lock:
            now = self._clock()
            old = [other for other, (_, life) in self._signed.items() if not life.is_young(now)]
            for other in old:
                del self._signed[other]
            self._unsigned = sorted([*old, *self._unsigned])
            if number not in self._signed:
                ahead = [] if alone else [other for other in self._unsigned if other != number][: BATCH - 1]
                for url in self._sign([number, *ahead]):
                    self._signed[url["part_number"]] = url, Life(now, url.get("expires_in_secs"))
                self._unsigned = [other for other in self._unsigned if other not in self._signed]
            try:
                return self._signed.pop(number)
            except KeyError:
                raise NetworkError(f"the server gave no URL for part {number}") from None


class Lanes:
    """`on_sent` gets the bytes of all parts that have left; `on_trouble` what went wrong and is being tried again.
    Both are called from lanes, one at a time."""

    def __init__(
        self,
        transport: Transport,
        source: SourceFile,
        todo: Sequence[Piece],
        urls: Urls,
        *,
        on_sent: Callable[[int], None],
        on_trouble: Callable[[AetherError], None],
        lanes: int = LANES,
    ) -> None:
        self._source = source
        self._todo = list(reversed(todo))
        self._left = len(todo)
        self._urls = urls
        self._on_sent = on_sent
        self._on_trouble = on_trouble
        self._transports = [transport.sibling() for _ in range(min(lanes, len(todo)))]
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._sent: dict[int, int] = {}
        self._patience = {piece.number: Patience() for piece in todo}
        self.etags: dict[int, str] = {}
        """Of the parts that have arrived."""

    def run(self) -> None:
        """Returns when every part has arrived. Raises what ends the upload."""
        threads = [
            threading.Thread(target=self._lane, args=(transport,), name=f"upload-{number}", daemon=True)
            for number, transport in enumerate(self._transports)
        ]
        for thread in threads:
            thread.start()
        try:
            with self._changed:
                while self._left and self._failure is None:
                    self._changed.wait()
        finally:
            self._stop.set()
            if self._left:
                for transport in self._transports:
                    transport.cut()
            deadline = time.monotonic() + END_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._failure is not None:
            raise self._failure

    def _lane(self, transport: Transport) -> None:
        try:
            with transport:
                while (piece := self._next()) is not None:
                    self._arrived(piece, self._send(transport, piece))
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits in `run`
            with self._changed:
                if self._failure is None:
                    self._failure = error
                self._changed.notify_all()

    def _next(self) -> Piece | None:
        with self._changed:
            return self._todo.pop() if self._todo and not self._stop.is_set() else None

    def _send(self, transport: Transport, piece: Piece) -> str:
        patience = self._patience[piece.number]
        step = ""
        while True:
            life = None
            try:
                url, life = self._urls.of(piece.number, alone=step == RESIGN)
                body = self._source.part(piece.offset, piece.size, lambda sent: self._count(piece.number, sent))
                reply = transport.put(url["url"], body, headers=url["headers"])
                etag = reply.headers.get("etag")
                if not etag:
                    raise NetworkError(f"{reply.origin} took part {piece.number} without naming it: no ETag")
                return etag
            except AetherError as error:
                if self._stop.is_set():
                    raise _Stopped from None
                step = patience.step(error, time.monotonic(), life)
                if step not in (AGAIN, RESIGN):
                    raise
                with self._changed:
                    self._on_trouble(error)
            if self._stop.wait(pause_before(patience.attempts + 1, random.random())):
                raise _Stopped

    def _count(self, number: int, sent: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        with self._changed:
            self._sent[number] = sent
            self._on_sent(sum(self._sent.values()))

    def _arrived(self, piece: Piece, etag: str) -> None:
        self._count(piece.number, piece.size)
        with self._changed:
            self.etags[piece.number] = etag
            self._left -= 1
            # the store answers: an outage that others still count is over
            for patience in self._patience.values():
                patience.since = None
            self._changed.notify_all()
