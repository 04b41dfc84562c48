"""The key-value port: consistent state that servers, gateways, workers and nodes share; drivers in
`aether.stores.kv`.

The words are those of etcd v3, so that a driver for it adds no meaning of its own. Every change of the store gives it
the next revision; the changes of one transaction share theirs. A value remembers the revision at which its key came
to be (`create_revision`), at which it was last written (`mod_revision`), and how often it was written since it came
to be (`version`).

Elections, leases that keep themselves alive and views that follow changes are built on this port in
`aether.coordination`; what keys mean belongs to whoever writes them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeAlias

from aether.model.errors import BadRequest, PayloadTooLarge

MAX_KEY_BYTES = 1024
MAX_VALUE_BYTES = 1024 * 1024
"""Also of all values of one transaction together; etcd takes requests of 1.5 MiB."""
MAX_OPERATIONS = 128
"""Of each branch of a transaction, as in etcd."""
MAX_TTL_SECS = 9_000_000_000
"""etcd's own bound."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    """1 when the key was created; counts its writes."""
    lease: int = 0
    """The lease with which the key ends; 0 for none."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What was under a prefix at `revision`, by key. Watch from `revision + 1` to miss nothing."""

    revision: int
    items: tuple[KeyValue, ...]
    more: bool = False
    """Whether `limit` cut it short."""


class Change(StrEnum):
    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Event:
    """One key changed. `kv` of a deletion has the key and, as `mod_revision`, the revision of the deletion."""

    change: Change
    kv: KeyValue


@dataclass(frozen=True, slots=True)
class Batch:
    """What a watch has to tell, in order; a revision is never divided between two batches.

    Every change up to `revision` has been told: to resume, watch from `revision + 1`. Without events it is a notice
    that nothing was missed until now.
    """

    revision: int
    events: tuple[Event, ...] = ()


# --- transactions


class Field(StrEnum):
    """What of a key is compared."""

    CREATE = "create_revision"
    MOD = "mod_revision"
    VERSION = "version"
    VALUE = "value"


class Is(StrEnum):
    EQUAL = "="
    UNEQUAL = "!="
    LESS = "<"
    GREATER = ">"


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition on one key. Of a key that is not there the three numbers are 0, and no comparison of its value
    holds (not even UNEQUAL)."""

    key: str
    field: Field
    relation: Is
    target: int | bytes


def absent(key: str) -> Compare:
    return Compare(key, Field.CREATE, Is.EQUAL, 0)


def present(key: str) -> Compare:
    return Compare(key, Field.CREATE, Is.GREATER, 0)


def unchanged(kv: KeyValue) -> Compare:
    """The key has not been written or deleted since `kv` was read."""
    return Compare(kv.key, Field.MOD, Is.EQUAL, kv.mod_revision)


def created_at(key: str, revision: int) -> Compare:
    """The key is still the one that was created at `revision`: the fence of a leader or of an owner."""
    return Compare(key, Field.CREATE, Is.EQUAL, revision)


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key. It ends with `lease`; with 0 it stays, also where it had a lease before."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key, or every key that begins with it."""

    key: str
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Get:
    """Read a key, or every key that begins with it, as the operations before it have left them."""

    key: str
    prefix: bool = False


Operation: TypeAlias = Put | Delete | Get


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a transaction did. `results` has, for each operation of the branch that ran, what a Get found, the keys
    that a Delete deleted (as they were), or nothing for a Put."""

    succeeded: bool
    """Whether all conditions held, so that `then` ran."""
    revision: int
    """The store's after the transaction; that of its changes, if it made any."""
    results: tuple[tuple[KeyValue, ...], ...]


# --- leases


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    id: int
    ttl_secs: int
    """As granted, which may be longer than asked for."""
    remaining_secs: float
    keys: tuple[str, ...]


# --- the port


