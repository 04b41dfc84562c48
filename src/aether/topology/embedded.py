"""`aether up`: database, objects, registry, runtime, engine, API and edge in one process on one machine.

Order of the start: what can be refused first (lock, port), then stores, then apps taken up, then traffic. Connections
made meanwhile wait in the listener's queue, so a restart looks to clients like a pause. The end goes backwards.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from aether.api.app import create_api
from aether.api.server import ApiServer, unix_socket
from aether.api.services import Services
from aether.apps.artifacts import UnpackedArtifacts
from aether.apps.broadcast import Broadcast
from aether.apps.catalogue import Catalogue
from aether.apps.deployments import Deployments
from aether.apps.engine import Engine, EngineOptions
from aether.apps.logs import Logs
from aether.apps.services import AppServices
from aether.edge.options import EdgeOptions
from aether.edge.server import Edge
from aether.edge.table import RouteTable
from aether.identity.service import Identity
from aether.model.errors import LocalIOError, ServiceUnavailable
from aether.model.instance import Limits
from aether.model.names import new_id
from aether.observability.logging import logger
from aether.observability.metrics import Metrics
from aether.registry.collector import PendingCollector
from aether.registry.service import Registry
from aether.runtimes.process.runtime import ProcessRuntime, RuntimeOptions
from aether.settings import Settings
from aether.stores.database.engine import Database
from aether.stores.objects.filesystem import FilesystemObjects
from aether.stores.objects.signing import UrlSigner, load_key
from aether.topology import node
from aether.topology.edge_metrics import EdgeMetrics
from aether.topology.folder import announce, owned, withdraw
from aether.topology.public import api_hosts, app_url, base_url, check_exposure, listen

ADOPTION_SECS = 1.0
"""How long traffic waits for apps that are taken up again; those that must start take longer and answer 503."""
RESTART_SECS = 15.0
"""How long the start as a whole waits for apps that must be started."""
_INTERRUPTED = 130
_OPEN_FILES = 65_536
_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """What the operator should know once everything runs."""

    url: str
    token_file: Path
    first_start: bool
    """True when the admin token was made by this start."""
    data_dir: Path
    sandbox: str
    """What isolates apps here, in words."""


def serve(settings: Settings, host: str, port: int, on_ready: Callable[[Ready], None]) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code. A second signal ends the process at once.

    Apps are stopped in order and come back at the next start. After kill -9 they go on by themselves and are adopted
    by the next start. Raises LocalIOError (port in use, folder in use), ConfigError and ServiceUnavailable.
    """
    check_exposure(settings, host)
    _allow_many_files()
    with owned(settings.data_dir), listen(host, port) as listener:
        return uvloop.run(_serve(settings, host, listener, on_ready))


