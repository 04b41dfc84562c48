"""The embedded topology in a child process, driven over HTTP without the CLI."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.product import free_port

_PROGRAM = """
import sys, json
from pathlib import Path
from aether import settings, topology
from aether.observability.logging import configure
configure("info", "text")
def ready(info):
    print(json.dumps({"url": info.url, "first_start": info.first_start}), flush=True)
sys.exit(topology.serve(settings.load(), "127.0.0.1", int(sys.argv[1]), ready))
"""
SETTLED = ("active", "failed", "cancelled", "rolled_back", "superseded")

SERVER_JS = """
const http = require('http');
const said = process.env.SAY || %r;
http.createServer((request, response) => response.end(said + ' ' + process.pid + ' ' + process.env.STARTED + '\\n'))
  .listen(process.env.PORT, () => console.log('up ' + said));
process.on('SIGTERM', () => process.exit(0));
"""


def hello(text: str) -> dict[str, str]:
    return {"server.js": SERVER_JS % text}


def pack(files: dict[str, str]) -> bytes:
    """A .tar.gz of text files; a package.json that starts server.js is added."""
    files = {"package.json": json.dumps({"name": "x", "scripts": {"start": "node server.js"}}), **files}
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(text.encode()), 0o644
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def wait_for(what: Callable[[], Any], secs: float = 30.0) -> Any:
    deadline = time.monotonic() + secs
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited {secs} s in vain"
        time.sleep(0.02)
    return found


@dataclass
class Server:
    """One server with its data folder."""

    folder: Path
    port: int = field(default_factory=free_port)
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    first_start: bool = False

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        """Start and return once the server says that it is ready."""
        assert self.process is None
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AETHER_")}
        environment |= {"AETHER_DATA_DIR": str(self.data), **self.environment}
        with (self.folder / "stderr").open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(self.port)],
                env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server ended with {self.process.wait(30)}:\n{self.errors()}"
        self.first_start = json.loads(line)["first_start"]

    def errors(self) -> str:
        return (self.folder / "stderr").read_text()[-6000:]

    def stop(self, secs: float = 60) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self._ended(secs)

    def kill9(self) -> None:
        assert self.process is not None
        self.process.kill()
        self._ended(10)

    def _ended(self, secs: float) -> int:
        assert self.process is not None
        code = self.process.wait(secs)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        return code

    def close(self) -> None:
        if self.process is None and self.instances():
            self.start()  # a killed server leaves its instances running; its successor takes them down
        if self.process is not None:
            self.stop()

    def instances(self) -> list[str]:
        """Ids of instances of which anything is left."""
        folder = self.data / "instances"
        return sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []

    def pids(self) -> set[int]:
        """Processes of this server's apps: keepers, found by their folder."""
        found: set[int] = set()
        for proc in Path("/proc").iterdir():
            if proc.name.isdigit():
                with contextlib.suppress(OSError):
                    if (proc / "cwd").readlink().is_relative_to(self.data / "instances"):
                        found.add(int(proc.name))
        return found

    # --- HTTP

    def get(self, app: str, path: str = "/") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path, headers={"Host": f"{app}.localhost:{self.port}"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def said(self, app: str) -> str:
        status, text = self.get(app)
        return text.split()[0] if status == 200 else f"status {status}"

    def api(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        token = (self.data / "admin-token").read_text().strip()
        send = {"Authorization": f"Bearer {token}", **(headers or {})}
        payload = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if payload is not None and not isinstance(body, bytes):
            send["Content-Type"] = "application/json"
        try:
            connection.request(method, path, body=payload, headers=send)
            answer = connection.getresponse()
            raw = answer.read()
            return answer.status, json.loads(raw) if raw and _is_json(answer) else raw
        finally:
            connection.close()

    def upload(self, app: str, files: dict[str, str], **claims: Any) -> str:
        """Make the app if needed and upload; returns the digest."""
        self.api("POST", "/apps", {"name": app})
        blob = pack(files)
        digest = hashlib.sha256(blob).hexdigest()
        body = {"app": app, "digest": digest, "size_bytes": len(blob), "runtime": "node20", **claims}
        status, signed = self.api("POST", "/artifacts/presign", body)
        assert status == 200, signed
        if signed["method"] == "PUT":
            assert self.api("PUT", signed["url"], blob)[0] == 200
            done = self.api("POST", "/artifacts/complete", {**body, "upload_id": signed["upload_id"]})
            assert done[0] == 200, done
        return digest

    def begin(self, app: str, files: dict[str, str], **request: Any) -> dict[str, Any]:
        """Upload and begin a deployment."""
        body = {"app": app, "digest": self.upload(app, files), "command": "node server.js", **request}
        status, made = self.api("POST", "/deployments", body)
        assert status in (200, 201), made
        return made

    def settled(self, deployment_id: str) -> dict[str, Any]:
        """Follow the events to their end; returns the deployment."""
        status, text = self.api("GET", f"/deployments/{deployment_id}/events")
        assert status == 200, text
        last = text.decode().strip().split("\n\n")[-1].split("\n")
        assert last[0] == "event: end", text
        return json.loads(last[1].removeprefix("data: "))

    def deploy(self, app: str, files: dict[str, str], **request: Any) -> dict[str, Any]:
        return self.settled(self.begin(app, files, **request)["id"])

    def app(self, name: str) -> dict[str, Any]:
        status, found = self.api("GET", f"/apps/{name}")
        assert status == 200, found
        return found


@contextlib.contextmanager
def server(folder: Path, **environment: str) -> Iterator[Server]:
    it = Server(folder, environment=environment)
    try:
        it.start()
        yield it
    except BaseException:
        print(it.errors())
        raise
    finally:
        it.close()


def _is_json(answer: http.client.HTTPResponse) -> bool:
    return (answer.getheader("content-type") or "").startswith("application/json")
