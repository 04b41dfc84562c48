"""Streams that outlive their connections: an app's log and a deployment's events.

A log is resumed by the numbers of its lines (`LogCursor`), events by `Last-Event-ID`.
"""

from __future__ import annotations

import json
import random
import time

from aether.client.parse import EventParser, LineSplitter, LineTooLong
from aether.client.transport import StreamBroken
from aether.model.errors import AetherError, NetworkError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from aether.client.transport import Stream, Transport
    from aether.client.wire import Deployment, DeploymentEvent, LogLine

LOG_SILENCE_S = 45.0
"""Three of the server's keep-alive periods."""
EVENT_SILENCE_S = 30.0
PATIENCE_S = 600.0
"""How long a follower keeps trying to reach a server that was there before."""
_ALL_LINES = 1_000_000_000
_OVERLAP_S = 5
_NAMED = 100
"""Instances whose positions a request tells; the rest is dropped here when it comes again."""
_REMEMBERED = 2000
_TRANSIENT = frozenset(
    {"service_unavailable", "bad_gateway", "gateway_timeout", "rate_limited", "internal", "network"}
)


class LogCursor:
    """Remembers which lines were handed on, so that a replay repeats none and skips none.

    The lines of an instance are numbered (`seq`), so after a break the server is asked for what follows the last
    number of each. Instances not seen yet are asked for from `_OVERLAP_S` before the newest line: the server sends
    lines in the order of time, give or take what was just being written.
    """

    def __init__(self, *, tail: int | None = None, since: str | None = None) -> None:
        self._tail = tail
        self._since = since
        self._first = ""
        self._newest = ""
        self._connected_at = ""
        self._seen: dict[str, int] = {}
        """Instance → number of its last line, the instance that wrote last at the end."""

    def query(self) -> dict[str, str | int | None]:
        """What to ask the server for on the next connection; call it once for each."""
        if self._newest:
            # never before the first line that was shown: what `tail` left out stays out
            since = max(self._first, _earlier(self._newest, _OVERLAP_S))
            known = list(self._seen.items())[-_NAMED:]
            after = ",".join(f"{instance}:{seq}" for instance, seq in known)
            return {"since": since, "after": after, "tail": _ALL_LINES}
        if self._connected_at:
            # connected once and saw nothing: what is there now is new, unless the user wanted no old lines at all
            return {"since": self._since or (self._connected_at if self._tail == 0 else None), "tail": _ALL_LINES}
        return {"since": self._since, "tail": self._tail}

    def connected(self, moment: str) -> None:
        """The server answered; `moment` is its clock in ISO-8601."""
        self._connected_at = self._connected_at or moment

    def admit(self, record: LogLine) -> bool:
        """Whether `record` is new; from then on it counts as handed on."""
        instance, seq = record["instance"], record["seq"]
        last = self._seen.pop(instance, 0)
        self._seen[instance] = max(seq, last)
        if seq <= last:
            return False
        moment = record["time"]
        if moment > self._newest:
            self._newest = moment
            self._first = self._first or moment
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return True


class _Patience:
    """Waits between attempts, longer each time, and gives up after `limit_s` seconds without a success."""

    def __init__(self, limit_s: float, pause: Callable[[float], None]) -> None:
        self._limit_s = limit_s
        self._pause = pause
        self._attempt = 0
        self._since = time.monotonic()

    def reset(self) -> None:
        self._attempt = 0
        self._since = time.monotonic()

    def wait(self, error: AetherError | None, deadline: float | None = None) -> None:
        """Raises the given error when patience has run out."""
        now = time.monotonic()
        if now - self._since > self._limit_s:
            raise error or NetworkError("the server keeps ending the stream")
        seconds = min(5.0, 0.1 * 2 ** min(self._attempt, 10)) * (0.5 + random.random() / 2)
        self._attempt += 1
        self._pause(seconds if deadline is None else max(0.0, min(seconds, deadline - now)))


