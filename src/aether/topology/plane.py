"""One server as a whole: database, objects, registry, runtime, engine, API and edge in one process.

Settings choose the drivers; `Claim` says whether other servers share the database and the data directory. Order of
the start: what can be refused first (lock, port), then stores, then apps taken up, then traffic. Connections made
meanwhile wait in the listener's queue, so a restart looks to clients like a pause. The end goes backwards.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aether.api.app import create_api
from aether.api.server import ApiServer, unix_socket
from aether.api.services import Services
from aether.apps.artifacts import UnpackedArtifacts
from aether.apps.broadcast import Broadcast
from aether.apps.catalogue import Catalogue
from aether.apps.deployments import Deployments
from aether.apps.engine import LEASES, Engine, EngineOptions
from aether.apps.follower import Follower
from aether.apps.history import DeploymentSweeper, UnpackedSweeper
from aether.apps.leftovers import LogSweeper, StrandedSweeper
from aether.apps.logs import Logs
from aether.apps.runs import Runs
from aether.apps.services import AppServices
from aether.apps.volumes import AppVolumes
from aether.backup.write import sweep
from aether.edge.access_log import AccessLog
from aether.edge.functions import FunctionTable
from aether.edge.options import EdgeOptions
from aether.edge.server import Edge
from aether.edge.table import RouteTable
from aether.hosts.certificates import Certificates
from aether.hosts.proof import Prover
from aether.hosts.recheck import Rechecker
from aether.hosts.service import HostOptions, Hosts
from aether.identity.audit_sweeper import AuditSweeper
from aether.identity.service import Identity
from aether.leases import Leases
from aether.model.errors import LocalIOError, ServiceUnavailable
from aether.model.instance import Limits
from aether.model.names import new_id
from aether.observability.logging import logger
from aether.observability.metrics import Metrics
from aether.registry.collector import PendingCollector
from aether.registry.policy import ReleasePolicy
from aether.registry.service import Registry
from aether.registry.sweeper import ArtifactSweeper, EventSweeper, Keep, OrphanSweeper
from aether.retention import Retention
from aether.runtimes.process.runtime import ProcessRuntime
from aether.settings import Settings
from aether.topology import backups, node, reserve
from aether.topology.chores import Chores
from aether.topology.databases import open_database, open_signals
from aether.topology.edge_metrics import EdgeMetrics
from aether.topology.exporting import exporting
from aether.topology.folder import Claim, announce, withdraw
from aether.topology.function_catalogue import function_chores, open_functions
from aether.topology.function_metrics import FunctionMetrics
from aether.topology.functions import running_functions
from aether.topology.isolation import runtime_options
from aether.topology.objects import open_objects
from aether.topology.public import (
    api_hosts,
    app_url,
    base_url,
    is_loopback,
    proof_options,
)
from aether.topology.tls import Tls, open_acme
from aether.topology.unlock import seal_anew, unlock

ADOPTION_SECS = 1.0
"""How long traffic waits for apps that are taken up again; those that must start take longer and answer 503."""
LOOKS_PER_LEASE = 3
CHANGES_SECS = 1.0
"""How late whoever follows something at one server hears of what another one did, when nothing else tells."""
RESTART_SECS = 15.0
"""How long the start as a whole waits for apps that must be started."""
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
    functions: str = "no functions"
    """What functions run in, in words."""
    ca_file: Path | None = None
    """What clients must trust, when the server's certificates are its own authority's."""


@asynccontextmanager
async def running(
    settings: Settings,
    host: str,
    listeners: Sequence[socket.socket],
    tls: Tls | None,
    stop: asyncio.Event,
    claim: Claim,
) -> AsyncGenerator[Ready]:
    """A server that serves until it is left. Raises LocalIOError, ConfigError, ServiceUnavailable."""
    data = settings.data_dir
    options = runtime_options(settings)
    port = int(listeners[0].getsockname()[1])
    secure = tls is not None
    token_file = data / "admin-token"
    first_start = not token_file.exists()
    reserve.give_up_if_full(data)
    async with AsyncExitStack() as stack:
        metrics = Metrics()
        otlp = await exporting(stack, metrics)
        database = await open_database(settings)
        stack.push_async_callback(database.close)
        try:
            if claim.first:
                sweep(data)
                for stale in (data / "run").glob("api-*.sock"):
                    stale.unlink(missing_ok=True)
            vault = await unlock(settings, database)
            store = await open_objects(settings)
            objects = store.objects
            stack.push_async_callback(objects.close)
            source = UnpackedArtifacts(data / "releases", objects)
            await source.open(sweep=claim.first)
            stack.push_async_callback(source.close)
        except (OSError, ValueError) as error:
            raise LocalIOError(f"the data directory {data} cannot be used: {error}") from error
        identity = Identity(database, settings.api_tokens, required=settings.auth_required)
        place = None if claim.alone else f"{socket.gethostname()}:{data}"[-200:]
        await identity.tokens.ensure_bootstrap(token_file, place)

        runtime = ProcessRuntime(data, options)
        stack.push_async_callback(runtime.close)
        report, major = await asyncio.gather(runtime.probe(), node.node_major())
        if not report.usable:
            _log.warning("apps cannot be run here", reason=report.reason, remedy=report.remedy)

        table = RouteTable(settings.base_domain)
        broadcast = Broadcast()
        signals = None if claim.alone else open_signals(settings, broadcast.heard)
        if signals is not None:
            broadcast.relay = signals.tell
            stack.push_async_callback(signals.close)
        # alone, the lock of the data folder, in which the database is, says that nobody else has a lease
        leases = Leases(database, f"{os.getpid()}-{new_id()}", ttl_secs=settings.lease_secs, alone=claim.alone)
        leases.start()
        stack.callback(broadcast.notify, LEASES)
        stack.push_async_callback(leases.close)
        engine = Engine(
            database,
            broadcast,
            runtime,
            table,
            source,
            _engine_options(settings, major, alone=claim.alone),
            leases,
            vault,
        )
        runs = Runs(database, broadcast, engine, runtime, settings.stop_grace_secs)
        volumes = AppVolumes(database, runtime.volumes)
        catalogue = Catalogue(database, broadcast, engine, source, objects, leases, runs, volumes)
        registry = Registry(database, objects, settings, metrics, vault.sealer, leases)
        functions = await open_functions(settings, database, vault, objects, leases, sweep=claim.first)
        stack.push_async_callback(functions.codes.close)
        stack.push_async_callback(functions.runtimes.images.close)
        stack.push_async_callback(functions.catalogue.close)

        async def check_runtime() -> None:
            if not report.usable:
                raise ServiceUnavailable(f"apps cannot be run here: {report.reason}")

        custom_hosts = Hosts(
            database,
            table,
            Prover(proof_options(settings)),
            HostOptions(settings.base_domain, tuple(api_hosts(settings, host)), is_loopback(host)),
        )
        certificates = None
        if tls is not None:
            certificates = Certificates(database, custom_hosts, data / "tls", tls.book)
        grace = settings.retention_grace_secs
        retention = Retention(
            leases,
            [
                DeploymentSweeper(database, runtime, settings.deployment_failed_ttl_secs),
                ArtifactSweeper(database, registry, Keep(settings.retain_latest_per_app, grace)),
                OrphanSweeper(database, objects, registry, grace + settings.presign_expire_secs),
                EventSweeper(database, settings.audit_ttl_secs),
                *function_chores(settings, database, functions),
                UnpackedSweeper(engine),
                StrandedSweeper(database, source),
                LogSweeper(database, runtime, grace),
                AuditSweeper(identity.audit, settings.audit_ttl_secs),
            ],
            settings.retention_interval_secs,
            metrics,
        )
        services = Services(
            settings=settings,
            identity=identity,
            registry=registry,
            apps=AppServices(
                catalogue=catalogue,
                deployments=Deployments(database, broadcast, engine, ReleasePolicy.of(settings)),
                logs=Logs(database, broadcast, runtime, vault, settings.stream_heartbeat_secs),
                url_of=lambda app: app_url(app, settings, port, secure=secure),
                runs=runs,
                volumes=volumes,
            ),
            functions=functions,
            hosts=custom_hosts,
            certificates=certificates,
            retention=retention,
            transfer=store.transfer,
            backup=(lambda plan: backups.writer(data, plan)) if claim.alone else None,
            metrics=metrics,
            checks={"database": database.check, "objects": objects.check, "runtime": check_runtime},
        )
        stack.push_async_callback(engine.close if claim.alone else engine.abandon)
        stack.push_async_callback(catalogue.close)
        await custom_hosts.publish()
        if certificates is not None:
            await certificates.open()
            custom_hosts.on_change = certificates.refresh
        if claim.first:
            await runtime.volumes.clear()
        await engine.resume()
        if claim.first:
            await runs.resume()
        await catalogue.finish_deletions()
        await functions.catalogue.finish_deletions()
        claim.started()
        await engine.until_serving(ADOPTION_SECS)

        socket_path = data / "run" / ("api.sock" if claim.alone else f"api-{os.getpid()}.sock")
        api_socket = unix_socket(socket_path)
        stack.callback(socket_path.unlink, missing_ok=True)
        api = ApiServer(create_api(services), api_socket, grace_secs=settings.stop_grace_secs)
        await api.start()
        stack.push_async_callback(api.stop)
        table.set_api(api_hosts(settings, host), socket_path)
        edge_metrics = EdgeMetrics()
        edge = Edge(table, _edge_options(settings), edge_metrics.record)
        if otlp is not None and otlp.traces:
            from aether.topology.edge_spans import EdgeSpans

            spans = EdgeSpans(otlp)
            edge.traces, edge.on_record = spans, spans.beside(edge_metrics.record)
        function_words = "no functions"
        if claim.alone and settings.function_runtime != "off":
            edge.functions = FunctionTable()
            function_engine, function_words = await stack.enter_async_context(
                running_functions(settings, functions, edge.functions)
            )
            metrics.registry.register(FunctionMetrics(function_engine, edge.functions))
        edge_metrics.counters = edge.counters
        metrics.registry.register(edge_metrics)
        if settings.access_log != "off":
            edge_metrics.access_log = access_log = AccessLog(
                data / "logs" / ("access.log" if claim.alone else f"access-{port}.log")
                if settings.access_log == "file"
                else None,
                max_bytes=settings.access_log_bytes or sys.maxsize,
                with_query=settings.access_log_query,
            )
            try:
                access_log.start()
            except OSError as error:
                raise LocalIOError(f"the access log cannot be opened: {error}") from error
            stack.push_async_callback(access_log.close)
            edge.on_access = access_log.record
        await _listen(edge, table, listeners, settings, tls)
        stack.push_async_callback(edge.close, settings.drain_timeout_secs)
        stack.push_async_callback(runs.close)
        stack.callback(services.shutdown.set)
        url = base_url(host, port, secure=secure)
        announce(data, url, tls and tls.ca_file)
        stack.callback(withdraw, data, url)

        await registry.open()
        chores = Chores(leases, services.shutdown)
        if not settings.disable_background:
            collector = PendingCollector(database, objects, settings, metrics)
            chores.leased("seal with the newest key", lambda _: seal_anew(database, vault))
            chores.leased("pending uploads", collector.run)
            chores.add("interrupted uploads", registry.uploads.keep_recovering(services.shutdown))
            chores.add("retention", retention.run(services.shutdown))
            chores.leased("pending hosts", Rechecker(custom_hosts).run)
        chores.add("reserve", reserve.keep_up(data, services.shutdown))
        if tls is not None:
            chores.add("certificate files", tls.watch())
            renewer = open_acme(settings, custom_hosts, certificates) if certificates is not None else None
            if certificates is not None and renewer is not None:
                certificates.on_change = renewer.look_again
                chores.leased("certificates", lambda _: renewer.run())
        if not claim.alone:
            chores.add("apps of other servers", engine.watch(services.shutdown))
            follower = Follower(database, runtime, table, engine.runs)
            told = asyncio.Event()
            broadcast.overhear(engine.overheard)
            broadcast.overhear(lambda _: told.set())
            chores.every(CHANGES_SECS, "changes of other servers", broadcast.notify_all)
            chores.every(CHANGES_SECS, "routes of other servers", follower.look, when=told)
            chores.every(leases.ttl_secs / LOOKS_PER_LEASE, "hosts of other servers", custom_hosts.publish)
            if signals is not None:
                signals.start()
            chores.leased_every(leases.ttl_secs, "deletions", catalogue.finish_deletions)
        stack.push_async_callback(chores.close)
        await _or_stop(engine.until_serving(RESTART_SECS), stop)
        services.started.set()
        yield Ready(url, token_file, first_start, data, report.lines()[0], function_words, tls and tls.ca_file)


async def _listen(
    edge: Edge, table: RouteTable, listeners: Sequence[socket.socket], settings: Settings, tls: Tls | None
) -> None:
    """The first listener takes all there is; the second, beside TLS, sends on to the first."""
    port = settings.public_port or int(listeners[0].getsockname()[1])
    if tls is None:
        await edge.start(sockets=listeners, entrance=table.enter_by(port=port))
        return
    await edge.start(
        sockets=listeners[:1], tls=tls.book.listening, entrance=table.enter_by(secure=True, port=port)
    )  # fmt: skip
    for plain in listeners[1:]:
        await edge.start(sockets=[plain], entrance=table.enter_by(https_port=port))


async def _or_stop(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> None:
    """Await `work`, or give it up when `stop` is set."""
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work), asyncio.create_task(stop.wait())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await _ended(tasks)


async def _ended(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _engine_options(settings: Settings, node_major: int | None, *, alone: bool) -> EngineOptions:
    return EngineOptions(
        linger_secs=0.0 if alone else 2 * CHANGES_SECS,
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
