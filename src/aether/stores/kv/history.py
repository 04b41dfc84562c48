"""The tables of the key-value store on SQLite and what one transaction does to them.

Every version of every key is a row of `history`, in the order in which they came to be. A version is the state of its
key from `revision` until before `until`; the newest has none. A deletion is a row too, for those who watch, and is
nobody's state: its `until` is its own revision. So the state at a revision, the changes since a revision and what a
compaction may take away are each one condition.

Functions take the connection inside a transaction; who opens it and who is woken is left to
`aether.stores.kv.sqlite`.
"""

from __future__ import annotations

import operator
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from aether.model.errors import BadRequest, Compacted, LeaseGone
from aether.model.kv import (
    Batch,
    Change,
    Compare,
    Delete,
    Event,
    Field,
    Is,
    KeyValue,
    LeaseInfo,
    Listing,
    Operation,
    Outcome,
    Put,
    prefix_end,
)

VERSION = 1
LAYOUT = (
    """CREATE TABLE state (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        revision INTEGER NOT NULL, compacted INTEGER NOT NULL, past_bytes INTEGER NOT NULL)""",
    """CREATE TABLE history (
        id INTEGER PRIMARY KEY,
        revision INTEGER NOT NULL, until INTEGER, key BLOB NOT NULL, value BLOB NOT NULL,
        create_revision INTEGER NOT NULL, version INTEGER NOT NULL, lease INTEGER NOT NULL)""",
    "CREATE INDEX history_revision ON history (revision)",
    "CREATE UNIQUE INDEX history_newest ON history (key) WHERE until IS NULL",
    "CREATE INDEX history_lease ON history (lease) WHERE until IS NULL AND lease != 0",
    "CREATE INDEX history_past ON history (until) WHERE until IS NOT NULL",
    """CREATE TABLE leases (
        id INTEGER PRIMARY KEY, ttl INTEGER NOT NULL, boot TEXT NOT NULL, deadline REAL NOT NULL)""",
    "CREATE INDEX leases_deadline ON leases (boot, deadline)",
    # etcd's first revision, so that 0 can always mean "none"
    "INSERT INTO state VALUES (1, 1, 0, 0)",
)
BATCH_EVENTS = 512
BATCH_BYTES = 1 << 20
ROW_BYTES = 200
"""About what a version takes besides its value."""
_COLUMNS = "key, value, create_revision, revision, version, lease"
_RELATIONS = {Is.EQUAL: operator.eq, Is.UNEQUAL: operator.ne, Is.LESS: operator.lt, Is.GREATER: operator.gt}
_Db = sqlite3.Connection


def revision_of(db: _Db) -> int:
    return int(db.execute("SELECT revision FROM state").fetchone()[0])


# --- reading


def get(db: _Db, key: bytes, revision: int) -> KeyValue | None:
    """Raises Compacted and BadRequest."""
    if revision:
        _check_readable(db, revision)
    found = next(_rows(db, key, None, revision, exact=True), None)
    return None if found is None else _kv(found)


def listing(db: _Db, prefix: bytes, revision: int, after: bytes, limit: int) -> Listing:
    """Raises Compacted and BadRequest."""
    current = revision_of(db)
    if revision:
        _check_readable(db, revision)
    start = max(prefix, after + b"\0") if after else prefix
    rows = _rows(db, start, prefix_end(prefix), revision)
    items: list[KeyValue] = []
    for row in rows:
        if limit and len(items) == limit:
            return Listing(revision or current, tuple(items), more=True)
        items.append(_kv(row))
    return Listing(revision or current, tuple(items))


def changes(db: _Db, since: int, prefix: bytes) -> tuple[Batch, bool]:
    """Changes from the revision `since` on, as many as one batch holds; and whether these are all.

    Raises Compacted."""
    current, compacted = db.execute("SELECT revision, compacted FROM state").fetchone()
    if since < compacted:
        raise Compacted(f"changes before revision {compacted} are no longer kept", revision=compacted)
    end = prefix_end(prefix)
    bound, arguments = _range(prefix, end)
    rows = db.execute(
        f"SELECT {_COLUMNS}, until = revision FROM history WHERE revision >= ? AND {bound} ORDER BY id",
        (since, *arguments),
    )
    events: list[Event] = []
    size = 0
    for row in rows:
        if (len(events) >= BATCH_EVENTS or size >= BATCH_BYTES) and row[3] != events[-1].kv.mod_revision:
            return Batch(events[-1].kv.mod_revision, tuple(events)), False
        events.append(Event(Change.DELETE if row[6] else Change.PUT, _kv(row)))
        size += len(row[1]) + ROW_BYTES
    return Batch(max(current, since - 1), tuple(events)), True


