"""What functions need from the world."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
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
