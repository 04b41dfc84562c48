"""The tables of the queue on SQLite and what one transaction does to them.

A message waits while it has no consumer, and is taken while it has one. A delivery is told from an earlier or later
one of the same message by its number, so that every change of a delivery is one conditional statement.

Functions take the connection inside a transaction; waiting and the port are left to `aether.stores.queue.sqlite`.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from aether.model.errors import NotFound, QueueFull
from aether.model.queue import MAX_REASON_CHARS, DeadLetter, Delivery, Enqueued, Lengths, Limits, Message

VERSION = 1
LAYOUT = (
    # AUTOINCREMENT: the id of a message that is gone never comes back
    """CREATE TABLE messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        topic TEXT NOT NULL, body BLOB NOT NULL, dedupe TEXT NOT NULL, enqueued_at INTEGER NOT NULL,
        consumer TEXT, deliveries INTEGER NOT NULL, boot TEXT NOT NULL, deadline REAL NOT NULL)""",
    "CREATE INDEX messages_waiting ON messages (topic, id) WHERE consumer IS NULL",
    "CREATE INDEX messages_taken ON messages (topic, id) WHERE consumer IS NOT NULL",
    "CREATE UNIQUE INDEX messages_dedupe ON messages (topic, dedupe) WHERE dedupe != ''",
    """CREATE TABLE dead (
        id INTEGER PRIMARY KEY,
        topic TEXT NOT NULL, body BLOB NOT NULL, dedupe TEXT NOT NULL, enqueued_at INTEGER NOT NULL,
        consumer TEXT NOT NULL, deliveries INTEGER NOT NULL, reason TEXT NOT NULL, died_at INTEGER NOT NULL)""",
    "CREATE INDEX dead_topic ON dead (topic, id)",
)
_MESSAGE = "id, topic, body, dedupe, enqueued_at"
_THIS = "id = ? AND topic = ? AND consumer = ? AND deliveries = ?"
_Db = sqlite3.Connection


@dataclass(frozen=True, slots=True)
class Moment:
    """When a transaction happens: `now` on the clock of `boot`, `at` for people."""

    boot: str
    now: float
    at: int


def enqueue(db: _Db, moment: Moment, limits: Limits, topic: str, body: bytes, dedupe: str) -> Enqueued:
    """Raises QueueFull."""
    if dedupe:
        found = db.execute("SELECT id FROM messages WHERE topic = ? AND dedupe = ?", (topic, dedupe)).fetchone()
        if found is not None:
            return Enqueued(str(found[0]), True)
    if _count(db, topic, "consumer IS NULL") + _count(db, topic, "consumer IS NOT NULL") >= limits.max_length:
        raise QueueFull(f"the queue '{topic}' is full: {limits.max_length} messages wait or are taken")
    made = db.execute(
        "INSERT INTO messages (topic, body, dedupe, enqueued_at, consumer, deliveries, boot, deadline) "
        "VALUES (?, ?, ?, ?, NULL, 0, '', 0)",
        (topic, body, dedupe, moment.at),
    )
    return Enqueued(str(made.lastrowid), False)


def any_waiting(db: _Db, topic: str) -> bool:
    found = db.execute("SELECT 1 FROM messages WHERE topic = ? AND consumer IS NULL LIMIT 1", (topic,))
    return found.fetchone() is not None


def take(db: _Db, moment: Moment, limits: Limits, topic: str, consumer: str, limit: int) -> list[Delivery]:
    rows = db.execute(
        f"SELECT {_MESSAGE}, deliveries FROM messages WHERE topic = ? AND consumer IS NULL ORDER BY id LIMIT ?",
        (topic, limit),
    ).fetchall()
    return [_deliver(db, moment, limits, row, consumer) for row in rows]


def untake(db: _Db, deliveries: list[Delivery]) -> None:
    """As if they had never been delivered."""
    for delivery in deliveries:
        db.execute(
            f"UPDATE messages SET consumer = NULL, deliveries = deliveries - 1 WHERE {_THIS}", _names(delivery)
        )


def claim_stale(db: _Db, moment: Moment, limits: Limits, topic: str, consumer: str, limit: int) -> list[Delivery]:
    rows = db.execute(
        f"SELECT {_MESSAGE}, deliveries, consumer FROM messages "
        "WHERE topic = ? AND consumer IS NOT NULL AND (boot != ? OR deadline <= ?) ORDER BY id",
        (topic, moment.boot, moment.now),
    )
    spent: list[Any] = []
    found: list[Any] = []
    for row in rows:
        if row[5] >= limits.max_deliveries:
            spent.append(row)
        else:
            found.append(row)
        if len(found) == limit:
            break
    for row in spent:
        reason = f"delivered {row[5]} times and never acknowledged, last by {row[6]}"
        _bury(db, moment, limits, row[0], topic, reason)
    return [_deliver(db, moment, limits, row, consumer) for row in found]


def extend(db: _Db, moment: Moment, limits: Limits, delivery: Delivery) -> bool:
    deadline = moment.now + limits.visibility_secs
    changed = db.execute(
        f"UPDATE messages SET boot = ?, deadline = ? WHERE {_THIS}", (moment.boot, deadline, *_names(delivery))
    )
    return changed.rowcount > 0


def acknowledge(db: _Db, delivery: Delivery) -> bool:
    return db.execute(f"DELETE FROM messages WHERE {_THIS}", _names(delivery)).rowcount > 0


def give_back(db: _Db, delivery: Delivery) -> bool:
    return db.execute(f"UPDATE messages SET boot = '' WHERE {_THIS}", _names(delivery)).rowcount > 0


def give_back_all(db: _Db, deliveries: list[Delivery]) -> None:
    for delivery in deliveries:
        give_back(db, delivery)


def forfeit(db: _Db, topic: str, consumer: str) -> int:
    return db.execute("UPDATE messages SET boot = '' WHERE topic = ? AND consumer = ?", (topic, consumer)).rowcount


def bury(db: _Db, moment: Moment, limits: Limits, delivery: Delivery, reason: str) -> bool:
    if db.execute(f"SELECT 1 FROM messages WHERE {_THIS}", _names(delivery)).fetchone() is None:
        return False
    _bury(db, moment, limits, int(delivery.message.id), delivery.message.topic, reason)
    return True


def dead(db: _Db, topic: str, after: int, limit: int) -> list[DeadLetter]:
    rows = db.execute(
        f"SELECT {_MESSAGE}, reason, deliveries, consumer, died_at FROM dead "
        "WHERE topic = ? AND id > ? ORDER BY id LIMIT ?",
        (topic, after, limit),
    )
    return [DeadLetter(_message(row), *row[5:]) for row in rows]


def redrive(db: _Db, moment: Moment, limits: Limits, topic: str, message: int) -> Enqueued:
    """Raises NotFound and QueueFull."""
    row = db.execute("SELECT body, dedupe FROM dead WHERE topic = ? AND id = ?", (topic, message)).fetchone()
    if row is None:
        raise NotFound(f"the queue '{topic}' has no dead letter {message}")
    done = enqueue(db, moment, limits, topic, row[0], row[1])
    discard(db, topic, message)
    return done


def discard(db: _Db, topic: str, message: int) -> bool:
    return db.execute("DELETE FROM dead WHERE topic = ? AND id = ?", (topic, message)).rowcount > 0


def lengths(db: _Db, topic: str) -> Lengths:
    letters = db.execute("SELECT count(*) FROM dead WHERE topic = ?", (topic,)).fetchone()[0]
    return Lengths(_count(db, topic, "consumer IS NULL"), _count(db, topic, "consumer IS NOT NULL"), letters)


def _deliver(db: _Db, moment: Moment, limits: Limits, row: Any, consumer: str) -> Delivery:
    db.execute(
        "UPDATE messages SET consumer = ?, deliveries = deliveries + 1, boot = ?, deadline = ? WHERE id = ?",
        (consumer, moment.boot, moment.now + limits.visibility_secs, row[0]),
    )
    return Delivery(_message(row), consumer, row[5] + 1)


def _bury(db: _Db, moment: Moment, limits: Limits, message: int, topic: str, reason: str) -> None:
    columns = f"{_MESSAGE}, consumer, deliveries"
    db.execute(
        f"INSERT INTO dead ({columns}, reason, died_at) SELECT {columns}, ?, ? FROM messages WHERE id = ?",
        (reason[:MAX_REASON_CHARS], moment.at, message),
    )
    db.execute("DELETE FROM messages WHERE id = ?", (message,))
    db.execute(
        "DELETE FROM dead WHERE id IN (SELECT id FROM dead WHERE topic = ? ORDER BY id DESC LIMIT -1 OFFSET ?)",
        (topic, limits.max_dead),
    )


def _message(row: Any) -> Message:
    return Message(str(row[0]), *row[1:5])


def _names(delivery: Delivery) -> tuple[int, str, str, int]:
    return int(delivery.message.id), delivery.message.topic, delivery.consumer, delivery.number


def _count(db: _Db, topic: str, state: str) -> int:
    return int(db.execute(f"SELECT count(*) FROM messages WHERE topic = ? AND {state}", (topic,)).fetchone()[0])
