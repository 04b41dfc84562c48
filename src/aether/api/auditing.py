"""What a request is for the audit log: gathered while it is served, written before its answer leaves.

The layer around the routes opens a note for every request; handlers may say what it was about. The first write
transaction of a request carries the note's row with it. Requests of nobody
(no valid token) are not written, or a stranger could fill the disk; failed logins are, because they are throttled.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import cast

from aether.identity.audit import UNANSWERED, Entry
from aether.model.names import new_id
from aether.model.times import now_us
from aether.observability import tracing


@dataclass(slots=True)
class Note:
    """Filled in by whoever knows; `actor` empty means that nothing is to be written."""

    actor: str = ""
    actor_kind: str = ""
    target: str = ""
    code: str = ""
    address: str = ""
    id: str = field(default_factory=new_id)
    time: int = field(default_factory=now_us)
    begun: bool = False
    """The row may be there already; it is not when the transaction that wrote it was taken back."""
    ended: bool = False

    def entry(self, action: str, status: int) -> Entry:
        """`status` 0: not answered yet."""
        outcome = "ok" if 0 < status < 400 else self.code or f"status {status}"
        if not status:
            outcome = UNANSWERED
        request_id, trace_id = cast(str, tracing.request_id.get()), cast(str, tracing.trace_id.get())
        return Entry(
            self.actor, self.actor_kind, action, self.target, outcome, status, self.address, request_id, trace_id,
            self.time, self.id,
        )  # fmt: skip


_note: ContextVar[Note | None] = ContextVar("audit_note", default=None)


def begin(address: str) -> Note:
    """A fresh note for this request."""
    made = Note(address=address)
    _note.set(made)
    return made


def note() -> Note:
    """The note of the request being served."""
    return _note.get() or Note()


def about(target: str) -> None:
    """Say what the request is about, where its path does not."""
    note().target = target
