"""The server's wall clock jumps by an hour, forth and back, while rollouts are under way (libfaketime moves it)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Server, hello, server, wait_for

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
SLOW = """
const http = require('http');
const said = %r, app = http.createServer((q, r) => r.end(said + ' 1'));
setTimeout(() => app.listen(process.env.PORT, () => console.log('up ' + said)), 1500);
process.on('SIGTERM', () => process.exit(0));
"""


class Clock:
    """The offset of the server's wall clock in seconds; clocks that measure durations are left alone."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "offset"
        self.jump(0)

    def jump(self, offset: int) -> None:
        part = self._file.with_suffix(".part")
        part.write_text(f"{offset:+d}")
        part.replace(self._file)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(LIBRARIES[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_RESET": "1",
            "NO_FAKE_STAT": "1",
        }


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    if not LIBRARIES:
        pytest.skip("component: libfaketime (Debian package faketime)")
    return Clock(tmp_path)


@pytest.fixture
def up(tmp_path: Path, clock: Clock) -> Iterator[Server]:
    with server(tmp_path / "up", AETHER_STOP_GRACE_SECS="2", **clock.environment) as it:
        yield it


def slow(text: str) -> dict[str, str]:
    return {"server.js": SLOW % text}


def hour(up: Server) -> str:
    """The server's wall clock, from an app that is made now."""
    return str(up.api("POST", "/apps", {"name": f"t{os.urandom(6).hex()}"})[1]["created_at"])[:13]


@pytest.mark.parametrize("offsets", [(3600, 0), (-3600, 0)], ids=["forth", "back"])
def test_a_jump_of_an_hour_ends_no_rollout_and_mixes_up_no_order(
    up: Server, clock: Clock, offsets: tuple[int, ...]
) -> None:
    up.deploy("jumpy", hello("first"))
    began = hour(up)
    made = [up.api("GET", "/deployments?app=jumpy&limit=1")[1]["items"][0]["id"]]
    for number, offset in enumerate(offsets):
        begun = up.begin("jumpy", slow(f"n{number}"), timeout_secs=30)
        made.append(begun["id"])
        wait_for(lambda id=begun["id"]: up.api("GET", f"/deployments/{id}")[1]["status"] == "rolling_out")
        clock.jump(offset)
        wait_for(lambda moved=offset != 0: (hour(up) != began) is moved)
        assert up.settled(begun["id"])["status"] == "active", "the jump ended a rollout"
        assert up.said("jumpy") == f"n{number}"
    listed = [item["id"] for item in up.api("GET", "/deployments?app=jumpy")[1]["items"]]
    assert listed == made[::-1], "the newest deployment is not the one that was made last"
    releases = [item["version"] for item in up.api("GET", "/apps/jumpy/releases")[1]["items"]]
    assert releases == [3, 2, 1]
    # what is active is found again: a repeat is no new deployment, whatever the clock says of the others
    again = up.begin("jumpy", slow("n1"), timeout_secs=30)
    assert again["id"] == made[-1]
    lines = [json.loads(line)["line"] for line in up.api("GET", "/apps/jumpy/logs?tail=100")[1].decode().splitlines()]
    assert [line for line in lines if line.startswith("up")] == ["up first", "up n0", "up n1"]


def test_a_rollout_survives_a_jump_and_a_killed_server_at_once(up: Server, clock: Clock) -> None:
    up.deploy("jumpy", hello("first"))
    begun = up.begin("jumpy", slow("second"), timeout_secs=30)
    wait_for(lambda: up.api("GET", f"/deployments/{begun['id']}")[1]["status"] == "rolling_out")
    clock.jump(-3600)
    up.kill9()
    up.start()
    assert up.settled(begun["id"])["status"] == "active"
    assert up.said("jumpy") == "second"
    wait_for(lambda: len(up.instances()) == 1)