def _rows(db: _Db, start: bytes, end: bytes | None, revision: int, *, exact: bool = False) -> Iterator[Any]:
    bound, arguments = ("key = ?", [start]) if exact else _range(start, end)
    if not revision:
        return db.execute(f"SELECT {_COLUMNS} FROM history WHERE until IS NULL AND {bound} ORDER BY key", arguments)
    return db.execute(
        f"SELECT {_COLUMNS} FROM history WHERE {bound} AND revision <= ? AND (until IS NULL OR until > ?) "
        "ORDER BY key",
        [*arguments, revision, revision],
    )


def _range(start: bytes, end: bytes | None) -> tuple[str, list[bytes]]:
    return ("key >= ?", [start]) if end is None else ("key >= ? AND key < ?", [start, end])


def _kv(row: Any) -> KeyValue:
    return KeyValue(row[0].decode(), row[1], *row[2:6])


def _check_readable(db: _Db, revision: int) -> None:
    current, compacted = db.execute("SELECT revision, compacted FROM state").fetchone()
    if revision < compacted:
        raise Compacted(f"states before revision {compacted} are no longer kept", revision=compacted)
    if revision > current:
        raise BadRequest(f"revision {revision} has not come yet: the newest is {current}")


# --- changing


class Clock:
    """The moment at which a transaction looks at leases: a time of one boot."""

    __slots__ = ("boot", "now")

    def __init__(self, boot: str, now: float) -> None:
        self.boot = boot
        self.now = now


def transact(
    db: _Db, clock: Clock, when: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation]
) -> Outcome:
    """Raises LeaseGone; the caller undoes what was done until then."""
    before = revision_of(db)
    succeeded = all(_holds(db, condition) for condition in when)
    change = _Change(db, before + 1)
    results: list[tuple[KeyValue, ...]] = []
    for operation in then if succeeded else otherwise:
        match operation:
            case Put():
                if operation.lease:
                    _check_lease(db, clock, operation.lease)
                change.put(operation.key.encode(), operation.value, operation.lease)
                results.append(())
            case Delete():
                results.append(change.delete(_newest(db, operation)))
            case _:
                results.append(tuple(map(_kv, _newest(db, operation))))
    return Outcome(succeeded, change.done(), tuple(results))


class _Change:
    """What one revision changes."""

    def __init__(self, db: _Db, revision: int) -> None:
        self._db = db
        self._revision = revision
        self._past_bytes = 0
        self._changed = False

    def put(self, key: bytes, value: bytes, lease: int) -> None:
        newest = "SELECT create_revision, version, length(value) FROM history WHERE until IS NULL AND key = ?"
        found = self._db.execute(newest, (key,)).fetchone()
        created, version = self._revision, 0
        if found is not None:
            created, version, size = found
            self._end(key, size)
        self._add(None, key, value, created, version + 1, lease)

    def delete(self, rows: Sequence[Any]) -> tuple[KeyValue, ...]:
        for row in rows:
            self._end(row[0], len(row[1]))
            self._add(self._revision, row[0], b"", 0, 0, 0)
            self._past_bytes += ROW_BYTES
        return tuple(map(_kv, rows))

    def done(self) -> int:
        """The store's revision from now on."""
        if not self._changed:
            return self._revision - 1
        self._db.execute(
            "UPDATE state SET revision = ?, past_bytes = past_bytes + ?", (self._revision, self._past_bytes)
        )
        return self._revision

    def _end(self, key: bytes, size: int) -> None:
        self._db.execute("UPDATE history SET until = ? WHERE until IS NULL AND key = ?", (self._revision, key))
        self._past_bytes += size + ROW_BYTES

    def _add(self, until: int | None, key: bytes, value: bytes, created: int, version: int, lease: int) -> None:
        self._db.execute(
            "INSERT INTO history (revision, until, key, value, create_revision, version, lease) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (self._revision, until, key, value, created, version, lease),
        )
        self._changed = True


def _newest(db: _Db, operation: Operation) -> list[Any]:
    key = operation.key.encode()
    if isinstance(operation, Put) or not operation.prefix:
        return list(_rows(db, key, None, 0, exact=True))
    return list(_rows(db, key, prefix_end(key), 0))


def _holds(db: _Db, condition: Compare) -> bool:
    found = get(db, condition.key.encode(), 0)
    actual: int | bytes
    match condition.field:
        case Field.VALUE:
            if found is None:
                return False
            actual = found.value
        case Field.CREATE:
            actual = found.create_revision if found else 0
        case Field.MOD:
            actual = found.mod_revision if found else 0
        case Field.VERSION:
            actual = found.version if found else 0
    return bool(_RELATIONS[condition.relation](actual, condition.target))


