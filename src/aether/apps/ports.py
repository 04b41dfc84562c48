"""What apps need from a runtime, a router and an artifact source."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from aether.model.instance import InstanceExit, InstanceSpec, KeptLog, LogRecord
from aether.model.traffic import Traffic

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


class Attached(Protocol):
    """The standard streams of an instance in somebody's hands; closing them ends the instance."""

    async def read(self) -> tuple[int, bytes] | None:
        """Output with its stream, 1 or 2; None when the instance has ended and everything was read."""
        ...

    async def write(self, data: bytes) -> None:
        """Returns when the instance's keeper has taken `data`."""
        ...

    async def end_input(self) -> None: ...

    def close(self) -> None: ...


class VolumeStore(Protocol):
    """Where volumes are kept; instances that name one make it."""

    async def names(self, app: str) -> Sequence[str]: ...

    async def used_bytes(self, app: str, name: str) -> int | None:
        """What a volume takes on the disk; None when counting takes too long."""
        ...

    async def delete(self, app: str, name: str) -> bool:
        """False when there is none."""
        ...

    async def delete_all(self, app: str) -> None: ...


class Instance(Protocol):
    """A started instance. Losing this object does not stop the instance; `Runtime.adopt` finds it again."""

    @property
    def spec(self) -> InstanceSpec: ...

    async def dial(self) -> socket.socket:
        """A connected, non-blocking TCP socket to the instance's PORT inside its own network view.

        Raises ConnectionRefusedError while nothing listens, OSError when the instance is gone.
        """
        ...

    async def listening_ports(self) -> Sequence[int]:
        """TCP ports that something in the instance listens on; empty when that cannot be told."""
        ...

    async def open_console(self) -> Attached:
        """Take hold of an instance that was started with a console, once. Raises ConnectionError, OSError."""
        ...

    def resize(self, rows: int, columns: int) -> None:
        """Tell a terminal its size."""
        ...

    def signal(self, number: int) -> None:
        """Send a signal to everything in the instance."""
        ...

    async def wait(self) -> InstanceExit:
        """Return when the instance has ended; may be awaited by several tasks and again after the end."""
        ...

    async def stop(self, grace_secs: float) -> InstanceExit:
        """SIGTERM, then SIGKILL to everything in the sandbox after `grace_secs`; idempotent."""
        ...


class InstanceLog(Protocol):
    """A place in the log of an instance."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will be written; ask before `read`."""
        ...

    def read(self) -> list[LogRecord]:
        """The next records in order, each once, or nothing when there are none for now; blocks for as long as the
        disk takes. A record with `skipped` stands for those that were rotated away unread."""
        ...

    def close(self) -> None: ...


class Runtime(Protocol):
    """Runs instances; everything it keeps on disk lives in its own folder and survives a killed server."""

    async def start(self, spec: InstanceSpec) -> Instance:
        """Start and return at once (readiness is the caller's business). Raises ServiceUnavailable with the
        reason and the remedy when no sandbox can be had."""
        ...

    async def adopt(self, instance_id: str) -> Instance | None:
        """Take over a running or ended instance of an earlier server process; None if nothing is known of it."""
        ...

    async def known(self) -> Sequence[str]:
        """Ids of all instances with anything left on this machine."""
        ...

    async def remove(self, instance_id: str) -> None:
        """Forget an ended instance: cgroup, folders, sockets; its logs stay. Idempotent."""
        ...

    def logs(
        self, instance_id: str, app: str, *, since_ns: int = 0, tail: int | None = None, follow: bool = False
    ) -> AsyncGenerator[LogRecord]:
        """Records in order, each once; with `follow` goes on until the instance has ended and all is read."""
        ...

    async def open_log(
        self,
        instance_id: str,
        app: str,
        *,
        since_ns: int = 0,
        tail: int | None = None,
        after: int | None = None,
        grew: Callable[[], None] | None = None,
    ) -> InstanceLog:
        """A place in a log: at the oldest record kept, `tail` records before the end, or behind the record `after`;
        what is older than `since_ns` is left out. `grew` is called whenever there may be more to read."""
        ...

    async def drop_logs(self, instance_id: str, app: str) -> None: ...

    async def kept_logs(self) -> Sequence[KeptLog]:
        """The logs of all instances, also of those of which nothing else is left."""
        ...


class Backend(Protocol):
    """One upstream of an app as the edge sees it."""

    @property
    def in_flight(self) -> int: ...

    async def drain(self, timeout_secs: float) -> bool:
        """Take no new requests; True when those under way ended in time."""
        ...


class Router(Protocol):
    """The edge's routing table."""

    def add(self, app: str, instance: Instance) -> Backend:
        """Make a backend that gets no requests yet."""
        ...

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
        ...

    def serves(self, app: str) -> bool:
        """Whether requests for the app go to any backend."""
        ...

    def traffic(self, app: str) -> tuple[Traffic, Traffic]:
        """What the trial and what the other backends have answered since the trial began."""
        ...

    def drop(self, app: str) -> None:
        """Forget the app: its host answers 404."""
        ...


class ArtifactSource(Protocol):
    """Unpacked artifacts on this machine, shared by every instance of a digest."""

    async def unpack(self, app: str, digest: str, content_digest: str | None) -> Path:
        """Folder with the unpacked artifact; made once, complete or absent, never half-written.

        The bytes must hash to `digest`, and the tar inside to `content_digest` when the client named one."""
        ...

    async def discard(self, app: str, digest: str) -> None: ...

    async def unpacked(self, app: str) -> Sequence[str]:
        """Digests that have a folder."""
        ...

    async def apps(self) -> Sequence[str]:
        """Names of apps that have a folder."""
        ...

    async def discard_app(self, app: str) -> None:
        """Take away everything of a deleted app."""
        ...

    async def put_aside(self, app: str) -> Path | None:
        """Take everything of an app out of its place, at once; `destroy` what is returned."""
        ...

    async def destroy(self, aside: Path | None) -> None: ...


class ReleasePolicy(Protocol):
    """What an artifact must have before it is released."""

    async def check(self, tx: AsyncConnection, artifact_id: str) -> None:
        """Within the transaction that records the deployment, before the artifact is locked. Raises
        SignatureRequired, SbomRequired, ProvenanceRequired."""
        ...


class ArtifactObjects(Protocol):
    """Where artifacts are stored, as far as unpacking and deleting an app need it."""

    def local_path(self, key: str) -> str | None: ...

    def read(self, key: str, chunk_bytes: int = 1 << 20, start: int = 0) -> AsyncIterator[bytes]: ...

    async def delete(self, key: str) -> None: ...

    def list(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        """Yield (key, size in bytes, modified at in seconds since the epoch)."""
        ...
