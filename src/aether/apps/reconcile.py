"""What a starting server does with what an earlier one left behind. Pure: records and ids in, a plan out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from aether.model.deployment import UNDER_WAY, DeploymentStatus
from aether.model.processes import WEB

_ADOPTABLE = ("ready", "starting")


@dataclass(frozen=True, slots=True)
class RecordedDeployment:
    """A deployment that may want instances. `active` says that its app points at it."""

    id: str
    app_id: str
    status: DeploymentStatus
    strategy: str
    active: bool
    deleting: bool = False
    desired: Mapping[str, int] = field(default_factory=lambda: {WEB: 1})
    """How many instances of each of its process types."""
    command: str | None = None
    """The instance that runs its release command, as far as that is known not to have ended."""


@dataclass(frozen=True, slots=True)
class RecordedInstance:
    """An instance whose row does not say that it has ended."""

    id: str
    app_id: str
    deployment_id: str
    status: str
    created_at: int
    process: str = WEB


@dataclass(slots=True)
class AppPlan:
    """One app's releases and the instances to adopt for them; fewer than desired means starting the rest."""

    app_id: str
    active: str | None = None
    active_instances: list[str] = field(default_factory=list[str])
    under_way: str | None = None
    under_way_instances: list[str] = field(default_factory=list[str])
    process_of: dict[str, str] = field(default_factory=dict[str, str])
    """The process type of each instance to adopt."""
    hold_active: bool = False
    """The rollout under way had taken the active release down (recreate); it must not come back beside it."""


@dataclass(slots=True)
class Plan:
    apps: dict[str, AppPlan] = field(default_factory=dict[str, AppPlan])
    remove: list[str] = field(default_factory=list[str])
    """Instances on this machine that nobody wants: stop them and forget them."""
    gone: list[str] = field(default_factory=list[str])
    """Rows of instances of which nothing is left."""
    cancel: list[str] = field(default_factory=list[str])
    """Deployments under way that a newer one has overtaken."""


def reconcile(
    recorded: Sequence[RecordedDeployment],
    instances: Sequence[RecordedInstance],
    known: Collection[str],
    jobs: Collection[str] = (),
) -> Plan:
    """Every known instance is adopted exactly once or removed; every live row is adopted, removed or marked gone.

    `jobs` are instances of commands that run to their end, which whoever records them takes up: like those of the
    release commands of rollouts under way they are left alone, there or not."""
    plan = Plan()
    present = set(known)
    wanted: dict[str, RecordedDeployment] = {}
    for deployment in sorted(recorded, key=lambda d: d.id):
        if deployment.deleting:
            continue
        app = plan.apps.setdefault(deployment.app_id, AppPlan(deployment.app_id))
        if deployment.active and deployment.status is DeploymentStatus.ACTIVE:
            app.active = deployment.id
            wanted[deployment.id] = deployment
        elif deployment.status in UNDER_WAY:
            if app.under_way is not None:
                plan.cancel.append(app.under_way)
                del wanted[app.under_way]
            app.under_way = deployment.id
            wanted[deployment.id] = deployment

    jobs = {*jobs, *(deployment.command for deployment in wanted.values() if deployment.command is not None)}
    adopted: set[str] = set()
    for instance in sorted(instances, key=lambda i: (_ADOPTABLE.index(i.status) if i.status in _ADOPTABLE else 9,
                                                     -i.created_at, i.id)):  # fmt: skip
        if instance.id in jobs:
            continue
        if instance.id not in present:
            plan.gone.append(instance.id)
            continue
        deployment = wanted.get(instance.deployment_id)
        if deployment is None or instance.status not in _ADOPTABLE:
            continue
        app = plan.apps[deployment.app_id]
        mine = app.active_instances if app.active == deployment.id else app.under_way_instances
        others = [other for other in mine if app.process_of[other] == instance.process]
        if len(others) < deployment.desired.get(instance.process, 0):
            mine.append(instance.id)
            app.process_of[instance.id] = instance.process
            adopted.add(instance.id)
    plan.remove = sorted(present - adopted - jobs)

    for app in plan.apps.values():
        rollout = wanted.get(app.under_way) if app.under_way else None
        if rollout and rollout.strategy == "recreate" and rollout.status is DeploymentStatus.ROLLING_OUT:
            app.hold_active = not app.active_instances
    return plan
