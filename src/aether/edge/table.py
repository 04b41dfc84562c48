"""The routing table: from a Host to an app's backends or the API, and the choice among backends.

Implements `Router` of the apps' ports. It decides and holds; it neither reads nor writes a byte of traffic.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, cycle
from pathlib import Path

from aether.apps.ports import Backend, Instance
from aether.edge.closed import ClosedBackend
from aether.edge.pool import EdgeBackend
from aether.model.traffic import Traffic

_CACHE_SIZE = 4096
_CLIENT_LEFT = 499


class Route:
    """Where the requests of one app (or of the API, `app` None) go."""

    __slots__ = ("_backends", "_pairs", "_turn", "app", "closed")

    def __init__(self, app: str | None, backends: tuple[EdgeBackend, ...] = ()) -> None:
        self.app = app
        self.closed: ClosedBackend | None = None
        """Answers while there is no backend and there is not meant to be one."""
        self._turn = 0
        self.backends = backends

    @property
    def backends(self) -> tuple[EdgeBackend, ...]:
        return self._backends

    @backends.setter
    def backends(self, backends: tuple[EdgeBackend, ...]) -> None:
        self._backends = backends
        self._pairs = _pairs(backends)

    def pick(self, but: Collection[EdgeBackend] = ()) -> EdgeBackend | None:
        """The less loaded of two backends (power of two choices, Mitzenmacher 2001) outside `but`.

        All ordered pairs take their turn: with one chooser that is as even as drawing them, and cheaper.
        """
        if but:
            return self._pick_outside(but)
        for one, two in self._pairs:
            return one if one.in_flight <= two.in_flight else two
        return self.closed

    def _pick_outside(self, but: Collection[EdgeBackend]) -> EdgeBackend | None:
        backends = [backend for backend in self._backends if backend not in but]
        if not backends:
            return None
        self._turn = turn = self._turn + 1
        one, two = backends[turn % len(backends)], backends[(turn + 1) % len(backends)]
        return one if one.in_flight <= two.in_flight else two


def _pairs(backends: tuple[EdgeBackend, ...]) -> Iterator[tuple[EdgeBackend, EdgeBackend]]:
    """All ordered pairs in turn, without end; a lone backend is its own partner, and of none there is no pair."""
    if len(backends) < 2:
        return cycle(zip(backends, backends, strict=True))
    return chain.from_iterable(
        zip(backends, backends[shift:] + backends[:shift], strict=True) for shift in cycle(range(1, len(backends)))
    )


class CountedApp(str):
    """An app's name in the records of requests to one of two releases: tells which, and what that one answered."""

    __slots__ = ("traffic",)

    def __new__(cls, name: str) -> CountedApp:
        made = super().__new__(cls, name)
        made.traffic = Traffic()
        return made

    traffic: Traffic

    def answered(self, status: int, upstream_secs: float) -> None:
        """A request is over; one that its client gave up says nothing."""
        if status != _CLIENT_LEFT:
            traffic = self.traffic
            traffic.answers += 1
            traffic.seconds += upstream_secs
            if status >= 500:
                traffic.errors += 1


class Trial:
    """Two releases of one app, the new one with a share of the requests. Each has a route whose name is counted."""

    __slots__ = ("_left", "_percent", "new", "new_route", "old", "old_route")

    def __init__(self, app: str) -> None:
        self.new, self.old = CountedApp(app), CountedApp(app)
        self.new_route, self.old_route = Route(self.new), Route(self.old)
        self._percent = 0
        self._left = 0

    def begin(self, old: Route, new: tuple[EdgeBackend, ...], percent: int) -> None:
        self.old_route.backends, self.old_route.closed = old.backends, old.closed
        self.new_route.backends = new
        self._percent = percent

    def choose(self) -> Route:
        """The route of the next request: exactly so many in a hundred go to the new release, evenly spread."""
        if not self.new_route.backends:
            return self.old_route
        if not self.old_route.backends:
            return self.new_route
        self._left += self._percent
        if self._left >= 100:
            self._left -= 100
            return self.new_route
        return self.old_route


