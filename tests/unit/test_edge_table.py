"""Routing: hosts, the choice among backends, swaps and drains."""

from __future__ import annotations

import socket
from collections import Counter

import pytest

from aether.edge.closed import ClosedBackend
from aether.edge.headers import TraceParents
from aether.edge.table import CountedApp, Route, RouteTable
from support.edge import PortInstance


class _Nowhere(PortInstance):
    async def dial(self) -> socket.socket:
        raise ConnectionRefusedError


def instance(name: str = "i") -> PortInstance:
    return _Nowhere(1, name)


def app_of(table: RouteTable, host: bytes) -> str | None:
    route = table.find(host)
    return "(none)" if route is None else route.app


@pytest.mark.parametrize(
    "host", [b"shop.localhost", b"SHOP.LocalHost", b"shop.localhost:8080", b"shop.localhost.", b"Shop.localhost.:1"]
)
def test_an_app_is_found_by_its_host(host: bytes) -> None:
    table = RouteTable()
    table.route("shop", [])
    assert app_of(table, host) == "shop"
    assert app_of(table, host) == "shop"  # and from the cache
    table.drop("shop")
    assert app_of(table, host) == "(none)"


@pytest.mark.parametrize(
    "host", [b"localhost", b"other.localhost", b"x.shop.localhost", b"shop.localhost.evil", b"shop", b"127.0.0.1"]
)
def test_other_hosts_are_not_found(host: bytes) -> None:
    table = RouteTable()
    table.route("shop", [])
    assert app_of(table, host) == "(none)"


def test_api_hosts() -> None:
    table = RouteTable("apps.example")
    table.route("shop", [])
    assert table.find(b"localhost") is None
    table.set_api(["localhost", "127.0.0.1", "::1", "API.example"], "/run/api.sock")
    for host in (b"localhost", b"LOCALHOST:80", b"127.0.0.1:8080", b"[::1]:8080", b"[::1]", b"api.example."):
        assert app_of(table, host) is None
    assert app_of(table, b"shop.apps.example") == "shop"
    assert app_of(table, b"shop.localhost") == "(none)"


def test_swapping_retires_what_is_no_longer_routed() -> None:
    table = RouteTable()
    one, two = table.add("a", instance("1")), table.add("a", instance("2"))
    table.route("a", [one])
    table.route("a", [one, two])
    assert (one.retired, two.retired) == (False, False)
    table.route("a", [two])
    assert (one.retired, two.retired) == (True, False)
    table.route("a", [one])
    assert (one.retired, two.retired) == (False, True)
    table.drop("a")
    assert one.retired


def test_foreign_backends_are_refused() -> None:
    class Foreign:
        in_flight = 0

        async def drain(self, timeout_secs: float) -> bool:
            return True

    with pytest.raises(TypeError):
        RouteTable().route("a", [Foreign()])


async def test_drain_waits_for_requests_under_way() -> None:
    table = RouteTable()
    backend = table.add("a", instance())
    table.route("a", [backend])
    backend.in_flight = 1
    assert not await backend.drain(0.01)
    route = table.find(b"a.localhost")
    assert route is not None
    assert route.pick() is None
    backend.leave()
    assert await backend.drain(0.01)


def test_choice_prefers_the_less_loaded() -> None:
    table = RouteTable()
    backends = tuple(table.add("a", instance(str(number))) for number in range(3))
    route = Route("a", backends)
    assert Counter(route.pick() for _ in range(3000)).most_common()[-1][1] > 800
    backends[0].in_flight = 5
    backends[1].in_flight = 1
    found = Counter(route.pick() for _ in range(3000))
    assert found[backends[0]] == 0
    assert found[backends[2]] > found[backends[1]] > 800
    assert route.pick({backends[1], backends[2]}) is backends[0]
    assert route.pick(set(backends)) is None


