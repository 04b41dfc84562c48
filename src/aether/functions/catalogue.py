"""Functions: made, found, changed, given code, rolled back and deleted; and what instances are started from.

Every change of a field or of the code is a version of its own, and nothing changes a version. A deletion is recorded
first and then carried out: once nothing of the function runs, its rows go. One that a killed server left half-done is
finished at the next start.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.apps.tasks import Tasks
from aether.apps.vault import Vault
from aether.functions import records, runtimes
from aether.functions.code import CodeStore, Received
from aether.functions.ports import FunctionControl, FunctionVersion
from aether.functions.records import Function, StoredCode, Version
from aether.leases import Leases
from aether.model.database import DatabasePort
from aether.model.errors import AetherError, BadRequest, Conflict, DigestMismatch, NotFound
from aether.model.function import changed, define
from aether.model.function_instance import Code, CodeForm
from aether.model.names import new_id
from aether.model.times import now_us
from aether.registry.locks import ArtifactLocks
from aether.stores.database.tables import artifacts, function_invocations, function_versions, functions, owners

RESERVED = frozenset({"runtimes"})
"""Names that are paths of the API."""
LOCK = "functions"
"""Under which a digest is held while its code is stored or swept."""
_Change = Callable[[Version], Version]
_log = structlog.stdlib.get_logger("aether.functions")


class CodePolicy(Protocol):
    """What code must have before instances are started from it."""

    async def check(self, tx: AsyncConnection, artifact_id: str) -> None:
        """Of code that is an artifact, in the transaction that records the version. Raises SignatureRequired,
        SbomRequired, ProvenanceRequired."""
        ...

    def check_unknown(self) -> None:
        """Of code that is none. Raises the same."""
        ...


@dataclass(frozen=True, slots=True)
class ArtifactCode:
    """A verified artifact that is to be a function's code."""

    id: str
    digest: str
    storage_key: str


