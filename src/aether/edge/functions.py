"""Functions at the edge: which instance a request to `/functions/NAME/...` goes to, and who waits for one.

Implements `FunctionRouter` of the functions' ports. An instance is never given more requests at once than its
function allows; a request that finds no room waits in a bounded line, each with its own deadline, and gets the next
place that becomes free. What starts and stops instances is told of the waiting and of instances that cannot be
reached; it decides elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from time import monotonic
from typing import Final

from aether.edge.options import RequestRecord
from aether.edge.pool import EdgeBackend
from aether.edge.table import Route
from aether.functions.ports import RouteLoad, RouteRules, ServingInstance
from aether.model.function_instance import Invocation, StartKind

FUNCTIONS: Final = b"/functions/"
HUNG_AFTER: Final = 3
"""Calls in a row without an answer in their time, after which an instance is taken for hung."""
RECORDS_PER_SEC: Final = 250
"""Of one function; of what is called more often a part is recorded: failures and cold starts in any case."""
_MAX_PATH: Final = 200
_MAX_KNOWN: Final = 4096
_STATUSES: Final = 1000
_MAX_COLD: Final = 10_000


class NoRoom(Exception):
    """A request that waited, or may not wait, for an instance: what it is answered."""

    def __init__(self, status: int, message: str, retry_after_secs: int = 1) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after_secs = retry_after_secs


class FunctionName(str):
    """A function's name in the records of its requests: hands them on as invocations."""

    __slots__ = ("route",)
    route: FunctionRoute

    def answered(self, record: RequestRecord) -> None:
        route = self.route
        status = record.status
        route.answers[status] += 1
        backend = record.backend
        if isinstance(backend, FunctionBackend):
            if status == 504 and not record.upstream_secs:
                backend.missed()
            else:
                backend.misses = 0
        route.answered(record)


class FunctionBackend(EdgeBackend):
    """One instance; a place that a request leaves goes to who waits longest."""

    __slots__ = ("busy_until", "fresh", "misses", "route", "start", "version")

    def __init__(self, route: FunctionRoute, instance: ServingInstance) -> None:
        super().__init__(f"{route.app}/{instance.id}", instance.dial, route.withdraw)
        self.instance_id = instance.id
        self.route = route
        self.version = instance.version
        self.start = instance.start
        self.fresh = True
        """It was started for those who waited when it came."""
        self.busy_until = monotonic()
        self.misses = 0
        """Calls in a row that it has not answered in their time."""

    def missed(self) -> None:
        self.misses += 1
        if self.misses == HUNG_AFTER:
            self.route.hung(self)

    def leave(self) -> None:
        if not self.retired and self.route.hand_over(self):
            return
        super().leave()
        if not self.in_flight:
            self.busy_until = monotonic()
            if self.retired:
                self.route.emptied(self)


_Place = tuple[FunctionBackend, bool]
"""An instance with room, and whether it was started for those who waited when it came."""


