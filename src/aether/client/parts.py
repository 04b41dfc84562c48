"""Decisions of an upload, pure: which parts are still to be sent, what to do about a failure, and what a refused URL
says of the store. `now` is a monotonic clock's everywhere."""

from __future__ import annotations

from aether.client.failures import Unreached
from aether.model.errors import AetherError, ClientError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aether.client.wire import ArrivedPart

AGAIN = "again"
RESIGN = "resign"
ANEW = "anew"
FAIL = "fail"

PATIENCE_S = 60.0
"""How long an outage may last."""
MIN_ATTEMPTS = 5
"""Made however long each of them takes."""
MAX_REFUSALS = 3
"""Of signed URLs, one after the other: a store that refuses valid ones will refuse the next one too."""
_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 4.0
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
# what S3 answers with 400 although only the connection was at fault
_BROKEN_OFF = frozenset({"RequestTimeout", "IncompleteBody", "OperationAborted", "SlowDown"})
_HEX = frozenset("0123456789abcdef")


class Piece:
    """A part of a file."""

    __slots__ = ("number", "offset", "size")

    def __init__(self, number: int, offset: int, size: int) -> None:
        self.number = number
        self.offset = offset
        self.size = size


def pieces(size_bytes: int, part_size_bytes: int) -> list[Piece]:
    """Every part, in order; the last one is what is left."""
    return [
        Piece(number, offset, min(part_size_bytes, size_bytes - offset))
        for number, offset in enumerate(range(0, size_bytes, part_size_bytes), 1)
    ]


def kept(
    every: Iterable[Piece], arrived: Iterable[ArrivedPart], md5: Callable[[Piece], str]
) -> tuple[dict[int, str], dict[int, str]]:
    """Etags of the parts that need not be sent again, and of those that may be: their size is right, and their etag
    where it is an MD5.

    Stores that encrypt with keys of their own name parts by what only looks like an MD5, and others list what was cut
    off on its way as if it were whole. When not one etag is the MD5 of the local bytes, the parts are of the second
    kind: whether this store's etags are MD5s shows when a part has just been sent.
    """
    by_number = {piece.number: piece for piece in every}
    right = [part for part in arrived if _is_whole(by_number.get(part["part_number"]), part)]
    named = [part for part in right if looks_like_md5(bare(part["etag"]))]
    wrong = {part["part_number"] for part in named if md5(by_number[part["part_number"]]) != bare(part["etag"])}
    sure = {part["part_number"]: part["etag"] for part in right if part["part_number"] not in wrong}
    unsure = {part["part_number"]: part["etag"] for part in named if len(wrong) == len(named)}
    return sure, unsure


def _is_whole(piece: Piece | None, part: ArrivedPart) -> bool:
    return piece is not None and piece.size == part["size_bytes"] and bool(bare(part["etag"]))


def bare(etag: str) -> str:
    return etag.strip().strip('"')


def looks_like_md5(etag: str) -> bool:
    return len(etag) == 32 and _HEX.issuperset(etag)


def step_after(error: AetherError) -> str:
    """What to do about a failed call of an upload: AGAIN after a pause, RESIGN (the signed URL is no good any more),
    begin the upload ANEW (it is gone), or FAIL."""
    if isinstance(error, Unreached):
        return AGAIN
    if isinstance(error, ClientError):
        return FAIL
    details = error.details or {}
    reason = details.get("reason")
    if reason == "disk_full" or (error.status == 500 and "trace_id" in details):
        return FAIL  # a fault in the API itself will be there the next time; a store's own 500 passes
    if error.status in _PASSING or reason in _BROKEN_OFF:
        return AGAIN
    if error.status == 403:
        return RESIGN
    return ANEW if error.status == 404 else FAIL


def pause_before(attempt: int, draw: float) -> float:
    """Seconds to wait before attempt number `attempt` (from 2 on); `draw` is from 0 to 1."""
    return min(_PAUSE_S * 2 ** (attempt - 2), _LONGEST_PAUSE_S) * (0.5 + draw / 2)


class Life:
    """Of a signed URL: `asked` is when the server was asked for it, `secs` how long it lives, if the server says so.
    The clocks of client, server and store need not agree."""

    __slots__ = ("asked", "secs")

    def __init__(self, asked: float, secs: float | None) -> None:
        self.asked = asked
        self.secs = secs

    def is_young(self, now: float) -> bool:
        """Whether there is time enough left to use it: half of it."""
        return self.secs is None or now - self.asked < self.secs / 2

    def may_be_over(self, now: float) -> bool:
        return self.secs is not None and now - self.asked >= self.secs


class Patience:
    """Counts the failures of one call, or of one part, since it last went well."""

    __slots__ = ("attempts", "refusals", "since")

    def __init__(self) -> None:
        self.attempts = 0
        self.refusals = 0
        self.since: float | None = None

    def step(self, error: AetherError, now: float, life: Life | None = None) -> str:
        """As `step_after`, but FAIL when it was tried for long enough. `life` is that of the URL that was used: being
        refused after its end says nothing of the store."""
        step = step_after(error)
        self.attempts += 1
        if self.since is None:
            self.since = now
        if step != RESIGN:
            self.refusals = 0
        elif life is None or not life.may_be_over(now):
            self.refusals += 1
        tired = self.attempts >= MIN_ATTEMPTS and now - self.since >= PATIENCE_S
        return FAIL if tired or self.refusals >= MAX_REFUSALS else step
