"""How each fault is done. A strike says what it hit, or that there was nothing (any more) to hit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from support.faults.cells import CLI, NEW, OLD, Fault
from support.faults.operations import ByCli, Operation
from support.faults.world import Instance, Process, World

FIND_SECS = 0.5
"""How long a process that is about to exist is waited for."""
NOTHING = "nothing left to hit"
ROLES = {
    Fault.OLD_KEEPER: "keeper", Fault.OLD_SANDBOX: "sandbox", Fault.OLD_APP: "app", Fault.OLD_EGRESS: "egress",
    Fault.OLD_DIALER: "dialer", Fault.NEW_KEEPER: "keeper", Fault.NEW_SANDBOX: "sandbox", Fault.NEW_APP: "app",
    Fault.NEW_EGRESS: "egress", Fault.NEW_DIALER: "dialer",
}  # fmt: skip


@dataclass
class Strike:
    """`at` is when it fell; `restart` says that the server is gone and must be started again."""

    world: World
    fault: Fault
    random: random.Random
    operation: Operation
    old_instances: set[str]
    rival: Callable[[], Operation]
    at: float = 0.0
    hit: str = ""
    restart: bool = False
    rivals: list[Operation] = field(default_factory=list)

    def fall(self) -> None:
        self.at = time.monotonic()
        fault, product = self.fault, self.world.product
        if fault is Fault.SERVER_KILL:
            product.kill9()
            self.hit, self.restart = "server", True
        elif fault is Fault.SERVER_TERM:
            code = product.stop()
            assert code == 0, f"the server ended with {code} on SIGTERM"
            self.hit, self.restart = "server", True
        elif fault in OLD or fault in NEW:
            self.hit = self._kill_role(ROLES[fault], new=fault in NEW)
        elif fault in CLI:
            self._strike_cli()
        elif fault is Fault.VANISH:
            self.hit = "client" if self.operation.alive() else NOTHING
            self.operation.vanish()
        else:
            rival = self.rival()
            self.rivals.append(rival)
            rival.begin()
            self.hit = "second deploy"

    def _kill_role(self, role: str, *, new: bool) -> str:
        deadline = time.monotonic() + FIND_SECS
        while True:
            for instance in self.world.look():
                if (instance.id in self.old_instances) is new:
                    continue
                victim = self._victim(instance, role)
                if victim is not None and victim.alive():
                    os.kill(victim.pid, signal.SIGKILL)
                    return f"{role} of {'new' if new else 'old'}"
            if time.monotonic() > deadline or not (new or self._any_old()):
                return NOTHING
            time.sleep(0.001)

    def _any_old(self) -> bool:
        return bool(self.old_instances.intersection(self.world.folders()))

    def _victim(self, instance: Instance, role: str) -> Process | None:
        if role == "sandbox" and self.random.random() < 0.5:
            return instance.init
        if role == "app" and instance.app == instance.init:
            return None
        return getattr(instance, role)

    def _strike_cli(self) -> None:
        cli = self.operation
        assert isinstance(cli, ByCli)
        self.hit = "CLI" if self.operation.alive() else NOTHING
        if self.fault is Fault.CLI_KILL:
            cli.signal(signal.SIGKILL)
            return
        cli.signal(signal.SIGINT)
        if self.fault is Fault.CLI_INTERRUPT_TWICE:
            time.sleep(self.random.uniform(0.0, 0.05))
            cli.signal(signal.SIGINT)
