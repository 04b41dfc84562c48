"""The routing table: from a Host to an app's backends or the API, and the choice among backends.

A listener asks through an `Entrance`, which knows whether it is entered over TLS and keeps what it found.

Implements `Router` of the apps' ports. It decides and holds; it neither reads nor writes a byte of traffic.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, cycle
from pathlib import Path

from aether.apps.ports import Backend, Instance
from aether.edge.closed import ChallengeBackend, ClosedBackend, RedirectBackend
from aether.edge.head import HEAD_END
from aether.edge.pool import EdgeBackend
from aether.model.hosts import HostRule
from aether.model.traffic import Traffic

_CACHE_SIZE = 4096
_CLIENT_LEFT = 499
_FEW = 16
"""The pairs of so many backends are written out: the next one is then at hand."""


class Route:
    """Where the requests of one app (or of the API, `app` None) go."""

    __slots__ = ("_backends", "_pairs", "_turn", "app", "closed")

    timeout_secs = 0.0
    """Until an answer begins; 0: as everywhere."""

    def __init__(self, app: str | None, backends: tuple[EdgeBackend, ...] = ()) -> None:
        self.app = app
        self.closed: EdgeBackend | None = None
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
    if len(backends) <= _FEW:
        return cycle([(one, two) for shift in range(1, len(backends)) for one, two in _apart(backends, shift)])
    return chain.from_iterable(_apart(backends, shift) for shift in cycle(range(1, len(backends))))


def _apart(backends: tuple[EdgeBackend, ...], shift: int) -> Iterator[tuple[EdgeBackend, EdgeBackend]]:
    return zip(backends, backends[shift:] + backends[:shift], strict=True)


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


class Entrance:
    """The table as one kind of listener sees it. `found` are routes by the Host fields that led to them."""

    __slots__ = ("_endings", "_table", "found", "https_port", "port", "secure", "strict")

    def __init__(self, table: RouteTable, *, secure: bool = False, port: int = 0, https_port: int = 0) -> None:
        self._table = table
        self.secure = secure
        self.port = port
        """The port that clients use, for redirects to another host; 0: the scheme's own."""
        self.https_port = https_port
        """Where plain requests are sent on to, at this port; 0: they are served."""
        self.found: dict[bytes, Route] = {}
        self.strict = False
        """Some host wants its clients to come back over HTTPS only; `ending` knows which."""
        self._endings: dict[bytes, bytes] = {}

    def forget(self) -> None:
        self.found.clear()
        self._endings.clear()

    def ending(self, host: bytes) -> bytes:
        """What ends a response head of this host, for a `strict` entrance."""
        known = self._endings.get(host)
        if known is None:
            rule = self._table.rule(host)
            known = HEAD_END
            if rule is not None and rule.hsts_secs:
                known = b"\r\nStrict-Transport-Security: max-age=%d\r\n\r\n" % rule.hsts_secs
            if len(self._endings) >= _CACHE_SIZE:
                self._endings.clear()
            self._endings[host] = known
        return known

    def find(self, host: bytes) -> Route | None:
        """The route for a Host field that `head` has found well-formed; kept in `found` when it stays the same."""
        return self._table.enter(self, host)

    def origin(self, host: str) -> str:
        """Scheme, host and port at which clients reach `host`, over TLS if this listener insists on it."""
        secure = self.secure or self.https_port > 0
        port = self.port if self.secure or not self.https_port else self.https_port
        shown = "" if port in (0, 443 if secure else 80) else f":{port}"
        return f"{'https' if secure else 'http'}://{host}{shown}"


