"""Edge against nginx: the same keep-alive upstream, the same logging, one CPU for the proxy, interleaved runs.

Runs wrk -c32 for about two seconds against nginx and the edge in the order A B B A and prints the median of the
paired throughput ratios and its range, and CPU seconds per 1,000 requests; writes bench/out/edge.json. The edge
routes by Host, chooses between two backends and counts every request, as in production; with `--log on` both write
their access log.

With `--cpus one` wrk, proxy and upstream share one CPU; with `--cpus two` the proxy has one for itself, so that the
ratio is that of the proxies' own cost. On a machine with other work the CPU time of all three parts per request says
more than the throughput: `whole_cpu` is the ratio that one undisturbed CPU would show. `--vary` asks for a different
path with a different cookie each time.

    python bench/edge.py [--cpus one|two] [--pairs 8] [--secs 2] [--log off|on] [--vary] [--function] [--check RATIO]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aether.edge.functions import FunctionTable
    from aether.functions.ledger import InvocationLedger

ROOT = Path(__file__).resolve().parent.parent
PROXY_CPU = 0
LOAD_CPU = {"one": 0, "two": 1}
BODY = "hello from an app\n"
FUNCTION_PATH = "/functions/hello/"
FUNCTION_ID = "019a5f7e-0000-7000-8000-000000000001"

NGINX = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log crit;
events {{ worker_connections 4096; }}
http {{
    access_log {access};
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 100000000;
    upstream app {{
        random two least_conn;
        server 127.0.0.1:{one};
        server 127.0.0.1:{two};
        keepalive 128;
        keepalive_requests 100000000;
    }}
    server {{
        listen 127.0.0.1:{port};
        server_name hello.localhost;
        location {location} {{
            proxy_pass http://app/;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header X-Forwarded-Host $http_host;
            proxy_set_header X-Request-Id $request_id;
            proxy_set_header traceparent "00-$request_id-00f067aa0ba902b7-01";
            add_header X-Request-Id $request_id always;
        }}
    }}
}}
"""

VARY = """
local n = 0
function request()
  n = n + 1
  return wrk.format("GET", "/items/" .. n .. "?page=" .. n % 7, {
    ["Host"] = "hello.localhost", ["Cookie"] = "session=" .. n, ["Accept"] = "*/*", ["User-Agent"] = "bench/1.0"
  })
end
"""

UPSTREAM = """
worker_processes 1;
daemon off;
pid {folder}/upstream.pid;
error_log {folder}/upstream-error.log crit;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/u-body;
    proxy_temp_path {folder}/u-proxy;
    fastcgi_temp_path {folder}/u-fastcgi;
    uwsgi_temp_path {folder}/u-uwsgi;
    scgi_temp_path {folder}/u-scgi;
    keepalive_requests 100000000;
    server {{
        listen 127.0.0.1:{one};
        listen 127.0.0.1:{two};
        location / {{ default_type text/plain; return 200 "{body}"; }}
    }}
}}
"""