def _allow_many_files() -> None:
    """Each proxied connection takes two descriptors; instances get a limit of their own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _serve(settings: Settings, host: str, listener: socket.socket, on_ready: Callable[[Ready], None]) -> int:
    stop = asyncio.Event()
    _obey_signals(stop)
    async with _running(settings, host, listener, stop) as ready:
        if not stop.is_set():
            on_ready(ready)
        await stop.wait()
        _log.info("stopping", hint="requests under way end first; a second signal ends the server at once")
    return 0


def _obey_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def asked() -> None:
        if stop.is_set():
            os._exit(_INTERRUPTED)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)


@asynccontextmanager
async def _running(
    settings: Settings, host: str, listener: socket.socket, stop: asyncio.Event
) -> AsyncGenerator[Ready]:
    data = settings.data_dir
    port = int(listener.getsockname()[1])
    token_file = data / "admin-token"
    first_start = not token_file.exists()
    background: list[asyncio.Task[None]] = []
    async with AsyncExitStack() as stack:
        database = Database(f"sqlite+aiosqlite:///{data / 'aether.db'}")
        stack.push_async_callback(database.close)
        await database.open()
        try:
            signer = UrlSigner(load_key(data / "signing.key"))
            objects = FilesystemObjects(data / "objects", signer)
            await objects.open()
            stack.push_async_callback(objects.close)
            source = UnpackedArtifacts(data / "releases", objects)
            await source.open()
            stack.push_async_callback(source.close)
        except (OSError, ValueError) as error:
            raise LocalIOError(f"the data directory {data} cannot be used: {error}") from error
        identity = Identity(database, settings.api_tokens, required=settings.auth_required)
        await identity.tokens.ensure_bootstrap(token_file)

        runtime = ProcessRuntime(data, RuntimeOptions(sandbox=settings.sandbox, log_bytes=settings.app_log_bytes))
        stack.push_async_callback(runtime.close)
        report, major = await asyncio.gather(runtime.probe(), node.node_major())
        if not report.usable:
            _log.warning("apps cannot be run here", reason=report.reason, remedy=report.remedy)

        table = RouteTable(settings.base_domain)
        broadcast = Broadcast()
        engine = Engine(
            database, broadcast, runtime, table, source, _engine_options(settings, major), f"{os.getpid()}-{new_id()}"
        )
        catalogue = Catalogue(database, broadcast, engine, source, objects)
        metrics = Metrics()
        registry = Registry(database, objects, settings, metrics)

        async def check_runtime() -> None:
            if not report.usable:
                raise ServiceUnavailable(f"apps cannot be run here: {report.reason}")

        services = Services(
            settings=settings,
            identity=identity,
            registry=registry,
            apps=AppServices(
                catalogue=catalogue,
                deployments=Deployments(database, broadcast, engine),
                logs=Logs(database, broadcast, runtime),
                url_of=lambda app: app_url(app, settings, port),
            ),
            transfer=objects,
            metrics=metrics,
            checks={"database": database.check, "objects": objects.check, "runtime": check_runtime},
        )
        stack.push_async_callback(engine.close)
        stack.push_async_callback(catalogue.close)
        await engine.resume()
        await catalogue.finish_deletions()
        await engine.until_serving(ADOPTION_SECS)

        api_socket = unix_socket(data / "run" / "api.sock")
        api = ApiServer(create_api(services), api_socket, grace_secs=settings.stop_grace_secs)
        await api.start()
        stack.push_async_callback(api.stop)
        table.set_api(api_hosts(settings, host), data / "run" / "api.sock")
        edge_metrics = EdgeMetrics()
        edge = Edge(table, _edge_options(settings), edge_metrics.record)
        edge_metrics.counters = edge.counters
        metrics.registry.register(edge_metrics)
        await edge.start(sockets=[listener])
        stack.push_async_callback(edge.close, settings.drain_timeout_secs)
        stack.callback(services.shutdown.set)
        url = base_url(host, port)
        announce(data, url)
        stack.callback(withdraw, data)

        await registry.recover()
        if not settings.disable_background:
            collector = PendingCollector(database, objects, settings, metrics)
            background.append(asyncio.create_task(collector.run(services.shutdown), name="pending uploads"))
        stack.push_async_callback(_ended, background)
        await _or_stop(engine.until_serving(RESTART_SECS), stop)
        services.started.set()
        yield Ready(url, token_file, first_start, data, report.lines()[0])


async def _or_stop(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> None:
    """Await `work`, or give it up when `stop` is set."""
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work), asyncio.create_task(stop.wait())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await _ended(tasks)


async def _ended(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _engine_options(settings: Settings, node_major: int | None) -> EngineOptions:
    return EngineOptions(
        base_domain=settings.base_domain,
        drain_timeout_secs=settings.drain_timeout_secs,
        stop_grace_secs=settings.stop_grace_secs,
        limits=Limits(
            memory_bytes=settings.app_memory_bytes,
            cpus=settings.app_cpus,
            pids=settings.app_pids,
            tmp_bytes=settings.app_tmp_bytes,
        ),
        runtime_warning=lambda runtime: node.warning(runtime, node_major),
    )


def _edge_options(settings: Settings) -> EdgeOptions:
    never = float("inf")
    return EdgeOptions(
        max_body_bytes=settings.edge_max_body_bytes,
        header_timeout_secs=settings.edge_header_timeout_secs or never,
        idle_timeout_secs=settings.edge_idle_timeout_secs or never,
        upstream_timeout_secs=settings.edge_upstream_timeout_secs or never,
    )
