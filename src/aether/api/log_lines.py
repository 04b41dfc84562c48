"""A line of an app's log as the API writes it: one JSON object, put together from parts that are made once.

A flooding app writes a hundred thousand lines a second, and each passes through here; hence no general encoder.
"""

from __future__ import annotations

import msgspec

from aether.apps.log_merge import LogLine, Source
from aether.model.times import to_iso


class LogLineView(msgspec.Struct, omit_defaults=True):
    """One line of one instance. `release` is null while its rollout is under way."""

    time: str
    stream: str
    line: str
    """Without its newline, as the app wrote it; bytes that are not UTF-8 are replaced."""
    app: str
    release: int | None
    deployment_id: str
    digest: str
    process: str
    """web, a worker's or cron process's name, or release for the release command."""
    instance: str
    seq: int
    """The line's number among all that its instance wrote, from 1."""
    partial: bool = False
    """Goes on in the next line of the same instance and stream: it was longer than 16 KiB."""
    skipped: int = 0
    """On lines of the stream `aether`: so many lines, up to `seq`, were rotated away before they could be sent."""


class LineEncoder:
    """Encodes the lines of one app; every object ends with a newline."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._json = msgspec.json.Encoder()
        self._middles: dict[Source, bytes] = {}
        self._second = -1
        self._prefix = b""

    def __call__(self, line: LogLine) -> bytes:
        record, source = line
        time_ns, stream, text, partial, seq, skipped = record
        second, rest = divmod(time_ns, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._prefix = b'{"time":"' + to_iso(second * 1_000_000)[:20].encode()
        middle = self._middles.get(source)
        if middle is None:
            middle = self._middles[source] = self._middle(source)
        return b'%s%06dZ","stream":"%s","line":%s,%s%d%s%s}\n' % (
            self._prefix,
            rest // 1000,
            stream.encode(),
            self._json.encode(text),
            middle,
            seq,
            b',"partial":true' if partial else b"",
            b',"skipped":%d' % skipped if skipped else b"",
        )

    def _middle(self, source: Source) -> bytes:
        if len(self._middles) > 1000:  # a follower outlives any number of instances
            self._middles.clear()
        fields = {
            "app": self._app,
            "release": source.release,
            "deployment_id": source.deployment_id,
            "digest": source.digest,
            "process": source.process,
            "instance": source.instance_id,
        }
        return self._json.encode(fields)[1:-1] + b',"seq":'
