"""One server process: what it owns (folder, port, descriptors, signals) around what runs in it.

`aether up` has its data directory to itself. Several `aether server` may share a database, and on one machine a data
directory too: what runs there is then anybody's to adopt, and a server that ends leaves it running.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
from collections.abc import Callable
from contextlib import ExitStack

import uvloop

from aether.observability.logging import logger
from aether.observability.telemetry import wanted
from aether.settings import Settings
from aether.topology.folder import owned, shared
from aether.topology.plane import Ready, running
from aether.topology.public import check_exposure, listen
from aether.topology.tls import open_tls

_INTERRUPTED = 130
_OPEN_FILES = 65_536
_log = logger(__name__)


def serve(
    settings: Settings, host: str, port: int, on_ready: Callable[[Ready], None], *, among_others: bool = False
) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code. A second signal ends the process at once.

    Alone, apps are stopped in order and come back at the next start; `among_others` they go on and are adopted by
    another server, or by the next start. After kill -9 they go on in both cases.
    Raises LocalIOError (port in use, folder in use), ConfigError and ServiceUnavailable.
    """
    check_exposure(settings, host)
    wanted(os.environ)
    _allow_many_files()
    with ExitStack() as stack:
        if among_others:
            claim = stack.enter_context(shared(settings.data_dir))
        else:
            claim = stack.enter_context(owned(settings.data_dir))
        tls = open_tls(settings, host)
        listeners = [stack.enter_context(listen(host, port))]
        if settings.http_port:
            listeners.append(stack.enter_context(listen(host, settings.http_port)))

        async def run() -> int:
            stop = asyncio.Event()
            _obey_signals(stop)
            async with running(settings, host, listeners, tls, stop, claim) as ready:
                _spare_the_collector()
                if not stop.is_set():
                    on_ready(ready)
                await stop.wait()
                _log.info("stopping", hint="requests under way end first; a second signal ends the server at once")
            return 0

        return uvloop.run(run())


def _allow_many_files() -> None:
    """Each proxied connection takes two descriptors; instances get a limit of their own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _spare_the_collector() -> None:
    """What a start makes stays: looking through all of it again and again for garbage was a seventh of the CPU time
    of a server under load."""
    gc.collect()
    gc.freeze()


def _obey_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def asked() -> None:
        if stop.is_set():
            os._exit(_INTERRUPTED)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)
