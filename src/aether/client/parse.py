"""Incremental parsers of the two streaming formats, pure: newline-delimited JSON and server-sent events.

Both take bytes in whatever pieces the network made of them and give the same result for every cutting.
Server-sent events follow the WHATWG HTML standard, section 9.2.6.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_LINE_BYTES = 16 * 1024 * 1024


class LineTooLong(ValueError):
    """The peer sent a line above MAX_LINE_BYTES."""


class LineSplitter:
    """Cuts a byte stream at `\\n`; a last line without one stays behind (it was cut off in transit)."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> "list[bytes]":
        """The lines that `data` completes, without their newline. Raises LineTooLong."""
        head, *tail = data.split(b"\n")
        self._keep(head)
        if not tail:
            return []
        lines = [b"".join(self._rest), *tail[:-1]]
        self._rest, self._size = [], 0
        self._keep(tail[-1])
        return lines

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > MAX_LINE_BYTES:
            raise LineTooLong(f"a line of the stream is longer than {MAX_LINE_BYTES} bytes")
        if piece:
            self._rest.append(piece)


class ServerEvent:
    """One dispatched event: its type, data, and the last event id in force when it was dispatched."""

    __slots__ = ("data", "event", "id")

    def __init__(self, event: str, data: str, last_id: str) -> None:
        self.event = event
        self.data = data
        self.id = last_id

    def __repr__(self) -> str:
        return f"ServerEvent({self.event!r}, {self.data!r}, {self.id!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ServerEvent) and (self.event, self.data, self.id) == (
            other.event,
            other.data,
            other.id,
        )

    def __hash__(self) -> int:
        return hash((self.event, self.data, self.id))


class EventParser:
    """Parses `text/event-stream`; an event that its blank line did not end is not dispatched."""

    def __init__(self) -> None:
        self.last_id = ""
        self._buffer = b""
        self._after_cr = False
        self._started = False
        self._event = ""
        self._data: list[str] = []

    def feed(self, data: bytes) -> "Iterator[ServerEvent]":
        """Yield the events that `data` completes. Raises LineTooLong."""
        for line in self._lines(data):
            if not self._started:
                self._started = True
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line:
                if self._data:
                    yield ServerEvent(self._event or "message", "\n".join(self._data), self.last_id)
                self._event, self._data = "", []
            elif not line.startswith(b":"):
                self._field(line.decode("utf-8", "replace"))

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self.last_id = value

    def _lines(self, data: bytes) -> "Iterator[bytes]":
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if not data:
            return
        self._after_cr = data.endswith(b"\r")
        *lines, self._buffer = (self._buffer + data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")).split(b"\n")
        if len(self._buffer) > MAX_LINE_BYTES:
            raise LineTooLong(f"a line of the stream is longer than {MAX_LINE_BYTES} bytes")
        yield from lines
