"""Functions as a server runs them (edge, gateway, scaler, worker, stores) over a real runtime.

Only the catalogue is a dictionary, so that a test changes a function with one assignment.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from aether.edge.functions import FunctionTable
from aether.edge.server import Edge
from aether.edge.table import RouteTable
from aether.functions.engine import FunctionEngine, FunctionOptions
from aether.functions.gateway import Waiting
from aether.functions.instance_state import Limits
from aether.functions.ports import FunctionRuntime, FunctionVersion
from aether.functions.scaling import Rules
from aether.functions.worker import WorkerOptions
from aether.model.function import define
from aether.model.function_instance import Code, FunctionState, Invocation
from aether.runtimes.process.functions import ProcessFunctions
from aether.stores.kv.sqlite import SqliteKV
from aether.stores.queue.sqlite import SqliteQueue
from aether.topology.edge_metrics import EdgeMetrics
from support.edge import LIMIT_SECS
from support.microvm import code

FUNCTION_ID = "5f0c0d5e-0000-4000-8000-000000000001"
SERVER = """
import http.server, os, signal, socket, time

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.partition("?")[0].strip("/")
        if name == "slow":
            time.sleep(0.2)
        if name == "die":
            os._exit(7)
        if name == "deaf":
            server.socket.shutdown(socket.SHUT_RDWR)  # at once, though another thread waits for it
            server.socket.close()
        if name == "hang":
            while True:
                time.sleep(60)
        if name == "late":
            time.sleep(3)
        body = os.environ.get("SAY", "hi").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if name == "close":
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 256

server = Server(("0.0.0.0", int(os.environ["PORT"])), Handler)
print("up", flush=True)
try:
    server.serve_forever()
except (OSError, ValueError):
    signal.pause()  # it has closed its socket
"""
SHORT = Rules(idle_secs=1.0, last_idle_secs=1.5, stable_secs=3.0, panic_secs=1.0)
"""So that a test can wait for what takes minutes otherwise."""


class Shelf:
    """Implements `FunctionSource`."""

    def __init__(self) -> None:
        self.versions: dict[str, FunctionVersion] = {}
        self.codes: dict[str, Code] = {}
        self.made: dict[str, Code] = {}
        """Code by the text of its main.py."""

    async def current(self) -> Sequence[FunctionVersion]:
        return list(self.versions.values())

    async def fetch(self, version: FunctionVersion) -> Code:
        return self.codes[version.code_digest]


@dataclass
class Records:
    """Implements `InvocationSink`."""

    kept: list[Invocation] = field(default_factory=list)

    async def add(self, invocations: Sequence[Invocation]) -> None:
        self.kept += invocations


@dataclass
class Functions:
    engine: FunctionEngine
    runtime: FunctionRuntime
    table: FunctionTable
    shelf: Shelf
    records: Records
    kv: SqliteKV
    queue: SqliteQueue
    port: int
    folder: Path
    client: aiohttp.ClientSession

    def put(self, text: str = SERVER, name: str = "hello", function_id: str = FUNCTION_ID, **fields: Any) -> int:
        """The next version of a function, told of at once; returns its number."""
        made = self.shelf.made.get(text)
        if made is None:
            made = code(self.folder / f"code-{len(self.shelf.made)}.tgz", {"main.py": text})
            self.shelf.made[text] = self.shelf.codes[made.digest] = made
        before = self.shelf.versions.get(function_id)
        number = 1 if before is None else before.version + 1
        definition = define({"name": name, "runtime": "python", "entrypoint": "main.py", **fields})
        self.shelf.versions[function_id] = FunctionVersion(function_id, number, definition, made.digest, made.form)
        self.engine.changed()
        return number

    async def routed(self, version: int, name: str = "hello") -> None:
        """Return once the edge knows of this version."""
        async with asyncio.timeout(LIMIT_SECS):
            while (route := self.table.enter(f"/functions/{name}".encode())[0]) is None or route.version < version:
                await asyncio.sleep(0.005)

    async def get(self, path: str = "/", name: str = "hello", method: str = "GET") -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.port}/functions/{name}{path}"
        async with self.client.request(method, url) as answer:
            return answer.status, await answer.text()

    async def state(self) -> FunctionState:
        return await self.engine.state(FUNCTION_ID)

    async def until(self, condition: Any, secs: float = 60.0) -> FunctionState:
        """The state once `condition(state)` holds."""
        async with asyncio.timeout(secs):
            with self.engine.board.subscribe() as changed:
                while not condition(state := await self.state()):
                    changed.clear()
                    with_time = asyncio.create_task(changed.wait())
                    await asyncio.wait([with_time], timeout=0.1)
                    with_time.cancel()
        return state


class Load:
    """Callers who call again and again until they are told to stop; counts what they get."""

    def __init__(self, functions: Functions, path: str = "/slow", callers: int = 6) -> None:
        self.answers: Counter[tuple[int, str]] = Counter()
        self._functions = functions
        self._path = path
        self._over = False
        self._callers = callers

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._call()) for _ in range(self._callers)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)

    async def _call(self) -> None:
        while not self._over:
            status, text = await self._functions.get(self._path)
            self.answers[status, text] += 1

    async def until(self, wanted: tuple[int, str]) -> None:
        async with asyncio.timeout(60):
            while not self.answers[wanted]:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running_functions(
    folder: Path, *, rules: Rules = SHORT, waiting: Waiting = Waiting(30.0, 2000), start_secs: float = 20.0,
    runtime: FunctionRuntime | None = None, worker: WorkerOptions | None = None,
) -> AsyncIterator[Functions]:  # fmt: skip
    """A server's functions in `folder`; nothing of them is left afterwards."""
    kv, queue = SqliteKV(folder / "kv.db"), SqliteQueue(folder / "queue.db")
    async with AsyncExitStack() as stack:
        await kv.open()
        stack.push_async_callback(kv.close)
        await queue.open()
        stack.push_async_callback(queue.close)
        runtime = runtime or ProcessFunctions(folder / "process")
        stack.push_async_callback(runtime.close)
        table, hosts = FunctionTable(), RouteTable()
        hosts.set_api(["127.0.0.1"], folder / "api.sock")
        edge = Edge(hosts, on_record=EdgeMetrics().record)
        edge.functions = table
        port = await edge.start()
        stack.push_async_callback(edge.close, 2.0)
        shelf, records = Shelf(), Records()
        limits = Limits(start_secs=math.inf, drain_secs=10.0, acknowledge_secs=5.0, stop_secs=5.0)
        worker = worker or WorkerOptions("local", 4, ready_secs=start_secs, limits=limits)
        options = FunctionOptions(waiting=waiting, rules=rules, worker=worker)
        engine = FunctionEngine(kv, queue, shelf, records, runtime, table, options)
        client = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=100))
        )
        await stack.enter_async_context(engine.running())
        yield Functions(engine, runtime, table, shelf, records, kv, queue, port, folder, client)
