"""One command run to its end in an instance of its own: a release command, or one run of a cron process.

Its instance id is recorded before it starts, and starting is idempotent by that id: a successor that runs the same
job adopts what is there, and learns from the keeper's record how it ended if nobody was looking.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from aether.apps.ports import Instance
from aether.apps.replica import Drivers
from aether.model.errors import AetherError
from aether.model.instance import InstanceExit, InstanceSpec


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ended: the exit of its command, or why there is none."""

    exit: InstanceExit | None
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.exit is not None and self.exit.code == 0 and not self.exit.expired

    def __str__(self) -> str:
        return f"has no known end: {self.error}" if self.exit is None else str(self.exit)


class Job:
    def __init__(self, drivers: Drivers, instance_id: str, spec: InstanceSpec | None) -> None:
        """Without a `spec` nothing is started: the job is what is there under the id."""
        self._drivers = drivers
        self._instance_id = instance_id
        self._spec = None if spec is None else replace(spec, instance_id=instance_id)
        self._instance: Instance | None = None
        self._stopping = False

    @property
    def digest(self) -> str | None:
        """Of the artifact that it runs in; None while that is not known."""
        spec = self._spec if self._instance is None else self._instance.spec
        return None if spec is None else spec.digest

    async def run(self) -> JobEnd:
        """Start or adopt, and return when it has ended. Raises LeaseLost. Cancelled, it leaves the command
        running."""
        await self._drivers.lease.until_holds()
        try:
            instance = await self._obtain()
        except AetherError as error:
            return JobEnd(None, error=f"it could not be started: {error.message}")
        except OSError as error:
            return JobEnd(None, error=f"it could not be started: {str(error) or type(error).__name__}")
        if instance is None:
            return JobEnd(None, error="nothing of it is left on this machine")
        self._instance = instance
        return JobEnd(await instance.stop(0) if self._stopping else await instance.wait())

    async def _obtain(self) -> Instance | None:
        runtime = self._drivers.runtime
        return await (runtime.adopt(self._instance_id) if self._spec is None else runtime.start(self._spec))

    async def stop(self, grace_secs: float) -> None:
        """End the command; `run` returns by it."""
        self._stopping = True
        if self._instance is not None:
            await self._instance.stop(grace_secs)