class KV(Protocol):
    """Every method raises ServiceUnavailable when the store does not answer in time; whether a change was made is
    then unknown, so change through conditions and look. Methods are linearizable: what was acknowledged to anybody is
    seen by whoever asks afterwards."""

    async def get(self, key: str, *, revision: int = 0) -> KeyValue | None:
        """The key, now or as it was at `revision`. Raises Compacted, and BadRequest for a revision to come."""
        ...

    async def list(self, prefix: str, *, revision: int = 0, after: str = "", limit: int = 0) -> Listing:
        """Keys that begin with `prefix` (all, when it is empty), at one revision, those after the key `after`.

        To page through one state, ask for the next page `after` the last key at the `revision` of the first.
        Raises Compacted, and BadRequest for a revision to come.
        """
        ...

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Write a key whatever it was; returns the revision. Raises LeaseGone."""
        ...

    async def delete(self, key: str) -> bool:
        """False when it was not there, and nothing changed."""
        ...

    async def delete_prefix(self, prefix: str) -> int:
        """Delete every key that begins with `prefix`, at one revision; returns how many."""
        ...

    async def transact(
        self, when: Sequence[Compare], then: Sequence[Operation] = (), otherwise: Sequence[Operation] = ()
    ) -> Outcome:
        """If all conditions hold do `then`, else `otherwise`; whole or not at all.

        Raises BadRequest where one branch writes a key twice or writes what it also deletes, LeaseGone, and
        PayloadTooLarge.
        """
        ...

    async def grant(self, ttl_secs: int) -> int:
        """A new lease. Its keys are deleted, at one revision, when it has not been kept alive for its time: never
        sooner, whatever the wall clock does, and soon after."""
        ...

    async def keep_alive(self, lease: int) -> int:
        """Begin the lease's time anew; returns it in seconds. Raises LeaseGone."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys, at one revision. Raises LeaseGone."""
        ...

    async def lease(self, lease: int) -> LeaseInfo:
        """Raises LeaseGone."""
        ...

    def watch(
        self, prefix: str, *, from_revision: int = 0, progress_secs: float = 0.0
    ) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """Changes of keys that begin with `prefix`, from `from_revision` on, or those after the watch is open.

        It is open once the context is entered: a change that anybody begins afterwards is told. Changes come in the
        order of their revisions, each once, none left out. A revision to come may be watched from. A consumer may be
        slow; what it has not taken is not kept in memory without bound. With `progress_secs` there is a batch at
        least that often, also when nothing happens: when it fails to come, the store is not answering.

        Iterating raises Compacted when changes that are due are no longer kept, also from the start, and
        ServiceUnavailable when the store is lost; open another watch from the last batch's `revision + 1`.
        """
        ...

    async def compact(self, revision: int) -> None:
        """Forget history before `revision`: states and changes of it and after it can still be had. Raises Compacted
        where that was done already, and BadRequest for a revision to come."""
        ...


# --- what may be asked of any driver


def check_key(key: str) -> bytes:
    """The key as it is kept. Raises BadRequest."""
    encoded = check_prefix(key)
    if not encoded:
        raise BadRequest("a key must not be empty")
    return encoded


def check_prefix(prefix: str) -> bytes:
    try:
        encoded = prefix.encode()
    except UnicodeEncodeError:
        raise BadRequest("a key must be text that UTF-8 can write") from None
    if len(encoded) > MAX_KEY_BYTES or b"\0" in encoded:
        raise BadRequest(f"a key has at most {MAX_KEY_BYTES} bytes, none of them NUL")
    return encoded


def prefix_end(prefix: bytes) -> bytes | None:
    """The first key after all that begin with `prefix`; None when there is none."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes((trimmed[-1] + 1,)) if trimmed else None


def check_revision(revision: int) -> None:
    if not 0 <= revision < 1 << 63:
        raise BadRequest("a revision is a number of zero or more")


def check_ttl(ttl_secs: int) -> None:
    if not 1 <= ttl_secs <= MAX_TTL_SECS:
        raise BadRequest("a lease lasts at least one second")


def check_transaction(when: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation]) -> None:
    """Raises BadRequest and PayloadTooLarge."""
    if max(len(when), len(then), len(otherwise)) > MAX_OPERATIONS:
        raise BadRequest(f"a transaction has at most {MAX_OPERATIONS} conditions, and operations in each branch")
    for condition in when:
        check_key(condition.key)
        if (condition.field is Field.VALUE) is not isinstance(condition.target, bytes):
            raise BadRequest(f"{condition.field} of '{condition.key}' is compared with a value of another kind")
    total = 0
    for branch in (then, otherwise):
        _check_branch(branch)
        total += sum(len(operation.value) for operation in branch if isinstance(operation, Put))
    if total > MAX_VALUE_BYTES:
        raise PayloadTooLarge(f"the values of a transaction have {total} bytes; {MAX_VALUE_BYTES} are the limit")


def _check_branch(operations: Sequence[Operation]) -> None:
    written: set[str] = set()
    for operation in operations:
        if isinstance(operation, Put):
            check_key(operation.key)
            if operation.key in written:
                raise BadRequest(f"a transaction writes '{operation.key}' twice")
            written.add(operation.key)
        elif operation.prefix:
            check_prefix(operation.key)
        else:
            check_key(operation.key)
    for operation in operations:
        if isinstance(operation, Delete):
            for key in written:
                if key == operation.key or (operation.prefix and key.startswith(operation.key)):
                    raise BadRequest(f"a transaction writes '{key}' and deletes it")
