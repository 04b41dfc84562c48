"""`aether server` as it is, but that a test can hold up at a named point, and do something to its database there.

The folder given as the second argument holds the file `at` with the name of the point that is armed. Whoever comes to
it makes `reached` and waits for `go`; everything else of the server goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aether import settings, topology
from aether.apps.deployments import Deployments
from aether.apps.launch import Launcher
from aether.apps.ledger import Ledger
from aether.apps.replica import Replica
from aether.observability.logging import configure
from aether.rollout.health import Gate
from aether.runtimes.process.instance import ProcessInstance
from aether.stores.objects.filesystem import FilesystemObjects

_LONGEST_SECS = 60.0


async def _pass_point(folder: Path, name: str) -> None:
    try:
        if (folder / "at").read_text() != name:
            return
        (folder / "at").unlink()
    except FileNotFoundError:
        return
    (folder / "reached").touch()
    async with asyncio.timeout(_LONGEST_SECS):
        while not (folder / "go").exists():
            await asyncio.sleep(0.01)


def _passing(folder: Path, owner: type[Any], method: str, *, before: str = "", after: str = "") -> None:
    plain: Callable[..., Any] = getattr(owner, method)

    @functools.wraps(plain)
    async def passing(self: Any, *arguments: Any, **named: Any) -> Any:
        await _pass_point(folder, before)
        found = await plain(self, *arguments, **named)
        await _pass_point(folder, after)
        return found

    setattr(owner, method, passing)


def main(port: int, folder: Path) -> int:
    _passing(folder, FilesystemObjects, "sha256", before="hash")
    _passing(folder, FilesystemObjects, "move", after="moved, no row yet")
    _passing(folder, Deployments, "create", after="created, not answered")
    _passing(folder, Launcher, "release", before="looking the release up")
    _passing(folder, Ledger, "add_instance", before="start")
    _passing(folder, Gate, "run", before="readiness")
    _passing(folder, Ledger, "promote", before="switch of traffic", after="switched, nobody told")
    _passing(folder, Replica, "_drain", before="drain")
    _passing(folder, ProcessInstance, "stop", before="stop of the old release")

    def ready(info: Any) -> None:
        print(json.dumps({"url": info.url, "first_start": info.first_start}), flush=True)

    return topology.serve(settings.load(), "127.0.0.1", port, ready, among_others=True)


if __name__ == "__main__":
    configure("info", "text")
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
