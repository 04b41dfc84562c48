"""What is known of the instances of all functions: records in the key-value store, and a view that follows them.

    /functions/FUNCTION/instances/INSTANCE   one instance, once it is asked for; with the lease of who has it
    /functions/FUNCTION/failure              the last instance that failed, and how many there have been
    /gateways/GATEWAY                        what a gateway has seen, and which withdrawn instances it still uses
    /workers/WORKER                          a worker; with its lease

Who decides and who acts on it is in `scaler`, `gateway` and `worker`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

from aether.coordination.views import View, follow
from aether.model.function_instance import FailedStart, StartKind
from aether.model.kv import KV, KeyValue

FUNCTIONS = "/functions/"
GATEWAYS = "/gateways/"
WORKERS = "/workers/"
_INSTANCES = "/instances/"
_FAILURE = "/failure"
_REACH_SECS = 10.0


class Stage(StrEnum):
    """Of an instance, as everybody can see it."""

    ASKED = "asked"
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    function_id: str
    id: str
    version: int
    stage: Stage
    asked_at: float
    """UNIX time."""
    worker: str = ""
    ready_ms: float | None = None
    start: StartKind = StartKind.COLD

    @property
    def key(self) -> str:
        return f"{FUNCTIONS}{self.function_id}{_INSTANCES}{self.id}"

    def at(self, stage: Stage) -> InstanceRecord:
        return replace(self, stage=stage)

    def encode(self) -> bytes:
        fields = asdict(self)
        del fields["function_id"], fields["id"]
        return json.dumps(fields).encode()


@dataclass(frozen=True, slots=True)
class Entry:
    record: InstanceRecord
    kv: KeyValue


@dataclass(frozen=True, slots=True)
class Failure:
    """`count` grows with every instance that failed; `ran_secs` is how long the last one had served."""

    count: int
    ran_secs: float
    last: FailedStart

    def encode(self) -> bytes:
        return json.dumps({"count": self.count, "ran_secs": self.ran_secs, **asdict(self.last)}).encode()


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A gateway has heeded everything up to `revision`; `busy` are requests that withdrawn instances still have."""

    revision: int
    busy: Mapping[str, int] = field(default_factory=dict[str, int])

    def encode(self) -> bytes:
        return json.dumps({"revision": self.revision, "busy": dict(self.busy)}).encode()

    @staticmethod
    def decode(value: bytes) -> Acknowledged:
        fields = json.loads(value)
        return Acknowledged(int(fields["revision"]), {str(k): int(v) for k, v in fields["busy"].items()})


def failure_key(function_id: str) -> str:
    return f"{FUNCTIONS}{function_id}{_FAILURE}"


def decode_instance(kv: KeyValue) -> Entry:
    function_id, _, instance_id = kv.key.removeprefix(FUNCTIONS).partition(_INSTANCES)
    fields = json.loads(kv.value)
    record = InstanceRecord(
        function_id, instance_id, int(fields["version"]), Stage(fields["stage"]), float(fields["asked_at"]),
        str(fields["worker"]), fields["ready_ms"], StartKind(fields["start"]),
    )  # fmt: skip
    return Entry(record, kv)


def decode_failure(kv: KeyValue) -> Failure:
    fields = json.loads(kv.value)
    log = tuple(str(line) for line in fields["log"])
    last = FailedStart(int(fields["version"]), float(fields["at"]), str(fields["reason"]), log)
    return Failure(int(fields["count"]), float(fields["ran_secs"]), last)


class Board:
    """The records of functions as this process knows them, never older than what it has waited for."""

    def __init__(self, kv: KV) -> None:
        self._kv = kv
        self._listening: set[asyncio.Event] = set()
        self._opened = asyncio.Event()
        self.revision = 0
        self.instances: dict[str, dict[str, Entry]] = {}
        """By function and instance."""
        self.failures: dict[str, Failure] = {}
        self.withdrawn_at = 0
        """The newest revision at which an instance stopped to serve."""

    async def run(self) -> None:
        """Follow for ever."""
        views = follow(self._kv, FUNCTIONS)
        try:
            async for view in views:
                self._take(view)
        finally:
            await views.aclose()

    async def opened(self) -> None:
        """Return once there is a view at all."""
        await self._opened.wait()

    async def reached(self, revision: int) -> None:
        """Return once everything up to `revision` is seen. Raises TimeoutError."""
        with self.subscribe() as changed:
            async with asyncio.timeout(_REACH_SECS):
                while self.revision < revision:
                    await changed.wait()
                    changed.clear()

    def of(self, function_id: str) -> Mapping[str, Entry]:
        return self.instances.get(function_id, {})

    def entry(self, function_id: str, instance_id: str) -> Entry | None:
        return self.of(function_id).get(instance_id)

    @contextmanager
    def subscribe(self) -> Generator[asyncio.Event]:
        """An event that every change sets; its reader clears it before it looks."""
        event = asyncio.Event()
        self._listening.add(event)
        try:
            yield event
        finally:
            self._listening.discard(event)

    def _take(self, view: View) -> None:
        for key in view.changed:
            kv = view.items.get(key)
            if key.endswith(_FAILURE):
                function_id = key.removeprefix(FUNCTIONS).removesuffix(_FAILURE)
                if kv is None:
                    self.failures.pop(function_id, None)
                else:
                    self.failures[function_id] = decode_failure(kv)
            elif _INSTANCES in key:
                self._take_instance(key, kv, view.revision)
        self.revision = view.revision
        self._opened.set()
        for event in self._listening:
            event.set()

    def _take_instance(self, key: str, kv: KeyValue | None, revision: int) -> None:
        function_id, _, instance_id = key.removeprefix(FUNCTIONS).partition(_INSTANCES)
        mine = self.instances.setdefault(function_id, {})
        before = mine.get(instance_id)
        if kv is None:
            mine.pop(instance_id, None)
            if not mine:
                del self.instances[function_id]
        else:
            mine[instance_id] = decode_instance(kv)
        serving = kv is not None and mine[instance_id].record.stage is Stage.SERVING
        if before is not None and before.record.stage is not Stage.ASKED and not serving:
            self.withdrawn_at = revision