def main() -> int:
    options = _arguments()
    if options.serve is not None:
        _serve(options.serve, options.upstreams, options.log, options.function)
        return 0
    missing = [tool for tool in ("wrk", "nginx", "taskset") if shutil.which(tool) is None]
    if missing:
        print(f"this benchmark needs {', '.join(missing)}", file=sys.stderr)
        return 2
    result = _compare(options)
    out = ROOT / "bench" / "out"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{result['bench']}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"edge / nginx: median {result['ratio']['median']:.3f} x "
        f"(range {result['ratio']['min']:.3f} to {result['ratio']['max']:.3f}, {options.pairs} pairs, "
        f"{options.cpus} CPU, logging {options.log}{', varied requests' if options.vary else ''}"
        f"{', calls of a function' if options.function else ''})"
    )
    for name in ("nginx", "edge"):
        row = result[name]
        print(
            f"{name:>6}: {row['requests_per_sec']:8.0f} requests/s, "
            f"{row['cpu_secs_per_1000']:.4f} CPU s per 1,000 requests"
        )
    for name, what in (("cpu_ratio", "CPU of the edge / nginx"), ("whole_cpu", "CPU of all parts, nginx / edge")):
        row = result[name]
        print(f"{what}: median {row['median']:.3f} x (range {row['min']:.3f} to {row['max']:.3f})")
    if options.check is not None and result["ratio"]["max"] < options.check:
        print(f"below the bar of {options.check}", file=sys.stderr)
        return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--secs", type=int, default=2)
    parser.add_argument("--cpus", choices=("one", "two"), default="one")
    parser.add_argument("--vary", action="store_true", help="a new path and cookie for every request")
    parser.add_argument("--function", action="store_true", help="call a function instead of an app")
    parser.add_argument("--log", choices=("off", "on"), default="off", help="write an access log line per request")
    parser.add_argument("--check", type=float, help="exit 1 when the whole range lies below this ratio")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--upstreams", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def _compare(options: argparse.Namespace) -> dict[str, object]:
    log: str = options.log
    load_cpu = LOAD_CPU[options.cpus]
    one, two, nginx_port, edge_port = _free_ports(4)
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # an unprivileged worker must be able to use the folder when the benchmark runs as root
        folder.chmod(0o777)
        fields = {
            "folder": folder,
            "one": one,
            "two": two,
            "port": nginx_port,
            "body": BODY.strip(),
            "location": FUNCTION_PATH if options.function else "/",
            "access": "off" if log == "off" else f"{folder}/access.log combined buffer=8k",
        }
        (folder / "upstream.conf").write_text(UPSTREAM.format(**fields))
        (folder / "nginx.conf").write_text(NGINX.format(**fields))
        load = ["taskset", "-c", str(load_cpu), "wrk", "-t1", "-c32", "-H", "Host: hello.localhost"]
        if options.vary:
            (folder / "vary.lua").write_text(VARY)
            load += ["-s", str(folder / "vary.lua")]
        try:
            upstream = _pinned(load_cpu, ["nginx", "-p", name, "-c", str(folder / "upstream.conf")])
            children.append(upstream)
            nginx = _pinned(PROXY_CPU, ["nginx", "-p", name, "-c", str(folder / "nginx.conf")])
            children.append(nginx)
            command = [sys.executable, __file__, "--serve", str(edge_port), "--log", log]
            command += ["--function"] if options.function else []
            edge = _pinned(PROXY_CPU, [*command, "--upstreams", str(one), str(two)], cwd=name)
            children.append(edge)
            for port in (one, two, nginx_port, edge_port):
                _wait_for(port)
            sides = {"nginx": (nginx_port, nginx.pid, upstream.pid), "edge": (edge_port, edge.pid, upstream.pid)}
            for side in sides.values():
                _measure(load, *side, 1, options.function)
            return _interleave(load, sides, options)
        finally:
            for child in children:
                child.send_signal(signal.SIGTERM)
            for child in children:
                child.wait(10)


def _interleave(
    load: list[str], sides: dict[str, tuple[int, int, int]], options: argparse.Namespace
) -> dict[str, object]:
    pairs: int = options.pairs
    secs: int = options.secs
    runs: dict[str, list[tuple[float, float, float]]] = {"nginx": [], "edge": []}
    for number in range(pairs):
        order = ("nginx", "edge") if number % 2 == 0 else ("edge", "nginx")
        for side in order:
            runs[side].append(_measure(load, *sides[side], secs, options.function))
    ratios = [edge[0] / nginx[0] for edge, nginx in zip(runs["edge"], runs["nginx"], strict=True)]
    whole = [nginx[2] / edge[2] for edge, nginx in zip(runs["edge"], runs["nginx"], strict=True)]
    cpu = [edge[1] / nginx[1] for edge, nginx in zip(runs["edge"], runs["nginx"], strict=True)]
    result: dict[str, object] = {
        "bench": "edge-functions" if options.function else "edge",
        "pairs": pairs,
        "secs": secs,
        "cpus": options.cpus,
        "varied": options.vary,
        "logging": options.log,
        "ratio": _spread(ratios),
        "cpu_ratio": _spread(cpu),
        "whole_cpu": _spread(whole),
    }
    for side, values in runs.items():
        result[side] = {
            "requests_per_sec": statistics.median(v[0] for v in values),
            "cpu_secs_per_1000": statistics.median(v[1] for v in values),
            "whole_cpu_secs_per_1000": statistics.median(v[2] for v in values),
        }
    return result


def _spread(values: list[float]) -> dict[str, float | list[float]]:
    rounded = [round(value, 4) for value in values]
    return {"median": statistics.median(rounded), "min": min(rounded), "max": max(rounded), "all": rounded}