def follow_log(
    transport: Transport,
    app: str,
    *,
    tail: int | None = 100,
    since: str | None = None,
    follow: bool = True,
    process: str | None = None,
    on_state: Callable[[str], None] | None = None,
    silence_s: float = LOG_SILENCE_S,
    patience_s: float = PATIENCE_S,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[list[tuple[bytes, LogLine]]]:
    """Yield the lines of an app as they come, over any number of connections, none twice and none left out: each as
    the server sent it, and decoded. A line with `skipped` stands for those that were rotated away before they could
    be sent. An empty list is a sign of life of the server. Ends by itself only when `follow` is false. `tail` None
    means all, `process` None every process type. Raises what the first connection raises, and later NetworkError
    after `patience_s` seconds without the server, or what the server says when it is not transient (the app was
    deleted, the token revoked).
    """
    on_state = _once(on_state)
    cursor = LogCursor(tail=_ALL_LINES if tail is None else tail, since=since)
    patience = _Patience(patience_s, pause)
    connected = False
    while True:
        failure: AetherError | None = None
        try:
            query = {**cursor.query(), "follow": "true" if follow else None, "process": process}
            with transport.stream(f"/apps/{app}/logs", query=query, headers=_ACCEPT_NDJSON) as stream:
                cursor.connected(_server_time(stream))
                if connected and on_state is not None:
                    on_state("connected again")
                connected = True
                splitter = LineSplitter()
                while data := stream.read(silence_s):
                    patience.reset()
                    lines = [(line, _decoded(line)) for line in splitter.feed(data) if line]
                    yield [line for line in lines if cursor.admit(line[1])]
            if not follow:
                return
        except AetherError as error:
            if not connected or error.code not in _TRANSIENT:
                raise
            failure = error
        except LineTooLong as error:
            raise NetworkError(str(error)) from error
        if on_state is not None:
            on_state(f"the log stream ended ({failure.message if failure else 'by the server'}); connecting again")
        patience.wait(failure)


def watch_deployment(
    transport: Transport,
    deployment_id: str,
    on_event: Callable[[DeploymentEvent], None],
    *,
    deadline: float | None = None,
    on_state: Callable[[str], None] | None = None,
    silence_s: float = EVENT_SILENCE_S,
    patience_s: float = PATIENCE_S,
    pause: Callable[[float], None] = time.sleep,
) -> Deployment:
    """Hand on every event of a deployment once and return the deployment when it has settled.

    `deadline` is in `time.monotonic()` seconds; raises TimeoutError when it passes first, NetworkError after
    `patience_s` seconds without the server, or what the server says when it is not transient.
    """
    on_state = _once(on_state)
    patience = _Patience(patience_s, pause)
    last_id = ""
    connected = False
    while deadline is None or time.monotonic() < deadline:
        failure: AetherError | None = None
        try:
            headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_id} if last_id else {})}
            path = f"/deployments/{deployment_id}/events"
            with transport.stream(path, headers=headers, timeout_s=_left(deadline, silence_s)) as stream:
                if connected and on_state is not None:
                    on_state("connected again")
                connected = True
                parser = EventParser()
                while data := stream.read(_left(deadline, silence_s)):
                    patience.reset()
                    for event in parser.feed(data):
                        if event.event == "end":
                            return _decoded(event.data)
                        if event.event == "phase" and _is_new(event.id, last_id):
                            last_id = event.id
                            on_event(_decoded(event.data))
                    if deadline is not None and time.monotonic() >= deadline:
                        raise TimeoutError
        except AetherError as error:
            # also on the first connection: whoever watches has just heard from this server
            if error.code not in _TRANSIENT:
                raise
            failure = error
        except LineTooLong as error:
            raise NetworkError(str(error)) from error
        if on_state is not None and not isinstance(failure, StreamBroken):
            on_state(f"lost the deployment's events ({failure.message if failure else 'by the server'}); retrying")
        patience.wait(failure, deadline)
    raise TimeoutError


_ACCEPT_NDJSON = {"Accept": "application/x-ndjson"}


def _once(on_state: Callable[[str], None] | None) -> Callable[[str], None] | None:
    """`on_state` without the repetitions that every further attempt of one outage brings."""
    if on_state is None:
        return None
    last = ""

    def say(text: str) -> None:
        nonlocal last
        if text != last:
            last = text
            on_state(text)

    return say


def _is_new(event_id: str, last_id: str) -> bool:
    if not (event_id.isdigit() and last_id.isdigit()):
        return event_id != last_id or not event_id
    return int(event_id) > int(last_id)


def _left(deadline: float | None, at_most: float) -> float:
    return at_most if deadline is None else max(0.001, min(at_most, deadline - time.monotonic()))


def _decoded(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise NetworkError("the server sent something that is not JSON in its stream") from error


def _server_time(stream: Stream) -> str:
    from email.utils import parsedate_to_datetime

    from aether.model.times import now_us, to_iso

    try:
        moment = parsedate_to_datetime(stream.headers.get("date", ""))
    except ValueError:
        return to_iso(now_us())
    return to_iso(int(moment.timestamp()) * 1_000_000)


def _earlier(moment: str, seconds: int) -> str:
    from aether.model.times import from_iso, to_iso

    return to_iso(max(0, from_iso(moment) - seconds * 1_000_000))
