"""What is taken away is never what somebody needs, and everything else goes in the end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aether.apps.history import NOTHING_CAME, Past, forgotten
from aether.apps.leftovers import unclaimed
from aether.model.deployment import UNDER_WAY, DeploymentStatus
from aether.model.instance import KeptLog
from aether.registry.retention import RELEASES_KEPT, Stored, Use, needed, surplus

APPS = ["a", "b"]
NAMES = [f"{app}{n}" for app in APPS for n in range(6)]
stored = st.lists(
    st.builds(lambda name, at: Stored(name, name[0], at), st.sampled_from(NAMES), st.integers(0, 50)),
    unique_by=lambda it: it.id,
)
uses = st.lists(
    st.builds(
        lambda name, status, release: Use(name, name[0], status, release),
        st.sampled_from(NAMES),
        st.sampled_from(list(DeploymentStatus)),
        st.none() | st.integers(1, 30),
    ),
    max_size=20,
)


@given(stored=stored, uses=uses, keep=st.integers(0, 4), young=st.integers(0, 60))
def test_only_old_artifacts_beyond_the_number_go_and_none_that_is_needed(
    stored: list[Stored], uses: list[Use], keep: int, young: int
) -> None:
    gone = set(surplus(stored, uses, keep=keep, young_since=young))
    if not keep:
        assert not gone
        return
    busy = {use.artifact_id for use in uses if use.status in UNDER_WAY or use.status is DeploymentStatus.ACTIVE}
    assert not gone & busy
    for app in APPS:
        newest = sorted((s for s in stored if s.app_id == app), key=lambda s: (s.created_at, s.id))[-keep:]
        assert not gone & {s.id for s in newest}
        releases = sorted((u for u in uses if u.app_id == app and u.release), key=lambda u: -(u.release or 0))
        assert not gone & {u.artifact_id for u in releases[:RELEASES_KEPT]}
        rest = {s.id for s in stored if s.app_id == app} - {s.id for s in newest} - needed(uses)
        assert {s.id for s in stored if s.id in rest and s.created_at < young} == {g for g in gone if g[0] == app}


@given(
    history=st.lists(
        st.builds(
            Past,
            st.uuids().map(str),
            st.sampled_from(APPS),
            st.sampled_from(list(DeploymentStatus)),
            st.none() | st.integers(1, 30),
            st.none() | st.integers(0, 100),
            st.booleans(),
        ),
        unique_by=lambda it: it.id,
    ),
    before=st.integers(0, 110),
)
def test_only_old_deployments_that_came_to_nothing_are_forgotten(history: list[Past], before: int) -> None:
    gone = set(forgotten(history, before))
    newest = {app: next((p.id for p in history if p.app_id == app), None) for app in APPS}
    for past in history:
        due = (
            past.status in NOTHING_CAME
            and past.release is None
            and not past.live
            and past.ended_at is not None
            and past.ended_at < before
            and past.id != newest[past.app_id]
        )
        assert (past.id in gone) == due


@given(
    st.lists(st.builds(KeptLog, st.sampled_from(NAMES), st.just("a"), st.just(1), st.floats(0, 100)), max_size=12),
    st.sets(st.sampled_from(NAMES)),
    st.floats(0, 100),
)
def test_only_old_logs_that_nothing_known_wrote_go(kept: list[KeptLog], known: set[str], before: float) -> None:
    gone = unclaimed(kept, known, before)
    for log in kept:
        assert (log in gone) == (log.instance_id not in known and log.changed_at < before)
