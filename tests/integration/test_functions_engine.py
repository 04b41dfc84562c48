"""Functions from the first call to zero and back, on the `process` runtime: what callers get while instances come and
go, fail, hang and are replaced."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from aether.functions.board import FUNCTIONS, InstanceRecord, Stage
from aether.functions.gateway import Waiting
from aether.functions.scaler import PROVISION
from aether.functions.scaling import Rules
from aether.functions.worker import WorkerOptions
from aether.model.function_instance import FunctionSpec, StartKind
from aether.model.kv import Put
from support.functions import FUNCTION_ID, SERVER, Functions, Load, running_functions

NEVER = "import signal\nprint('waiting for nothing', flush=True)\nsignal.pause()\n"
EXITS = "import sys\nprint('no database', flush=True)\nsys.exit(3)\n"


def stages(functions: Functions) -> Counter[str]:
    return Counter(each.record.stage.value for each in functions.engine.board.of(FUNCTION_ID).values())


async def test_from_zero_to_one_and_back_to_zero(tmp_path: Path) -> None:
    async with running_functions(tmp_path) as it:
        await it.routed(it.put())
        assert (await it.state()).instances == ()
        assert await it.get() == (200, "hi")
        assert await it.get("/again?x") == (200, "hi")
        state = await it.state()
        assert [(each.stage, each.version) for each in state.instances] == [("serving", 1)]
        assert state.instances[0].ready_ms is not None
        assert [each.record.text for each in await it.engine.log(FUNCTION_ID)] == ["up"]
        await it.until(lambda state: not state.instances)
        await it.engine.worker.ended(FUNCTION_ID)
        assert list(await it.runtime.list()) == []
        assert [each.record.text for each in await it.engine.log(FUNCTION_ID)] == ["up"], "its log outlives it"
        assert await it.get() == (200, "hi")
        await it.engine.ledger.flush()
        kept = it.records.kept
        assert [each.start for each in kept] == [StartKind.COLD, StartKind.WARM, StartKind.COLD]
        assert [each.path for each in kept] == ["/functions/hello/", "/functions/hello/again", "/functions/hello/"]
        assert len({each.instance_id for each in kept}) == 2
    assert list(await _records(tmp_path)) == [], "a server that ends leaves no record of an instance"


async def test_the_runtime_is_told_whether_it_may_go_on_from_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_functions(tmp_path) as it:
        told: list[bool] = []
        start = it.runtime.start

        async def noted(spec: FunctionSpec) -> None:
            told.append(spec.snapshot)
            await start(spec)

        monkeypatch.setattr(it.runtime, "start", noted)
        await it.routed(it.put(snapshot=True))
        assert await it.get() == (200, "hi")
        assert told == [True]


async def _records(folder: Path) -> list[str]:
    from aether.stores.kv.sqlite import SqliteKV

    kv = SqliteKV(folder / "kv.db")
    await kv.open()
    try:
        return [item.key for item in (await kv.list(FUNCTIONS)).items]
    finally:
        await kv.close()


async def test_a_thousand_first_calls_make_one_wave(tmp_path: Path) -> None:
    async with running_functions(tmp_path) as it:
        await it.routed(it.put(max_instances=3, concurrency=20))
        answers = Counter(await asyncio.gather(*(it.get() for _ in range(1000))))
        assert answers == {(200, "hi"): 1000}
        await it.engine.ledger.flush()
        assert len({each.instance_id for each in it.records.kept}) == 3
        assert len(it.engine.board.of(FUNCTION_ID)) == 3


async def test_a_caller_that_goes_away_cancels_only_itself(tmp_path: Path) -> None:
    async with running_functions(tmp_path, rules=Rules(target=10.0)) as it:
        await it.routed(it.put("import time\ntime.sleep(1)\n" + SERVER))
        first = asyncio.create_task(it.get())
        await it.until(lambda state: state.instances)
        others = [asyncio.create_task(it.get()) for _ in range(3)]
        await it.until(lambda state: state.waiting == 4)
        first.cancel()
        assert await asyncio.gather(*others) == [(200, "hi")] * 3
        assert len(it.engine.board.of(FUNCTION_ID)) == 1, "no second instance for those who came later"


async def test_new_code_replaces_old_without_a_failed_call(tmp_path: Path) -> None:
    async with running_functions(tmp_path) as it:
        await it.routed(it.put(env_vars={"SAY": "one"}, max_instances=3, concurrency=3))
        assert await it.get() == (200, "one")
        async with Load(it) as load:
            await load.until((200, "one"))
            for text in ("two", "three"):
                number = it.put(env_vars={"SAY": text}, max_instances=3, concurrency=3)
                await load.until((200, text))
                await it.until(lambda state, number=number: {each.version for each in state.instances} == {number})
        assert {status for status, _ in load.answers} == {200}
        assert await it.get() == (200, "three")


async def test_a_function_that_is_deleted_under_load_ends_in_order(tmp_path: Path) -> None:
    async with running_functions(tmp_path) as it:
        await it.routed(it.put())
        async with Load(it) as load:
            await load.until((200, "hi"))
            del it.shelf.versions[FUNCTION_ID]
            async with asyncio.timeout(30):
                await it.engine.gone(FUNCTION_ID)
        assert {status for status, _ in load.answers} == {200, 404}
        assert list(await it.runtime.list()) == []
        assert (await it.kv.list(FUNCTIONS)).items == ()


async def test_instances_that_are_too_many_leave_without_a_failed_call(tmp_path: Path) -> None:
    async with running_functions(tmp_path) as it:
        await it.routed(it.put(max_instances=4, concurrency=2))
        async with Load(it, callers=8) as load:
            await it.until(lambda state: sum(each.stage == "serving" for each in state.instances) == 4)
        async with Load(it, callers=1) as little:
            await it.until(lambda state: len(state.instances) == 1)
            await little.until((200, "hi"))
        assert {status for status, _ in load.answers | little.answers} == {200}


async def test_a_minimum_is_kept_and_a_killed_instance_replaced(tmp_path: Path) -> None:
    async with running_functions(tmp_path) as it:
        await it.routed(it.put(min_instances=2))
        await it.until(lambda state: sum(each.stage == "serving" for each in state.instances) == 2)
        before = {each.id for each in (await it.state()).instances}
        status, _ = await it.get("/die", method="POST")
        assert status == 502, "what may have been done is not done again"
        state = await it.until(
            lambda state: (
                sum(each.stage == "serving" for each in state.instances) == 2
                and {each.id for each in state.instances} != before
            )
        )
        assert state.last_failure is not None
        assert state.last_failure.reason == "it exited with code 7"
        assert state.last_failure.log == ("up",)


async def test_an_instance_that_stops_listening_is_replaced(tmp_path: Path) -> None:
    async with running_functions(tmp_path) as it:
        await it.routed(it.put())
        await it.get("/deaf")
        (deaf,) = (await it.state()).instances
        answers = await asyncio.gather(*(it.get() for _ in range(5)))
        assert {status for status, _ in answers} == {200}
        state = await it.until(lambda state: deaf.id not in {each.id for each in state.instances})
        assert state.last_failure is not None
        assert state.last_failure.reason == "stopped answering its health checks"


async def test_an_instance_that_hangs_is_replaced(tmp_path: Path) -> None:
    async with running_functions(tmp_path) as it:
        await it.routed(it.put(timeout_secs=0.3, concurrency=1, max_instances=1))
        assert await it.get() == (200, "hi")
        (hangs,) = (await it.state()).instances
        for _ in range(3):
            assert (await it.get("/hang"))[0] == 504
        assert await it.get() == (200, "hi")
        state = await it.until(lambda state: hangs.id not in {each.id for each in state.instances})
        assert state.last_failure is not None


@pytest.mark.parametrize(
    ("text", "reason"),
    [(EXITS, "it exited with code 3 before it listened on port 3000"), (NEVER, "it did not listen on port 3000")],
)
async def test_a_function_that_cannot_start_says_why_and_is_left_alone(
    tmp_path: Path, text: str, reason: str
) -> None:
    async with running_functions(tmp_path, start_secs=2.0) as it:
        await it.routed(it.put(text))
        status, body = await it.get()
        assert status == 503
        assert "function hello could not be started" in body
        assert reason in body
        state = await it.until(lambda state: state.last_failure is not None)
        assert state.last_failure is not None
        assert state.last_failure.log in (("no database",), ("waiting for nothing",))
        assert (state.failures, state.retry_at is not None) == (1, True)
        status, _ = await it.get()
        assert status == 503
        async with asyncio.timeout(60):
            while (await it.state()).failures < 2:  # whoever calls after the pause has it tried again
                assert (await it.get())[0] == 503
                await asyncio.sleep(0.05)
        # whoever mends it need not wait for the pause of what was broken
        await it.routed(it.put())
        assert await it.get() == (200, "hi")
        assert (await it.state()).failures == 0


async def test_a_machine_without_memory_to_spare_says_so(tmp_path: Path) -> None:
    spare = [100]
    worker = WorkerOptions("local", 4, lambda: spare[0], 20.0)
    async with running_functions(tmp_path, worker=worker) as it:
        await it.routed(it.put(memory_mb=128))
        status, body = await it.get()
        assert status == 503
        assert "this machine has 100 MB of memory to spare, and an instance takes 128" in body
        spare[0] = 128
        await it.routed(it.put(memory_mb=128, env_vars={"SAY": "now"}))
        assert await it.get() == (200, "now")


async def test_calls_of_a_broken_new_version_are_served_by_the_old_one(tmp_path: Path) -> None:
    rules = Rules(idle_secs=60.0, last_idle_secs=60.0)
    async with running_functions(tmp_path, rules=rules) as it:
        await it.routed(it.put(env_vars={"SAY": "old"}))
        async with Load(it, callers=4) as load:
            await load.until((200, "old"))
            it.put(EXITS)
            await it.until(lambda state: state.last_failure is not None)
        assert set(load.answers) == {(200, "old")}


async def test_answers_that_come_too_late_and_lines_that_are_too_long(tmp_path: Path) -> None:
    async with running_functions(tmp_path, waiting=Waiting(secs=1.0, most=3)) as it:
        await it.routed(it.put("import time\ntime.sleep(6)\n" + SERVER))
        first = [asyncio.create_task(it.get()) for _ in range(3)]
        await it.until(lambda state: state.waiting == 3)
        assert (await it.get())[0] == 503
        assert [status for status, _ in await asyncio.gather(*first)] == [504] * 3
        await it.until(lambda state: any(each.stage == "serving" for each in state.instances))
        await it.routed(it.put(timeout_secs=0.5))
        await it.engine.warm(FUNCTION_ID)
        await it.until(lambda state: any(each.version == 2 and each.stage == "serving" for each in state.instances))
        assert (await it.get("/late"))[0] == 504


async def test_connections_that_the_function_closes_fail_no_call(tmp_path: Path) -> None:
    async with running_functions(tmp_path) as it:
        await it.routed(it.put())
        for _ in range(30):
            assert await it.get("/close") == (200, "hi")


async def test_an_instance_can_be_asked_for_before_anybody_calls(tmp_path: Path) -> None:
    async with running_functions(tmp_path, rules=Rules(idle_secs=60.0, last_idle_secs=60.0)) as it:
        await it.routed(it.put())
        await it.engine.warm(FUNCTION_ID)
        await it.until(lambda state: [each.stage for each in state.instances] == ["serving"])
        await it.routed(it.put(env_vars={"SAY": "two"}))
        await it.engine.warm(FUNCTION_ID)
        await it.until(lambda state: [(each.stage, each.version) for each in state.instances] == [("serving", 2)])
        assert await it.get() == (200, "two")
        await it.engine.ledger.flush()
        assert [each.start for each in it.records.kept] == [StartKind.WARM]


async def test_a_worker_that_loses_its_lease_ends_what_it_has_and_begins_anew(tmp_path: Path) -> None:
    async with running_functions(tmp_path) as it:
        await it.routed(it.put(min_instances=1))
        state = await it.until(lambda state: [each.stage for each in state.instances] == ["serving"])
        worker = await it.kv.get("/workers/local")
        assert worker is not None
        await it.kv.revoke(worker.lease)
        lost = state.instances[0].id
        await it.until(
            lambda state: [each.stage for each in state.instances] == ["serving"] and state.instances[0].id != lost
        )
        assert await it.get() == (200, "hi")
        assert lost not in await it.runtime.list()


async def test_a_job_that_is_lost_is_asked_for_again(tmp_path: Path) -> None:
    async with running_functions(tmp_path) as it:
        await it.routed(it.put())
        lease = await it.kv.grant(60)
        record = InstanceRecord(FUNCTION_ID, "lost0000", 1, Stage.ASKED, 0.0)
        await it.kv.transact([], [Put(record.key, record.encode(), lease)])
        await it.until(lambda state: any(each.stage == "serving" for each in state.instances))
        assert (await it.queue.lengths(PROVISION)).taken == 0


async def test_what_a_killed_server_has_recorded_is_in_nobodys_way(tmp_path: Path) -> None:
    """Records, leases and jobs of a process that is gone, as kill -9 leaves them."""
    from aether.functions.scaler import encode_job
    from aether.stores.kv.sqlite import SqliteKV
    from aether.stores.queue.sqlite import SqliteQueue

    kv, queue = SqliteKV(tmp_path / "kv.db"), SqliteQueue(tmp_path / "queue.db")
    await kv.open()
    await queue.open()
    worker, gateway = await kv.grant(3600), await kv.grant(3600)
    await kv.put("/workers/local", b"{}", lease=worker)
    await kv.put("/gateways/local", b'{"revision": 1, "busy": {"old-1": 3}}', lease=gateway)
    for name, stage, lease in (
        ("old-1", Stage.SERVING, worker),
        ("old-2", Stage.STARTING, worker),
        ("old-3", Stage.ASKED, gateway),
    ):
        record = InstanceRecord(FUNCTION_ID, name, 1, stage, 1.0, "local")
        await kv.put(record.key, record.encode(), lease=lease)
    await queue.enqueue(PROVISION, encode_job(FUNCTION_ID, ["old-3"]))
    await queue.close()
    await kv.close()
    async with running_functions(tmp_path) as it:
        await it.routed(it.put())
        assert (await it.state()).instances == ()
        assert await it.get() == (200, "hi")
        (instance,) = (await it.state()).instances
        assert not instance.id.startswith("old")
        async with asyncio.timeout(20):
            while (lengths := await it.queue.lengths(PROVISION)).waiting or lengths.taken:
                await asyncio.sleep(0.05)