class Catalogue:
    """Implements `FunctionSource`. `control` is set before the first deletion, where functions are run."""

    def __init__(
        self,
        database: DatabasePort,
        vault: Vault,
        codes: CodeStore,
        policy: CodePolicy,
        leases: Leases | None = None,
    ) -> None:
        self._database = database
        self._vault = vault
        self._codes = codes
        self._policy = policy
        self.locks = ArtifactLocks(leases)
        self.control: FunctionControl | None = None
        self._tasks = Tasks()
        self._deletions: dict[str, asyncio.Task[None]] = {}
        self._opened: dict[str, FunctionVersion] = {}

    # --- what the API asks

    async def create(self, values: Mapping[str, Any], owner: str, actor: str) -> Function:
        """Raises BadRequest with the field's name, Conflict for a name that is taken, NotFound for the owner."""
        definition = define(values)
        if definition.name in RESERVED:
            raise BadRequest(f"'{definition.name}' is reserved; choose another name", {"field": "name"})
        function_id, now = new_id(), now_us()
        version = Version(1, definition, None, actor, now)
        try:
            async with self._database.write() as tx:
                await runtimes.require(tx, definition.runtime, hold=True)
                await _hold_owner(tx, owner)
                row = {"id": function_id, "name": definition.name, "owner": owner, "version": 1}
                await tx.execute(sa.insert(functions).values(**row, created_at=now, updated_at=now))
                await records.insert(tx, self._vault, function_id, version)
        except IntegrityError:
            raise Conflict(await self._why_taken(definition.name), {"field": "name"}) from None
        _log.info("function created", function=definition.name)
        return Function(function_id, owner, now, now, version)

    async def get(self, ref: str) -> Function:
        """By id or name. Raises NotFound."""
        async with self._database.read() as tx:
            return await records.find(tx, self._vault, ref)

    async def list(
        self, *, q: str = "", after: str | None = None, limit: int = 50, only: sa.ColumnElement[bool] | None = None
    ) -> Sequence[Function]:
        """By name, `limit` + 1 at most; `q` is a part of the name, `after` the last name seen, `only` a condition on
        `functions`."""
        query = records.NOW
        if q:
            query = query.where(functions.c.name.contains(q, autoescape=True))
        if after is not None:
            query = query.where(functions.c.name > after)
        if only is not None:
            query = query.where(only)
        async with self._database.read() as tx:
            rows = (await tx.execute(query.order_by(functions.c.name).limit(limit + 1))).all()
        return [records.function_of(row, self._vault) for row in rows]

    async def update(self, ref: str, values: Mapping[str, Any], actor: str) -> Function:
        """Change the fields that are named; what changes nothing makes no version. Raises BadRequest with the field's
        name, NotFound, and what the policy raises."""

        def change(before: Version) -> Version:
            return replace(before, definition=changed(before.definition, values))

        return await self._change(ref, change, actor)

    async def put_code(
        self,
        ref: str,
        received: Received,
        actor: str,
        *,
        artifact_id: str | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> Function:
        """Give a function code, and with it other `values` of fields, as one version. Raises BadRequest, NotFound,
        ServiceUnavailable, and what the policy raises."""
        values = values or {}
        code = StoredCode(received.digest, received.form, received.size_bytes, artifact_id)
        async with self._database.read() as tx:
            wanted = changed((await records.find(tx, self._vault, ref)).current.definition, values)
            if "runtime" in values:
                await runtimes.require(tx, wanted.runtime, hold=False)
        if artifact_id is None:
            self._policy.check_unknown()
        await self._codes.check(received, wanted.entrypoint)

        def change(version: Version) -> Version:
            return replace(version, definition=changed(version.definition, values), code=code)

        async with self.locks.alone_with(LOCK, received.digest) as hold:
            await self._codes.keep(received)
            hold.check()
            return await self._change(ref, change, actor)

    async def put_artifact(
        self, ref: str, artifact: ArtifactCode, actor: str, values: Mapping[str, Any] | None = None
    ) -> Function:
        """The same with a verified artifact, of which the function keeps a copy. Raises DigestMismatch too."""
        body: AsyncIterator[bytes] = self._codes.objects.read(artifact.storage_key)
        async with self._codes.receiving(body, CodeForm.ARTIFACT) as received:
            if received.digest != artifact.digest:
                raise DigestMismatch(f"the stored artifact {artifact.digest[:12]} has changed")
            return await self.put_code(ref, received, actor, artifact_id=artifact.id, values=values)

    async def versions(self, ref: str, *, before: int | None = None, limit: int = 50) -> Sequence[Version]:
        """Newest first, `limit` + 1 at most, from just below `before`. Raises NotFound."""
        async with self._database.read() as tx:
            function = await records.find(tx, self._vault, ref)
            query = records.VERSIONS.where(function_versions.c.function_id == function.id)
            if before is not None:
                query = query.where(function_versions.c.version < before)
            query = query.order_by(function_versions.c.version.desc()).limit(limit + 1)
            rows = (await tx.execute(query)).all()
        return [records.version_of(row, self._vault) for row in rows]

    async def rollback(self, ref: str, number: int | None, actor: str) -> Function:
        """Make a version that is as an earlier one was; None is the newest one before the current one whose code
        could be run. Raises NotFound without such a one, BadRequest for the current one, and what the policy raises.
        """
        async with self._database.read() as tx:
            current = await records.find(tx, self._vault, ref)
            query = records.VERSIONS.where(function_versions.c.function_id == current.id)
            if number is None:
                query = query.where(
                    function_versions.c.version < current.current.number, function_versions.c.code_digest.is_not(None)
                )
            else:
                query = query.where(function_versions.c.version == number)
            row = (await tx.execute(query.order_by(function_versions.c.version.desc()).limit(1))).one_or_none()
        if row is None:
            what = "no version before this one that has code" if number is None else f"no version {number}"
            raise NotFound(f"the function '{current.name}' has {what}")
        target = records.version_of(row, self._vault)
        if target.number == current.current.number:
            raise BadRequest(f"version {target.number} is the current one", {"field": "version"})
        if target.code is None:
            raise BadRequest(f"version {target.number} has no code", {"field": "version"})
        # held, so that no sweep takes the code of a version that is just being dropped
        async with self.locks.alone_with(LOCK, target.code.digest) as hold:
            await self._codes.fetch(target.code.digest, target.code.form)
            hold.check()
            return await self._change(ref, lambda _: replace(target, rollback_of=target.number), actor, always=True)

    async def transfer(self, ref: str, owner: str) -> Function:
        """Record another owner; the function goes on as it is. Raises NotFound."""
        async with self._database.write() as tx:
            await _hold_owner(tx, owner)
            found = await records.find(tx, self._vault, ref, lock=True)
            await tx.execute(sa.update(functions).where(functions.c.id == found.id).values(owner=owner))
        _log.info("function transferred", function=found.name, owner=owner)
        return replace(found, owner=owner)

    async def delete(self, ref: str) -> None:
        """Take a function away with everything of it; returns when nothing of it runs and its rows are gone. Goes on
        when the caller is cancelled. Raises NotFound."""
        async with self._database.write() as tx:
            query = sa.select(functions).where(records.called(ref)).with_for_update(key_share=True)
            row = (await tx.execute(query)).one_or_none()
            if row is None:
                raise records.unknown(ref)
            if row.deleting_at is None:
                await tx.execute(sa.update(functions).where(functions.c.id == row.id).values(deleting_at=now_us()))
        self._tell()
        await asyncio.shield(self._carry_out(row.id, row.name))

    async def finish_deletions(self) -> None:
        """Take up the deletions that an earlier server did not finish."""
        async with self._database.read() as tx:
            found = (await tx.execute(sa.select(functions).where(functions.c.deleting_at.is_not(None)))).all()
        for row in found:
            self._carry_out(row.id, row.name)

    async def close(self) -> None:
        await self._tasks.close()

    # --- what runs functions asks

    async def current(self) -> Sequence[FunctionVersion]:
        """See `FunctionSource`."""
        async with self._database.read() as tx:
            rows = (await tx.execute(records.NOW.where(function_versions.c.code_digest.is_not(None)))).all()
        # unsealed once per version: a change of one function must not cost all the others
        opened = {row.id: self._opened.get(row.id) or self._open(row) for row in rows}
        self._opened = opened
        return list(opened.values())

    async def fetch(self, version: FunctionVersion) -> Code:
        """See `FunctionSource`."""
        return await self._codes.fetch(version.code_digest, version.code_form)

    def _open(self, row: records.Row) -> FunctionVersion:
        version = records.version_of(row, self._vault)
        return FunctionVersion(
            row.function_id, version.number, version.definition, row.code_digest, CodeForm(row.code_form)
        )

    # --- changes

    async def _change(self, ref: str, change: _Change, actor: str, *, always: bool = False) -> Function:
        """Make the next version of a function; one that would be as the current one is made only if `always`."""
        async with self._database.write() as tx:
            before = await records.find(tx, self._vault, ref, lock=True)
            wanted = change(before.current)
            if not always and _same(wanted, before.current):
                return before
            if wanted.definition.runtime != before.current.definition.runtime:
                await runtimes.require(tx, wanted.definition.runtime, hold=True)
            if wanted.code is not None:
                await self._judge(tx, wanted.code)
            now = max(now_us(), before.current.created_at + 1)
            number = before.current.number + 1
            made = replace(
                wanted,
                number=number,
                created_by=actor,
                created_at=now,
                rollback_of=wanted.rollback_of if always else None,
            )
            await records.insert(tx, self._vault, before.id, made)
            query = sa.update(functions).where(functions.c.id == before.id)
            await tx.execute(query.values(version=number, updated_at=now))
        self._tell()
        _log.info("function changed", function=before.name, version=number)
        return replace(before, updated_at=now, current=made)

    async def _judge(self, tx: AsyncConnection, code: StoredCode) -> None:
        known = None
        if code.artifact_id is not None:
            known = await tx.scalar(sa.select(artifacts.c.id).where(artifacts.c.id == code.artifact_id))
        if known is None:
            self._policy.check_unknown()
        else:
            await self._policy.check(tx, known)

    def _tell(self) -> None:
        if self.control is not None:
            self.control.changed()

    def _carry_out(self, function_id: str, name: str) -> asyncio.Task[None]:
        task = self._deletions.get(function_id)
        if task is None or task.done():
            task = self._deletions[function_id] = self._tasks.start(self._erase(function_id, name), f"delete {name}")
            task.add_done_callback(lambda _: self._deletions.pop(function_id, None))
        return task

    async def _erase(self, function_id: str, name: str) -> None:
        if self.control is not None:
            await self.control.gone(function_id)
        async with self._database.write() as tx:
            await tx.execute(sa.delete(function_invocations).where(function_invocations.c.function_id == function_id))
            await tx.execute(sa.delete(functions).where(functions.c.id == function_id))
        _log.info("function deleted", function=name)

    async def _why_taken(self, name: str) -> str:
        try:
            await self.get(name)
        except AetherError:
            return f"the function '{name}' is still being deleted; try again in a moment"
        return f"there is already a function '{name}'"


async def _hold_owner(tx: AsyncConnection, owner: str) -> None:
    """Keep a team from being deleted until the function that it owns is on record. Raises NotFound."""
    query = sa.select(owners.c.name).where(owners.c.name == owner).with_for_update(read=True)
    if await tx.scalar(query) is None:
        raise NotFound(f"there is no user or team '{owner}'")


def _same(wanted: Version, now: Version) -> bool:
    """Whether instances of both would be the same, and as much is known of their code."""
    if wanted.definition != now.definition:
        return False
    a, b = wanted.code, now.code
    if a is None or b is None:
        return a is b
    return (a.digest, a.form) == (b.digest, b.form) and a.artifact_id in (None, b.artifact_id)