def test_choice_of_two_is_fair_when_equal() -> None:
    table = RouteTable()
    one, two = table.add("a", instance("1")), table.add("a", instance("2"))
    route = Route("a", (one, two))
    found = Counter(route.pick() for _ in range(2000))
    assert min(found[one], found[two]) > 850


@pytest.mark.parametrize("count", [2, 3, 5, 16, 17])
def test_all_ordered_pairs_take_their_turn(count: int) -> None:
    table = RouteTable()
    backends = tuple(table.add("a", instance(str(number))) for number in range(count))
    route = Route("a", backends)
    first = Counter(route.pick() for _ in range(count * (count - 1)))
    assert set(first.values()) == {count - 1}
    for busy in backends:
        busy.in_flight = 9
    backends[0].in_flight = 0
    among = Counter(route.pick() for _ in range(count * (count - 1)))
    assert among.total() == count * (count - 1)
    assert among[backends[0]] == 2 * (count - 1)


def test_a_trial_gets_exactly_its_share_and_is_counted() -> None:
    table = RouteTable()
    old, new = table.add("a", instance("1")), table.add("a", instance("2"))
    table.route("a", [old])
    assert table.find(b"a.localhost") is not None
    table.route("a", [old], trial=[new], percent=5)
    routes = [table.entrance.found.get(b"a.localhost") or table.find(b"a.localhost") for _ in range(200)]
    assert Counter(route.pick() for route in routes if route is not None) == {old: 190, new: 10}
    for route in routes:
        assert route is not None
        assert route.app == "a"
        assert isinstance(route.app, CountedApp)
        route.app.answered(500 if route.backends == (new,) else 200, 0.5)
    routes[0].app.answered(499, 9.0)  # type: ignore[union-attr]
    tried, others = table.traffic("a")
    assert (tried.answers, tried.errors, tried.seconds) == (10, 10, 5.0)
    assert (others.answers, others.errors) == (190, 0)
    table.route("a", [old], trial=[new], percent=100)
    assert {table.find(b"a.localhost").pick() for _ in range(50)} == {new}  # type: ignore[union-attr]
    assert table.traffic("a")[0].answers == 10, "a step counts on"
    table.route("a", [new])
    assert (old.retired, new.retired) == (True, False)
    route = table.find(b"a.localhost")
    assert route is not None
    assert type(route.app) is str
    assert table.entrance.found == {b"a.localhost": route}
    assert table.traffic("a")[0].answers == 0


async def test_either_side_of_a_trial_stands_in_for_the_other() -> None:
    table = RouteTable()
    old, new = table.add("a", instance("1")), table.add("a", instance("2"))
    table.route("a", [old], trial=[new], percent=50)
    assert await new.drain(0)
    assert {table.find(b"a.localhost").pick() for _ in range(4)} == {old}  # type: ignore[union-attr]
    table.route("a", [], trial=[new], percent=1)
    assert {table.find(b"a.localhost").pick() for _ in range(4)} == {new}  # type: ignore[union-attr]
    table.drop("a")
    assert table.find(b"a.localhost") is None
    assert (old.retired, new.retired) == (True, True)


def test_a_closed_app_is_refused_by_a_backend_of_its_own() -> None:
    table = RouteTable()
    backend = table.add("a", instance())
    table.route("a", [], closed="the app is stopped")
    route = table.find(b"a.localhost")
    assert route is not None
    refusing = route.pick()
    assert isinstance(refusing, ClosedBackend)
    assert refusing.message == "the app is stopped"
    assert route.pick({backend}) is None, "a request whose backends failed is not told that the app is stopped"
    table.route("a", [backend])
    assert route.pick() is backend


def test_trace_parents_are_well_formed_and_new() -> None:
    traces = TraceParents()
    made = {traces.new() for _ in range(2000)}
    assert len(made) == 2000
    assert all(len(one) == 55 and one.startswith(b"00-") and one.endswith(b"-01") for one in made)
