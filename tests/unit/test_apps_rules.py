"""Small pure rules of apps: variables, statuses, log merging, restarts, request checks."""

from __future__ import annotations

import pytest

from aether.api.routers.logs import since_to_ns
from aether.apps.catalogue import app_status
from aether.apps.configs import Change, VariableChange, changed, check_env, differences
from aether.apps.deployments import DeployRequest, check_request
from aether.apps.records import Health
from aether.apps.replica import LONGEST_PAUSE_SECS, pause_before_restart
from aether.apps.vault import Variables
from aether.model.errors import BadRequest, InvalidDigest
from aether.rollout.gates import Shift
from aether.topology.node import warning
from aether.topology.public import api_hosts, app_url, base_url, check_exposure, is_loopback

DIGEST = "a" * 64


def test_variables_are_set_unset_and_replaced() -> None:
    before = Variables({"A": "1", "B": "2"})
    assert changed(before, Change({"C": "3"}, unset=["A"])) == Variables({"B": "2", "C": "3"})
    assert changed(before, Change({"C": "3"}, replace=True)) == Variables({"C": "3"})
    assert changed(before, Change(unset=["nope"])) == before
    for twice in (Change({"A": "x"}, unset=["A"]), Change({"A": "x"}, {"A": "y"}), Change({}, {"A": "y"}, ["A"])):
        with pytest.raises(BadRequest, match="A is named twice"):
            changed(before, twice)


def test_a_secret_stays_one_until_it_is_unset() -> None:
    before = changed(Variables({"A": "1"}), Change(secrets={"S": "s", "A": "2"}))
    assert before == Variables({"A": "2", "S": "s"}, frozenset({"A", "S"}))
    assert changed(before, Change({"S": "other"})).secrets == {"A", "S"}
    assert changed(before, Change({"S": "other"}, replace=True)) == Variables({"S": "other"}, frozenset({"S"}))
    unset = changed(before, Change(unset=["S"]))
    assert unset == Variables({"A": "2"}, frozenset({"A"}))
    assert changed(unset, Change({"S": "plain"})).secrets == {"A"}


def test_differences_name_what_changed_and_never_a_value() -> None:
    a = Variables({"GONE": "1", "SAME": "1", "S": "1", "KIND": "1"}, frozenset({"S"}))
    b = Variables({"NEW": "1", "SAME": "1", "S": "2", "KIND": "1"}, frozenset({"S", "KIND"}))
    assert differences(a, b) == [
        VariableChange("GONE", "removed", False),
        VariableChange("KIND", "changed", True),
        VariableChange("NEW", "added", False),
        VariableChange("S", "changed", True),
    ]
    assert differences(a, a) == []


@pytest.mark.parametrize("env", [{"1A": ""}, {"A-B": ""}, {"": ""}, {"PORT": "1"}, {"AETHER_X": ""}, {"A": "\0"},
                                 {"A": "x" * 200_000}, {f"V{n}": "" for n in range(501)}])  # fmt: skip
def test_impossible_variables_are_refused(env: dict[str, str]) -> None:
    with pytest.raises(BadRequest):
        check_env(env)


def test_a_variable_may_hold_anything_else() -> None:
    check_env({"_x9": "line\nline ='\"$`", "ÜBER"[1:]: "snow ☃"})


@pytest.mark.parametrize(
    ("has_release", "ready", "newest", "status"),
    [
        (False, 0, None, "empty"),
        (False, 0, "rolling_out", "starting"),
        (False, 0, "failed", "failed"),
        (False, 0, "cancelled", "empty"),
        (True, 1, "active", "running"),
        (True, 1, "failed", "running"),
        (True, 1, "rolling_out", "running"),
        (True, 0, "active", "degraded"),
        (True, 0, "rolling_out", "starting"),
    ],
)
def test_what_an_app_is(has_release: bool, ready: int, newest: str | None, status: str) -> None:
    assert app_status(has_release=has_release, ready=ready, newest=newest) == status


def test_the_pause_before_a_restart_doubles_up_to_half_a_minute() -> None:
    pauses = [pause_before_restart(n) for n in range(12)]
    assert pauses[:4] == [0.1, 0.2, 0.4, 0.8]
    assert pauses == sorted(pauses)
    assert pauses[-1] == pause_before_restart(10_000) == LONGEST_PAUSE_SECS == 30.0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"digest": "A" * 64}, InvalidDigest),
        ({"strategy": "sideways"}, BadRequest),
        ({"rollout": Shift(steps=(50, 10))}, BadRequest),
        ({"command": ""}, BadRequest),
        ({"command": "x\0"}, BadRequest),
        ({"timeout_secs": 0}, BadRequest),
        ({"timeout_secs": float("nan")}, BadRequest),
        ({"health": Health("x")}, BadRequest),
        ({"health": Health("/a b")}, BadRequest),
        ({"health": Health("/a\r\nX: y")}, BadRequest),
        ({"health": Health(None, 80)}, BadRequest),
        ({"env": {"HOME": "/"}}, BadRequest),
    ],
)
def test_requests_that_cannot_be_meant(change: dict[str, object], error: type[Exception]) -> None:
    good = {"app": "x", "digest": DIGEST}
    check_request(DeployRequest(**good))  # type: ignore[arg-type]
    with pytest.raises(error):
        check_request(DeployRequest(**{**good, **change}))  # type: ignore[arg-type]


def test_since() -> None:
    now = 10_000 * 10**9
    assert since_to_ns("30", now) == now - 30 * 10**9
    assert since_to_ns("10m", now) == now - 600 * 10**9
    assert since_to_ns("999999d", now) == 0
    assert since_to_ns("1970-01-01T00:00:01Z", now) == 10**9
    for bad in ("yesterday", "10 m", "-5", ""):
        with pytest.raises(BadRequest, match="since"):
            since_to_ns(bad, now)


def test_node_versions() -> None:
    assert warning("node20", 20) is None
    assert warning("python3.11", None) is None
    assert warning(None, 20) is None
    assert "22" in (warning("node22", 20) or "")
    assert "no Node.js" in (warning("node22", None) or "")


def test_addresses(tmp_path: object) -> None:
    from aether.model.errors import ConfigError
    from aether.settings import load

    settings = load({"AETHER_DATA_DIR": "/x", "AETHER_API_HOSTS": "api.example"})
    assert base_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert base_url("::1", 8080) == "http://[::1]:8080"
    assert app_url("shop", settings, 80) == "http://shop.localhost/"
    assert app_url("shop", settings, 8080) == "http://shop.localhost:8080/"
    assert "api.example" in api_hosts(settings, "10.0.0.1")
    assert [is_loopback(h) for h in ("127.0.0.9", "::1", "localhost", "0.0.0.0", "example")] == [True] * 3 + [
        False
    ] * 2
    check_exposure(settings, "0.0.0.0")
    for change in ({"AETHER_SANDBOX": "none"}, {"AETHER_AUTH_REQUIRED": "false"}):
        risky = load({"AETHER_DATA_DIR": "/x", **change})
        check_exposure(risky, "127.0.0.1")
        with pytest.raises(ConfigError):
            check_exposure(risky, "0.0.0.0")
