"""Drives the product as a user does: the installed `aether` script against a real `aether up`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
AETHER = str(Path(sys.executable).parent / "aether")
START_SECS = 60.0
COMMAND_SECS = 180.0


_EPHEMERAL = range(32_768, 61_000)
"""Where Linux takes the ports of outgoing connections from."""


def free_port() -> int:
    """A port that nothing listens on, and that no connection takes while a server is down between two starts."""
    while True:
        port = random.randrange(10_000, _EPHEMERAL.start)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    def __str__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


@dataclass
class Product:
    """One `aether up` with folders of its own, and the CLI of a user who is logged in to it."""

    home: Path
    port: int = field(default_factory=free_port)
    extra_env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    printed: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.home / "data" / "aether"

    @property
    def env(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("AETHER_")}
        env |= {
            "XDG_DATA_HOME": str(self.home / "data"),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "AETHER_API_BASE": f"http://127.0.0.1:{self.port}",
            "NPM_CONFIG_CACHE": os.environ.get("NPM_CONFIG_CACHE") or str(Path.home() / ".npm"),
            "NPM_CONFIG_UPDATE_NOTIFIER": "false",
            "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR") or str(Path.home() / ".cache" / "pip"),
        }
        return env | self.extra_env

    # --- the server

    def start(self, *flags: str) -> None:
        """Start `aether up` and wait until it says how to log in."""
        assert self.process is None
        self.home.mkdir(parents=True, exist_ok=True)
        errors = (self.home / "up.stderr").open("ab")
        self.process = subprocess.Popen(
            [AETHER, "up", "--port", str(self.port), *flags],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        errors.close()
        lines: queue.Queue[str | None] = queue.Queue()

        def read(process: subprocess.Popen[str]) -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, args=(self.process,), daemon=True).start()
        deadline = time.monotonic() + START_SECS
        while True:
            try:
                line = lines.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"aether up said nothing in {START_SECS} s\n{self.errors()}") from None
            if line is None:
                raise AssertionError(f"aether up ended with {self.process.wait()}\n{self.errors()}")
            self.printed.append(line)
            if "aether login" in line:
                return

    def errors(self) -> str:
        path = self.home / "up.stderr"
        return path.read_text()[-8000:] if path.exists() else ""

    def stop(self) -> int:
        """SIGTERM and wait: what Ctrl-C does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._forget()
        return code

    def kill9(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        self._forget()

    def _forget(self) -> None:
        assert self.process is not None
        if self.process.stdout:
            self.process.stdout.close()
        self.process = None

    def close(self) -> None:
        """End the server and whatever instances it left, by the pids it recorded."""
        if self.process is None and (self.data / "instances").exists() and any((self.data / "instances").iterdir()):
            # a killed server leaves its instances running; its successor takes them down in order
            self.start()
        if self.process is not None:
            self.stop()

    # --- the CLI

    def run(
        self,
        *args: str,
        check: bool = True,
        cwd: Path | None = None,
        stdin: str | None = None,
        env: dict[str, str] | None = None,
        timeout: float = COMMAND_SECS,
    ) -> Done:
        done = subprocess.run(
            [AETHER, *args],
            env=self.env | (env or {}),
            cwd=cwd or self.home,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        result = Done(done.returncode, done.stdout, done.stderr)
        if check:
            assert done.returncode == 0, f"aether {' '.join(args)}: {result}\n--- server\n{self.errors()}"
        return result

    def login(self) -> None:
        self.run("login")

    def deploy(self, project: Path, *flags: str, check: bool = True, **kwargs: Any) -> Done:
        return self.run("deploy", str(project), "--format", "json", *flags, check=check, **kwargs)

    # --- HTTP

    def get(self, app: str, path: str = "/", headers: dict[str, str] | None = None) -> tuple[int, str]:
        """GET from an app through the edge, dialling 127.0.0.1 with a Host header."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path, headers={"Host": f"{app}.localhost:{self.port}"} | (headers or {}))
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def token(self) -> str:
        return (self.data / "admin-token").read_text().strip()

    def api(
        self,
        method: str,
        path: str,
        body: Any = None,
        token: str | None = "admin",
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any, dict[str, str]]:
        """Call the API directly; `token` 'admin' means the bootstrap credential, None sends none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        send = dict(headers or {})
        if token is not None:
            send["Authorization"] = f"Bearer {self.token() if token == 'admin' else token}"
        payload = None
        if body is not None:
            payload = body if isinstance(body, bytes) else json.dumps(body).encode()
            send.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body=payload, headers=send)
            answer = connection.getresponse()
            raw = answer.read()
        finally:
            connection.close()
        fields = {k.lower(): v for k, v in answer.getheaders()}
        decoded = json.loads(raw) if raw and "json" in fields.get("content-type", "") else raw
        return answer.status, decoded, fields


@contextlib.contextmanager
def product(home: Path, **extra_env: str) -> Iterator[Product]:
    """A running, logged-in product that is taken down at the end."""
    it = Product(home, extra_env=extra_env)
    try:
        it.start()
        it.login()
        yield it
    finally:
        it.close()


def copy_example(name: str, target: Path) -> Path:
    """A copy of examples/<name> that a test may change."""
    shutil.copytree(EXAMPLES / name, target, ignore=shutil.ignore_patterns("node_modules", "dist", "__pycache__"))
    return target


def node_app(
    target: Path, code: str, *, name: str | None = None, start: str = "node server.js", **package: Any
) -> Path:
    """A Node.js project without dependencies whose server.js is `code`."""
    target.mkdir(parents=True, exist_ok=True)
    manifest = {
        "name": name or target.name,
        "version": "1.0.0",
        "private": True,
        "scripts": {"start": start},
        **package,
    }
    (target / "package.json").write_text(json.dumps(manifest))
    (target / "server.js").write_text(code)
    return target


HELLO = """
const http = require('http');
http.createServer((request, response) => response.end(%r + '\\n')).listen(process.env.PORT, () => console.log('up'));
process.on('SIGTERM', () => process.exit(0));
"""
