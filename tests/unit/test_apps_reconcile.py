"""What a starting server adopts, removes and resumes: every instance is accounted for exactly once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aether.apps.reconcile import RecordedDeployment, RecordedInstance, reconcile
from aether.model.deployment import UNDER_WAY, DeploymentStatus

S = DeploymentStatus


def deployment(name: str, status: S = S.ACTIVE, *, active: bool = False, strategy: str = "rolling", **more: object):
    return RecordedDeployment(name, "app", status, strategy, active, **more)


def instance(
    name: str, of: str, status: str = "ready", created_at: int = 0, process: str = "web"
) -> RecordedInstance:
    return RecordedInstance(name, "app", of, status, created_at, process)


def test_the_active_release_keeps_its_instance() -> None:
    plan = reconcile([deployment("d1", active=True)], [instance("i1", "d1")], ["i1"])
    app = plan.apps["app"]
    assert (app.active, app.active_instances, plan.remove, plan.gone) == ("d1", ["i1"], [], [])


def test_an_instance_that_is_gone_is_started_anew() -> None:
    plan = reconcile([deployment("d1", active=True)], [instance("i1", "d1")], [])
    assert plan.apps["app"].active_instances == []
    assert plan.gone == ["i1"]


def test_both_sides_of_a_rollout_are_adopted() -> None:
    rows = [instance("i1", "d1"), instance("i2", "d2", "starting")]
    plan = reconcile([deployment("d1", active=True), deployment("d2", S.ROLLING_OUT)], rows, ["i1", "i2"])
    app = plan.apps["app"]
    assert (app.active_instances, app.under_way, app.under_way_instances) == (["i1"], "d2", ["i2"])
    assert not app.hold_active


def test_leftovers_of_old_releases_and_of_nobody_are_removed() -> None:
    rows = [instance("i1", "d1"), instance("i0", "d0")]
    plan = reconcile([deployment("d1", active=True), deployment("d0", S.SUPERSEDED)], rows, ["i0", "i1", "stray"])
    assert plan.remove == ["i0", "stray"]


def test_a_ready_instance_is_kept_before_a_starting_one() -> None:
    rows = [instance("new", "d1", "starting", 2), instance("old", "d1", "ready", 1)]
    plan = reconcile([deployment("d1", active=True)], rows, ["new", "old"])
    assert plan.apps["app"].active_instances == ["old"]
    assert plan.remove == ["new"]


def test_recreate_holds_an_old_release_that_it_had_taken_down() -> None:
    rows = [instance("i2", "d2", "starting")]
    recorded = [deployment("d1", active=True), deployment("d2", S.ROLLING_OUT, strategy="recreate")]
    assert reconcile(recorded, rows, ["i2"]).apps["app"].hold_active
    assert not reconcile(recorded, [*rows, instance("i1", "d1")], ["i1", "i2"]).apps["app"].hold_active


def test_of_two_under_way_the_newer_goes_on() -> None:
    plan = reconcile([deployment("d2", S.PENDING), deployment("d1", S.VERIFYING)], [], [])
    assert plan.apps["app"].under_way == "d2"
    assert plan.cancel == ["d1"]


def test_every_replica_is_adopted_and_no_more_than_wanted() -> None:
    rows = [instance(f"i{n}", "d1", created_at=n) for n in range(5)]
    plan = reconcile([deployment("d1", active=True, desired={"web": 3})], rows, [row.id for row in rows])
    assert plan.apps["app"].active_instances == ["i4", "i3", "i2"]
    assert plan.remove == ["i0", "i1"]
    stopped = reconcile([deployment("d1", active=True, desired={"web": 0})], rows, [row.id for row in rows])
    assert stopped.apps["app"].active_instances == []
    assert len(stopped.remove) == 5


def test_each_process_type_is_adopted_by_its_own_number() -> None:
    rows = [instance(f"w{n}", "d1", created_at=n, process="worker") for n in range(3)]
    rows += [instance("i1", "d1"), instance("x", "d1", process="gone")]
    wanted = {"web": 2, "worker": 2}
    app = (plan := reconcile([deployment("d1", active=True, desired=wanted)], rows, [r.id for r in rows])).apps["app"]
    assert sorted(app.active_instances) == ["i1", "w1", "w2"]
    assert app.process_of == {"i1": "web", "w1": "worker", "w2": "worker"}
    assert plan.remove == ["w0", "x"]


def test_commands_under_way_are_left_to_whoever_records_them() -> None:
    rows = [instance("c", "d2", "starting", process="release"), instance("r", "d0", "ready", process="report")]
    recorded = [deployment("d1", active=True), deployment("d2", S.ROLLING_OUT, command="c")]
    for known in (["c", "r"], []):
        plan = reconcile(recorded, rows, known, jobs=["r"])
        assert (plan.remove, plan.gone, plan.apps["app"].under_way_instances) == ([], [], [])
    settled = reconcile([deployment("d2", S.CANCELLED, command="c")], rows, ["c", "r"], jobs=["r"])
    assert settled.remove == ["c"], "the command of a settled deployment is not wanted any more"


def test_an_app_being_deleted_wants_nothing() -> None:
    plan = reconcile([deployment("d1", active=True, deleting=True)], [instance("i1", "d1")], ["i1"])
    assert plan.apps == {}
    assert plan.remove == ["i1"]


NAMES = st.sampled_from([f"i{n}" for n in range(8)])
ROWS = st.lists(
    st.builds(
        instance, NAMES, st.sampled_from(["d0", "d1", "d2", "d3"]),
        st.sampled_from(["starting", "ready", "draining"]), st.integers(0, 3),
    ),
    unique_by=lambda row: row.id,
)  # fmt: skip


@given(
    rows=ROWS,
    known=st.sets(NAMES | st.sampled_from(["x", "y"])),
    statuses=st.lists(st.sampled_from(S), min_size=4, max_size=4),
    active=st.sampled_from([None, 0, 1, 2, 3]),
)
def test_nothing_is_forgotten_or_kept_twice(
    rows: list[RecordedInstance], known: set[str], statuses: list[S], active: int | None
) -> None:
    recorded = [deployment(f"d{n}", status, active=n == active) for n, status in enumerate(statuses)]
    plan = reconcile(recorded, rows, known)
    adopted = [i for app in plan.apps.values() for i in (*app.active_instances, *app.under_way_instances)]
    assert len(adopted) == len(set(adopted))
    assert set(adopted) | set(plan.remove) == known, "an instance is neither adopted nor removed"
    assert not set(adopted) & set(plan.remove)
    assert set(plan.gone) == {row.id for row in rows} - known
    for app in plan.apps.values():
        assert len(app.active_instances) <= 1
        assert len(app.under_way_instances) <= 1
    under_way = [d.id for d in recorded if d.status in UNDER_WAY]
    assert len(plan.cancel) == max(0, len(under_way) - 1)
