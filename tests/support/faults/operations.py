"""The changes to an app that faults fall into, each by a client of the API or by the installed CLI.

An operation runs beside the strike and ends with what its client was told (`Told`), which the record must bear out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from support.faults.client import Client, Vanished
from support.faults.world import World
from support.product import AETHER

START = "node server.js"
_ASLEEP_SECS = 0.2
SERVER_JS = """
const http = require('http');
const boot = Math.random().toString(36).slice(2, 10), id = process.env.AETHER_DEPLOYMENT_ID;
const log = (text) => console.log(text + ' ' + boot);
const server = http.createServer((request, response) => {
  const [path, word] = request.url.split('?');
  if (path === '/mark') log('mark ' + word);
  const answer = () => response.end(id + ' ' + boot + ' ' + (process.env.SAY || '') + '\\n');
  if (path === '/slow') setTimeout(answer, Number(word)); else answer();
});
setTimeout(() => server.listen(process.env.PORT, () => log('up')), Number(process.env.DELAY_MS || 0));
process.on('SIGTERM', () => setTimeout(() => process.exit(0), Number(process.env.STOP_MS || 0)));
"""


class Word(StrEnum):
    OK = "ok"
    """It is done."""
    NOT = "not"
    """It is not done, and will not be."""
    NOTHING = "nothing"
    """The client was told nothing, or is gone."""


@dataclass(frozen=True)
class Told:
    word: Word
    detail: str = ""
    deployment: str | None = None


def artifact(filler: int, salt: str) -> bytes:
    """A .tar.gz of the app with `filler` bytes that do not compress, the same for the same salt."""
    out = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=out, mode="wb", mtime=0, compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name, data in {
            "server.js": SERVER_JS.encode(),
            "salt": salt.encode(),
            "filler": _noise(salt, filler),
        }.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _noise(salt: str, size: int) -> bytes:
    return hashlib.shake_256(salt.encode()).digest(size) if size else b""


@dataclass
class Plan:
    """What an operation does; the fields that it has no use for are ignored."""

    app: str
    env: Mapping[str, str]
    blob: bytes = b""
    strategy: str = "rolling"
    rollout: Mapping[str, Any] | None = None
    key: str = ""
    """Idempotency-Key of the deployment."""


class Operation:
    """Runs in a thread of its own; `told` is there once `join` has returned. `sending` says which requests began."""

    def __init__(self, world: World, plan: Plan) -> None:
        self.world, self.plan = world, plan
        self.sending: dict[str, threading.Event] = {
            step: threading.Event() for step in ("presign", "put", "complete", "create", "change")
        }
        self.told = Told(Word.NOTHING)
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._guarded, name="operation")

    def begin(self) -> None:
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, secs: float = 60.0) -> None:
        self._thread.join(secs)
        if self._thread.is_alive():
            raise AssertionError(f"the client still waits after {secs} s: {self!r}")
        if self.failure is not None:
            raise self.failure

    def _guarded(self) -> None:
        try:
            self.told = self.run()
        except Vanished:
            self.told = Told(Word.NOTHING, "vanished")
        except BaseException as error:
            self.failure = error

    def run(self) -> Told:
        raise NotImplementedError

    def vanish(self) -> None:
        raise NotImplementedError


class ByApi(Operation):
    def __init__(self, world: World, plan: Plan) -> None:
        super().__init__(world, plan)
        self.client = Client(world.product.port, world.product.token())

    def vanish(self) -> None:
        self.client.vanish()

    def _upload(self) -> tuple[str, Told | None]:
        """The digest, and why it could not be brought. An upload that ran out of time is begun anew, as the answer
        says it should be."""
        digest, refused = self._try_upload()
        while refused is not None and refused.detail.endswith(("forbidden", "not_found", "conflict")):
            begun = time.monotonic()
            digest, refused = self._try_upload()
            if time.monotonic() - begun < 1.0:
                break
        return digest, refused

    def _try_upload(self) -> tuple[str, Told | None]:
        plan, client = self.plan, self.client
        digest = hashlib.sha256(plan.blob).hexdigest()
        body = {"app": plan.app, "digest": digest, "size_bytes": len(plan.blob), "runtime": "node20"}
        self.sending["presign"].set()
        status, signed = client.call("POST", "/artifacts/presign", body)
        if status != 200:
            return digest, Told(Word.NOT, f"presign: {status} {signed['code']}")
        if signed["method"] == "PUT":
            status, answer = client.call("PUT", signed["url"], plan.blob, half_way=self.sending["put"])
            if status != 200:
                return digest, Told(Word.NOT, f"PUT: {status} {answer['code']}")
            self.sending["complete"].set()
            done = {**body, "upload_id": signed["upload_id"], "idempotency_key": signed["upload_id"]}
            status, answer = client.call("POST", "/artifacts/complete", done)
            if status != 200:
                return digest, Told(Word.NOT, f"complete: {status} {answer['code']}")
        return digest, None

    def _followed(self, status: int, answer: Any) -> Told:
        if status not in (200, 201, 202):
            return Told(Word.NOT, f"{status} {answer['code']}: {answer['message']}")
        done = self.client.settled(answer["id"])
        word = Word.OK if done["status"] in ("active", "superseded") else Word.NOT
        return Told(word, done["status"], done["id"])


class ApiDeploy(ByApi):
    def run(self) -> Told:
        plan = self.plan
        digest, refused = self._upload()
        if refused is not None:
            return refused
        body = {
            "app": plan.app, "digest": digest, "command": START, "env": dict(plan.env), "timeout_secs": 20,
            "strategy": plan.strategy, "rollout": plan.rollout,
        }  # fmt: skip
        self.sending["create"].set()
        return self._followed(*self.client.call("POST", "/deployments", body, {"Idempotency-Key": plan.key}))


class ApiRollback(ByApi):
    def run(self) -> Told:
        self.sending["change"].set()
        path = f"/apps/{self.plan.app}/rollback"
        return self._followed(*self.client.call("POST", path, {}, {"Idempotency-Key": self.plan.key}))


class ApiConfig(ByApi):
    def run(self) -> Told:
        self.sending["change"].set()
        body = {"set": dict(self.plan.env), "unset": [], "replace": False}
        status, answer = self.client.call("PUT", f"/apps/{self.plan.app}/config", body)
        if status != 200:
            return Told(Word.NOT, f"{status} {answer['code']}")
        if not answer["deployment_id"]:
            return Told(Word.OK, "nothing to change")
        done = self.client.settled(answer["deployment_id"])
        word = Word.OK if done["status"] in ("active", "superseded") else Word.NOT
        return Told(word, done["status"], done["id"])


class ApiScale(ByApi):
    def run(self) -> Told:
        self.sending["change"].set()
        status, answer = self.client.call("POST", f"/apps/{self.plan.app}/scale", {"web": 2})
        return Told(Word.OK if status == 200 else Word.NOT, f"scale: {status} {answer if status != 200 else ''}")


class ApiDelete(ByApi):
    def run(self) -> Told:
        self.sending["change"].set()
        status, answer = self.client.call("DELETE", f"/apps/{self.plan.app}")
        # a repeat that finds nothing is the deletion's success
        return Told(Word.OK if status in (204, 404) else Word.NOT, f"delete: {status} {answer or ''}")


class ByCli(Operation):
    """`words` is the command; what it was told is its exit code and its last line."""

    def __init__(self, world: World, plan: Plan, words: list[str]) -> None:
        super().__init__(world, plan)
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", 'read go; exec "$@"', "sh", AETHER, *words],
            env=world.product.env, cwd=world.product.home, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self) -> Told:
        out, err = self.process.communicate("go\n", timeout=60)
        return self._read(self.process.returncode, out, err)

    def vanish(self) -> None:
        """As a laptop that is closed: nothing moves any more, and then the connections end."""
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(_ASLEEP_SECS)
        self.process.send_signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def _read(self, code: int, out: str, err: str) -> Told:
        last = err.strip().rpartition("\n")[2]
        if out.lstrip("{\n ").startswith('"error"'):
            last = str(json.loads(out)["error"]["message"])
        if "Traceback" in err or "Traceback" in out:
            raise AssertionError(f"the CLI shows a stack trace:\n{err}")
        if code == 0:
            return Told(Word.OK, "exit 0", _deployment_in(out))
        if code in (50, 10, 20, 30, 2):
            return Told(Word.NOT, f"exit {code}: {last}")
        if code == 130 and "too late" in last:
            return Told(Word.OK, f"exit {code}: {last}")
        if code == 130 and "the rollout is " in last:
            return Told(Word.NOT, f"exit {code}: {last}")
        return Told(Word.NOTHING, f"exit {code}: {last}")


def _deployment_in(out: str) -> str | None:
    found = re.search(r'"deployment_id":\s*"([0-9a-f-]{36})"', out)
    return found[1] if found else None


def project(folder: Path, plan: Plan, filler: int, salt: str) -> Path:
    """A project that the CLI packs into what `artifact` would make."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text(json.dumps({"name": plan.app, "version": "1.0.0", "private": True}))
    (folder / "server.js").write_text(SERVER_JS)
    (folder / "salt").write_text(salt)
    (folder / "filler").write_bytes(_noise(salt, filler))
    return folder


def cli_deploy(world: World, plan: Plan, folder: Path) -> ByCli:
    words = ["deploy", str(folder), "--app", plan.app, "--format", "json", "--timeout", "20", "--start", START]
    words += ["--strategy", plan.strategy, "--no-cache"]
    if plan.rollout:
        words += [
            "--canary-steps",
            ",".join(map(str, plan.rollout["steps"])),
            "--step-time",
            str(plan.rollout["step_secs"]),
        ]
    for name, value in plan.env.items():
        words += ["--env", f"{name}={value}"]
    return ByCli(world, plan, words)


def cli_change(world: World, plan: Plan, verb: str) -> ByCli:
    app = ["--app", plan.app]
    words = {
        "rollback": ["rollback", *app],
        "config": ["config", "set", *(f"{k}={v}" for k, v in plan.env.items()), *app],
        "scale": ["scale", "web=2", *app],
        "delete": ["apps", "delete", plan.app, "--yes"],
    }[verb]
    return ByCli(world, plan, words)


def new_key() -> str:
    return os.urandom(8).hex()
