"""The API of functions on a real server and both databases, with a control that stands for what runs them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from aether.api.turns import UploadTurns
from aether.apps.vault import Vault
from aether.functions.code import PREFIX
from aether.functions.services import FunctionServices
from aether.identity.roles import Role
from aether.leases import Leases
from aether.model.errors import NotFound
from aether.model.function_instance import (
    FailedStart,
    FunctionLogRecord,
    FunctionState,
    InstanceState,
    Invocation,
    StartKind,
)
from aether.model.instance import LogRecord
from aether.model.names import new_id
from aether.stores.database.tables import audit
from aether.stores.keys import keyring
from aether.topology.function_catalogue import open_functions
from support.identity import add_user, bearer
from support.served import Served, digest_of, served
from support.zips import Item, zipped

pytestmark = pytest.mark.usefixtures("database_url")

ZIP = zipped(Item(b"index.js", b"one"))
HELLO = {"name": "hello", "runtime": "node", "entrypoint": "index.js"}
READER = bearer("tok-reader")
ADMIN = bearer("tok-admin")


class Control:
    """What runs functions, as the test says it is."""

    def __init__(self) -> None:
        self.states: dict[str, FunctionState] = {}
        self.lines: dict[str, list[FunctionLogRecord]] = {}
        self.warmed: list[str] = []
        self.changes = 0

    def changed(self) -> None:
        self.changes += 1

    async def warm(self, function_id: str) -> None:
        if function_id not in self.states:
            raise NotFound("the function has no code yet, or is gone")
        self.warmed.append(function_id)

    async def state(self, function_id: str) -> FunctionState:
        return self.states.get(function_id, FunctionState())

    async def gone(self, function_id: str) -> None:
        self.states.pop(function_id, None)

    async def log(self, function_id: str, tail: int = 100) -> Sequence[FunctionLogRecord]:
        return self.lines.get(function_id, [])[-tail:] if tail else []


class World:
    def __init__(self, api: Served, functions: FunctionServices, control: Control) -> None:
        self.api, self.functions, self.control = api, functions, control
        self.call = api.call

    async def create(self, **more: Any) -> dict[str, Any]:
        status, made = await self.call("POST", "/api/functions", json={**HELLO, **more})
        assert status == 201, made
        return made

    async def code(self, data: bytes, kind: str = "application/zip", name: str = "hello") -> tuple[int, Any]:
        return await self.call("POST", f"/api/functions/{name}/code", data=data, headers={"Content-Type": kind})


@pytest.fixture
async def world(tmp_path: Path) -> AsyncGenerator[World]:
    async with served(tmp_path) as api:
        vault = Vault(keyring.load(tmp_path, given="", file=None, in_use=()))
        leases = Leases(api.database, "one", alone=True)
        functions = await open_functions(api.settings, api.database, vault, api.objects, leases, sweep=True)
        control = Control()
        functions.run_by(control)
        api.services.functions = functions
        yield World(api, functions, control)
        await functions.catalogue.close()
        await functions.codes.close()
        await functions.runtimes.images.close()
        await leases.close()


async def test_a_function_from_its_making_to_its_end(world: World) -> None:
    made = await world.create(env_vars={"GREETING": "hi"}, memory_mb=256)
    assert (made["version"], made["code"], made["status"]) == (1, None, "empty")
    assert (made["url"], made["owner"], made["timeout_secs"]) == ("/functions/hello/", "default", 30.0)
    assert made["snapshot"] is False
    status, coded = await world.code(ZIP)
    assert status == 200, coded
    assert coded["version"] == 2
    assert coded["code"] == {"digest": digest_of(ZIP), "form": "zip", "size_bytes": len(ZIP)}
    assert coded["status"] == "idle"
    for ref in ("hello", made["id"]):
        assert (await world.call("GET", f"/api/functions/{ref}"))[1] == coded
    status, changed = await world.call(
        "PUT", "/api/functions/hello", json={"env_vars": {"GREETING": "ho"}, "snapshot": True}
    )
    assert changed["snapshot"] is True
    assert (status, changed["version"], changed["env_vars"], changed["memory_mb"]) == (
        200,
        3,
        {"GREETING": "ho"},
        256,
    )
    status, back = await world.call("POST", "/api/functions/hello/rollback", json={"version": 2})
    assert (status, back["version"], back["env_vars"]) == (200, 4, {"GREETING": "hi"})
    _, versions = await world.call("GET", "/api/functions/hello/versions?limit=3")
    assert [(one["version"], one["current"], one["rollback_of"]) for one in versions["items"]] == [
        (4, True, 2),
        (3, False, None),
        (2, False, None),
    ]
    _, rest = await world.call("GET", f"/api/functions/hello/versions?cursor={versions['next_cursor']}")
    assert [one["version"] for one in rest["items"]] == [1]
    assert world.control.changes == 3
    assert (await world.call("DELETE", "/api/functions/hello"))[0] == 204
    assert (await world.call("GET", "/api/functions/hello"))[0] == 404
    assert world.functions.catalogue.control is world.control


async def test_refusals_name_the_field(world: World) -> None:
    for body, named in (
        ({**HELLO, "memory_mb": 1}, "memory_mb"),
        ({**HELLO, "memory_mb": "much"}, "memory_mb"),
        ({**HELLO, "name": "Bad Name"}, "name"),
        ({**HELLO, "name": "runtimes"}, "name"),
        ({**HELLO, "runtime": "cobol"}, "runtime"),
        ({**HELLO, "entrypoint": "../x"}, "entrypoint"),
        ({**HELLO, "env_vars": {"PORT": "1"}}, "env_vars"),
        ({**HELLO, "min_instances": 5, "max_instances": 2}, "min_instances"),
        ({"name": "hello", "runtime": "node"}, "entrypoint"),
        ({**HELLO, "snapshot": "yes"}, "snapshot"),
        ({**HELLO, "colour": "red"}, "colour"),
    ):
        status, said = await world.call("POST", "/api/functions", json=body)
        assert (status, said["code"]) == (400, "bad_request"), body
        assert named in json.dumps([said["message"], said.get("details")]), said
    await world.create()
    status, said = await world.call("POST", "/api/functions", json=HELLO)
    assert (status, said["code"], said["details"]) == (409, "conflict", {"field": "name"})
    status, said = await world.call("PUT", "/api/functions/hello", json={"name": "other"})
    assert (status, said["details"]) == (400, {"field": "name"})


async def test_code_is_judged_before_it_is_taken(world: World) -> None:
    await world.create()
    for data, kind, message in (
        (b"nothing", "application/zip", "neither a zip nor a tar.gz"),
        (ZIP, "application/gzip", "announced as tar.gz"),
        (ZIP[:-4], "application/zip", "archive"),
        (zipped(Item(b"../index.js", b"x")), "application/octet-stream", "leads out"),
        (zipped(Item(b"other.js", b"x")), "application/octet-stream", "no file 'index.js'"),
        (b"{", "application/json", "does not fit"),
        (b'{"artifact": "?"}', "application/json", "digest"),
        (b'{"artifact": "' + b"0" * 64 + b'", "more": 1}', "application/json", "more"),
    ):
        status, said = await world.code(data, kind)
        assert status == 400, said
        assert message in said["message"], said
    status, said = await world.code(b'{"artifact": "' + b"0" * 64 + b'"}', "application/json")
    assert (status, said["code"]) == (404, "not_found")
    status, said = await world.code(b" " * 300_000, "application/json")
    assert status == 413
    assert [key async for key, _, _ in world.api.objects.list(PREFIX)] == []
    assert (await world.code(ZIP, "application/octet-stream"))[0] == 200
    assert (await world.code(ZIP, name="nothing"))[0] == 404


async def test_a_large_body_is_passed_on_as_it_comes(world: World) -> None:
    """More than a body of another route may have, without a length said before."""
    await world.create()
    big = zipped(Item(b"index.js", b"one"), Item(b"data", world_bytes(6 << 20), method=0))

    async def pieces() -> AsyncGenerator[bytes]:
        for at in range(0, len(big), 100_000):
            yield big[at : at + 100_000]

    status, coded = await world.call("POST", "/api/functions/hello/code", data=pieces())
    assert (status, coded["code"]["digest"]) == (200, digest_of(big))


def world_bytes(size: int) -> bytes:
    return b"".join(digest_of(b"%d" % n).encode() for n in range(size // 64))


async def test_an_artifact_becomes_code_with_the_fields_that_come_with_it(world: World) -> None:
    import io
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo("main.js")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"one"))
    data = out.getvalue()
    await world.api.add_app("hello")
    await world.api.upload("hello", data)
    await world.create()
    body = {"artifact": digest_of(data), "fields": {"entrypoint": "main.js", "port": 4000}}
    status, coded = await world.call("POST", "/api/functions/hello/code", json=body)
    assert (status, coded["version"], coded["entrypoint"], coded["port"]) == (200, 2, "main.js", 4000), coded
    assert coded["code"] == {"digest": digest_of(data), "form": "artifact", "size_bytes": len(data)}
    again = await world.call("POST", "/api/functions/hello/code", json=body)
    assert (again[0], again[1]["version"]) == (200, 2)
    refused = {"artifact": digest_of(data), "fields": {"memory_mb": 1}}
    status, said = await world.call("POST", "/api/functions/hello/code", json=refused)
    assert (status, said["details"]) == (400, {"field": "memory_mb"})


async def test_the_state_tells_what_runs_and_why_not(world: World) -> None:
    made = await world.create()
    assert (await world.call("POST", "/api/functions/hello/warm"))[0] == 409
    await world.code(ZIP)
    serving = InstanceState("i-1", 2, "serving", 3, 1_700_000_000.5, 42.0, "local")
    failed = FailedStart(2, 1_700_000_001.0, "it did not listen in time", ("line one", "line two"))
    world.control.states[made["id"]] = FunctionState((serving,), 4, 2, 1_700_000_009.0, failed)
    status, warm = await world.call("POST", "/api/functions/hello/warm")
    assert (status, world.control.warmed) == (202, [made["id"]])
    _, shown = await world.call("GET", "/api/functions/hello")
    assert shown == warm
    assert shown["status"] == "running"
    assert shown["state"] == {
        "instances": [
            {
                "id": "i-1", "version": 2, "stage": "serving", "in_flight": 3, "since": "2023-11-14T22:13:20.500000Z",
                "ready_ms": 42.0, "worker": "local",
            }
        ],
        "waiting": 4,
        "failures": 2,
        "retry_at": "2023-11-14T22:13:29.000000Z",
        "last_failure": {
            "version": 2, "at": "2023-11-14T22:13:21.000000Z", "reason": "it did not listen in time",
            "log": ["line one", "line two"],
        },
    }  # fmt: skip
    for state, status_word in (
        (FunctionState((), 0, 2, None, failed), "failing"),
        (FunctionState((InstanceState("i", 2, "starting", 0, 1.0, None),)), "starting"),
        (FunctionState(), "idle"),
    ):
        world.control.states[made["id"]] = state
        assert (await world.call("GET", "/api/functions"))[1]["items"][0]["status"] == status_word


async def test_logs_are_lines_of_json(world: World) -> None:
    made = await world.create()
    record = LogRecord(1_700_000_000_000_000_000, "stdout", "hello", seq=7)
    world.control.lines[made["id"]] = [FunctionLogRecord("i-1", record)] * 3
    async with world.api.client.get(world.api.base + "/api/functions/hello/logs?tail=2") as answer:
        assert answer.content_type == "application/x-ndjson"
        lines = [json.loads(line) async for line in answer.content]
    line = {"time": "2023-11-14T22:13:20.000000Z", "stream": "stdout", "line": "hello", "instance": "i-1", "seq": 7}
    assert lines == [line, line]


async def test_invocations_are_paged(world: World) -> None:
    made = await world.create()
    calls = [
        Invocation(f"call-{n}", made["id"], 1, "", 1_700_000_000.0 + n, 1.5, "GET", "/a", 200, StartKind.WARM)
        for n in range(5)
    ]
    await world.functions.invocations.add(calls)
    seen: list[str] = []
    query = ""
    while True:
        status, found = await world.call("GET", f"/api/functions/hello/invocations?limit=2{query}")
        assert status == 200
        seen += [one["id"] for one in found["items"]]
        if not found["next_cursor"]:
            break
        query = f"&cursor={found['next_cursor']}"
    assert seen == [f"call-{n}" for n in (4, 3, 2, 1, 0)]
    assert found["items"][0] == {
        "id": "call-0", "version": 1, "instance": "", "started_at": "2023-11-14T22:13:20.000000Z", "duration_ms": 1.5,
        "method": "GET", "path": "/a", "status": 200, "start": "warm",
    }  # fmt: skip


async def test_others_see_nothing_and_readers_no_values(world: World) -> None:
    await world.create(env_vars={"KEY": "value-to-hide"})
    other = await add_user(world.api, "olga", Role.DEPLOYER)
    for method, path, body in (
        ("GET", "", None), ("PUT", "", {"port": 1}), ("PATCH", "", {"owner": "olga"}),
        ("DELETE", "", None), ("POST", "/code", {"artifact": "0" * 64}),
        ("GET", "/versions", None), ("POST", "/rollback", {}), ("POST", "/warm", None), ("GET", "/logs", None),
        ("GET", "/invocations", None),
    ):  # fmt: skip
        told: list[Any] = []
        for name in ("hello", "nothing"):
            status, said = await world.call(method, f"/api/functions/{name}{path}", json=body, headers=other)
            told.append((status, said["code"], said["message"].replace(name, "X")))
        assert told[0] == told[1], (method, path)
        assert told[0][0] == 404
        if method != "GET":
            status, _ = await world.call(method, f"/api/functions/hello{path}", json=body, headers=READER)
            assert status == 403
    assert (await world.call("GET", "/api/functions", headers=other))[1]["items"] == []
    for path in ("", "/versions"):
        _, shown = await world.call("GET", f"/api/functions/hello{path}", headers=READER)
        assert "value-to-hide" not in json.dumps(shown)
        assert '"KEY": "****"' in json.dumps(shown)
        _, shown = await world.call("GET", f"/api/functions/hello{path}")
        assert "value-to-hide" in json.dumps(shown)
    assert (await world.call("POST", "/api/functions", json={**HELLO, "name": "mine"}, headers=other))[1][
        "owner"
    ] == "olga"
    theirs = {**HELLO, "name": "theirs", "team": "default"}
    assert (await world.call("POST", "/api/functions", json=theirs, headers=other))[0] == 404


async def test_a_token_that_is_bound_to_apps_is_bound_to_functions_of_those_names(world: World) -> None:
    await world.create()
    await world.create(name="other")
    await add_user(world.api, "olga", Role.DEPLOYER, "default")
    wanted = {"name": "ci", "apps": ["hello"], "user": "olga", "role": "deployer"}
    _, made = await world.call("POST", "/tokens", json=wanted, headers=ADMIN)
    bound = bearer(made["token"])
    assert [one["name"] for one in (await world.call("GET", "/api/functions", headers=bound))[1]["items"]] == [
        "hello"
    ]
    assert (await world.call("GET", "/api/functions/other", headers=bound))[0] == 404
    assert (await world.call("POST", "/api/functions", json={**HELLO, "name": "third"}, headers=bound))[0] == 403


async def test_changes_are_written_to_the_audit_log(world: World) -> None:
    made = await world.create()
    await world.code(ZIP)
    await world.code(b"nothing")
    await world.call("DELETE", f"/api/functions/{made['id']}")
    async with world.api.database.read() as tx:
        rows = (await tx.execute(sa.select(audit).order_by(audit.c.time, audit.c.id))).all()
    assert [(row.action, row.target, row.outcome, row.actor) for row in rows] == [
        ("POST /api/functions", "hello", "ok", "dan"),
        ("POST /api/functions/{function}/code", "hello", "ok", "dan"),
        ("POST /api/functions/{function}/code", "hello", "bad_request", "dan"),
        ("DELETE /api/functions/{function}", made["id"], "ok", "dan"),
    ]


async def test_a_team_with_functions_is_not_deleted(world: World) -> None:
    await world.call("POST", "/teams", json={"name": "crew"}, headers=ADMIN)
    made = {**HELLO, "team": "crew"}
    assert (await world.call("POST", "/api/functions", json=made, headers=ADMIN))[0] == 201
    status, said = await world.call("DELETE", "/teams/crew", headers=ADMIN)
    assert (status, "functions (hello)" in said["message"]) == (409, True)
    status, moved = await world.call("PATCH", "/api/functions/hello", json={"owner": "default"}, headers=ADMIN)
    assert (status, moved["owner"], moved["version"]) == (200, "default", 1)
    assert (await world.call("GET", "/api/functions/hello"))[1]["owner"] == "default"
    assert (await world.call("DELETE", "/teams/crew", headers=ADMIN))[0] == 204
    for owner in ("crew", "nobody"):
        assert (await world.call("PATCH", "/api/functions/hello", json={"owner": owner}, headers=ADMIN))[0] == 404


async def test_a_server_without_functions_says_so(world: World) -> None:
    await world.create()
    await world.code(ZIP)
    world.functions.control = None
    assert (await world.call("POST", "/api/functions/hello/warm"))[0] == 503
    async with world.api.client.get(world.api.base + "/api/functions/hello/logs") as answer:
        assert (answer.status, await answer.read()) == (200, b"")
    world.api.services.functions = None
    for method, path in (
        ("GET", "/api/functions"),
        ("GET", "/api/functions/hello"),
        ("GET", "/api/functions/runtimes"),
    ):
        status, said = await world.call(method, path)
        assert (status, said["message"]) == (503, "functions are not run by this server")


async def test_runtimes_and_lists(world: World) -> None:
    _, runtimes = await world.call("GET", "/api/functions/runtimes")
    assert [(one["name"], one["shipped"]) for one in runtimes["items"]] == [("node", True), ("python", True)]
    await asyncio.gather(*(world.create(name=f"f-{n}") for n in range(5)))
    _, first = await world.call("GET", "/api/functions?limit=3")
    _, rest = await world.call("GET", f"/api/functions?limit=3&cursor={first['next_cursor']}")
    assert [one["name"] for one in (*first["items"], *rest["items"])] == [f"f-{n}" for n in range(5)]
    assert [one["name"] for one in (await world.call("GET", "/api/functions?q=-3"))[1]["items"]] == ["f-3"]
    assert (await world.call("GET", f"/api/functions/{new_id()}"))[0] == 404


async def test_an_upload_that_breaks_off_leaves_nothing(world: World) -> None:
    await world.create()
    reader, writer = await asyncio.open_connection("127.0.0.1", world.api.port)
    head = (
        "POST /api/functions/hello/code HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer tok-deployer\r\n"
        f"Content-Type: application/zip\r\nContent-Length: {len(ZIP)}\r\n\r\n"
    )
    writer.write(head.encode() + ZIP[:40])
    await writer.drain()
    folder = world.api.folder / "functions" / "code"
    while not list(folder.iterdir()):
        await asyncio.sleep(0.01)
    writer.close()
    while list(folder.iterdir()):
        await asyncio.sleep(0.01)
    assert reader is not None
    assert (await world.call("GET", "/api/functions/hello"))[1]["version"] == 1
    status, said = await world.call(
        "POST", "/api/functions/hello/code", data=b"x", headers={"Content-Length": str(300 << 20)}
    )
    assert (status, said["code"]) == (413, "payload_too_large")


async def test_what_is_run_of_the_code_can_change_with_it(world: World) -> None:
    await world.create()
    other = zipped(Item(b"app/main.py", b"one"))
    path = "/api/functions/hello/code?entrypoint=app/main.py&runtime=python"
    status, coded = await world.call("POST", path, data=other)
    assert (status, coded["version"], coded["entrypoint"], coded["runtime"]) == (200, 2, "app/main.py", "python")
    for query, field in (
        ("entrypoint=/x", "entrypoint"),
        ("runtime=cobol", "runtime"),
        ("entrypoint=no", "entrypoint"),
    ):
        status, said = await world.call("POST", f"/api/functions/hello/code?{query}", data=other)
        assert (status, said["details"]) == (400, {"field": field})


async def test_a_client_that_stalls_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.create()
    monkeypatch.setattr("aether.api.routers.functions.STALL_SECS", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", world.api.port)
    head = (
        "POST /api/functions/hello/code HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer tok-deployer\r\n"
        "Content-Length: 1000\r\n\r\n"
    )
    writer.write(head.encode() + ZIP[:40])
    answer = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    assert b" 400 " in answer
    assert list((world.api.folder / "functions" / "code").iterdir()) == []


async def test_uploads_beyond_the_bound_are_told_to_wait(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.create()
    monkeypatch.setattr("aether.api.turns.TURN_SECS", 0.05)
    world.api.services.turns = UploadTurns(1)
    async with world.api.services.turns.one():
        assert (await world.code(ZIP))[0] == 429
    assert (await world.code(ZIP))[0] == 200
