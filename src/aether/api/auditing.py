"""What a request is for the audit log: gathered while it is served, written before its answer leaves.

The layer around the routes opens a note for every request; handlers may say what it was about. Requests of nobody
(no valid token) are not written, or a stranger could fill the disk; failed logins are, because they are throttled.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

from aether.identity.audit import Entry
from aether.observability import tracing


@dataclass(slots=True)
class Note:
    """Filled in by whoever knows; `actor` empty means that nothing is to be written."""

    actor: str = ""
    actor_kind: str = ""
    target: str = ""
    code: str = ""
    address: str = ""

    def entry(self, action: str, status: int) -> Entry:
        outcome = "ok" if status < 400 else self.code or f"status {status}"
        request_id, trace_id = cast(str, tracing.request_id.get()), cast(str, tracing.trace_id.get())
        return Entry(
            self.actor, self.actor_kind, action, self.target, outcome, status, self.address, request_id, trace_id
        )


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
