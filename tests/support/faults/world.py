"""One `aether up` seen from outside: its database read-only, its instances' processes, its files."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.product import Product

UNDER_WAY = ("pending", "verifying", "rolling_out", "rolling_back")
SETTINGS = {
    "AETHER_DRAIN_TIMEOUT_SECS": "3",
    "AETHER_STOP_GRACE_SECS": "2",
    "AETHER_PRESIGN_EXPIRE_SECS": "12",
    "AETHER_PENDING_TTL_SECS": "12",
    "AETHER_PENDING_GC_INTERVAL_SECS": "1",
}
"""Short times, so that what must have gone by itself has gone while a run is looking."""


@dataclass(frozen=True)
class Process:
    pid: int
    start: int
    parent: int
    session: int
    name: str

    def alive(self) -> bool:
        now = process(self.pid)
        return now is not None and now.start == self.start


def process(pid: int) -> Process | None:
    """The process as proc(5) shows it; None when there is none, or a zombie."""
    try:
        data = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    head, _, tail = data.rpartition(b")")
    fields = tail.split()
    if fields[0] in (b"Z", b"X"):
        return None
    return Process(pid, int(fields[19]), int(fields[1]), int(fields[3]), head.partition(b"(")[2].decode())


def processes() -> list[Process]:
    found = (process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [item for item in found if item is not None]


@dataclass
class Instance:
    """One instance's processes by role; those that are not there yet, or no more, are None."""

    id: str
    deployment: str
    keeper: Process | None = None
    sandbox: Process | None = None
    init: Process | None = None
    app: Process | None = None
    egress: Process | None = None
    dialer: Process | None = None

    @property
    def whole(self) -> bool:
        roles = (self.keeper, self.sandbox, self.init, self.app, self.egress, self.dialer)
        return all(role is not None for role in roles)

    @property
    def missing(self) -> list[str]:
        roles = ("keeper", "sandbox", "init", "app", "egress", "dialer")
        return [role for role in roles if getattr(self, role) is None]


@dataclass
class World:
    """`keepers` are the session ids of all keepers that were seen, with their start time and instance: an instance's
    helpers have its keeper's session."""

    product: Product
    keepers: dict[int, tuple[int, str]] = field(default_factory=dict)
    cgroups: dict[Path, str] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        return self.product.data

    # --- the record

    @contextlib.contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(f"file:{self.data / 'aether.db'}?mode=ro", uri=True, timeout=5)
        connection.row_factory = sqlite3.Row
        try:
            yield connection
        finally:
            connection.close()

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        with self.database() as connection:
            return [dict(row) for row in connection.execute(query, values).fetchall()]

    def app(self, name: str) -> dict[str, Any] | None:
        found = self.rows("SELECT * FROM applications WHERE name = ?", name)
        return found[0] if found else None

    def deployments(self, app: str) -> list[dict[str, Any]]:
        """Oldest first."""
        return self.rows(
            "SELECT d.* FROM deployments d JOIN applications a ON a.id = d.app_id WHERE a.name = ?"
            " ORDER BY d.created_at, d.id",
            app,
        )

    def desired(self, app_id: str) -> int:
        found = self.rows("SELECT quantity FROM formations WHERE app_id = ? AND process = 'web'", app_id)
        return int(found[0]["quantity"]) if found else 1

    # --- what runs

    def folders(self) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self.data / "instances") if entry.is_dir())
        except FileNotFoundError:
            return []

    def look(self) -> list[Instance]:
        """Every instance with its processes."""
        everything = processes()
        children: dict[int, list[Process]] = {}
        for item in everything:
            children.setdefault(item.parent, []).append(item)
        return [self._instance(name, children) for name in self.folders()]

    def _instance(self, name: str, children: dict[int, list[Process]]) -> Instance:
        folder = self.data / "instances" / name
        spec, state = _json(folder / "spec.json"), _json(folder / "state.json")
        found = Instance(name, str(spec.get("spec", {}).get("deployment_id", "")))
        self.cgroups |= {Path(group): name for group in spec.get("cgroups", ())}
        for role, attribute in (("keeper", "keeper"), ("main", "sandbox"), ("init", "init")):
            pid, start = state.get(role, (0, 0))
            known = process(pid) if pid else None
            setattr(found, attribute, known if known is not None and known.start == start else None)
        if found.keeper is not None:
            self.keepers[found.keeper.pid] = found.keeper.start, name
            for child in children.get(found.keeper.pid, ()):
                if child.name.startswith("slirp4netns"):
                    found.egress = child
                elif found.sandbox is None or child.pid != found.sandbox.pid:
                    found.dialer = child
        last = found.init
        while last is not None and children.get(last.pid):
            last = found.app = children[last.pid][0]
        return found

    def leftovers(self, wanted: set[str]) -> list[str]:
        """Processes and cgroups of instances that should not be there any more."""
        found: list[str] = []
        folder = self.data / "instances"
        everything = processes()
        sessions = {item.session: 0 for item in everything} | {item.pid: item.start for item in everything}
        # a pid is free again once its session is over, and may come back as somebody else's
        self.keepers = {
            pid: (start, name) for pid, (start, name) in self.keepers.items() if sessions.get(pid) in (0, start)
        }
        for item in everything:
            _, owner = self.keepers.get(item.session, (0, None))
            with contextlib.suppress(OSError):
                place = Path(f"/proc/{item.pid}/cwd").readlink()
                if place.is_relative_to(folder):
                    owner = place.relative_to(folder).parts[0].removesuffix(" (deleted)")
            if owner is not None and owner not in wanted:
                found.append(f"process {item.name} {item.pid} of instance {owner}")
        for group, owner in self.cgroups.items():
            if owner not in wanted and group.is_dir():
                found.append(f"cgroup {group.relative_to('/sys/fs/cgroup').parts[0]} of instance {owner}")
        return found


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
