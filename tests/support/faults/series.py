"""Runs by a seed: every cell once in a random order, then cells by chance; one server for all of them."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.faults import operations as ops
from support.faults.cells import CELLS, CLI, Fault, Phase
from support.faults.client import Client
from support.faults.invariants import Facts, check, settle
from support.faults.operations import Operation, Plan, Word
from support.faults.phases import TIMINGS, Lengths, Watch
from support.faults.prober import Answer, Prober
from support.faults.strikes import NOTHING, Strike
from support.faults.world import SETTINGS, World
from support.product import Product, product

LARGE_BYTES = 6_000_000
MISSED = "over before the fault"


@dataclass(frozen=True)
class Row:
    """One run: its cell, what came of it, and the rules that were broken."""

    number: int
    phase: Phase
    fault: Fault
    driver: str
    outcome: str
    problems: tuple[str, ...]
    secs: float
    detail: str


def cells_for(runs: int, seed: int, cells: Sequence[tuple[Phase, Fault]] = CELLS) -> list[tuple[Phase, Fault]]:
    """`runs` cells: all of them in a random order, as often as it takes."""
    chance = random.Random(seed)
    found: list[tuple[Phase, Fault]] = []
    while len(found) < runs:
        found += chance.sample(list(cells), len(cells))
    return found[:runs]


class Series:
    def __init__(self, up: Product, seed: int) -> None:
        self.world = World(up)
        self.seed = seed
        self.lengths = Lengths()
        self.client = Client(up.port, up.token())
        self._apps = 0
        self._salt = 0
        self.app = ""
        self.app_id = ""
        self.spoilt = False
        """The next run needs an app of its own."""

    # --- an app to work on

    def new_app(self) -> None:
        """Leave the app of before, if it is there, and make a fresh one with two releases."""
        if self.app and self.world.app(self.app) is not None:
            status, answer = self.client.call("DELETE", f"/apps/{self.app}")
            assert status == 204, f"an app cannot be deleted: {status} {answer}"
        self._apps += 1
        self.app = f"app{self._apps}"
        status, answer = self.client.call("POST", "/apps", {"name": self.app})
        assert status == 201, answer
        app = self.world.app(self.app)
        assert app is not None
        self.app_id = app["id"]
        for word in ("first", "second"):
            self._deploy(Plan(self.app, {"SAY": word}, self._blob(0), key=ops.new_key()))
        self.spoilt = False

    def _blob(self, filler: int) -> bytes:
        self._salt += 1
        return ops.artifact(filler, f"{self.seed}-{self._salt}")

    def _deploy(self, plan: Plan) -> float:
        operation = ops.ApiDeploy(self.world, plan)
        begun = time.monotonic()
        operation.begin()
        operation.join()
        assert operation.told.word is Word.OK, f"a plain deployment: {operation.told}"
        took = time.monotonic() - begun
        waiting = settle(self.world, self.app_id)
        assert not waiting, f"after a plain deployment: {waiting}"
        return took

    def measure(self) -> None:
        """The lengths of the phases, from an undisturbed deployment."""
        self.new_app()
        self._deploy(Plan(self.app, {}, self._blob(LARGE_BYTES), key=ops.new_key()))
        rows = self.world.rows(
            "SELECT e.phase, e.timestamp FROM deployment_events e JOIN deployments d ON d.id = e.deployment_id"
            " WHERE d.app_id = ? ORDER BY e.id DESC",
            self.app_id,
        )
        at = {row["phase"]: row["timestamp"] / 1e6 for row in reversed(rows)}
        self.lengths = Lengths(
            verifying=max(0.01, at["rolling_out"] - at["verifying"]),
            starting=max(0.03, (at["active"] - at["rolling_out"]) / 2),
            to_active=max(0.05, at["active"] - at["rolling_out"]),
            rollout=max(0.1, at["active"] - at["pending"]),
        )

    # --- one run

    def run(self, number: int, phase: Phase, fault: Fault) -> Row:
        begun = time.monotonic()
        chance = random.Random(f"{self.seed}/{number}/{phase}/{fault}")
        if self.spoilt:
            self.new_app()
        driver = "cli" if fault in CLI or (fault is not Fault.RIVAL_SAME_KEY and chance.random() < 0.4) else "api"
        facts = self._struck(number, chance, phase, fault, driver)
        problems = check(facts)
        outcome, told = _outcome(facts), facts.operation.told
        if not problems:
            problems = self._next(facts)
        row = Row(
            number, phase, fault, driver, outcome, tuple(problems), time.monotonic() - begun,
            f"hit: {facts.hit}; told {told.word}: {told.detail}",
        )  # fmt: skip
        app = self.world.app(self.app)
        self.spoilt = bool(problems) or app is None or app["id"] != self.app_id
        return row

    def _struck(self, number: int, chance: random.Random, phase: Phase, fault: Fault, driver: str) -> Facts:
        world, timing = self.world, TIMINGS[phase]
        stop_ms = str(timing.stop_ms)
        before = world.deployments(self.app)
        active = str(world.app(self.app)["active_deployment_id"])  # type: ignore[index]
        if timing.stop_ms or timing.slow_ms:
            # the old release must be one that takes its time to stop
            self._deploy(
                Plan(self.app, {"STOP_MS": stop_ms, "SAY": f"{number}-old"}, self._blob(0), key=ops.new_key())
            )
            before = world.deployments(self.app)
            active = str(before[-1]["id"])
        env = {"SAY": str(number), "DELAY_MS": str(timing.delay_ms), "STOP_MS": stop_ms}
        shift = {"steps": [50, 100], "step_secs": 1, "min_requests": 40} if timing.canary else None
        plan = Plan(
            self.app, env, self._blob(LARGE_BYTES if timing.large else 0), key=ops.new_key(),
            strategy="canary" if timing.canary else "rolling", rollout=shift,
        )  # fmt: skip
        operation = self._operation(phase, plan, driver, timing.large)
        old = set(world.folders())
        mark = f"m{number}"
        prober = Prober(world.product.port, self.app)
        marked = prober.ask(f"/mark?{mark}")
        assert marked.status == 200, marked
        strike = Strike(world, fault, chance, operation, old, lambda: self._rival(fault, plan, driver))
        slow: list[Answer] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(prober)
            if timing.slow_ms:
                thread = threading.Thread(target=lambda: slow.append(prober.ask(f"/slow?{timing.slow_ms}")))
                thread.start()
                stack.callback(thread.join)
            watch = Watch(world, self.app_id, operation, step=chance.randint(1, 2))
            operation.begin()
            try:
                seen = watch.until(phase)
                time.sleep(timing.length(self.lengths) * chance.random())
                world.look()
                strike.fall()
                if strike.restart:
                    world.product.start()
                served_again = time.monotonic()
            finally:
                if world.product.process is None:
                    world.product.start()
                operation.join()
            for rival in strike.rivals:
                rival.join()
            quiet = settle(world, self.app_id)
            if world.app(self.app) is not None:
                prober.answers.append(prober.ask())
        return Facts(
            world=world, client=self.client, app=self.app, app_id=self.app_id, phase=phase, fault=fault,
            hit=seen and strike.hit != NOTHING, operation=operation, rivals=strike.rivals, before=before,
            old_deployment=active, struck=strike.at, served_again=served_again if strike.restart else strike.at,
            answers=prober.answers, slow=slow[0] if slow else None, mark=f"mark {mark} {marked.boot}", quiet=quiet,
        )  # fmt: skip

    def _operation(self, phase: Phase, plan: Plan, driver: str, large: bool) -> Operation:
        world = self.world
        match phase:
            case Phase.SCALE:
                return ops.cli_change(world, plan, "scale") if driver == "cli" else ops.ApiScale(world, plan)
            case Phase.ROLLBACK:
                return ops.cli_change(world, plan, "rollback") if driver == "cli" else ops.ApiRollback(world, plan)
            case Phase.CONFIG:
                return ops.cli_change(world, plan, "config") if driver == "cli" else ops.ApiConfig(world, plan)
            case Phase.DELETE:
                return ops.cli_change(world, plan, "delete") if driver == "cli" else ops.ApiDelete(world, plan)
        if driver == "api":
            return ops.ApiDeploy(world, plan)
        folder = world.product.home / "projects" / self.app
        self._salt += 1
        return ops.cli_deploy(
            world, plan, ops.project(folder, plan, LARGE_BYTES if large else 0, f"cli-{self.seed}-{self._salt}")
        )

    def _rival(self, fault: Fault, plan: Plan, driver: str) -> Operation:
        """The second of two deploys at once; of two CLIs in the same folder for the same artifact."""
        folder = self.world.product.home / "projects" / self.app
        match fault:
            case Fault.RIVAL_SAME_KEY:
                return ops.ApiDeploy(self.world, plan)
            case Fault.RIVAL_SAME if driver == "cli" and folder.exists():
                return ops.cli_deploy(self.world, plan, folder)
            case Fault.RIVAL_OTHER if driver == "cli":
                other = ops.project(folder.with_name(f"{self.app}-rival"), plan, 0, f"{self.seed}-{self._salt}")
                return ops.cli_deploy(self.world, plan, other)
            case Fault.RIVAL_SAME:
                return ops.ApiDeploy(self.world, Plan(**{**plan.__dict__, "key": ops.new_key()}))
            case _:
                other = {**plan.env, "SAY": "rival"}
                return ops.ApiDeploy(self.world, Plan(self.app, other, self._blob(0), key=ops.new_key()))

    def _next(self, facts: Facts) -> list[str]:
        """I6: a deployment right after."""
        app = self.world.app(self.app)
        if app is None or app["id"] != self.app_id:
            return []
        if facts.phase is Phase.SCALE:
            self.client.call("POST", f"/apps/{self.app}/scale", {"web": 1})
        try:
            took = self._deploy(Plan(self.app, {"SAY": "next"}, self._blob(0), key=ops.new_key()))
        except AssertionError as error:
            return [f"I6 next: {error}"]
        return [] if took < 15 else [f"I6 next: the next deployment took {took:.1f} s"]


def _outcome(facts: Facts) -> str:
    """What came of the change, in a word or two."""
    if not facts.hit:
        return MISSED
    app = facts.world.app(facts.app)
    if facts.phase is Phase.DELETE:
        if app is None:
            return "deleted"
        return "kept" if app["id"] == facts.app_id else "deleted, made anew"
    if facts.phase is Phase.SCALE:
        return "scaled" if facts.world.desired(facts.app_id) == 2 else "not scaled"
    fresh = facts.world.deployments(facts.app)[len(facts.before) :]
    if not fresh:
        return "not begun"
    said = {"active": "promoted", "superseded": "promoted"}
    words = [said.get(row["status"], row["status"].replace("_", " ")) for row in fresh]
    return " + ".join(words)


@contextlib.contextmanager
def series(home: Path, seed: int) -> Iterator[Series]:
    """A server of its own for fault runs."""
    with product(home, **SETTINGS) as up:
        it = Series(up, seed)
        it.measure()
        yield it


def play(home: Path, cells: Sequence[tuple[Phase, Fault]], seed: int, tell: Callable[[Row], None]) -> list[Row]:
    """One run for each of `cells`; a run that breaks is a bad row, and the next goes on with an app of its own."""
    rows: list[Row] = []
    with series(home, seed) as it:
        for number, (phase, fault) in enumerate(cells, 1):
            try:
                row = it.run(number, phase, fault)
            except Exception as error:
                row = Row(number, phase, fault, "?", "the run broke", (f"{type(error).__name__}: {error}",), 0.0, "")
                it.spoilt = True
                if it.world.product.process is None:
                    it.world.product.start()
            rows.append(row)
            tell(row)
    return rows
