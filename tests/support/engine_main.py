"""One server process around a real engine, without the lock of the data folder, for tests of two on one database.

Reads commands as JSON lines and answers each with one line. `arm` makes the process freeze or kill itself at a named
point, so that a test meets it in exactly that state; everything else is the real thing.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from aether.apps import launch, replica
from aether.apps.artifacts import UnpackedArtifacts
from aether.apps.broadcast import Broadcast
from aether.apps.deployments import Author, Deployments, DeployRequest
from aether.apps.engine import Engine, EngineOptions
from aether.edge.server import Edge
from aether.edge.table import RouteTable
from aether.leases import Leases
from aether.observability.logging import configure
from aether.registry.policy import ReleasePolicy
from aether.rollout.gates import Shift
from aether.rollout.health import Gate
from aether.runtimes.process.instance import ProcessInstance
from aether.runtimes.process.runtime import ProcessRuntime, RuntimeOptions
from aether.settings import Settings
from aether.stores.database.engine import Database
from aether.stores.objects.filesystem import FilesystemObjects
from aether.stores.objects.signing import UrlSigner, load_key
from aether.topology.unlock import unlock

_LOOKING = ("watch", "cron processes")
RESTART_TIMEOUT_SECS = 5.0
"""So that a test can wait for it."""
_armed: dict[str, signal.Signals] = {}


def _pass_point(name: str) -> None:
    if (number := _armed.pop(name, None)) is not None:
        os.kill(os.getpid(), number)


class Source(UnpackedArtifacts):
    async def unpack(self, app: str, digest: str, content_digest: str | None) -> Path:
        _pass_point("verifying")
        return await super().unpack(app, digest, content_digest)


class Runtime(ProcessRuntime):
    async def start(self, spec: Any) -> ProcessInstance:
        _pass_point("before start")
        instance = await super().start(spec)
        _pass_point("after start")
        return instance


class PassingGate(Gate):
    async def run(self) -> Any:
        _pass_point("gate")
        return await super().run()


_stop = ProcessInstance.stop


async def _stop_passing(self: ProcessInstance, grace_secs: float) -> Any:
    _pass_point("stopping")
    return await _stop(self, grace_secs)


def _in_hand(engine: Engine) -> bool:
    """Whether the engine does anything besides looking around and watching over the instances of its apps."""
    coroutines = [task.get_coro() for task in asyncio.all_tasks() if task.get_name() not in _LOOKING]
    files = [Path(it.cr_code.co_filename) for it in coroutines if it is not None]  # type: ignore[union-attr]
    watching = "replica.py" if engine._runners else ""
    return any(file.parts[-3:-1] == ("aether", "apps") and file.name != watching for file in files)


class Looks:
    """The looks around of an engine, counted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._look = engine._census.claim_apps
        self._looked = asyncio.Event()
        engine._census.claim_apps = self._counted  # type: ignore[method-assign]

    async def _counted(self) -> Any:
        found = await self._look()
        self._looked.set()
        return found

    async def quiet(self, wanted: int) -> None:
        looks = 0
        while looks < wanted:
            self._looked.clear()
            await self._looked.wait()
            looks = 0 if _in_hand(self._engine) else looks + 1


async def main(data: Path, name: str, ttl: float, url: str) -> None:
    ProcessInstance.stop = _stop_passing
    replica.Gate = PassingGate  # type: ignore[misc]
    assert launch.RESTART_TIMEOUT_SECS > RESTART_TIMEOUT_SECS, "the name is where it is looked up"
    launch.RESTART_TIMEOUT_SECS = RESTART_TIMEOUT_SECS
    database = Database(url)
    await database.open()
    vault = await unlock(Settings(data), database)
    objects = FilesystemObjects(data / "objects", UrlSigner(load_key(data / "signing.key")))
    await objects.open()
    source = Source(data / "releases", objects)
    runtime = Runtime(data, RuntimeOptions())
    await runtime.probe()
    broadcast, table = Broadcast(), RouteTable()
    leases = Leases(database, name, ttl_secs=ttl)
    engine = Engine(
        database, broadcast, runtime, table, source, EngineOptions(drain_timeout_secs=2, stop_grace_secs=1), leases,
        vault,
    )  # fmt: skip
    deployments = Deployments(database, broadcast, engine, ReleasePolicy())
    promote = engine.ledger.promote

    async def promote_passing(*arguments: Any) -> int:
        release = await promote(*arguments)
        _pass_point("promoted")
        return release

    engine.ledger.promote = promote_passing  # type: ignore[method-assign]
    add_instance = engine.ledger.add_instance

    async def add_instance_passing(*arguments: Any) -> None:
        _pass_point("recording")
        await add_instance(*arguments)

    engine.ledger.add_instance = add_instance_passing  # type: ignore[method-assign]
    edge = Edge(table)
    port = await edge.start()
    leases.start()
    await engine.resume()
    looks = Looks(engine)
    over = asyncio.Event()
    watching = asyncio.create_task(engine.watch(over), name="watch")
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    print(json.dumps({"port": port}), flush=True)
    while line := await commands.readline():
        told = json.loads(line)
        answer: dict[str, Any] = {}
        match told.pop("do"):
            case "arm":
                _armed[told["at"]] = signal.SIGKILL if told["kills"] else signal.SIGSTOP
            case "deploy":
                shift = Shift(**told.pop("rollout", {}))
                row, _ = await deployments.create(DeployRequest(rollout=shift, **told), Author("test"))
                answer = {"id": row.id}
            case "held":
                answer = {"held": sorted(leases._held), "runs": sorted(r.app for r in engine._runners.values())}
            case "quiet":
                await looks.quiet(told["looks"])
            case "cancel":
                await deployments.cancel(told["id"], Author("test"))
            case other:
                raise ValueError(other)
        print(json.dumps(answer), flush=True)
    over.set()
    await watching
    await engine.abandon()
    await leases.close()
    await edge.close(0)
    await runtime.close()
    await source.close()
    await database.close()


if __name__ == "__main__":
    configure("info", "text")
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]))
