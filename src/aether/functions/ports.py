"""What functions need from the world."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Protocol

from aether.model.function_instance import Code, FunctionSpec, FunctionStatus
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
