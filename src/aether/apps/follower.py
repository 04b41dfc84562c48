"""Routes to apps that another server of this machine runs: their ready instances, as the record tells of them.

Only the server that holds an app's lease starts and stops its instances; every server can reach them. A follower sees
a change a moment later than the owner makes it, so the owner lets an instance linger after its drain
(`EngineOptions.linger_secs`). A release on trial gets its share here too; what it answers here is not what its owner
judges it by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from aether.apps.ports import Backend, Router, Runtime
from aether.apps.records import deployment_of, select_deployments
from aether.model.database import DatabasePort
from aether.model.deployment import DeploymentStatus
from aether.model.errors import AetherError
from aether.model.processes import WEB
from aether.stores.database.tables import applications, deployments, instances

_log = structlog.stdlib.get_logger("aether.apps")


@dataclass(frozen=True)
class _Wanted:
    """Ids of the instances that are to serve an app, and of those that get `percent` of the requests on trial."""

    serving: tuple[str, ...] = ()
    trial: tuple[str, ...] = ()
    percent: int = 0


@dataclass
class _Followed:
    """An app's route here; `backends` by instance id."""

    name: str
    reached: _Wanted = _Wanted()
    backends: dict[str, Backend] = field(default_factory=dict[str, Backend])


class Follower:
    """`runs_here` says whether this server runs the app with an id itself."""

    def __init__(
        self, database: DatabasePort, runtime: Runtime, router: Router, runs_here: Callable[[str], bool]
    ) -> None:
        self._database = database
        self._runtime = runtime
        self._router = router
        self._runs_here = runs_here
        self._followed: dict[str, _Followed] = {}

    async def look(self) -> None:
        """Make the routes what the record says by now. Raises ServiceUnavailable: the last known routes stay then."""
        async with self._database.read() as tx:
            query = sa.select(applications.c.id, applications.c.name).where(applications.c.deleting_at.is_(None))
            apps = {row.id: row.name for row in await tx.execute(query)}
            wanted = await _wanted(tx)
        for app_id in list(self._followed):
            if self._runs_here(app_id):
                del self._followed[app_id]  # the route is its runner's by now
            elif app_id not in apps:
                self._router.drop(self._followed.pop(app_id).name)
        for app_id, name in apps.items():
            if not self._runs_here(app_id):
                await self._follow(app_id, name, wanted.get(app_id, _Wanted()))

    async def _follow(self, app_id: str, name: str, wanted: _Wanted) -> None:
        followed = self._followed.get(app_id)
        if followed is not None and followed.reached == wanted:
            return
        known = {} if followed is None else followed.backends
        backends: dict[str, Backend] = {}
        for instance_id in (*wanted.serving, *wanted.trial):
            backend = known.get(instance_id) or await self._reach(name, instance_id, instance_id in wanted.trial)
            if backend is not None:
                backends[instance_id] = backend
        if self._runs_here(app_id):
            return
        serving = tuple(instance_id for instance_id in wanted.serving if instance_id in backends)
        trial = tuple(instance_id for instance_id in wanted.trial if instance_id in backends)
        if wanted.serving and not serving:
            return  # all of them are gone, or on another machine: what is known serves until the record says more
        self._followed[app_id] = _Followed(name, _Wanted(serving, trial, wanted.percent), backends)
        self._router.route(
            name, [backends[one] for one in serving],
            trial=[backends[one] for one in trial], percent=wanted.percent,
        )  # fmt: skip

    async def _reach(self, app: str, instance_id: str, on_trial: bool) -> Backend | None:
        try:
            instance = await self._runtime.adopt(instance_id)
            if instance is not None and on_trial:
                (await instance.dial()).close()  # the record calls it ready only once it is promoted
        except (AetherError, OSError) as error:
            _log.warning("an instance cannot be reached", app=app, instance=instance_id, error=str(error))
            return None
        return None if instance is None else self._router.add(app, instance)


async def _wanted(tx: AsyncConnection) -> dict[str, _Wanted]:
    """By app id."""
    web = sa.select(instances.c.app_id, instances.c.id).where(instances.c.process == WEB).order_by(instances.c.id)
    serving: dict[str, list[str]] = {}
    for row in await tx.execute(
        web.join(applications, applications.c.active_deployment_id == instances.c.deployment_id).where(
            instances.c.status == "ready"
        )
    ):
        serving.setdefault(row.app_id, []).append(row.id)
    under_way = select_deployments().where(
        deployments.c.status == DeploymentStatus.ROLLING_OUT.value, deployments.c.rollout_step > 0
    )
    trials = {row.id: deployment_of(row) for row in await tx.execute(under_way)}
    shares = {row.app_id: row.shift.steps[row.rollout_step - 1] for row in trials.values() if row.shift is not None}
    tried: dict[str, list[str]] = {}
    if shares:
        mine = web.where(instances.c.deployment_id.in_(list(trials)), instances.c.status.in_(("starting", "ready")))
        for row in await tx.execute(mine):
            tried.setdefault(row.app_id, []).append(row.id)
    return {
        app_id: _Wanted(tuple(serving.get(app_id, ())), tuple(tried.get(app_id, ())), shares.get(app_id, 0))
        for app_id in {*serving, *tried}
    }