class FunctionRoute(Route):
    """Where the requests of one function go. Used from one event loop only."""

    __slots__ = (
        "_cold", "_draining", "_gone", "_records_left", "_table", "_waiting", "answers", "concurrency", "function_id",
        "max_waiting", "name", "timeout_secs", "version", "wait_secs",
    )  # fmt: skip

    def __init__(self, table: FunctionTable, function_id: str, rules: RouteRules) -> None:
        label = FunctionName(f"function/{rules.name}")
        label.route = self
        super().__init__(label)
        self.function_id = function_id
        self._table = table
        self.answers = table.answers
        self._waiting: dict[asyncio.Future[_Place], None] = {}
        self._draining: dict[str, FunctionBackend] = {}
        self._cold: dict[bytes, StartKind] = {}
        """How the instances came to be that requests under way have waited for."""
        self._gone = False
        self._records_left = RECORDS_PER_SEC
        self.obey(rules)

    def obey(self, rules: RouteRules) -> None:
        self.name = rules.name
        self.version = rules.version
        self.concurrency = rules.concurrency
        self.timeout_secs = rules.timeout_secs
        self.wait_secs = rules.wait_secs
        self.max_waiting = rules.max_waiting

    def pick(self, but: Collection[EdgeBackend] = ()) -> EdgeBackend | None:
        """The less loaded of two instances that has room, or any other that has; None while others wait."""
        if self._waiting:
            return None
        limit = self.concurrency
        for one, two in self._pairs:
            best = one if one.in_flight <= two.in_flight else two
            if best.in_flight < limit and (not but or best not in but):
                return best
            break
        free = [backend for backend in self.backends if backend.in_flight < limit and backend not in but]
        return min(free, key=lambda backend: backend.in_flight) if free else None

    async def room(self, request_id: bytes, deadline: float) -> EdgeBackend:
        """A backend in which the request is counted already; `deadline` is monotonic. Raises NoRoom."""
        if self._gone:
            raise NoRoom(404, f"there is no function '{self.name}'")
        if len(self._waiting) >= self.max_waiting:
            raise NoRoom(503, f"{len(self._waiting)} requests wait for function {self.name} already")
        loop = asyncio.get_running_loop()
        place: asyncio.Future[_Place] = loop.create_future()
        self._waiting[place] = None
        try:
            self._fill()
            if not place.done():
                self._table.on_wait(self.function_id)
            async with asyncio.timeout_at(loop.time() + deadline - monotonic()):
                backend, fresh = await place
        except BaseException as error:
            self._waiting.pop(place, None)
            if place.done() and not place.cancelled() and place.exception() is None:
                place.result()[0].leave()
            if isinstance(error, TimeoutError):
                raise NoRoom(504, f"function {self.name} had no instance with room in time") from None
            raise
        if fresh and len(self._cold) < _MAX_COLD:
            self._cold[request_id] = backend.start
        return backend

    def hand_over(self, backend: FunctionBackend) -> bool:
        """Give the place that a request leaves to who waits longest; False where there is none to give."""
        if not self._waiting or backend.in_flight > self.concurrency:
            return False
        backend.fresh = False
        self._give(backend)
        return True

    def serve(self, instances: Sequence[ServingInstance]) -> None:
        """From now on requests go to exactly these; those under way at others go on."""
        have = {backend.instance_id: backend for backend in self.backends}
        wanted = {instance.id: instance for instance in instances}
        kept = [backend for name, backend in have.items() if name in wanted]
        new = [self._entered(instance) for name, instance in wanted.items() if name not in have]
        for name, backend in have.items():
            if name not in wanted and isinstance(backend, FunctionBackend):
                self._retire(backend)
        self.backends = (*kept, *new)
        self._fill()
        for backend in new:
            # whoever comes from here on finds it running
            backend.fresh = False

    def _entered(self, instance: ServingInstance) -> FunctionBackend:
        """An instance that comes back still has its requests."""
        known = self._draining.pop(instance.id, None)
        if known is None:
            return FunctionBackend(self, instance)
        known.retired = False
        return known

    def unreachable(self, backend: EdgeBackend) -> None:
        """It takes no connection: no more requests until somebody has looked at it."""
        if backend in self.backends and isinstance(backend, FunctionBackend):
            self.backends = tuple(other for other in self.backends if other is not backend)
            self._retire(backend)
            self._table.on_unreachable(self.function_id, backend.instance_id)

    def hung(self, backend: FunctionBackend) -> None:
        """It takes calls and answers none: no more of them for it."""
        if backend in self.backends:
            self.backends = tuple(other for other in self.backends if other is not backend)
            self._retire(backend)
            self._table.on_hung(self.function_id, backend.instance_id)

    def withdraw(self, backend: EdgeBackend) -> None:
        self.backends = tuple(other for other in self.backends if other is not backend)

    def emptied(self, backend: FunctionBackend) -> None:
        """A retired instance has no request any more."""
        if self._draining.pop(backend.instance_id, None) is not None:
            self._table.on_drained(self.function_id, backend.instance_id)

    def fail_waiting(self, message: str, retry_after_secs: int = 1, status: int = 503) -> None:
        """Nobody need wait longer: there will be no instance soon."""
        for place in list(self._waiting):
            if not place.done():
                place.set_exception(NoRoom(status, message, retry_after_secs))
        self._waiting.clear()

    def load(self) -> RouteLoad:
        now = monotonic()
        in_flight = {backend.instance_id: backend.in_flight for backend in self.backends}
        in_flight |= {name: backend.in_flight for name, backend in self._draining.items()}
        idle = {
            backend.instance_id: backend.busy_until
            for backend in self.backends
            if isinstance(backend, FunctionBackend) and not backend.in_flight and backend.busy_until <= now
        }
        return RouteLoad(len(self._waiting), in_flight, idle)

    def refill(self) -> None:
        """A second has passed."""
        self._records_left = RECORDS_PER_SEC

    def close(self) -> None:
        """The function is gone; what is under way goes on."""
        self._gone = True
        self.fail_waiting(f"there is no function '{self.name}'", status=404)
        self.serve(())

    @property
    def has_requests(self) -> bool:
        return bool(self._draining)

    def answered(self, record: RequestRecord) -> None:
        """A request is over; on the data path."""
        status = record.status
        start = self._cold.pop(record.request_id, StartKind.WARM) if self._cold else StartKind.WARM
        if start is not StartKind.WARM:
            self._table.started[start] = self._table.started.get(start, 0) + 1
        elif status < 500:
            if not self._records_left:
                return
            self._records_left -= 1
        backend = record.backend
        seen = isinstance(backend, FunctionBackend)
        path = record.target
        cut = path.find(b"?")
        self._table.on_invocation(
            Invocation(
                id=record.request_id.decode("ascii"),
                function_id=self.function_id,
                version=backend.version if seen else self.version,
                instance_id=backend.instance_id if seen else "",
                started_at=time.time() - record.duration,
                duration_ms=record.duration * 1000,
                method=record.method.decode("ascii"),
                path=path[: min(cut, _MAX_PATH) if cut >= 0 else _MAX_PATH].decode("ascii"),
                status=status,
                start=start,
            )
        )

    def _retire(self, backend: FunctionBackend) -> None:
        if backend.in_flight:
            self._draining[backend.instance_id] = backend
        backend.retire()

    def _fill(self) -> None:
        """Give every free place to who waits longest."""
        while self._waiting:
            free = [it for it in self.backends if it.in_flight < self.concurrency]
            if not free:
                return
            backend = min(free, key=lambda it: it.in_flight)
            assert isinstance(backend, FunctionBackend)
            backend.in_flight += 1
            self._give(backend)

    def _give(self, backend: FunctionBackend) -> None:
        place = next(iter(self._waiting))
        del self._waiting[place]
        if place.done():  # cancelled in this very round of the loop: its task has not seen it yet
            backend.in_flight -= 1
            if self._waiting:
                backend.in_flight += 1
                self._give(backend)
            return
        place.set_result((backend, backend.fresh))