class RouteTable:
    """Hosts and routes. `base_domain` is what follows an app's name in its host."""

    def __init__(self, base_domain: str = "localhost") -> None:
        self._suffix = "." + base_domain.lower().strip(".")
        self._apps: dict[str, Route] = {}
        self._trials: dict[str, Trial] = {}
        self._api: Route | None = None
        self._api_hosts: frozenset[str] = frozenset()
        self._rules: Mapping[str, HostRule] = {}
        self._answers: Mapping[str, Mapping[str, str]] = {}
        self._entrances: list[Entrance] = []
        self.entrance = self.enter_by()
        """Serves what comes, whether over TLS or not."""

    def enter_by(self, *, secure: bool = False, port: int = 0, https_port: int = 0) -> Entrance:
        """An entrance for further listeners."""
        made = Entrance(self, secure=secure, port=port, https_port=https_port)
        self._entrances.append(made)
        self._forget()
        return made

    def set_hosts(self, rules: Mapping[str, HostRule]) -> None:
        """From now on exactly these custom hosts lead to apps."""
        self._rules = dict(rules)
        self._forget()

    def set_answers(self, answers: Mapping[str, Mapping[str, str]]) -> None:
        """From now on these paths of these hosts are answered with these texts."""
        self._answers = dict(answers)
        self._forget()

    def rule(self, host: bytes) -> HostRule | None:
        """What is kept of a custom host."""
        return self._rules.get(_plain(host.decode("ascii")))

    def _forget(self) -> None:
        strict = any(rule.hsts_secs for rule in self._rules.values())
        for entrance in self._entrances:
            entrance.forget()
            entrance.strict = entrance.secure and strict

    def add(self, app: str, instance: Instance) -> EdgeBackend:
        """Make a backend that gets no requests yet."""
        spec = instance.spec
        made = EdgeBackend(f"{app}/{spec.instance_id}", instance.dial, self._withdraw)
        made.instance_id, made.deployment_id = spec.instance_id, spec.deployment_id
        return made

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
                self._forget()  # the choice between the two is made by `find`
            trial_of.begin(route, tried, percent)
        elif self._trials.pop(app, None) is not None:
            self._forget()
        for backend in before:
            if backend not in chosen and backend not in tried:
                backend.retire()

    def serves(self, app: str) -> bool:
        """Whether requests for the app go to any backend."""
        route = self._apps.get(app)
        return route is not None and bool(route.backends)

    def traffic(self, app: str) -> tuple[Traffic, Traffic]:
        """What the trial and what the other backends have answered since the trial began."""
        trial = self._trials.get(app)
        return (Traffic(), Traffic()) if trial is None else (trial.new.traffic.copy(), trial.old.traffic.copy())

    def drop(self, app: str) -> None:
        """Forget the app: its hosts answer 404."""
        before = self._of(app)
        route = self._apps.pop(app, None)
        self._trials.pop(app, None)
        self._rules = {host: rule for host, rule in self._rules.items() if rule.app != app}
        self._forget()
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
        self._forget()
        if old is not None:
            for backend in old.backends:
                backend.retire()

    def find(self, host: bytes) -> Route | None:
        """The route for a Host field, as the plain entrance sees it."""
        return self.entrance.find(host)

    def enter(self, entrance: Entrance, host: bytes) -> Route | None:
        """The route for a Host field at one of the entrances."""
        route = entrance.found.get(host)
        if route is not None:
            return route
        name = _plain(host.decode("ascii"))
        route, keep = self._enter(entrance, name)
        if self._answers and (answers := self._answers.get(name)) is not None:
            return _answering(answers, route)
        if route is not None and keep:
            if len(entrance.found) >= _CACHE_SIZE:
                entrance.found.clear()
            entrance.found[host] = route
        return route

    def _enter(self, entrance: Entrance, name: str) -> tuple[Route | None, bool]:
        """The route for a plain host name, and whether the next request would get the same."""
        app, rule = self._app_of(name)
        if rule is not None and rule.redirect_to is not None:
            return _redirecting(app, entrance.origin(rule.redirect_to)), True
        known = app in self._apps if app is not None else name in self._api_hosts
        if known and entrance.https_port and not (rule is not None and rule.allow_http):
            return _redirecting(app, entrance.origin(name)), True
        if app is None:
            return self._api if known else None, True
        if self._trials and (trial := self._trials.get(app)) is not None:
            return trial.choose(), False
        return self._apps.get(app), True

    def _app_of(self, name: str) -> tuple[str | None, HostRule | None]:
        """Nobody can take a host from the API or from an app whose name it has, whatever the rules say."""
        if name in self._api_hosts:
            return None, None
        if name.endswith(self._suffix):
            return name[: -len(self._suffix)], None
        rule = self._rules.get(name)
        return (None, None) if rule is None else (rule.app, rule)

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


def _redirecting(app: str | None, origin: str) -> Route:
    route = Route(app)
    route.closed = RedirectBackend(origin)
    return route


def _answering(answers: Mapping[str, str], beyond: Route | None) -> Route:
    route = Route(None if beyond is None else beyond.app)
    route.closed = ChallengeBackend(answers, beyond)
    return route


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
