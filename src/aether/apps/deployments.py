"""Deployments as their users see them: create, repeat, cancel, roll back, reconfigure, list, and follow.

Every decision is one transaction; the engine is told afterwards. A newer deployment of an app supersedes the one
under way in the same transaction, so there is never a lock to get stuck.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.apps.artifact_rows import find_artifact, need_artifact
from aether.apps.broadcast import Broadcast
from aether.apps.configs import Change, Config, VariableChange, changed, check_env, differences
from aether.apps.engine import Engine
from aether.apps.ledger import Event, Ledger, add_config, add_event, cancel_in, refuse_settled
from aether.apps.ports import ReleasePolicy
from aether.apps.records import (
    AppRow,
    DeploymentRow,
    Health,
    deployment_of,
    find_app,
    find_deployment,
    newest_config_version,
    select_deployments,
    under_way,
)
from aether.apps.vault import Variables
from aether.model import volumes
from aether.model.database import DatabasePort
from aether.model.deployment import SETTLED, UNDER_WAY, DeploymentStatus
from aether.model.errors import BadRequest, IdempotencyConflict, NotFound
from aether.model.instance import Volume
from aether.model.names import check_digest, new_id
from aether.model.processes import ProcessTypes, check_command, check_process_types
from aether.model.times import now_us
from aether.rollout.gates import Shift, check_shift
from aether.rollout.machine import Strategy
from aether.stores.database.tables import deployments

MAX_TIMEOUT_SECS = 3600.0
DEFAULT_COMMAND = "npm start"
MIN_DIGEST_PREFIX = 6


@dataclass(frozen=True, slots=True)
class DeployRequest:
    """What a client asks for; `timeout_secs` bounds the whole rollout."""

    app: str
    digest: str
    runtime: str | None = None
    command: str = DEFAULT_COMMAND
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    health: Health = field(default_factory=Health)
    processes: ProcessTypes = field(default_factory=ProcessTypes)
    volumes: tuple[Volume, ...] = ()
    strategy: str = Strategy.ROLLING.value
    timeout_secs: float = 120.0
    rollout: Shift = field(default_factory=Shift)
    description: str = ""


@dataclass(frozen=True, slots=True)
class Author:
    """Who asks, for the record."""

    name: str
    trace_id: str | None = None


@dataclass(frozen=True, slots=True)
class RollbackTarget:
    """At most one is given; none means the release before the active one. A digest may be shortened."""

    digest: str | None = None
    version: int | None = None
    deployment_id: str | None = None


class Deployments:
    def __init__(self, database: DatabasePort, broadcast: Broadcast, engine: Engine, policy: ReleasePolicy) -> None:
        self._policy = policy
        self._database = database
        self._broadcast = broadcast
        self._engine = engine
        self._ledger: Ledger = engine.ledger
        self._vault = engine.ledger.vault

    async def create(
        self, request: DeployRequest, author: Author, idempotency_key: str | None = None
    ) -> tuple[DeploymentRow, bool]:
        """Record a deployment and begin it; returns (deployment, whether it is new).

        A repeat of the newest deployment, while that is active or under way, or of an idempotency key returns
        what is there. Raises NotFound, BadRequest, IdempotencyConflict, and SignatureRequired, SbomRequired or
        ProvenanceRequired, as every way to a new deployment does.
        """
        check_request(request)
        try:
            async with self._database.write() as tx:
                app = await find_app(tx, request.app, lock=True)
                if idempotency_key and (known := await self._by_key(tx, app.id, idempotency_key)) is not None:
                    if not _same(known, self._vault.open_env(known), request):
                        raise IdempotencyConflict("this idempotency key was used for another deployment")
                    return known, False
                config = await newest_config_version(tx, app.id)
                newest = await self._newest(tx, app.id)
                if newest is not None and self._repeats(newest, request, config):
                    return newest, False
                artifact = await find_artifact(tx, app, request.digest)
                row = await self._insert(
                    tx, app, artifact.id, request, config, author,
                    runtime=request.runtime or artifact.runtime, idempotency_key=idempotency_key,
                )  # fmt: skip
                cancelled = await self._supersede(tx, app, row)
        except IntegrityError as error:
            raise IdempotencyConflict("this idempotency key is in use") from error
        self._begin(row, cancelled)
        return row, True

    async def rollback(
        self, app_name: str, target: RollbackTarget, author: Author, idempotency_key: str | None = None
    ) -> DeploymentRow:
        """Deploy exactly what a past release was: its digest, its variables, its commands.

        A repeat of an idempotency key returns the deployment that is there: "the release before the active one" must
        not be another one the second time. Raises NotFound when no such release was ever active, ArtifactGone when
        its artifact was taken away, BadRequest when it is ambiguous or active already, IdempotencyConflict.
        """
        async with self._database.write() as tx:
            app = await find_app(tx, app_name, lock=True)
            if idempotency_key and (known := await self._by_key(tx, app.id, idempotency_key)) is not None:
                if known.rollback_of is None:
                    raise IdempotencyConflict("this idempotency key was used for another deployment")
                return known
            past = await self._release(tx, app, target)
            request = DeployRequest(
                app=app.name,
                digest=past.digest,
                runtime=past.runtime,
                command=past.command,
                env=self._vault.open_env(past),
                health=past.health,
                processes=past.processes,
                volumes=past.volumes,
                # the release is known, and who goes back is in a hurry: no trial
                strategy=past.strategy if past.strategy == Strategy.RECREATE else Strategy.ROLLING.value,
                timeout_secs=past.timeout_secs,
                rollout=past.rollout,
                description=f"rollback to release {past.release}",
            )
            row = await self._insert(
                tx, app, past.artifact_id, request, past.config_version, author,
                runtime=past.runtime, rollback_of=past.id, idempotency_key=idempotency_key,
            )  # fmt: skip
            cancelled = await self._supersede(tx, app, row)
        self._begin(row, cancelled)
        return row

    async def config(self, app_name: str) -> Config:
        async with self._database.read() as tx:
            app = await find_app(tx, app_name)
            version = await newest_config_version(tx, app.id)
            return Config(version, await self._vault.config(tx, app.id, version))

    async def configure(
        self,
        app_name: str,
        change: Change,
        author: Author,
    ) -> tuple[Config, Collection[str], str | None]:
        """Change variables; returns the config, the names that changed, and the deployment that brings the change
        to the running app, if any.

        Variables that came with the active deployment itself give way to what is set or unset here.
        """
        row: DeploymentRow | None = None
        cancelled: list[str] = []
        async with self._database.write() as tx:
            app = await find_app(tx, app_name, lock=True)
            version = await newest_config_version(tx, app.id)
            before = await self._vault.config(tx, app.id, version)
            after = changed(before, change)
            base = await self._base_for_config(tx, app)
            given = {} if base is None else self._vault.open_env(base)
            kept = {} if change.replace else {k: v for k, v in given.items() if k not in change.names}
            names = {found.name for found in differences(before, after)} | (given.keys() - kept.keys())
            if not names:
                return Config(version, after), names, None
            if after != before:
                version += 1
                await add_config(tx, self._vault, app.id, version, after, author.name)
            if base is not None:
                request = DeployRequest(
                    app=app.name,
                    digest=base.digest,
                    runtime=base.runtime,
                    command=base.command,
                    env=kept,
                    health=base.health,
                    processes=base.processes,
                    volumes=base.volumes,
                    strategy=base.strategy,
                    timeout_secs=base.timeout_secs,
                    rollout=base.rollout,
                    description="config: " + ", ".join(sorted(names))[:280],
                )
                row = await self._insert(
                    tx, app, base.artifact_id, request, version, author, runtime=base.runtime
                )  # fmt: skip
                cancelled = await self._supersede(tx, app, row)
        if row is not None:
            self._begin(row, cancelled)
        return Config(version, after), names, None if row is None else row.id

    async def changed_variables(self, app_name: str, a: str, b: str) -> Sequence[VariableChange]:
        """What differs between the variables of two deployments of an app, without their values.
        Raises NotFound."""
        async with self._database.read() as tx:
            app = await find_app(tx, app_name)
            found: list[Variables] = []
            for deployment_id in (a, b):
                row = await find_deployment(tx, deployment_id)
                if row.app_id != app.id:
                    raise NotFound(f"app '{app_name}' has no deployment '{deployment_id}'")
                found.append(await self._vault.variables_of(tx, row))
            now = await self._vault.config(tx, app.id, await newest_config_version(tx, app.id))
        return differences(*(variables.keeping(now.secrets) for variables in found))

    async def cancel(self, deployment_id: str, author: Author) -> DeploymentRow:
        """Cancel a deployment under way; the old release goes on. Raises Conflict when it is settled."""
        async with self._database.write() as tx:
            row = await find_deployment(tx, deployment_id, lock=True)
            refuse_settled(row)
            await cancel_in(tx, [row], f"cancelled by {author.name}")
        self._broadcast.notify(row.id, row.app_id)
        self._engine.settled_elsewhere([row.id])
        return await self.get(row.id)

    async def get(self, deployment_id: str) -> DeploymentRow:
        async with self._database.read() as tx:
            return await find_deployment(tx, deployment_id)

    async def list(
        self,
        *,
        app: str | None = None,
        status: DeploymentStatus | None = None,
        before: tuple[int, str] | None = None,
        limit: int = 50,
        releases_only: bool = False,
        only: sa.ColumnElement[bool] | None = None,
    ) -> Sequence[DeploymentRow]:
        """Newest first, `limit` + 1 at most; `before` is (created_at, id) of the last one seen, `only` a condition
        on `applications`."""
        query = select_deployments()
        if only is not None:
            query = query.where(only)
        async with self._database.read() as tx:
            if app is not None:
                query = query.where(deployments.c.app_id == (await find_app(tx, app)).id)
            if status is not None:
                query = query.where(deployments.c.status == status.value)
            if releases_only:
                query = query.where(deployments.c.release.is_not(None))
            if before is not None:
                query = query.where(
                    sa.tuple_(deployments.c.created_at, deployments.c.id) < sa.tuple_(*map(sa.literal, before))
                )
            query = query.order_by(deployments.c.created_at.desc(), deployments.c.id.desc()).limit(limit + 1)
            return [deployment_of(row) for row in await tx.execute(query)]

    async def follow(self, deployment_id: str, after: int = 0) -> AsyncGenerator[Event | DeploymentRow]:
        """Events with ids above `after` as they happen, and at last the settled deployment."""
        with self._broadcast.subscribe(deployment_id) as changed_event:
            while True:
                changed_event.clear()
                events, row = await self._ledger.events(deployment_id, after)
                for event in events:
                    after = event.id
                    yield event
                if row.status in SETTLED:
                    yield row
                    return
                await changed_event.wait()

    # --- inside transactions

    async def _newest(self, tx: AsyncConnection, app_id: str) -> DeploymentRow | None:
        query = (
            select_deployments()
            .where(deployments.c.app_id == app_id)
            .order_by(deployments.c.created_at.desc(), deployments.c.id.desc())
            .limit(1)
        )
        row = (await tx.execute(query)).one_or_none()
        return None if row is None else deployment_of(row)

    def _repeats(self, newest: DeploymentRow, request: DeployRequest, config_version: int) -> bool:
        wanted = newest.status in UNDER_WAY or newest.status is DeploymentStatus.ACTIVE
        if not wanted or newest.config_version != config_version:
            return False
        return _same(newest, self._vault.open_env(newest), request)

    async def _by_key(self, tx: AsyncConnection, app_id: str, key: str) -> DeploymentRow | None:
        query = select_deployments().where(deployments.c.app_id == app_id, deployments.c.idempotency_key == key)
        row = (await tx.execute(query)).one_or_none()
        return None if row is None else deployment_of(row)

    async def _base_for_config(self, tx: AsyncConnection, app: AppRow) -> DeploymentRow | None:
        """What a config change deploys again: the newest deployment if it is under way, so that a change made
        during a rollout does not undo it, else the active release."""
        if app.active_deployment_id is None:
            return None
        newest = await self._newest(tx, app.id)
        if newest is not None and newest.status in UNDER_WAY:
            return newest
        return await find_deployment(tx, app.active_deployment_id)

    async def _release(self, tx: AsyncConnection, app: AppRow, target: RollbackTarget) -> DeploymentRow:
        given = [value for value in (target.digest, target.version, target.deployment_id) if value is not None]
        if len(given) > 1:
            raise BadRequest("name the release by digest, version or deployment_id, not by several")
        query = select_deployments().where(deployments.c.app_id == app.id, deployments.c.release.is_not(None))
        if target.version is not None:
            query = query.where(deployments.c.release == target.version)
        elif target.deployment_id is not None:
            query = query.where(deployments.c.id == target.deployment_id)
        elif target.digest is not None:
            if len(target.digest) < MIN_DIGEST_PREFIX or set(target.digest) - set("0123456789abcdef"):
                raise BadRequest(f"a digest is at least {MIN_DIGEST_PREFIX} lower-case hex characters")
            query = query.where(deployments.c.digest.startswith(target.digest))
        elif app.active_deployment_id is not None:
            query = query.where(deployments.c.id != app.active_deployment_id)
        query = query.order_by(deployments.c.release.desc())
        found = [deployment_of(row) for row in (await tx.execute(query)).all()]
        if not found:
            named = f"'{given[0]}'" if given else "before the active one"
            raise NotFound(f"app '{app.name}' has no release {named} to roll back to")
        if len({row.digest for row in found}) > 1 and target.digest is not None:
            raise BadRequest(f"several artifacts begin with '{target.digest}'; give more of the digest")
        chosen = found[0]
        if target.digest is not None and len(found) > 1 and chosen.id == app.active_deployment_id:
            chosen = found[1]
        return chosen

    async def _insert(
        self,
        tx: AsyncConnection,
        app: AppRow,
        artifact_id: str,
        request: DeployRequest,
        config_version: int,
        author: Author,
        *,
        runtime: str | None,
        rollback_of: str | None = None,
        idempotency_key: str | None = None,
    ) -> DeploymentRow:
        await self._policy.check(tx, artifact_id)
        await need_artifact(tx, artifact_id, request.digest)
        await self._vault.name_key(tx)
        deployment_id = new_id()
        created_at = await _next_moment(tx, app.id)
        await tx.execute(
            sa.insert(deployments).values(
                id=deployment_id,
                app_id=app.id,
                artifact_id=artifact_id,
                digest=request.digest,
                config_version=config_version,
                status=DeploymentStatus.PENDING.value,
                strategy=request.strategy,
                runtime=runtime,
                command=request.command,
                env=self._vault.seal_env(app.id, deployment_id, request.env),
                health=request.health.to_json(),
                processes=request.processes.to_json(),
                volumes=volumes.to_json(request.volumes),
                timeout_secs=request.timeout_secs,
                rollout=request.rollout.to_json(),
                description=request.description,
                rollback_of=rollback_of,
                idempotency_key=idempotency_key,
                created_by=author.name,
                trace_id=author.trace_id,
                created_at=created_at,
                epoch=1,
                lease_owner=self._ledger.owner,
            )
        )
        await add_event(tx, deployment_id, DeploymentStatus.PENDING, f"deployment created by {author.name}")
        return await find_deployment(tx, deployment_id)

    async def _supersede(self, tx: AsyncConnection, app: AppRow, newer: DeploymentRow) -> list[str]:
        query = under_way(app.id).where(deployments.c.id != newer.id)
        older = [deployment_of(row) for row in (await tx.execute(query)).all()]
        await cancel_in(tx, older, f"deployment {newer.id} took its place")
        return [row.id for row in older]

    def _begin(self, row: DeploymentRow, cancelled: Sequence[str]) -> None:
        self._broadcast.notify(row.id, row.app_id, *cancelled)
        self._engine.settled_elsewhere(cancelled)
        self._engine.submit(row)


async def _next_moment(tx: AsyncConnection, app_id: str) -> int:
    """Now, but after the app's newest deployment, whatever the wall clock was set to since: what came later must be
    the newer one."""
    found = await tx.execute(sa.select(sa.func.max(deployments.c.created_at)).where(deployments.c.app_id == app_id))
    return max(now_us(), (found.scalar_one_or_none() or 0) + 1)


def check_request(request: DeployRequest) -> None:
    """Raise BadRequest naming the field that is wrong."""
    check_digest(request.digest)
    check_env(request.env)
    if request.strategy not in [strategy.value for strategy in Strategy]:
        offered = " or ".join(strategy.value for strategy in Strategy)
        raise BadRequest(f"strategy must be {offered}, not '{request.strategy}'", {"field": "strategy"})
    check_shift(request.rollout)
    check_command(request.command, "command")
    check_process_types(request.processes)
    volumes.check_volumes(request.volumes)
    if not 1 <= request.timeout_secs <= MAX_TIMEOUT_SECS:
        raise BadRequest(f"timeout_secs must be 1 to {MAX_TIMEOUT_SECS:.0f}", {"field": "timeout_secs"})
    path, port = request.health.path, request.health.port
    if path is not None and not (path.startswith("/") and path.isascii() and path.isprintable() and " " not in path):
        raise BadRequest(
            "health.path must begin with '/' and be printable ASCII without spaces", {"field": "health.path"}
        )
    if port is not None and not 1024 <= port <= 65535:
        raise BadRequest("health.port must be 1024 to 65535", {"field": "health.port"})


def _same(row: DeploymentRow, env: Mapping[str, str], request: DeployRequest) -> bool:
    shift = request.rollout.for_strategy(Strategy(request.strategy))
    known = row.digest, row.runtime, row.command, env, row.health, row.processes, row.volumes, row.strategy, row.shift
    return known == (
        request.digest,
        request.runtime or row.runtime,
        request.command,
        dict(request.env),
        request.health,
        request.processes,
        request.volumes,
        request.strategy,
        shift,
    )
