"""What must hold once everything has settled after a fault, each rule with a name. A violation is a bad row.

I1 answers    the app answers whenever it should, and only instances that were hit are started anew
I2 releases   one active deployment, the pointer at it, release numbers dense and unique, nothing made twice
I3 told       the deployment ended legally, and what the client was told is what is on record
I4 remains    what runs is what is wanted, whole, and nothing else is left: processes, cgroups, folders, uploads
I5 artifacts  what was stored can be downloaded and is what it says; no row without object, no object without row
I6 next       the next deployment works at once
I7 logs       no line of the app is lost or doubled
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

from support.faults.cells import CLI, HELPERS, NEW, OLD, SERVER, Fault, Phase
from support.faults.client import Client
from support.faults.operations import Operation, Word
from support.faults.prober import Answer
from support.faults.world import UNDER_WAY, World

QUIET_SECS = 25.0
STILL_SECS = 0.1
"""How long nothing may change for it to count as rest: a kill takes a moment to show."""
HEAL_SECS = 6.0
"""How long an app with one instance may be away when that instance was killed."""
_ODD_EXITS = ("exit 2:", "exit 10:", "exit 20:", "exit 30:")
CUT_SECS = 0.3
"""A request may have been sent this long before the strike that cut it off."""


@dataclass
class Facts:
    """Everything about one run that the rules look at."""

    world: World
    client: Client
    app: str
    app_id: str
    phase: Phase
    fault: Fault
    hit: bool
    """The strike found what it was meant for."""
    operation: Operation
    rivals: list[Operation]
    before: list[dict[str, Any]]
    """Deployments before the run."""
    old_deployment: str
    struck: float
    served_again: float
    """When the server had been started again, or the strike for faults that leave it alone."""
    answers: list[Answer]
    slow: Answer | None
    mark: str
    quiet: list[str] = field(default_factory=list)
    """Why it did not become quiet."""
    problems: list[str] = field(default_factory=list)

    def bad(self, rule: str, text: str) -> None:
        self.problems.append(f"{rule}: {text}")


def settle(world: World, app_id: str) -> list[str]:
    """Wait until nothing changes any more by itself; returns what still does when patience is over."""
    deadline, still_since = time.monotonic() + QUIET_SECS, None
    while True:
        waiting, now = _unsettled(world, app_id), time.monotonic()
        still_since = None if waiting else still_since or now
        if now > deadline or (still_since is not None and now - still_since >= STILL_SECS):
            return waiting
        time.sleep(0.01)


def _unsettled(world: World, app_id: str) -> list[str]:
    apps = world.rows("SELECT * FROM applications WHERE id = ?", app_id)
    folders = set(world.folders())
    if not apps:
        # a deploy that came after the deletion has made the app anew
        if again := world.rows("SELECT id FROM applications"):
            return _unsettled(world, again[0]["id"])
        return [f"instance folders of a deleted app: {sorted(folders)}"] if folders else []
    app = apps[0]
    if app["deleting_at"] is not None:
        return ["the app is still being deleted"]
    marks = ",".join("?" * len(UNDER_WAY))
    busy = world.rows(
        f"SELECT id, status FROM deployments WHERE app_id = ? AND status IN ({marks})", app_id, *UNDER_WAY
    )
    if busy:
        return [f"deployment {busy[0]['id']} is {busy[0]['status']}"]
    rows = world.rows("SELECT * FROM instances WHERE app_id = ? AND status NOT IN ('stopped', 'failed')", app_id)
    wanted = world.desired(app_id) if app["active_deployment_id"] else 0
    good = [row for row in rows if row["status"] == "ready" and row["deployment_id"] == app["active_deployment_id"]]
    if len(good) != wanted or len(rows) != wanted:
        said = [(row["status"], row["deployment_id"] == app["active_deployment_id"]) for row in rows]
        return [f"{wanted} instances are wanted, these are on record (status, of the active release): {said}"]
    if folders != {row["id"] for row in rows}:
        return [f"instance folders {sorted(folders)} for the instances on record {[row['id'] for row in rows]}"]
    broken = [f"{one.id} lacks {one.missing}" for one in world.look() if not one.whole]
    return broken or world.leftovers(folders)


def check(facts: Facts) -> list[str]:
    """Every rule but I6, which is a deployment of its own; returns the violations."""
    for text in facts.quiet:
        facts.bad("I4 remains", text)
    app = facts.world.app(facts.app)
    if app is not None and app["id"] == facts.app_id:
        _releases(facts, app)
        _told(facts, app)
        _logs(facts)
    elif facts.phase is not Phase.DELETE:
        facts.bad("I2 releases", "the app is gone")
    elif facts.operation.told.word is Word.NOT:
        facts.bad("I3 told", f"the app is gone, and the client was told {facts.operation.told.detail}")
    _answers(facts)
    _uploads(facts)
    _artifacts(facts)
    return facts.problems


def _answers(facts: Facts) -> None:
    if facts.phase is Phase.DELETE:
        return
    begin, end = _outage(facts)
    for answer in facts.answers:
        if answer.status != 200 and not (answer.until >= begin and answer.at <= end):
            after = f"{answer.at - facts.struck:+.2f} s after the strike"
            facts.bad("I1 answers", f"{answer.status} {answer.text[:120]!r} {after}")
            break
    if facts.answers and facts.answers[-1].status != 200:
        facts.bad("I1 answers", f"at the end: {facts.answers[-1].status} {facts.answers[-1].text[:120]!r}")
    if facts.slow is not None and facts.slow.status != 200 and facts.fault not in SERVER | OLD | NEW:
        facts.bad("I1 answers", f"the request under way during the drain got {facts.slow.status} {facts.slow.text!r}")
    if (
        facts.fault is not Fault.SERVER_TERM
        and facts.fault not in (OLD | NEW) - HELPERS
        and facts.phase is not Phase.SCALE
    ):
        boots: dict[str, set[str]] = {}
        for answer in facts.answers:
            if answer.status == 200:
                boots.setdefault(answer.deployment, set()).add(answer.boot)
        for deployment, seen in boots.items():
            if len(seen) > 1:
                facts.bad("I1 answers", f"an instance of {deployment} was started anew though nothing ended it")


def _outage(facts: Facts) -> tuple[float, float]:
    """From when to when the app may be away; empty (end before begin) for faults that must not show."""
    begin = facts.struck - CUT_SECS
    if facts.fault in SERVER:
        return begin, facts.served_again
    if facts.hit and facts.fault in OLD:
        return begin, facts.struck + (HEAL_SECS if facts.fault not in HELPERS else 1.0)
    if facts.hit and facts.fault in NEW:
        exposed = facts.phase not in (Phase.STARTING, Phase.GATE)
        return (begin, facts.struck + HEAL_SECS) if exposed else (0.0, -1.0)
    return 0.0, -1.0


def _releases(facts: Facts, app: dict[str, Any]) -> None:
    rows = facts.world.deployments(facts.app)
    active = [row["id"] for row in rows if row["status"] == "active"]
    if active != [app["active_deployment_id"]]:
        facts.bad("I2 releases", f"active are {active}, the app points at {app['active_deployment_id']}")
    numbers = sorted(row["release"] for row in rows if row["release"] is not None)
    if numbers != list(range(1, len(numbers) + 1)) or app["last_release"] != len(numbers):
        facts.bad("I2 releases", f"release numbers {numbers}, the app's last is {app['last_release']}")
    fresh = rows[len(facts.before) :]
    if len(fresh) > 1 + len(facts.rivals):
        facts.bad("I2 releases", f"{len(fresh)} deployments came of one change")
    if facts.fault is Fault.RIVAL_SAME_KEY and facts.phase is not Phase.DELETE and len(fresh) > 1:
        facts.bad("I2 releases", f"one Idempotency-Key made {len(fresh)} deployments")
    if facts.fault in SERVER | OLD:
        for row in fresh:
            if row["status"] not in ("active", "superseded"):
                error = json.loads(row["error"])["message"] if row["error"] else ""
                canary_lost = row["status"] == "rolled_back" and facts.phase is Phase.CANARY and facts.fault in OLD
                if not canary_lost:
                    facts.bad("I2 releases", f"the deployment is lost: {row['status']} {error}")


def _told(facts: Facts, app: dict[str, Any]) -> None:
    rows = {row["id"]: row for row in facts.world.deployments(facts.app)}
    fresh = list(rows.values())[len(facts.before) :]
    for operation in (facts.operation, *facts.rivals):
        told = operation.told
        if told.deployment is not None:
            row = rows.get(told.deployment)
            status = row["status"] if row else "not on record"
            good = ("active", "superseded") if told.word is Word.OK else ("failed", "cancelled", "rolled_back")
            if status not in good:
                facts.bad("I3 told", f"told {told.word} ({told.detail}), on record it is {status}")
    told = facts.operation.told
    if facts.phase is Phase.SCALE:
        if told.word is Word.OK and facts.world.desired(app["id"]) != 2:
            facts.bad("I3 told", "told that it is scaled to 2, which is not on record")
        if told.word is Word.NOT:
            facts.bad("I3 told", f"the scaling was refused: {told.detail}")
        return
    if facts.phase is Phase.DELETE:
        if told.word is Word.OK:
            facts.bad("I3 told", "told that the app is deleted, and it is there")
        return
    if told.deployment is None and fresh and told.word is not Word.NOTHING:
        served = fresh[0]["status"] in ("active", "superseded")
        if served is not (told.word is Word.OK):
            facts.bad("I3 told", f"told {told.word} ({told.detail}), on record it is {fresh[0]['status']}")
    if told.word is Word.OK and not fresh and told.detail != "nothing to change":
        facts.bad("I3 told", f"told ok ({told.detail}) and nothing is on record")
    legitimate = facts.fault in NEW or facts.rivals or facts.fault in CLI or (
        facts.phase is Phase.CANARY and facts.fault in OLD
    )  # fmt: skip
    if told.word is Word.NOT and not legitimate:
        facts.bad("I3 told", f"the change failed for no reason: {told.detail}")
    unexpected = [
        one.told.detail for one in (facts.operation, *facts.rivals) if one.told.detail.startswith(_ODD_EXITS)
    ]
    if unexpected:
        facts.bad("I3 told", f"the CLI ended as if something else were wrong: {unexpected}")
    if facts.rivals and not any(one.told.word is Word.OK for one in (facts.operation, *facts.rivals)):
        facts.bad("I3 told", f"none of two came through: {told.detail}; {facts.rivals[0].told.detail}")
    said = told.word is not Word.NOTHING or "is serving" in told.detail
    if facts.fault is Fault.CLI_INTERRUPT and fresh and not said:
        facts.bad(
            "I3 told", f"Ctrl-C left a deployment behind ({fresh[0]['status']}) and said nothing of it: {told.detail}"
        )


def _uploads(facts: Facts) -> None:
    """Uploads that nobody completes end by their time; parts of bodies end with their connections."""
    parts = list((facts.world.data / "objects" / ".parts").glob("*"))
    if parts:
        facts.bad("I4 remains", f"staging files {[item.name for item in parts]}")
    late = (time.time() - 8) * 1_000_000
    for row in facts.world.rows(
        "SELECT id, status FROM uploads WHERE status IN ('pending', 'completing') AND expires_at < ?", late
    ):
        facts.bad("I4 remains", f"upload {row['id']} is {row['status']} long after its time")


def _artifacts(facts: Facts) -> None:
    objects = facts.world.data / "objects"
    stored = facts.world.rows("SELECT * FROM artifacts WHERE status = 'stored'")
    keys: set[str] = set()
    for row in stored:
        keys.add(row["storage_key"])
        path = objects / row["storage_key"]
        if not path.is_file() or path.stat().st_size != row["size_bytes"]:
            facts.bad("I5 artifacts", f"{row['digest'][:12]} is stored and its object is not there")
        for kind in ("manifest", "sbom", "provenance"):
            coming, path = row["replacing"] or "", path.with_name(f"{kind}.json")
            named = {row[f"{kind}_digest"], coming.removeprefix(f"{kind}:") if coming.startswith(kind) else None}
            found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            if found not in named:
                facts.bad("I5 artifacts", f"the {kind} of {row['digest'][:12]} is not the one on record")
            keys.add(str(path.relative_to(objects)))
    for path in (objects / "artifacts").rglob("*"):
        if path.is_file() and str(path.relative_to(objects)) not in keys:
            facts.bad("I5 artifacts", f"an object without a row: {path.relative_to(objects)}")
    mine = [row for row in stored if row["app_id"] == facts.app_id]
    if mine:
        newest = max(mine, key=lambda row: row["created_at"])
        digest = newest["digest"]
        status, answer = _download(facts, digest)
        if status != 200 or hashlib.sha256(answer).hexdigest() != digest:
            facts.bad("I5 artifacts", f"the download of {digest[:12]} gives {status}")


def _download(facts: Facts, digest: str) -> tuple[int, bytes]:
    status, _ = facts.client.call("HEAD", f"/artifacts/{digest}")
    if status != 200:
        return status, b""
    location = facts.client.location("GET", f"/artifacts/{digest}/download?app={facts.app}")
    return facts.client.call("GET", location)


def _logs(facts: Facts) -> None:
    status, text = facts.client.call("GET", f"/apps/{facts.app}/logs?tail=2000")
    if status != 200:
        facts.bad("I7 logs", f"the logs cannot be read: {status}")
        return
    lines = [json.loads(line)["line"] for line in text.decode().splitlines()]
    if lines.count(facts.mark) != 1:
        facts.bad("I7 logs", f"the line {facts.mark!r} is there {lines.count(facts.mark)} times")
    for boot in {answer.boot for answer in facts.answers if answer.status == 200}:
        if lines.count(f"up {boot}") != 1:
            facts.bad("I7 logs", f"the first line of {boot} is there {lines.count(f'up {boot}')} times")
