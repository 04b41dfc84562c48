"""The main job in one go: start `aether up`, deploy examples/express, show its answer.

On a terminal the server stays up until Ctrl-C. Elsewhere the demo stops it after the answer and exits 0, so that
scripts and newcomers' machines are left as they were. The data lives in a folder of its own.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READY_SECS = 60.0


def free_port(preferred: int) -> int:
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise SystemExit("demo: no free port on 127.0.0.1")


def shown(command: list[str], env: dict[str, str]) -> str:
    """Run a command as a user would, its progress on the terminal, and return what it printed."""
    print(f"\n$ {' '.join(command)}", flush=True)
    done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    sys.stdout.write(done.stdout)
    sys.stdout.flush()
    if done.returncode != 0:
        raise SystemExit(f"demo: `{' '.join(command)}` ended with exit code {done.returncode}")
    return done.stdout


def get(port: int, host: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/", headers={"Host": host})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"demo: the app answered {answer.status}: {body}")
    return body


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080, help="preferred port (another free one if it is taken)")
    options = parser.parse_args()
    stay = sys.stdout.isatty()
    port = free_port(options.port)
    home = Path(tempfile.mkdtemp(prefix="aether-demo-"))
    env = {name: value for name, value in os.environ.items() if not name.startswith("AETHER_")}
    env |= {
        "XDG_DATA_HOME": str(home / "data"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "AETHER_API_BASE": f"http://127.0.0.1:{port}",
    }
    # the dependency cache may stay where it is: it is the second deploy that newcomers time
    session_home = home / "cache"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aether"
    cache.mkdir(parents=True, exist_ok=True)
    session_home.mkdir(parents=True)
    (session_home / "aether").mkdir()
    (cache / "deps").mkdir(exist_ok=True)
    (session_home / "aether" / "deps").symlink_to(cache / "deps")
    env["XDG_CACHE_HOME"] = str(session_home)
    env["NPM_CONFIG_CACHE"] = os.environ.get("NPM_CONFIG_CACHE") or str(Path.home() / ".npm")

    print(f"$ aether up --port {port}", flush=True)
    server = subprocess.Popen(
        ["aether", "up", "--port", str(port)], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None
        for line in server.stdout:
            sys.stdout.write(line)
            if "aether login" in line:
                break
        else:
            raise SystemExit(f"demo: aether up ended with exit code {server.wait()}")
        shown(["aether", "login"], env)
        result = json.loads(shown(["aether", "deploy", "examples/express", "--format", "json"], env))
        url = str(result["url"])
        host = url.split("//", 1)[1].rstrip("/")
        print(f"\n$ curl {url}", flush=True)
        print(get(port, host), flush=True)
        shown(["aether", "list"], env)
        if stay:
            print(f"\nThe app is at {url} until Ctrl-C.", flush=True)
            try:
                return server.wait()
            except KeyboardInterrupt:
                print("stopping", flush=True)
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
        shutil.rmtree(home, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