def _measure(
    load: list[str], port: int, pid: int, upstream: int, secs: int, function: bool
) -> tuple[float, float, float]:
    """(requests per second, CPU seconds per 1,000 requests of the proxy, and of load, proxy and upstream)."""
    before, others, started = _cpu_secs(pid), _cpu_secs(upstream) + _wrk_secs(), time.monotonic()
    command = [*load, "-d", f"{secs}s", f"http://127.0.0.1:{port}{FUNCTION_PATH if function else '/'}"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    took, used = time.monotonic() - started, _cpu_secs(pid) - before
    whole = used + _cpu_secs(upstream) + _wrk_secs() - others
    found = re.search(r"(\d+) requests in ([\d.]+)(ms|s)", text)
    if found is None or "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"wrk met errors in {took:.1f} s:\n{text}")
    requests = int(found[1])
    duration = float(found[2]) / (1000 if found[3] == "ms" else 1)
    return requests / duration, used / requests * 1000, whole / requests * 1000


def _wrk_secs() -> float:
    """CPU time of the load generators that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _cpu_secs(pid: int) -> float:
    """User and system time of a process and its children (nginx works in a child)."""
    total = 0.0
    for one in [pid, *_children(pid)]:
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _pinned(cpu: int, command: list[str], cwd: str | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["taskset", "-c", str(cpu), *command], cwd=cwd)


def _free_ports(count: int) -> list[int]:
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _serve(port: int, upstreams: list[int], log: str, function: bool) -> None:
    """The edge as a process of its own, until SIGTERM."""
    import uvloop

    uvloop.run(_edge(port, upstreams, log, function))


async def _edge(port: int, upstreams: list[int], log: str, function: bool) -> None:
    from types import SimpleNamespace

    from aether.edge.access_log import AccessLog
    from aether.edge.options import EdgeOptions
    from aether.edge.server import Edge
    from aether.edge.table import RouteTable
    from aether.topology.edge_metrics import EdgeMetrics

    class Upstream:
        def __init__(self, at: int) -> None:
            self.spec = SimpleNamespace(instance_id=f"i{at}", deployment_id="019a5f7e-0000-7000-8000-000000000000")
            self.at = at

        async def dial(self) -> socket.socket:
            sock = socket.socket()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.at))
            return sock

    metrics = EdgeMetrics()
    table = RouteTable()
    instances = [Upstream(at) for at in upstreams]
    edge = Edge(table, EdgeOptions(), metrics.record)
    keeping = None
    if function:
        table.set_api(["hello.localhost"], "none.sock")
        edge.functions, ledger = await _functions(instances)
        keeping = asyncio.create_task(ledger.run())
    else:
        table.route("hello", [table.add("hello", instance) for instance in instances])  # pyright: ignore
    access_log = AccessLog(Path("edge-access.log"))
    if log == "on":
        access_log.start()
        edge.on_access = access_log.record
    await edge.start("127.0.0.1", port)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await edge.close(1)
    if keeping is not None:
        keeping.cancel()
    if log == "on":
        await access_log.close()


async def _functions(instances: list[Any]) -> tuple[FunctionTable, InvocationLedger]:
    """A function with these instances, whose calls are recorded in a database of its own."""
    import sqlalchemy as sa

    from aether.edge.functions import FunctionTable
    from aether.functions.invocations import Invocations
    from aether.functions.ledger import InvocationLedger
    from aether.functions.ports import RouteRules, ServingInstance
    from aether.model.function_instance import StartKind
    from aether.stores.database.engine import Database

    database = Database("sqlite+aiosqlite:///invocations.db")
    await database.open()
    async with database.write() as tx:
        await tx.execute(
            sa.text(
                "insert into functions (id, name, owner, version, created_at, updated_at)"
                f" values ('{FUNCTION_ID}', 'hello', 'default', 1, 1, 1)"
            )
        )
    ledger = InvocationLedger(Invocations(database))
    functions = FunctionTable()
    functions.on_invocation = ledger.add
    rules = RouteRules("hello", 1, 100, 30.0, 30.0, 1000)
    serving = [ServingInstance(f"i{each.at}", 1, StartKind.WARM, each.dial) for each in instances]
    functions.serve(FUNCTION_ID, rules, serving)
    return functions, ledger


if __name__ == "__main__":
    sys.exit(main())
