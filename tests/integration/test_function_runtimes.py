"""Registered runtimes: over the API on both databases, kept, saved, swept, and refused where they cannot run."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from aether.apps.vault import Vault
from aether.functions.retention import VersionSweeper
from aether.functions.runtimes import PREFIX, RuntimeSweeper
from aether.functions.services import FunctionServices
from aether.leases import Leases
from aether.model.errors import Conflict, DigestMismatch, NotFound, ServiceUnavailable
from aether.runtimes.microvm.images import make_image
from aether.runtimes.process.functions import ProcessFunctions
from aether.stores.keys import keyring
from aether.topology.function_catalogue import open_functions
from support.identity import bearer
from support.microvm import code
from support.served import Served, digest_of, served

pytestmark = pytest.mark.usefixtures("database_url")

ADMIN = bearer("tok-admin")
RUN = "/usr/bin/run"
HELLO = {"name": "hello", "runtime": "mine", "entrypoint": "index.js"}


def image(folder: Path, name: str = "image", *, without: str = "", text: str = "#!/bin/true\n") -> bytes:
    """A root file system that has all that is asked for, but for one folder."""
    for tool in ("mksquashfs", "unsquashfs"):
        if shutil.which(tool) is None:
            pytest.skip("component: squashfs-tools")
    tree = folder / f"{name}-tree"
    for inside in {"app", "dev", "proc", "tmp", "usr/bin"} - {without}:
        (tree / inside).mkdir(parents=True)
    program = tree / "usr/bin/run"
    program.write_text(text)
    program.chmod(0o755)
    make_image(tree, folder / name)
    return (folder / name).read_bytes()


class World:
    def __init__(self, api: Served, functions: FunctionServices) -> None:
        self.api, self.functions, self.runtimes = api, functions, functions.runtimes
        self.call = api.call

    async def add(
        self, data: bytes, name: str = "mine", init: tuple[str, ...] = (RUN,), **more: Any
    ) -> tuple[int, Any]:
        query = "&".join([f"name={name}", *(f"init={quote(word)}" for word in init)])
        options = {"headers": ADMIN, **more}
        return await self.call("POST", f"/api/functions/runtimes?{query}", data=data, **options)

    async def remove(self, name: str = "mine") -> tuple[int, Any]:
        return await self.call("DELETE", f"/api/functions/runtimes/{name}", headers=ADMIN)

    async def names(self) -> list[str]:
        return [one["name"] for one in (await self.call("GET", "/api/functions/runtimes"))[1]["items"]]

    async def stored(self) -> set[str]:
        return {key.removeprefix(PREFIX) async for key, _, _ in self.api.objects.list(PREFIX)}

    def local(self) -> set[str]:
        return {path.name for path in self.runtimes.images.folder.iterdir()}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncGenerator[World]:
    async with served(tmp_path) as api:
        vault = Vault(keyring.load(tmp_path, given="", file=None, in_use=()))
        leases = Leases(api.database, "one", alone=True)
        functions = await open_functions(api.settings, api.database, vault, api.objects, leases, sweep=True)
        api.services.functions = functions
        yield World(api, functions)
        await functions.catalogue.close()
        await functions.codes.close()
        await functions.runtimes.images.close()
        await leases.close()


async def test_a_runtime_is_added_used_and_removed(world: World, tmp_path: Path) -> None:
    data = image(tmp_path)
    status, made = await world.add(data, init=(RUN, "--flag", "a b"))
    assert status == 201, made
    assert (made["name"], made["shipped"], made["digest"], made["size_bytes"], made["init"], made["created_by"]) == (
        "mine", False, digest_of(data), len(data), [RUN, "--flag", "a b"], "ann",
    )  # fmt: skip
    _, listed = await world.call("GET", "/api/functions/runtimes")
    assert listed["items"][2] == made
    assert await world.names() == ["node", "python", "mine"]
    assert await world.stored() == {digest_of(data)}
    kept = world.runtimes.images.folder / digest_of(data)
    assert kept.stat().st_mode & 0o777 == 0o600
    found = await world.runtimes.fetch("mine")
    assert (found.rootfs, found.command) == (kept, (RUN, "--flag", "a b"))

    assert (await world.call("POST", "/api/functions", json=HELLO))[0] == 201
    status, refused = await world.remove()
    assert (status, refused["details"]) == (409, {"functions": ["hello"]})
    assert "hello" in refused["message"]
    status, _ = await world.call("DELETE", "/api/functions/hello")
    assert status == 204
    assert (await world.remove())[0] == 204
    assert await world.names() == ["node", "python"]
    assert (await world.remove())[0] == 404
    status, refused = await world.call("POST", "/api/functions", json=HELLO)
    assert (status, refused["details"]) == (400, {"field": "runtime"})
    assert "this server has: node, python" in refused["message"]


async def test_a_name_is_held_by_every_kept_version(world: World, tmp_path: Path) -> None:
    assert (await world.add(image(tmp_path)))[0] == 201
    assert (await world.call("POST", "/api/functions", json=HELLO))[0] == 201
    assert (await world.call("PUT", "/api/functions/hello", json={"runtime": "node"}))[0] == 200
    assert (await world.remove())[0] == 409, "a rollback would meet another image under the same name"
    await VersionSweeper(world.api.database, kept=1).sweep(dry_run=False)
    assert (await world.remove())[0] == 204
    status, refused = await world.call("PUT", "/api/functions/hello", json={"runtime": "mine"})
    assert (status, refused["details"]) == (400, {"field": "runtime"})


async def test_what_cannot_be_a_runtime_is_refused_and_leaves_nothing(world: World, tmp_path: Path) -> None:
    data = image(tmp_path)
    for name, init, body, status, said in (
        ("node", (RUN,), data, 409, "shipped"),
        ("Mine", (RUN,), data, 400, "runtime's name"),
        ("mine", ("run",), data, 400, "absolute path"),
        ("mine", (), data, 400, "init"),
        ("mine", (RUN,), b"", 400, "no squashfs image"),
        ("mine", (RUN,), b"x" * 5000, 400, "no squashfs image"),
        ("mine", (RUN,), data[:512], 400, "cut"),
        ("mine", ("/bin/other",), data, 400, "lacks the program /bin/other"),
        ("mine", (RUN,), image(tmp_path, "b", without="app"), 400, "lacks the folder /app"),
    ):
        got, refused = await world.add(body, name, init)
        assert (got, said in str(refused)) == (status, True), refused
    assert (await world.add(data, headers=bearer("tok-deployer")))[0] == 403
    assert await world.stored() == set()
    assert world.local() == set()
    assert (await world.add(data))[0] == 201
    status, refused = await world.add(data)
    assert (status, "already a runtime 'mine'" in refused["message"]) == (409, True)
    assert (await world.remove("python"))[0] == 409


async def test_an_image_is_fetched_again_and_verified(world: World, tmp_path: Path) -> None:
    data = image(tmp_path)
    await world.add(data)
    local = world.runtimes.images.folder / digest_of(data)
    local.unlink()
    found = await world.runtimes.fetch("mine")
    assert found.rootfs.read_bytes() == data
    assert local.stat().st_mode & 0o777 == 0o600
    local.unlink()
    await world.api.objects.delete(PREFIX + digest_of(data))
    await world.api.objects.put(PREFIX + digest_of(data), _one(b"other"), 5)
    with pytest.raises(DigestMismatch, match="root file system"):
        await world.runtimes.fetch("mine")
    assert world.local() == set()
    with pytest.raises(NotFound):
        await world.runtimes.fetch("none")


async def test_images_that_nobody_has_are_swept(world: World, tmp_path: Path) -> None:
    data, other = image(tmp_path), image(tmp_path, "other", text="#!/bin/false\n")
    for name, body in (("mine", data), ("same", data), ("other", other)):
        assert (await world.add(body, name))[0] == 201
    later = [0.0]
    chore = RuntimeSweeper(
        world.api.database, world.runtimes.images, world.functions.catalogue.locks, 100.0,
        clock=lambda: time.time() + later[0],
    )  # fmt: skip
    for name in ("mine", "other"):
        assert (await world.remove(name))[0] == 204
    assert (await chore.sweep(dry_run=False)).deleted == 0, "taken away before its time"
    later[0] = 1000.0
    seen = await chore.sweep(dry_run=True)
    assert (seen.deleted, seen.bytes) == (1, len(other))
    assert await world.stored() == {digest_of(data), digest_of(other)}
    assert await chore.sweep(dry_run=False) == seen
    assert await world.stored() == {digest_of(data)}, "the image of 'same' went with 'mine'"


async def test_a_sandbox_says_that_it_takes_a_machine(world: World, tmp_path: Path) -> None:
    await world.add(image(tmp_path))
    runtime = ProcessFunctions(tmp_path / "process", world.runtimes)
    try:
        some = code(tmp_path / "code.tgz", {"index.js": ""})
        with pytest.raises(ServiceUnavailable, match="'mine' is a root file system, which needs virtual machines"):
            await runtime.prepare("mine", some)
        with pytest.raises(NotFound):
            await runtime.prepare("none", some)
    finally:
        await runtime.close()


async def test_two_who_add_one_name_do_not_both_get_it(world: World, tmp_path: Path) -> None:
    data = [image(tmp_path, str(number), text=f"#!/bin/{number}\n") for number in range(2)]
    async with (
        world.runtimes.arriving(_one(data[0])) as first,
        world.runtimes.arriving(_one(data[1])) as second,
    ):
        await world.runtimes.add("mine", [RUN], first, "ann")
        with pytest.raises(Conflict):
            await world.runtimes.add("mine", [RUN], second, "ann")
    assert (await world.runtimes.fetch("mine")).rootfs.read_bytes() == data[0]


async def test_a_runtime_is_not_removed_under_a_function_that_is_being_made(world: World, tmp_path: Path) -> None:
    data = image(tmp_path)
    outcomes: set[tuple[int, int]] = set()
    for number in range(12):
        assert (await world.add(data))[0] == 201
        making = world.call("POST", "/api/functions", json={**HELLO, "name": f"f-{number}"})
        steps = [making, world.remove()] if number % 2 else [world.remove(), making]
        answers = await asyncio.gather(*steps)
        (made, _), (removed, _) = answers if number % 2 else answers[::-1]
        outcomes.add((made, removed))
        if made == 201:
            await world.call("DELETE", f"/api/functions/f-{number}")
            assert (await world.remove())[0] == 204, "the runtime went while a function had it"
    assert outcomes <= {(201, 409), (400, 204)}


async def _one(data: bytes) -> AsyncGenerator[bytes]:
    yield data
