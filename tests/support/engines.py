"""Server processes that share one database and one runtime folder (see `engine_main`)."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.databases import rows
from support.server import wait_for

TTL_SECS = 1.5
_GONE = " (deleted)"
_MAIN = Path(__file__).parent / "engine_main.py"


class EngineProcess:
    def __init__(self, data: Path, name: str, errors: Path, url: str) -> None:
        self.name = name
        self._errors = errors
        with errors.open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, str(_MAIN), str(data), name, str(TTL_SECS), url],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True,
            )  # fmt: skip
        self.port: int = self.answer()["port"]

    def tell(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.send(do, **arguments)
        return self.answer()

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 40)
        assert ready, f"{self.name} says nothing:\n{self.errors()}"
        line = self.process.stdout.readline()
        assert line, f"{self.name} ended:\n{self.errors()}"
        return json.loads(line)

    def runs(self) -> list[str]:
        return self.tell("held")["runs"]

    def until_quiet(self) -> None:
        """Return once it has nothing in hand and has looked around twice since."""
        self.tell("quiet", looks=2)

    def get(self, app: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", "/", headers={"Host": f"{app}.localhost"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode().split(" ")[0].strip()
        finally:
            connection.close()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    @property
    def state(self) -> str:
        """R, S, T (frozen), Z (ended) …"""
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return "Z"

    def errors(self) -> str:
        return self._errors.read_text()[-6000:]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.thaw()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise
        finally:
            self.process.stdout.close()


@contextlib.contextmanager
def engine(data: Path, name: str, url: str) -> Iterator[EngineProcess]:
    it = EngineProcess(data, name, data.parent / f"{name}.stderr", url)
    try:
        yield it
    except BaseException:
        print(f"--- {name}\n{it.errors()}")
        raise
    finally:
        it.close()


class Record:
    """What the database and the machine say, read from outside of every server."""

    def __init__(self, data: Path, url: str) -> None:
        self.data = data
        self.url = url

    def rows(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
        return rows(self.url, sql, *arguments)

    def status(self, deployment_id: str) -> str:
        return self.rows("select status from deployments where id = ?", deployment_id)[0][0]

    def settled(self, deployment_id: str, secs: float = 40) -> str:
        ends = ("active", "failed", "cancelled", "rolled_back")
        wait_for(lambda: self.status(deployment_id) in ends, secs)
        return self.status(deployment_id)

    def phases(self, deployment_id: str) -> list[str]:
        found = self.rows("select phase from deployment_events where deployment_id = ? order by id", deployment_id)
        return [row[0] for row in found]

    def releases(self, app: str) -> list[int]:
        found = self.rows(
            "select release from deployments d join applications a on a.id = d.app_id"
            " where a.name = ? and release is not null order by release", app,
        )  # fmt: skip
        return [row[0] for row in found]

    def instances(self) -> dict[str, str]:
        """Deployment by instance, of every instance of which anything is left on the machine."""
        found: dict[str, str] = {}
        for folder in sorted((self.data / "instances").iterdir()):
            with contextlib.suppress(FileNotFoundError):
                found[folder.name] = json.loads((folder / "spec.json").read_text())["spec"]["deployment_id"]
        return found

    def processes(self) -> set[int]:
        """Keepers of instances."""
        return {pid for pid, folder in self._keepers() if not folder.endswith(_GONE)}

    def stranded(self) -> set[int]:
        """Keepers whose instance was taken away before the server that was starting them told them what to keep."""
        return {pid for pid, folder in self._keepers() if folder.endswith(_GONE)}

    def _keepers(self) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        for proc in Path("/proc").iterdir():
            if proc.name.isdigit():
                with contextlib.suppress(OSError):
                    folder = os.readlink(proc / "cwd")
                    if folder.startswith(str(self.data / "instances")):
                        found.append((int(proc.name), folder))
        return found
