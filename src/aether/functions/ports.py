"""What functions need from the world."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aether.model.function import FunctionDefinition
from aether.model.function_instance import (
    Code,
    CodeForm,
    FunctionLogRecord,
    FunctionSpec,
    FunctionState,
    FunctionStatus,
    Invocation,
    StartKind,
)
from aether.model.instance import InstanceExit, LogRecord


class FunctionRuntime(Protocol):
    """Runs instances of functions on this machine. Instances do not outlive the process that started them."""

    async def prepare(self, runtime: str, code: Code) -> None:
        """Make what a start would have to wait for. Idempotent; made once however many ask.

        Raises BadRequest for code that may not be unpacked, NotFound for a runtime that is not registered,
        ServiceUnavailable with the remedy when something is missing on this machine."""
        ...

    async def start(self, spec: FunctionSpec) -> None:
        """Start an instance and return when it listens on its port, which it is not asked but says by itself.

        Nothing is left of a start that failed or was cancelled but the log. Raises what `prepare` does, Conflict when
        the id is taken, BadRequest when the variables are too large, and ServiceUnavailable when the instance ended
        or did not listen in time; `details["log"]` then has the end of its log."""
        ...

    async def connect(self, instance_id: str) -> socket.socket:
        """A connected, non-blocking TCP socket to the instance's port.

        Raises NotFound for an unknown instance, OSError when it does not take the connection."""
        ...

    async def wait(self, instance_id: str) -> InstanceExit:
        """Return when the instance has ended. Raises NotFound."""
        ...

    async def stop(self, instance_id: str, grace_secs: float) -> InstanceExit:
        """Ask the function to end, end it after `grace_secs`, and take away all but its log. Raises NotFound."""
        ...

    async def status(self, instance_id: str) -> FunctionStatus:
        """Raises NotFound."""
        ...

    async def list(self) -> Sequence[str]:
        """Ids of the instances that were started and not stopped, those that ended by themselves included."""
        ...

    async def log(self, instance_id: str, tail: int = 100) -> Sequence[LogRecord]:
        """The last lines of an instance's log, which is bounded and outlives it; empty when there is none."""
        ...

    async def sweep(self) -> Sequence[str]:
        """End and take away what a killed process left on this machine; returns the ids. Idempotent."""
        ...

    async def trim(self, unused_secs: float, logs: int) -> None:
        """Take away what was made of code that no instance has and nobody has asked for within `unused_secs`, and the
        logs of ended instances but the newest `logs`. Raises OSError of the disk."""
        ...

    async def close(self) -> None:
        """End every instance."""
        ...


@dataclass(frozen=True, slots=True)
class FunctionVersion:
    """What instances of a function are started from, as the catalogue has it now."""

    function_id: str
    version: int
    """Grows with every change of the code or of a field; instances of a lower one are outdated."""
    definition: FunctionDefinition
    """With the variables in clear."""
    code_digest: str
    """SHA-256 of the archive's bytes, lower-case hex."""
    code_form: CodeForm


class FunctionSource(Protocol):
    """The catalogue, as those need it who start instances."""

    async def current(self) -> Sequence[FunctionVersion]:
        """Of every function that has code and is not being deleted. Raises ServiceUnavailable."""
        ...

    async def fetch(self, version: FunctionVersion) -> Code:
        """The archive on this machine, verified; downloaded once however many ask. Raises NotFound when it is gone
        from the store, ServiceUnavailable while the store is away."""
        ...


class FunctionControl(Protocol):
    """What runs functions, as the API needs it."""

    def changed(self) -> None:
        """The catalogue has changed: look at it now rather than soon."""
        ...

    async def warm(self, function_id: str) -> None:
        """Ask for one instance of the newest version, if there is none and none starting; returns at once, and what
        becomes of it is in `state`. Raises NotFound."""
        ...

    async def state(self, function_id: str) -> FunctionState:
        """What there is of a function now; of an unknown one, nothing."""
        ...

    async def gone(self, function_id: str) -> None:
        """Return when no instance of a function is left that the catalogue no longer has."""
        ...

    async def log(self, function_id: str, tail: int = 100) -> Sequence[FunctionLogRecord]:
        """The last lines of the logs of its instances, those that have ended lately included, by time."""
        ...


class InvocationSink(Protocol):
    """Where records of invocations go; in batches, off the hot path. Raises ServiceUnavailable."""

    async def add(self, invocations: Sequence[Invocation]) -> None: ...


@dataclass(frozen=True, slots=True)
class RouteRules:
    """What the edge must know of a function. Times are seconds."""

    name: str
    version: int
    concurrency: int
    """Requests that one instance is given at once, at most."""
    timeout_secs: float
    """From when a request was sent to an instance until its answer begins."""
    wait_secs: float
    """How long a request waits for an instance with room."""
    max_waiting: int


@dataclass(frozen=True, slots=True)
class ServingInstance:
    """An instance that takes requests, and how it is connected to. `dial` raises OSError."""

    id: str
    version: int
    start: StartKind
    dial: Callable[[], Awaitable[socket.socket]]


@dataclass(frozen=True, slots=True)
class RouteLoad:
    """What a function has to do now, at one gateway."""

    waiting: int = 0
    in_flight: Mapping[str, int] = field(default_factory=dict[str, int])
    """By instance, those included that take no more and have not finished."""
    idle_since: Mapping[str, float] = field(default_factory=dict[str, float])
    """Since when (monotonic) an instance that takes requests has had none."""


class FunctionRouter(Protocol):
    """The way of requests to instances, at this gateway. Its calls are made on the data path: they must be quick and
    must not raise."""

    on_wait: Callable[[str], None]
    """A request of this function has begun to wait."""
    on_unreachable: Callable[[str, str], None]
    """An instance of this function took no connection; it gets no requests until `serve` names it again."""
    on_hung: Callable[[str, str], None]
    """An instance of this function has not answered several calls in a row; it gets no more until `serve` names it
    again."""
    on_drained: Callable[[str, str], None]
    """An instance that takes no more requests has finished its last one."""
    on_invocation: Callable[[Invocation], None]

    def serve(self, function_id: str, rules: RouteRules, instances: Sequence[ServingInstance]) -> None:
        """From now on requests go to exactly these instances; without any they wait."""
        ...

    def drop(self, function_id: str) -> None:
        """Requests are answered with 404 from now on, and so are those that wait."""
        ...

    def load(self, function_id: str) -> RouteLoad: ...

    def fail_waiting(self, function_id: str, message: str, retry_after_secs: int) -> None:
        """Whoever waits is answered with 503 now."""
        ...