# --- leases


def grant(db: _Db, clock: Clock, lease: int, ttl_secs: int) -> None:
    db.execute("INSERT INTO leases VALUES (?, ?, ?, ?)", (lease, ttl_secs, clock.boot, clock.now + ttl_secs))


def keep_alive(db: _Db, clock: Clock, lease: int) -> int:
    """Raises LeaseGone."""
    ttl_secs, _ = _check_lease(db, clock, lease)
    db.execute("UPDATE leases SET deadline = ? WHERE id = ?", (clock.now + ttl_secs, lease))
    return ttl_secs


def revoke(db: _Db, clock: Clock, lease: int) -> None:
    """Raises LeaseGone."""
    _check_lease(db, clock, lease)
    _end_lease(db, lease)


def lease_info(db: _Db, clock: Clock, lease: int) -> LeaseInfo:
    """Raises LeaseGone."""
    ttl_secs, deadline = _check_lease(db, clock, lease)
    keys = tuple(row[0].decode() for row in _of_lease(db, lease))
    return LeaseInfo(lease, ttl_secs, deadline - clock.now, keys)


def next_deadline(db: _Db, boot: str) -> float | None:
    """When, on the clock of this boot, the first lease ends; minus infinity where one is of another boot."""
    if db.execute("SELECT 1 FROM leases WHERE boot != ? LIMIT 1", (boot,)).fetchone():
        return float("-inf")
    found = db.execute("SELECT min(deadline) FROM leases WHERE boot = ?", (boot,)).fetchone()[0]
    return None if found is None else float(found)


def expire(db: _Db, clock: Clock) -> int:
    """End the leases whose time is over; returns how many."""
    over = db.execute(
        "SELECT id FROM leases WHERE boot != ? OR deadline <= ? ORDER BY deadline, id", (clock.boot, clock.now)
    ).fetchall()
    for (lease,) in over:
        _end_lease(db, lease)
    return len(over)


def _end_lease(db: _Db, lease: int) -> None:
    change = _Change(db, revision_of(db) + 1)
    change.delete(_of_lease(db, lease))
    change.done()
    db.execute("DELETE FROM leases WHERE id = ?", (lease,))


def _of_lease(db: _Db, lease: int) -> list[Any]:
    return db.execute(
        f"SELECT {_COLUMNS} FROM history WHERE until IS NULL AND lease != 0 AND lease = ? ORDER BY key", (lease,)
    ).fetchall()


def _check_lease(db: _Db, clock: Clock, lease: int) -> tuple[int, float]:
    found = db.execute(
        "SELECT ttl, deadline FROM leases WHERE id = ? AND boot = ? AND deadline > ?", (lease, clock.boot, clock.now)
    ).fetchone()
    if found is None:
        raise LeaseGone(f"the lease {lease:x} has expired or was revoked")
    return found


# --- compaction


def compact(db: _Db, revision: int) -> None:
    """Raises Compacted and BadRequest."""
    current, compacted = db.execute("SELECT revision, compacted FROM state").fetchone()
    if revision <= compacted:
        raise Compacted(f"history before revision {compacted} is gone already", revision=compacted)
    if revision > current:
        raise BadRequest(f"revision {revision} has not come yet: the newest is {current}")
    _forget(db, revision)


def bound(db: _Db, revisions: int, past_bytes: int) -> None:
    """Forget the oldest history, some at a time, where there is a quarter more than `revisions`, or more than
    `past_bytes` of it. The newest change is never forgotten."""
    current, compacted, size = db.execute("SELECT revision, compacted, past_bytes FROM state").fetchone()
    if current - compacted > revisions + revisions // 4:
        _forget(db, current - revisions)
        current, compacted, size = db.execute("SELECT revision, compacted, past_bytes FROM state").fetchone()
    while size > past_bytes and compacted < current:
        compacted = compacted + (current - compacted + 1) // 2
        _forget(db, compacted)
        size = db.execute("SELECT past_bytes FROM state").fetchone()[0]


def _forget(db: _Db, revision: int) -> None:
    gone = "FROM history WHERE until <= ? AND revision < ?"
    size, count = db.execute(f"SELECT total(length(value)), count(*) {gone}", (revision, revision)).fetchone()
    db.execute(f"DELETE {gone}", (revision, revision))
    db.execute(
        "UPDATE state SET compacted = ?, past_bytes = max(0, past_bytes - ?)",
        (revision, int(size) + count * ROW_BYTES),
    )