class RouteTable:
    """Hosts and routes. `base_domain` is what follows an app's name in its host."""

    def __init__(self, base_domain: str = "localhost") -> None:
        self._suffix = "." + base_domain.lower().strip(".")
        self._apps: dict[str, Route] = {}
        self._trials: dict[str, Trial] = {}
        self._api: Route | None = None
        self._api_hosts: frozenset[str] = frozenset()
        self.found: dict[bytes, Route] = {}
        """Routes by the Host fields that led to them; `find` fills it."""

    def add(self, app: str, instance: Instance) -> EdgeBackend:
        """Make a backend that gets no requests yet."""
        return EdgeBackend(f"{app}/{instance.spec.instance_id}", instance.dial, self._withdraw)

    def route(
        self,
        app: str,
        backends: Sequence[Backend],
        *,
        closed: str | None = None,
        trial: Sequence[Backend] = (),
        percent: int = 0,
    ) -> None:
        """From now on requests for `app` go to exactly these backends; an empty sequence answers 503.

        `closed` is what such an answer says of an app that is not meant to run. So many in a hundred requests go to
        `trial` instead; all do when there is nothing else."""
        chosen, tried = _own(backends), _own(trial)
        before = self._of(app)
        for backend in (*chosen, *tried):
            backend.retired = False
        route = self._apps.get(app)
        if route is None:
            route = self._apps[app] = Route(app)
        route.backends = chosen
        route.closed = None if closed is None else ClosedBackend(closed)
        if tried:
            trial_of = self._trials.get(app)
            if trial_of is None:
                trial_of = self._trials[app] = Trial(app)
                self.found.clear()  # the choice between the two is made by `find`
            trial_of.begin(route, tried, percent)
        elif self._trials.pop(app, None) is not None:
            self.found.clear()
        for backend in before:
            if backend not in chosen and backend not in tried:
                backend.retire()

    def traffic(self, app: str) -> tuple[Traffic, Traffic]:
        """What the trial and what the other backends have answered since the trial began."""
        trial = self._trials.get(app)
        return (Traffic(), Traffic()) if trial is None else (trial.new.traffic.copy(), trial.old.traffic.copy())

    def drop(self, app: str) -> None:
        """Forget the app: its host answers 404."""
        before = self._of(app)
        route = self._apps.pop(app, None)
        self._trials.pop(app, None)
        self.found.clear()
        if route is not None:
            route.backends = ()
        for backend in before:
            backend.retire()

    def set_api(self, hosts: Iterable[str], socket_path: Path | str) -> None:
        """Requests for these host names (ports are ignored) go to the API on this unix socket."""

        async def dial() -> socket.socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                await asyncio.get_running_loop().sock_connect(sock, str(socket_path))
            except BaseException:
                sock.close()
                raise
            return sock

        old = self._api
        self._api_hosts = frozenset(_plain(host) for host in hosts)
        self._api = Route(None, (EdgeBackend("api", dial, self._withdraw),))
        self.found.clear()
        if old is not None:
            for backend in old.backends:
                backend.retire()

    def find(self, host: bytes) -> Route | None:
        """The route for a Host field that `head` has found well-formed."""
        route = self.found.get(host)
        if route is not None:
            return route
        name = _plain(host.decode("ascii"))
        if name in self._api_hosts:
            route = self._api
        elif name.endswith(self._suffix):
            app = name[: -len(self._suffix)]
            if self._trials and (trial := self._trials.get(app)) is not None:
                return trial.choose()  # for each request anew, so it is not kept in `found`
            route = self._apps.get(app)
        if route is not None:
            if len(self.found) >= _CACHE_SIZE:
                self.found.clear()
            self.found[host] = route
        return route

    def prune(self, now: float) -> None:
        """Close upstream connections that were unused for too long."""
        for backend in self._backends():
            backend.prune(now)

    def close_idle(self) -> None:
        """Close every unused upstream connection."""
        for backend in self._backends():
            backend.close_idle()

    def _backends(self) -> list[EdgeBackend]:
        routes = [*self._apps.values(), *([self._api] if self._api is not None else [])]
        routes += [trial.new_route for trial in self._trials.values()]
        return [backend for route in routes for backend in route.backends]

    def _of(self, app: str) -> tuple[EdgeBackend, ...]:
        route, trial = self._apps.get(app), self._trials.get(app)
        return (() if route is None else route.backends) + (() if trial is None else trial.new_route.backends)

    def _withdraw(self, backend: EdgeBackend) -> None:
        trials = [route for trial in self._trials.values() for route in (trial.new_route, trial.old_route)]
        for route in (*self._apps.values(), *trials):
            if backend in route.backends:
                route.backends = tuple(b for b in route.backends if b is not backend)


def _own(backends: Sequence[Backend]) -> tuple[EdgeBackend, ...]:
    own = tuple(backend for backend in backends if isinstance(backend, EdgeBackend))
    if len(own) != len(backends):
        raise TypeError("a backend must come from this table's add()")
    return own


def _plain(host: str) -> str:
    """Lower case, without port, brackets' port and trailing dot: `App.Localhost.:80` → `app.localhost`."""
    name = host.lower()
    if name.startswith("["):
        return name[: name.find("]") + 1]
    if name.count(":") > 1:
        return f"[{name}]"
    name = name.partition(":")[0]
    return name[:-1] if name.endswith(".") else name
