"""Pure rules of identity: the throttle, names, whose app it is, the shape of refresh tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.identity import throttle
from aether.identity.accounts import RESERVED, check_name
from aether.identity.roles import Principal, Role
from aether.identity.secrets import ACCESS, REFRESH, is_refresh_token, new_token
from aether.identity.throttle import Buckets, LoginThrottle
from aether.model.errors import BadRequest, RateLimited


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 40)), max_size=80))
def test_a_bucket_never_allows_more_than_burst_and_refill(steps: list[tuple[bool, float]]) -> None:
    clock = Clock()
    buckets = Buckets(5, 10.0, clock)
    taken: list[float] = []
    for wants, pause in steps:
        clock.now += pause
        if wants and buckets.wait_secs("k") == 0:
            buckets.take("k")
            taken.append(clock.now)
    for first in taken:
        for span in (0.0, 10.0, 55.0):
            assert sum(first <= at <= first + span for at in taken) <= 5 + span / 10.0 + 1e-6


def test_what_is_given_back_may_be_taken_again() -> None:
    buckets = Buckets(1, 10.0, Clock())
    for _ in range(20):
        assert buckets.wait_secs("k") == 0
        buckets.take("k")
        buckets.give_back("k")
    buckets.take("k")
    assert buckets.wait_secs("k") == pytest.approx(10.0)
    assert buckets.wait_secs("other") == 0


def test_many_keys_take_bounded_memory_and_keep_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "MAX_BUCKETS", 100)
    buckets = Buckets(3, 10.0, Clock())
    for _ in range(3):
        buckets.take("guessed")
    for n in range(1000):
        buckets.take(f"k{n}")
    assert len(buckets._full_at) <= 100
    assert buckets.wait_secs("guessed") > 0


def test_a_refused_attempt_is_not_counted() -> None:
    clock = Clock()
    limit = LoginThrottle(clock)
    for _ in range(10):
        limit.begin("ida", "address")
    for _ in range(50):
        with pytest.raises(RateLimited) as refused:
            limit.begin("ida", "address")
        assert refused.value.details == {"retry_after_secs": 30}
    clock.now += 30
    limit.begin("ida", "address")


@pytest.mark.parametrize("name", ["", "A", "1a", "a b", "a/b", "-a", "a" * 65, "ä", "a\n", *sorted(RESERVED)])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "ida.b-c_9", "a" * 64])
def test_names_that_are_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("role", "owners", "apps", "app", "owner", "expected"),
    [
        (Role.READER, {"ida", "web"}, None, "shop", "web", True),
        (Role.DEPLOYER, {"ida"}, None, "shop", "web", False),
        (Role.ADMIN, {"ida"}, None, "shop", "web", True),
        (Role.ADMIN, {"ida"}, {"blog"}, "shop", "web", False),
        (Role.ADMIN, {"ida"}, {"shop"}, "shop", "web", True),
        (Role.DEPLOYER, {"ida"}, {"shop"}, "shop", "web", False),
        (Role.DEPLOYER, {"ida", "web"}, {"shop"}, "shop", "web", True),
        (Role.DEPLOYER, set[str](), None, "shop", "default", False),
    ],
)
def test_whose_app_it_is(
    role: Role, owners: set[str], apps: set[str] | None, app: str, owner: str, expected: bool
) -> None:
    scope = None if apps is None else frozenset(apps)
    caller = Principal("ida", role, "session", owner="ida", owners=frozenset(owners), apps=scope)
    assert caller.may_touch(app, owner) is expected


def test_refresh_tokens_have_a_shape() -> None:
    assert is_refresh_token(new_token(REFRESH))
    assert not is_refresh_token(new_token(ACCESS))
    assert not is_refresh_token(new_token(REFRESH) + "\n")
    assert not is_refresh_token(new_token(REFRESH)[:-1])
