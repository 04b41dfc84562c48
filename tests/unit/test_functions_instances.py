"""The life of a function instance: the order of its steps, and what holds whatever happens to it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

from aether.functions.instance_state import Effect, Life, Limits, Seen, Stage, advance, begun

LIMITS = Limits(start_secs=60.0, drain_secs=30.0, acknowledge_secs=5.0, stop_secs=10.0)
READY = Seen(ready=True)


@dataclass
class Story:
    life: Life = field(default_factory=lambda: begun(0.0))
    effects: list[tuple[float, Effect]] = field(default_factory=list[tuple[float, Effect]])

    def see(self, seen: Seen, now: float) -> tuple[Effect, ...]:
        """Everything that follows at this moment."""
        found: list[Effect] = []
        while True:
            self.life, effects = advance(self.life, seen, now, LIMITS)
            if not effects:
                return tuple(found)
            found += effects
            self.effects += [(now, effect) for effect in effects]

    @property
    def order(self) -> list[Effect]:
        return [effect for _, effect in self.effects]


def test_an_instance_is_drained_unregistered_acknowledged_and_then_stopped() -> None:
    story = Story()
    assert story.see(Seen(), 1) == ()
    assert story.see(READY, 2) == (Effect.REGISTER,)
    going = Seen(wanted=False, ready=True, in_flight=3, unaware=2)
    assert story.see(going, 100) == (Effect.DRAIN,)
    assert story.see(replace(going, in_flight=1), 110) == ()
    assert story.see(replace(going, in_flight=0), 111) == (Effect.UNREGISTER,)
    assert story.see(replace(going, in_flight=0, unaware=1), 112) == (), "a gateway may still send it something"
    assert story.see(replace(going, in_flight=1, unaware=0), 112) == (), "and has"
    assert story.see(replace(going, in_flight=0, unaware=0), 113) == (Effect.STOP,)
    assert story.see(replace(going, in_flight=0), 114) == ()
    assert story.see(replace(going, alive=False), 115) == (Effect.FORGET,)
    assert (story.life.stage, story.life.reason) == (Stage.GONE, "")
    assert story.see(READY, 116) == ()


def test_an_idle_instance_goes_in_one_step_but_for_the_gateways() -> None:
    story = Story(Life(Stage.SERVING, 0.0))
    assert story.see(Seen(wanted=False, ready=True, unaware=1), 1) == (Effect.DRAIN, Effect.UNREGISTER)
    assert story.see(Seen(wanted=False, ready=True), 2) == (Effect.STOP,)


def test_a_boot_that_hangs_is_killed_and_says_so() -> None:
    story = Story()
    assert story.see(Seen(), 59.9) == ()
    assert story.see(Seen(), 60) == (Effect.KILL,)
    assert story.see(Seen(), 100) == (), "once is enough"
    assert story.see(Seen(alive=False, ending="was killed"), 101) == (Effect.FORGET,)
    assert story.life.reason == "was not ready within 60 s"


def test_a_start_that_is_not_wanted_any_more_is_stopped_without_a_registration() -> None:
    story = Story()
    assert story.see(Seen(wanted=False, ready=True), 1) == (Effect.STOP,)
    assert story.see(Seen(wanted=False, alive=False), 2) == (Effect.FORGET,)
    assert story.life.reason == ""


def test_one_that_ends_by_itself_is_taken_out_of_the_registry_at_once() -> None:
    story = Story(Life(Stage.SERVING, 0.0))
    assert story.see(Seen(alive=False, ending="exited with code 3"), 5) == (Effect.UNREGISTER, Effect.FORGET)
    assert story.life.reason == "exited with code 3"
    early = Story()
    assert early.see(Seen(alive=False), 1) == (Effect.FORGET,)
    assert early.life.reason == "ended by itself"


def test_one_that_stops_answering_is_drained_for_its_requests_sake() -> None:
    story = Story(Life(Stage.SERVING, 0.0))
    assert story.see(Seen(ready=False, in_flight=1), 5) == (Effect.DRAIN,)
    assert story.life.reason == "stopped answering its health checks"
    assert story.see(Seen(ready=True, in_flight=1), 6) == (), "it does not come back"


def test_no_step_waits_for_ever() -> None:
    story = Story(Life(Stage.SERVING, 0.0))
    stuck = Seen(wanted=False, ready=True, in_flight=1, unaware=1)
    for second in range(100):
        story.see(stuck, float(second))
    assert story.effects == [
        (0.0, Effect.DRAIN), (30.0, Effect.UNREGISTER), (65.0, Effect.STOP), (75.0, Effect.KILL)
    ]  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.floats(0.1, 40),
            st.builds(
                Seen, wanted=st.booleans(), alive=st.integers(0, 9).map(bool), ready=st.booleans(),
                in_flight=st.integers(0, 2), unaware=st.integers(0, 1),
            ),
        ),
        max_size=25,
    )
)  # fmt: skip
def test_whatever_is_seen_the_order_holds_and_nobody_is_stopped_in_the_middle_of_a_request(
    sights: list[tuple[float, Seen]],
) -> None:
    story, now = Story(), 0.0
    for pause, seen in sights:
        now += pause
        before, known = story.life, len(story.effects)
        story.see(seen, now)
        for _, effect in story.effects[known:]:
            if effect is Effect.STOP and Effect.REGISTER in story.order:
                assert not seen.in_flight or now - before.since >= LIMITS.drain_secs
    order = [effect for effect in story.order if effect is not Effect.KILL]
    wanted = [Effect.REGISTER, Effect.DRAIN, Effect.UNREGISTER, Effect.STOP, Effect.FORGET]
    assert order == [effect for effect in wanted if effect in order], "each once, in this order"
    if Effect.STOP in order and Effect.REGISTER in order:
        assert Effect.UNREGISTER in order
    if story.life.stage is Stage.GONE and Effect.REGISTER in order:
        assert Effect.UNREGISTER in order, "no registration is left behind"
    while story.life.stage is not Stage.GONE:
        now += 10
        story.see(Seen(wanted=False, alive=Effect.KILL not in story.order, ready=True, in_flight=1, unaware=1), now)
        assert now < sum(pause for pause, _ in sights) + 300
