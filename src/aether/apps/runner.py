"""Everything that runs for one app: the release that is kept up, the one it replaces, and the app's route.

The runner owns the replicas; rollouts (`aether.apps.rollout`) tell it which release is the app's. Routing is a pure
function of what is ready: the active release's instances, or, while none of them is, those of the release before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from aether.apps.job import Job
from aether.apps.launch import ReleaseLaunch
from aether.apps.ports import Backend
from aether.apps.replica import Drivers, Replica
from aether.apps.tasks import Tasks
from aether.leases import LeaseLost
from aether.model.processes import WEB
from aether.model.traffic import Traffic
from aether.rollout.machine import InstanceView, Observed

CLOSED = "the app is stopped: it is scaled to 0 instances"


class Group:
    """The replicas of one release."""

    def __init__(self, release: ReleaseLaunch, drivers: Drivers, changed: Callable[[], None]) -> None:
        self.release = release
        self.replicas: list[Replica] = []
        self._drivers = drivers
        self._changed = changed

    def add(
        self, process: str = WEB, *, adopt: str | None = None, was_ready: bool = False, keep: bool = False
    ) -> Replica:
        launch = self.release.launches[process]
        replica = Replica(self._drivers, launch, self._changed, adopt=adopt, was_ready=was_ready)
        replica.keep = keep
        self.replicas.append(replica)
        replica.run()
        return replica

    def keep_up(self, sizes: Mapping[str, int]) -> Sequence[Replica]:
        """From now on the release runs so often: an instance that ends is replaced, also one that has ended.

        Returns the replicas beyond that number, which are no longer of the group: those that do not serve first,
        then the eldest, as a restart in the middle would choose."""
        doomed: list[Replica] = []
        for process, desired in self.wanted(sizes).items():
            by_use = sorted(self.of(process), key=lambda replica: replica.serves)
            doomed += by_use[: max(0, len(by_use) - desired)]
        self.replicas = [replica for replica in self.replicas if replica not in doomed]
        for replica in self.replicas:
            replica.keep = True
            replica.run()
        for process, desired in self.wanted(sizes).items():
            for _ in range(desired - len(self.of(process))):
                self.add(process, keep=True)
        return doomed

    def wanted(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """How many instances of each of its process types the release is to have; one where `sizes` says nothing."""
        return {process: sizes.get(process, 1) for process in self.release.launches}

    def of(self, process: str) -> list[Replica]:
        return [replica for replica in self.replicas if replica.launch.spec.process == process]

    def let_end(self) -> None:
        """Restart no instance any more."""
        for replica in self.replicas:
            replica.release()

    def named(self, replica_ids: Sequence[str]) -> list[Replica]:
        return [replica for replica in self.replicas if replica.instance_id in replica_ids]

    def serving(self) -> list[Backend]:
        return [r.backend for r in self.replicas if r.observed is Observed.READY and r.backend is not None]

    async def stop(self, grace_secs: float) -> None:
        await asyncio.gather(*(replica.stop(grace_secs) for replica in self.replicas))

    async def abandon(self) -> None:
        await asyncio.gather(*(replica.abandon() for replica in self.replicas))


class Runner:
    """One app while it is in this server's care."""

    def __init__(
        self,
        app_id: str,
        app: str,
        drivers: Drivers,
        tasks: Tasks,
        sizes: Mapping[str, int] | None = None,
        on_release: Callable[[], None] | None = None,
    ) -> None:
        self.app_id = app_id
        self.app = app
        self.drivers = drivers
        self.tasks = tasks
        self.sizes: Mapping[str, int] = dict(sizes or {})
        """How many instances of each process type the app wants; one of those that are not named."""
        self.active: Group | None = None
        self.fallback: Group | None = None
        """The release before the active one, until its last instance is gone."""
        self.held = False
        """True while a rollout keeps the active release down."""
        self.groups: list[Group] = []
        """Every group that may have an instance."""
        self.leaving: list[Replica] = []
        """Replicas that a smaller number of instances has no place for, until they are gone."""
        self._on_release = on_release
        """Called when another release is the app's, or may run again."""
        self.jobs: set[Job] = set()
        """Commands under way that run to their end."""
        self.routed: list[Backend] = []
        self._trial: tuple[Group, int] | None = None
        self._told: tuple[object, ...] | None = None
        self._listeners: list[asyncio.Event] = []
        self._abandoned = False
        # another server ran the app until now, and this one passed requests on to the instances that it takes up
        self._inherits = drivers.router.serves(app)
        if not self._inherits:
            drivers.router.route(app, [])
        self.changed()

    @property
    def desired(self) -> int:
        """How many web instances the app wants; 0 for one that is stopped."""
        return self.sizes.get(WEB, 1)

    def make_group(self, release: ReleaseLaunch) -> Group:
        group = Group(release, self.drivers, self.changed)
        self.groups.append(group)
        return group

    def forget(self, group: Group) -> None:
        if group in self.groups:
            self.groups.remove(group)
        if self.fallback is group:
            self.fallback = None
        if self._trial is not None and self._trial[0] is group:
            self.end_trial()

    def promote(self, group: Group) -> None:
        """Make `group` the app's release; the one before it is no longer restarted and serves only until then."""
        before = self.active
        if before is not None and before is not group:
            before.let_end()
            self.fallback = before
        self.active = group
        self.held = False
        self._trial = None
        self.keep_up()

    def begin_trial(self, group: Group, percent: int) -> None:
        """Give `group` so many in a hundred requests; the active release gets the others."""
        self._trial = group, percent
        self.changed()

    def traffic(self) -> tuple[Traffic, Traffic]:
        """What the release on trial and the active one have answered since the trial began."""
        return self.drivers.router.traffic(self.app)

    def end_trial(self) -> None:
        self._trial = None
        self.changed()

    def scale(self, sizes: Mapping[str, int]) -> None:
        """Run so many instances of the active release from now on, and of the one that is rolled out."""
        self.sizes = dict(sizes)
        if self.active is not None and not self.held:
            self.keep_up()
        else:
            self.changed()

    def keep_up(self) -> None:
        """Have the active release run as often as the app wants."""
        if self._on_release is not None:
            self._on_release()
        if self.active is not None:
            for replica in self.active.keep_up(self.sizes):
                self.leaving.append(replica)
                self.tasks.start(self._retire(replica), f"retire an instance of {self.app}")
        self.changed()

    async def _retire(self, replica: Replica) -> None:
        try:
            await replica.retire()
        except LeaseLost:
            return  # whoever runs the app now retires it
        self.leaving.remove(replica)

    def views(self, group: Group) -> tuple[InstanceView, ...]:
        """What a rollout sees of a release: also the instances that it has no place for any more."""
        launches = group.release.launches
        leaving = [r for r in self.leaving if r.launch is launches.get(r.launch.spec.process)]
        return tuple(
            InstanceView(
                id=replica.instance_id,
                observed=replica.observed,
                routed=replica.backend is not None and replica.backend in self.routed,
                reason=replica.reason,
                process=replica.launch.spec.process,
            )
            for replica in (*group.replicas, *leaving)
        )

    def hold(self) -> None:
        self.held = True
        if self.active is not None:
            self.active.let_end()

    def unhold(self) -> None:
        self.held = False
        self.keep_up()

    def changed(self) -> None:
        """Route to what is ready now and wake whoever waits for a change."""
        if self._abandoned:
            return
        serving: list[Backend] = []
        for group in (self.active, self.fallback):
            serving = serving or (group.serving() if group is not None else [])
        trial, percent = ([], 0) if self._trial is None else (self._trial[0].serving(), self._trial[1])
        closed = None if self.desired else CLOSED
        told = serving, trial, percent, closed
        self._inherits = self._inherits and not serving and closed is None and self._takes_up()
        if told != self._told and not self._inherits:
            self._told = told
            self.routed = [*serving, *trial]
            self.drivers.router.route(self.app, serving, closed=closed, trial=trial, percent=percent)
        for listener in self._listeners:
            listener.set()

    def _takes_up(self) -> bool:
        """Whether instances that serve already are still being adopted."""
        return self.active is None or any(replica.being_adopted for replica in self.active.of(WEB))

    def listen(self) -> asyncio.Event:
        event = asyncio.Event()
        self._listeners.append(event)
        return event

    def unlisten(self, event: asyncio.Event) -> None:
        self._listeners.remove(event)

    async def until_serving(self) -> None:
        """Return once a backend is routed, or at once if nothing is meant to serve."""
        event = self.listen()
        try:
            while self.active is not None and self.desired and not self.held and not self.routed:
                event.clear()
                await event.wait()
        finally:
            self.unlisten(event)

    async def stop(self, grace_secs: float) -> None:
        """End every instance of the app."""
        self.drivers.router.route(self.app, [])
        self.routed, self._trial = [], None
        await asyncio.gather(
            *(group.stop(grace_secs) for group in self.groups),
            *(replica.stop(grace_secs) for replica in self.leaving),
            *(job.stop(grace_secs) for job in self.jobs),
        )

    async def abandon(self) -> None:
        """Stop watching; the instances, and the requests to them, go on without this server's doing."""
        self._abandoned = True
        await asyncio.gather(
            *(group.abandon() for group in self.groups), *(replica.abandon() for replica in self.leaving)
        )
