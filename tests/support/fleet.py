"""Several `aether server` processes of one machine on one database and one data directory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.server import Server, wait_for

LEASE_SECS = 2.0
_PROGRAM = """
import sys, json
from aether import settings, topology
from aether.observability.logging import configure
configure("info", "text")
def ready(info):
    print(json.dumps({"url": info.url, "first_start": info.first_start}), flush=True)
sys.exit(topology.serve(settings.load(), "127.0.0.1", int(sys.argv[1]), ready, among_others=True))
"""


@dataclass
class Member(Server):
    """One of the servers; the folder is everybody's."""

    name: str = ""
    program: tuple[str, ...] = ("-c", _PROGRAM)
    """What Python runs, and what it is given after the port."""
    given: tuple[str, ...] = ()

    def launch(self) -> None:
        """Start; `until_ready` waits."""
        assert self.process is None
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AETHER_") and k != "DATABASE_URL"}
        environment |= {"AETHER_DATA_DIR": str(self.data), **self.environment}
        with (self.folder / f"{self.name}.stderr").open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *self.program, str(self.port), *self.given],
                env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            )  # fmt: skip

    def until_ready(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"{self.name} ended with {self.process.wait(30)}:\n{self.errors()}"
        self.first_start = json.loads(line)["first_start"]

    def start(self) -> None:
        self.launch()
        self.until_ready()

    def took_up(self, app: str) -> bool:
        """Whether it has told its log that it runs the app in the place of another server."""
        return f"an app is this server's from now on app={app}\n" in self.errors()

    def errors(self) -> str:
        return (self.folder / f"{self.name}.stderr").read_text()[-6000:]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid


class Fleet:
    """The servers by their names; those that were killed are started again by `start`."""

    def __init__(self, folder: Path, names: str, environment: dict[str, str]) -> None:
        self.members = {name: Member(folder, environment=environment, name=name) for name in names}

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    @property
    def live(self) -> list[Member]:
        return [member for member in self.members.values() if member.process is not None]

    def start(self) -> None:
        """All that do not run, at once."""
        absent = [member for member in self.members.values() if member.process is None]
        for member in absent:
            member.launch()
        for member in absent:
            member.until_ready()

    def serving(self, app: str, secs: float = 30) -> dict[str, str]:
        """What each live server answers for the app, once all of them do."""

        def answers() -> dict[str, str] | None:
            found = {member.name: member.get(app) for member in self.live}
            return (
                {name: text for name, (_, text) in found.items()}
                if all(status == 200 for status, _ in found.values())
                else None
            )

        return wait_for(answers, secs)

    def close(self) -> None:
        """Servers leave their apps running: the apps are deleted before the last one ends."""
        try:
            if not self.live and any(member.instances() for member in self.members.values()):
                next(iter(self.members.values())).start()
            if self.live:
                one = self.live[0]
                for app in one.api("GET", "/apps")[1]["items"]:
                    one.api("DELETE", f"/apps/{app['name']}")
                wait_for(lambda: not one.instances(), 60)
        finally:
            for member in self.live:
                member.stop()
            for pid in next(iter(self.members.values())).pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def fleet(folder: Path, names: str = "abc", **environment: Any) -> Iterator[Fleet]:
    """Servers named by the letters of `names`, started."""
    given = {"AETHER_LEASE_SECS": str(LEASE_SECS), "AETHER_STOP_GRACE_SECS": "2", **environment}
    it = Fleet(folder, names, given)
    try:
        it.start()
        yield it
    except BaseException:
        for member in it.members.values():
            print(f"--- {member.name}\n{member.errors()}")
        raise
    finally:
        it.close()