def _nothing(*_: object) -> None:
    """Until somebody listens."""


class FunctionTable:
    """Functions by id and by name."""

    def __init__(self) -> None:
        self._routes: dict[str, FunctionRoute] = {}
        self._found: dict[bytes, FunctionRoute] = {}
        self._known: dict[bytes, tuple[FunctionRoute | None, bytes, bytes]] = {}
        """What `enter` has found, by target."""
        self._refilled = 0.0
        self.answers = [0] * _STATUSES
        """Calls of all functions by status."""
        self.started: dict[StartKind, int] = {}
        """Calls that an instance was started for."""
        self._dropped: dict[str, FunctionRoute] = {}
        """Those that still have requests under way."""
        self.on_wait: Callable[[str], None] = _nothing
        self.on_unreachable: Callable[[str, str], None] = _nothing
        self.on_hung: Callable[[str, str], None] = _nothing
        self.on_drained: Callable[[str, str], None] = _nothing
        self.on_invocation: Callable[[Invocation], None] = _nothing

    def enter(self, target: bytes) -> tuple[FunctionRoute | None, bytes, bytes]:
        """The route for `/functions/NAME...`, what the function is asked for, and the name."""
        known = self._known.get(target)
        if known is not None:
            return known
        start = len(FUNCTIONS)
        end = target.find(b"/", start)
        mark = target.find(b"?", start, end if end >= 0 else len(target))
        if mark >= 0:
            name, rest = target[start:mark], b"/" + target[mark:]
        elif end >= 0:
            name, rest = target[start:end], target[end:]
        else:
            name, rest = target[start:], b"/"
        found = self._found.get(name), rest, name
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        if len(target) <= _MAX_PATH:
            self._known[target] = found
        return found

    @property
    def shortest_timeout_secs(self) -> float:
        return min((route.timeout_secs for route in self._routes.values()), default=float("inf"))

    def serve(self, function_id: str, rules: RouteRules, instances: Sequence[ServingInstance]) -> None:
        route = self._routes.get(function_id)
        if route is None:
            route = self._routes[function_id] = FunctionRoute(self, function_id, rules)
            self._found[function_id.encode()] = route
            self._found[rules.name.encode()] = route
            self._known.clear()
        else:
            route.obey(rules)
        route.serve(instances)

    def drop(self, function_id: str) -> None:
        route = self._routes.pop(function_id, None)
        if route is not None:
            self._known.clear()
            self._found = {name: other for name, other in self._found.items() if other is not route}
            route.close()
            self._dropped = {name: other for name, other in self._dropped.items() if other.has_requests}
            if route.has_requests:
                self._dropped[function_id] = route

    def functions(self) -> Collection[str]:
        return list(self._routes)

    def load(self, function_id: str) -> RouteLoad:
        route = self._routes.get(function_id) or self._dropped.get(function_id)
        return RouteLoad() if route is None else route.load()

    def fail_waiting(self, function_id: str, message: str, retry_after_secs: int) -> None:
        route = self._routes.get(function_id)
        if route is not None:
            route.fail_waiting(message, retry_after_secs)

    def stop_waiting(self) -> None:
        """The server ends: nobody is started for those who wait."""
        for route in self._routes.values():
            route.fail_waiting("the server is stopping", 5)

    def prune(self, now: float) -> None:
        """Close upstream connections that were unused for too long; called about every second."""
        refill = now - self._refilled >= 1.0
        if refill:
            self._refilled = now
        for route in self._routes.values():
            if refill:
                route.refill()
            for backend in route.backends:
                backend.prune(now)

    def close_idle(self) -> None:
        for route in self._routes.values():
            for backend in route.backends:
                backend.close_idle()


def retargeted(data: bytes, method: bytes, old: bytes, new: bytes) -> bytes:
    """A request head as `headers` has made it, asking for `new` instead of `old`."""
    return b"%b %b%b" % (method, new, data[len(method) + 1 + len(old) :])
