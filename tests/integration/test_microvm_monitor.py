"""The control line of a monitor that is in the hands of its guest: whatever it says, a start goes on without it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable

import pytest

from aether.runtimes.microvm.qmp import Control, MonitorError

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'
DONE = b'{"return": {}}\n'
Talk = Callable[[Control], Awaitable[object]]


async def with_monitor(said: bytes, talk: Talk, *, hangs_up: bool = True) -> object:
    """What comes of `talk` with a monitor that says all of `said` whatever it is asked."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)
        saying = asyncio.create_task(asyncio.get_running_loop().sock_sendall(theirs, said))
        if hangs_up:
            saying.add_done_callback(lambda _: theirs.shutdown(socket.SHUT_WR))
        try:
            async with asyncio.timeout(30), Control(ours) as control:
                return await talk(control)
        finally:
            saying.cancel()
            await asyncio.wait([saying])


async def ask(control: Control) -> object:
    return await control.execute("query-status")


async def resumed(control: Control) -> object:
    return await control.event("RESUME")


@pytest.mark.parametrize(
    ("said", "talk", "reason"),
    [
        (b"", ask, "hung up"),
        (b"hello\n", ask, "cannot be read"),
        (GREETING, ask, "hung up"),
        (GREETING + b"[]\n", ask, "hung up"),
        (GREETING + DONE + b'{"error": {"desc": "no such thing"}}\n', ask, "refuses query-status: .*no such thing"),
        (GREETING + DONE + b'{"return": ', ask, "hung up"),
        (GREETING + DONE + b'{"return": "' + b"x" * 1_000_000, ask, "cannot be read"),
        (GREETING + DONE + b"[" * 60_000 + b"\n", ask, "cannot be read"),
        (GREETING + DONE + b'{"event": "STOP"}\n' * 1000, resumed, "reports too much"),
        (GREETING + DONE + b'{"event": "STOP", "data": 7}\n', resumed, "hung up"),
        (GREETING + DONE + b'{"event": "STOP"}\n', resumed, "hung up"),
    ],
    ids=[
        "silent", "no-json", "greets", "no-object", "refuses", "cut-off", "endless", "deep", "floods", "no-data",
        "stops",
    ],
)  # fmt: skip
async def test_a_monitor_that_does_not_do_its_part_is_said_to(said: bytes, talk: Talk, reason: str) -> None:
    with pytest.raises(MonitorError, match=reason):
        await with_monitor(said, talk)


async def test_events_come_between_answers_and_are_not_lost() -> None:
    said = [{"event": "SETUP"}, {"return": {}}, {"event": "MIGRATION", "data": {"status": "setup"}}]
    said += [{"event": "MIGRATION", "data": {"status": "completed"}}, {"return": {"status": "running"}}]
    lines = b"".join(json.dumps(line).encode() + b"\n" for line in said)

    async def talk(control: Control) -> object:
        answer = await control.execute("query-status")
        return answer, await control.event("MIGRATION", "completed", "failed"), await control.event("MIGRATION")

    found = await with_monitor(GREETING + lines, talk, hangs_up=False)
    assert found == ({"status": "running"}, "completed", "setup")


async def test_a_descriptor_reaches_the_monitor() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)
        theirs.sendall(GREETING + DONE + DONE)
        async with asyncio.timeout(30), Control(ours) as control:
            source = os.memfd_create("given")
            os.write(source, b"saved")
            await control.give("state", source)
            os.close(source)
            told, given, _, _ = socket.recv_fds(theirs, 4096, 1)
            while b"getfd" not in told:
                told, given, _, _ = socket.recv_fds(theirs, 4096, 1)
            assert b'"fdname": "state"' in told
            assert os.pread(given[0], 10, 0) == b"saved"
            os.close(given[0])
