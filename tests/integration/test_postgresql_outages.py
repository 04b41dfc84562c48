"""PostgreSQL stopped as by a crash in every phase of an upload and of a deployment, frozen in some, and back some
seconds later.

One real server with one app goes through all of them. What must hold each time: the app answers every request all
the while, what the client was told is what is on record, nothing is there twice, and nobody has to do anything.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from aether.client.api import Api
from aether.model.errors import ServiceUnavailable
from support import halting_main
from support.cutter import cutter
from support.databases import LocalServer, binaries, rows
from support.fleet import LEASE_SECS, Member
from support.server import hello, wait_for
from support.traffic import Hammer
from support.uploads import PART, PARTS, Told, World

SECS, LONG_SECS = 2.0, 10.0
"""The shorter one is long enough for a lease of LEASE_SECS to be no longer acted upon."""
COMMAND = "node server.js"
HOWS = ["stopped", "frozen"]
UPLOAD_POINTS = ["hash", "moved, no row yet"]
DEPLOYMENT_POINTS = [
    "created, not answered",
    "looking the release up",
    "start",
    "readiness",
    "switch of traffic",
    "switched, nobody told",
    "drain",
    "stop of the old release",
]
FROZEN = ["moved, no row yet", "start", "switch of traffic", "stop of the old release"]
"""A database that stands still only makes its caller wait, so it is not shown everywhere."""


def cells(*points: str) -> list[Any]:
    """(point, how) of the outages to go through."""
    met = [(point, "stopped") for point in points] + [(point, "frozen") for point in points if point in FROZEN]
    return [pytest.param(*cell, id="-".join(cell)) for cell in met]


@dataclass
class Plane:
    """`up` serves the app `shop` from `database`; `halts` is where `halting_main` looks."""

    up: Member
    database: LocalServer
    world: World
    halts: Path
    serves: str = "v0"
    next: str = ""
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def arm(self, point: str) -> None:
        for name in ("reached", "go"):
            (self.halts / name).unlink(missing_ok=True)
        (self.halts / "at").write_text(point)

    def until_reached(self) -> None:
        wait_for(lambda: (self.halts / "reached").exists(), 60)

    @contextmanager
    def outage(self, how: str, secs: float, visitors: Hammer) -> Iterator[None]:
        """PostgreSQL is away for so long; whoever was held up goes on without it. Visitors get their answers."""
        back = time.monotonic() + secs
        if how == "stopped":
            self.database.stop(signal.SIGQUIT)
        else:
            self.database.freeze()
        try:
            (self.halts / "go").touch()
            yield
            visitors.wait(10)
            time.sleep(max(0.0, back - time.monotonic()))
            visitors.wait(10)
        finally:
            self.database.start() if how == "stopped" else self.database.thaw()

    @contextmanager
    def visited(self) -> Iterator[Hammer]:
        """Requests without pause, none of which may fail."""
        before = self.serves
        with Hammer(self.up, "shop", threads=2) as visitors:
            visitors.wait(2)
            yield visitors
            visitors.wait(2)
        assert not visitors.failures
        wrong = [(status, text) for status, text in visitors.answers if status != 200]
        assert not wrong
        said = {text.split()[0] for _, text in visitors.answers}
        assert said <= {before, self.serves}, "somebody else answered"

    def api(self) -> Api:
        return self.world.api()

    def row(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
        return rows(self.database.url, sql, *arguments)

    def deploy(self, digest: str) -> dict[str, Any]:
        """As a client that asks again, under the same key, until it is answered."""
        key = f"deploy-{digest}"
        with self.api() as api:
            deadline = time.monotonic() + 60
            while True:
                try:
                    made, _ = api.create_deployment(
                        "shop", digest=digest, runtime="node20", command=COMMAND, idempotency_key=key
                    )
                    break
                except ServiceUnavailable:
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
            return dict(api.watch_deployment(made["id"], lambda _: None, deadline=time.monotonic() + 90))

    def settled_record(self) -> None:
        """What the record says of instances is what runs."""
        live = "select id, status from instances where status in ('starting', 'ready', 'draining')"
        wait_for(lambda: len(self.up.instances()) == 1)
        wait_for(lambda: self.row(live) == [(self.up.instances()[0], "ready")])

    def check(self, deployment: dict[str, Any], digest: str) -> None:
        """The deployment is the app's, once, and nothing else runs."""
        assert deployment["status"] == "active", deployment
        self.serves = self.next
        wait_for(lambda: self.up.get("shop")[1].split()[0] == self.serves)
        kept = self.row("select id, status, release from deployments where digest = ?", digest)
        assert kept == [(deployment["id"], "active", deployment["release"])]
        assert self.row("select count(*) from deployments where status = 'active'") == [(1,)]
        releases = [
            release for (release,) in self.row("select release from deployments where release > 0 order by 1")
        ]
        assert releases == list(range(1, len(releases) + 1)), "release numbers are dense"
        self.settled_record()


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    found = binaries()
    if found is None:
        pytest.skip("component: postgresql")
    folder = tmp_path_factory.mktemp("outages")
    halts = folder / "halts"
    halts.mkdir()
    with ExitStack() as stack:
        database = LocalServer(found)
        stack.callback(database.close)
        database.start()
        settings = {
            "DATABASE_URL": database.url, "AETHER_LEASE_SECS": str(LEASE_SECS), "AETHER_STOP_GRACE_SECS": "2", **PARTS
        }  # fmt: skip
        up = Member(
            folder / "server", environment=settings, name="one",
            program=(str(halting_main.__file__),), given=(str(halts),),
        )  # fmt: skip
        stack.callback(_end, up)
        up.start()
        network = stack.enter_context(cutter(("127.0.0.1", up.port)))
        made = up.deploy("shop", hello("v0"), command=COMMAND)
        assert made["status"] == "active", made
        yield Plane(up, database, World(up, folder, network), halts)


def _end(up: Member) -> None:
    print(up.errors())
    if up.process is not None:
        up.api("DELETE", "/apps/shop")
        wait_for(lambda: not up.instances(), 60)
        up.stop()


@pytest.fixture
def digest(plane: Plane) -> str:
    """Of an artifact that nobody has deployed; its release answers `plane.next`."""
    plane.next = f"v{next(plane.numbers)}"
    return plane.up.upload("shop", hello(plane.next))


# --- uploads


@pytest.mark.parametrize(("point", "how"), cells("presign", "sending", *UPLOAD_POINTS))
def test_an_upload(plane: Plane, point: str, how: str) -> None:
    world, watch = plane.world, Told()
    path = world.file(PART + 12_345 if point == "presign" else 3 * PART)
    with plane.visited() as visitors, ThreadPoolExecutor() as pool:
        sent: Future[Any] | None = None
        if point in UPLOAD_POINTS:
            plane.arm(point)
            sent = pool.submit(world.send, path, watch)
            plane.until_reached()
        elif point == "sending":
            world.network.rate = PART // 3
            there = world.network.sent + PART
            sent = pool.submit(world.send, path, watch)
            wait_for(lambda: world.network.sent > there)
        with plane.outage(how, SECS, visitors):
            world.network.rate = 0
            assert point != "sending" or (sent is not None and not sent.done())
            sent = sent or pool.submit(world.send, path, watch)
        sent.result(90)
    world.check()
    (digest,) = world.stored
    assert plane.row("select count(*) from artifacts where digest = ?", digest) == [(1,)]
    assert not [key for key in world.objects() if key.startswith(("pending/", "claimed/"))]
    assert world.send(path).bytes_sent == 0
    world.stored.clear()


# --- deployments


@pytest.mark.parametrize(("point", "how"), cells(*DEPLOYMENT_POINTS))
def test_a_deployment(plane: Plane, digest: str, point: str, how: str) -> None:
    secs = LONG_SECS if (point, how) == ("readiness", "stopped") else SECS
    with plane.visited() as visitors, ThreadPoolExecutor() as pool:
        plane.arm(point)
        deployed = pool.submit(plane.deploy, digest)
        plane.until_reached()
        with plane.outage(how, secs, visitors):
            pass
        made = deployed.result(120)
        plane.check(made, digest)


@pytest.mark.parametrize("how", HOWS)
def test_a_deployment_that_is_asked_for_while_there_is_no_database(plane: Plane, digest: str, how: str) -> None:
    with plane.visited() as visitors, ThreadPoolExecutor() as pool:
        with plane.outage(how, SECS, visitors):
            deployed = pool.submit(plane.deploy, digest)
        made = deployed.result(120)
        plane.check(made, digest)


# --- what runs


def test_an_instance_that_ends_meanwhile_is_replaced_and_the_record_is_right_afterwards(plane: Plane) -> None:
    """Before the database is back if the lease still allows that, else then."""
    before = plane.up.instances()
    plane.database.stop(signal.SIGQUIT)
    try:
        for pid in plane.up.pids():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: plane.up.get("shop")[0] != 200 or plane.up.instances() != before)
    finally:
        plane.database.start()
    wait_for(lambda: plane.up.said("shop") == plane.serves)
    plane.settled_record()
    assert plane.up.instances() != before
    assert plane.row("select status from instances where id = ?", *before) == [("failed",)]
