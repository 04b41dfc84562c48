"""The catalogue of functions on both databases: versions, code, deletion, invocations, and what is swept."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from aether.apps.sealing import reseal
from aether.apps.vault import Vault
from aether.functions import code as code_module
from aether.functions.catalogue import ArtifactCode, Catalogue
from aether.functions.code import PREFIX, CodeStore
from aether.functions.invocations import Invocations
from aether.functions.retention import CodeSweeper, InvocationSweeper, VersionSweeper
from aether.model.errors import (
    BadRequest,
    Conflict,
    DigestMismatch,
    NotFound,
    PayloadTooLarge,
    ServiceUnavailable,
    SignatureRequired,
)
from aether.model.function_instance import (
    CodeForm,
    FunctionLogRecord,
    FunctionState,
    Invocation,
    StartKind,
)
from aether.model.names import new_id
from aether.registry.policy import ReleasePolicy
from aether.runtimes import code as runtimes_code
from aether.stores.database.engine import Database
from aether.stores.database.tables import function_versions, functions
from aether.stores.keys.keyring import Keyring, Source
from aether.stores.objects.filesystem import FilesystemObjects
from aether.stores.objects.signing import UrlSigner, load_key
from support.databases import everything_in
from support.disks import filled, small_disk
from support.served import add_app, digest_of
from support.zips import Item, zipped

ZIP = zipped(Item(b"index.js", b"one"))
OTHER = zipped(Item(b"index.js", b"two"))
FIELDS = {"name": "hello", "runtime": "node", "entrypoint": "index.js"}
OWNER = "default"
KEY = os.urandom(32)
SOURCE = Source("a test", None)


class Control:
    """What runs functions, as far as the catalogue asks: it hears of changes, and ends instances when told to."""

    def __init__(self) -> None:
        self.heard = 0
        self.asked: list[str] = []
        self.may_go = asyncio.Event()
        self.may_go.set()

    def changed(self) -> None:
        self.heard += 1

    async def warm(self, function_id: str) -> None:
        raise NotImplementedError

    async def state(self, function_id: str) -> FunctionState:
        return FunctionState()

    async def gone(self, function_id: str) -> None:
        self.asked.append(function_id)
        await self.may_go.wait()

    async def log(self, function_id: str, tail: int = 100) -> Sequence[FunctionLogRecord]:
        return ()


@dataclass
class World:
    folder: Path
    database: Database
    objects: FilesystemObjects
    vault: Vault
    codes: CodeStore
    catalogue: Catalogue
    control: Control

    async def give(self, data: bytes, ref: str = "hello", form: CodeForm | None = None, **values: object) -> int:
        """Returns the version."""
        async with self.codes.receiving(pieces(data), form) as received:
            function = await self.catalogue.put_code(ref, received, "ann", values=values)
        return function.current.number

    async def stored(self) -> set[str]:
        return {key.removeprefix(PREFIX) async for key, _, _ in self.objects.list(PREFIX)}

    def local(self) -> set[str]:
        return {path.name for path in (self.folder / "code").iterdir()}


async def pieces(data: bytes, size: int = 700) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def tar_gz(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
async def world(tmp_path: Path, database: Database) -> AsyncGenerator[World]:
    objects = FilesystemObjects(tmp_path / "objects", UrlSigner(load_key(tmp_path / "signing.key")))
    await objects.open()
    vault = Vault(Keyring([KEY], SOURCE))
    codes = CodeStore(tmp_path / "code", objects, max_bytes=1 << 20)
    await codes.open()
    catalogue = Catalogue(database, vault, codes, ReleasePolicy())
    control = Control()
    catalogue.control = control
    yield World(tmp_path, database, objects, vault, codes, catalogue, control)
    await catalogue.close()
    await codes.close()
    await objects.close()


def test_code_is_judged_by_the_limits_of_the_images() -> None:
    assert code_module.LIMITS == runtimes_code.LIMITS


# --- making and changing


async def test_a_function_is_made_found_and_listed(world: World) -> None:
    made = await world.catalogue.create({**FIELDS, "memory_mb": 256}, OWNER, "ann")
    assert (made.name, made.owner, made.current.number, made.current.code) == ("hello", OWNER, 1, None)
    assert made.current.definition.memory_mb == 256
    for ref in ("hello", made.id):
        assert await world.catalogue.get(ref) == made
    for name in ("alpha", "beta"):
        await world.catalogue.create({**FIELDS, "name": name}, OWNER, "ann")
    first = await world.catalogue.list(limit=2)
    assert [one.name for one in first] == ["alpha", "beta", "hello"]  # one more than asked for
    assert [one.name for one in await world.catalogue.list(after="beta")] == ["hello"]
    assert [one.name for one in await world.catalogue.list(q="et")] == ["beta"]
    assert [one.name for one in await world.catalogue.list(only=functions.c.name == "alpha")] == ["alpha"]


async def test_what_may_not_be_made_is_refused_with_its_field(world: World) -> None:
    for values, field in (
        ({"runtime": "node", "entrypoint": "a"}, "name"),
        ({**FIELDS, "runtime": "cobol"}, "runtime"),
        ({**FIELDS, "memory_mb": 1}, "memory_mb"),
        ({**FIELDS, "colour": "red"}, "colour"),
    ):
        with pytest.raises(BadRequest) as refused:
            await world.catalogue.create(values, OWNER, "ann")
        assert (refused.value.details or {})["field"] == field
    with pytest.raises(NotFound, match="user or team"):
        await world.catalogue.create(FIELDS, "nobody", "ann")
    await world.catalogue.create(FIELDS, OWNER, "ann")
    with pytest.raises(Conflict, match="already a function"):
        await world.catalogue.create(FIELDS, OWNER, "ann")


async def test_every_change_is_a_version_and_no_change_is_none(world: World) -> None:
    await world.catalogue.create(FIELDS, OWNER, "ann")
    changed = await world.catalogue.update("hello", {"timeout_secs": 5, "env_vars": {"A": "1"}}, "bob")
    assert (changed.current.number, changed.current.created_by) == (2, "bob")
    again = await world.catalogue.update("hello", {"timeout_secs": 5.0}, "bob")
    assert again == changed
    assert world.control.heard == 1
    with pytest.raises(BadRequest, match="name of a function cannot be changed"):
        await world.catalogue.update("hello", {"name": "other"}, "bob")
    with pytest.raises(BadRequest, match="no runtime 'cobol'"):
        await world.catalogue.update("hello", {"runtime": "cobol"}, "bob")
    with pytest.raises(NotFound):
        await world.catalogue.update("nothing", {"port": 1}, "bob")
    versions = await world.catalogue.versions("hello")
    assert [(one.number, one.definition.timeout_secs, one.created_by) for one in versions] == [
        (2, 5.0, "bob"),
        (1, 30.0, "ann"),
    ]
    assert [one.number for one in await world.catalogue.versions("hello", before=2)] == [1]


async def test_changes_at_once_are_versions_one_after_the_other(world: World) -> None:
    await world.catalogue.create(FIELDS, OWNER, "ann")
    await asyncio.gather(*(world.catalogue.update("hello", {"port": 4000 + n}, "ann") for n in range(8)))
    versions = await world.catalogue.versions("hello")
    assert [one.number for one in versions] == list(range(9, 0, -1))
    assert len({one.definition.port for one in versions}) == 9


async def test_variables_rest_sealed_and_are_sealed_anew(world: World) -> None:
    await world.catalogue.create({**FIELDS, "env_vars": {"KEY": "a-value-to-look-for"}}, OWNER, "ann")
    assert b"a-value-to-look-for" not in await everything_in(world.database)
    old = await sealed_texts(world.database)
    new = os.urandom(32)
    both = Keyring([new, KEY], SOURCE)
    assert await reseal(world.database, Vault(both)) == (1, [world.vault.sealer.newest])
    now = await sealed_texts(world.database)
    assert [text.startswith(both.mark) for text in (*old, *now)] == [False, True]
    later = Catalogue(world.database, Vault(Keyring([new], SOURCE)), world.codes, ReleasePolicy())
    assert (await later.get("hello")).current.definition.env_vars == {"KEY": "a-value-to-look-for"}
    with pytest.raises(ServiceUnavailable):
        await world.catalogue.get("hello")


async def sealed_texts(database: Database) -> list[str]:
    async with database.read() as tx:
        return list((await tx.execute(sa.select(function_versions.c.env))).scalars())


# --- code


@pytest.mark.parametrize(
    ("data", "form"),
    [(ZIP, CodeForm.ZIP), (tar_gz(**{"index.js": b"one"}), CodeForm.TAR_GZ)],
    ids=["zip", "tar.gz"],
)
async def test_code_is_stored_once_and_given_to_whoever_starts_instances(
    world: World, data: bytes, form: CodeForm
) -> None:
    await world.catalogue.create({**FIELDS, "env_vars": {"A": "1"}}, OWNER, "ann")
    assert await world.catalogue.current() == []  # without code there is nothing to start
    assert await world.give(data) == 2
    assert await world.give(data) == 2
    assert await world.stored() == {digest_of(data)}
    (version,) = await world.catalogue.current()
    assert (version.version, version.code_digest, version.code_form) == (2, digest_of(data), form)
    assert version.definition.env_vars == {"A": "1"}
    code = await world.catalogue.fetch(version)
    assert (code.archive.read_bytes(), code.form, code.digest) == (data, form, digest_of(data))
    assert world.local() == {digest_of(data)}


async def test_code_is_fetched_once_however_many_ask_and_verified(world: World) -> None:
    await world.catalogue.create(FIELDS, OWNER, "ann")
    await world.give(ZIP)
    (version,) = await world.catalogue.current()
    cached = world.folder / "code" / version.code_digest
    cached.unlink()
    found = await asyncio.gather(*(world.catalogue.fetch(version) for _ in range(20)))
    assert {code.archive for code in found} == {cached}
    assert cached.read_bytes() == ZIP
    cached.unlink()
    stored = world.folder / "objects" / PREFIX / version.code_digest
    stored.chmod(0o600)
    stored.write_bytes(OTHER)
    with pytest.raises(DigestMismatch, match="has changed"):
        await world.catalogue.fetch(version)
    stored.unlink()
    with pytest.raises(NotFound, match="no longer stored"):
        await world.catalogue.fetch(version)
    assert world.local() == set()


async def test_bad_code_is_refused_when_it_comes_and_nothing_is_kept(world: World) -> None:
    await world.catalogue.create(FIELDS, OWNER, "ann")
    packed = tar_gz(**{"index.js": b"one"})
    for data, form, message in (
        (b"", None, "neither a zip nor a tar.gz"),
        (b"#!/bin/sh\n", None, "neither a zip nor a tar.gz"),
        (ZIP, CodeForm.TAR_GZ, "announced as tar.gz"),
        (ZIP, CodeForm.ARTIFACT, "announced as artifact"),
        (ZIP[:-5], None, "archive"),
        (packed[:-9], None, "archive"),
        (zipped(Item(b"../index.js", b"one")), None, "leads out"),
        (tar_gz(**{"..__index.js": b"one"}), None, "leads out"),
        (zipped(Item(b"main.js", b"one")), None, "no file 'index.js'"),
        (zipped(Item(b"index.js/", b"", method=0)), None, "no file 'index.js'"),
    ):
        with pytest.raises(BadRequest, match=message):
            await world.give(data, form=form)
    with pytest.raises(PayloadTooLarge):
        await world.give(b"PK\3\4" + bytes(1 << 20))
    assert (await world.catalogue.get("hello")).current.number == 1
    assert (await world.stored(), world.local()) == (set(), set())


async def test_a_body_that_breaks_off_leaves_nothing(world: World) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield ZIP[:50]
        raise BadRequest("the upload broke off")

    await world.catalogue.create(FIELDS, OWNER, "ann")
    with pytest.raises(BadRequest, match="broke off"):
        async with world.codes.receiving(broken()):
            pass
    assert world.local() == set()


async def test_fields_and_code_can_change_as_one_version(world: World) -> None:
    await world.catalogue.create(FIELDS, OWNER, "ann")
    assert await world.give(zipped(Item(b"main.js", b"one")), entrypoint="main.js", memory_mb=512) == 2
    now = (await world.catalogue.get("hello")).current
    assert (now.definition.entrypoint, now.definition.memory_mb, now.code is not None) == ("main.js", 512, True)


async def test_an_artifact_is_copied_and_judged(world: World) -> None:
    data = tar_gz(**{"index.js": b"one"})
    key = f"artifacts/hello/{digest_of(data)}/app.tar.gz"
    await world.objects.put(key, pieces(data), len(data))
    artifact = ArtifactCode(new_id(), digest_of(data), key)
    await world.catalogue.create(FIELDS, OWNER, "ann")
    function = await world.catalogue.put_artifact("hello", artifact, "ann", {"port": 5000})
    assert function.current.code is not None
    assert (function.current.code.form, function.current.code.artifact_id) == (CodeForm.ARTIFACT, artifact.id)
    await world.objects.delete(key)
    (version,) = await world.catalogue.current()
    assert (await world.catalogue.fetch(version)).archive.read_bytes() == data
    with pytest.raises(NotFound):
        await world.catalogue.put_artifact("hello", artifact, "ann")
    await world.objects.put(key, pieces(ZIP), len(ZIP))
    with pytest.raises(BadRequest):
        await world.catalogue.put_artifact("hello", artifact, "ann")


async def test_a_server_that_wants_signatures_takes_no_code_of_unknown_origin(
    world: World, database: Database
) -> None:
    await world.catalogue.create(FIELDS, OWNER, "ann")
    await world.give(ZIP)
    strict = Catalogue(database, world.vault, world.codes, ReleasePolicy(signature=True))
    async with world.codes.receiving(pieces(OTHER)) as received:
        with pytest.raises(SignatureRequired):
            await strict.put_code("hello", received, "ann")
    with pytest.raises(SignatureRequired):  # a change of variables is judged too
        await strict.update("hello", {"env_vars": {"A": "1"}}, "ann")
    app_id = await add_app(database, "hello")
    artifact = ArtifactCode(new_id(), "ab" * 32, "none")
    async with database.write() as tx:
        await tx.execute(
            sa.text(
                "INSERT INTO artifacts (id, app_id, digest, size_bytes, status, storage_key, verified, created_at,"
                " pinned) VALUES (:id, :app, :digest, 1, 'stored', 'none', false, 1, false)"
            ),
            {"id": artifact.id, "app": app_id, "digest": artifact.digest},
        )
    async with world.codes.receiving(pieces(tar_gz(**{"index.js": b"1"})), CodeForm.ARTIFACT) as received:
        with pytest.raises(SignatureRequired, match="AETHER_SIGNING_KEY"):
            await strict.put_code("hello", received, "ann", artifact_id=artifact.id)
    assert (await world.catalogue.get("hello")).current.number == 2


async def test_a_rollback_makes_a_version_that_is_as_the_earlier_one_was(world: World) -> None:
    await world.catalogue.create(FIELDS, OWNER, "ann")
    with pytest.raises(NotFound, match="no version before this one that has code"):
        await world.catalogue.rollback("hello", None, "ann")
    await world.give(ZIP)
    await world.give(OTHER, memory_mb=512)
    back = await world.catalogue.rollback("hello", None, "bob")
    assert (back.current.number, back.current.rollback_of, back.current.created_by) == (4, 2, "bob")
    assert back.current.definition.memory_mb == 128
    assert back.current.code is not None
    assert back.current.code.digest == digest_of(ZIP)
    assert [one.version for one in await world.catalogue.current()] == [4]
    forth = await world.catalogue.rollback("hello", 3, "bob")
    assert (forth.current.number, forth.current.definition.memory_mb) == (5, 512)
    for number, kind, message in (
        (5, BadRequest, "the current one"),
        (1, BadRequest, "has no code"),
        (9, NotFound, "no version 9"),
    ):
        with pytest.raises(kind, match=message):
            await world.catalogue.rollback("hello", number, "bob")
    changed = await world.catalogue.update("hello", {"port": 5001}, "ann")
    assert changed.current.rollback_of is None


# --- deletion


async def test_a_deletion_waits_for_the_instances_and_outlives_its_caller(world: World) -> None:
    function = await world.catalogue.create(FIELDS, OWNER, "ann")
    await world.give(ZIP)
    invocations = Invocations(world.database)
    await invocations.add([invocation(function.id)])
    world.control.may_go.clear()
    deleting = asyncio.create_task(world.catalogue.delete("hello"))
    while not world.control.asked:
        await asyncio.sleep(0)
    assert world.control.asked == [function.id]
    assert await world.catalogue.current() == []
    for call in (world.catalogue.get("hello"), world.catalogue.update("hello", {"port": 1}, "ann")):
        with pytest.raises(NotFound):
            await call
    with pytest.raises(Conflict, match="still being deleted"):
        await world.catalogue.create(FIELDS, OWNER, "ann")
    deleting.cancel()
    await asyncio.gather(deleting, return_exceptions=True)
    world.control.may_go.set()
    await world.catalogue.delete("hello")  # joins the one under way
    assert world.control.asked == [function.id]
    assert await invocations.list(function.id) == []
    with pytest.raises(NotFound):
        await world.catalogue.delete("hello")
    await world.catalogue.create(FIELDS, OWNER, "ann")


async def test_a_deletion_that_was_cut_short_is_finished(world: World, database: Database) -> None:
    await world.catalogue.create(FIELDS, OWNER, "ann")
    world.control.may_go.clear()
    deleting = asyncio.create_task(world.catalogue.delete("hello"))
    while not world.control.asked:
        await asyncio.sleep(0)
    await world.catalogue.close()
    await asyncio.gather(deleting, return_exceptions=True)
    later = Catalogue(database, world.vault, world.codes, ReleasePolicy())
    later.control = Control()
    await later.finish_deletions()
    while await rows_of_functions(database):
        await asyncio.sleep(0.01)
    await later.create(FIELDS, OWNER, "ann")
    await later.close()


async def rows_of_functions(database: Database) -> int:
    async with database.read() as tx:
        return (await tx.execute(sa.select(sa.func.count()).select_from(functions))).scalar_one()


# --- invocations


def invocation(function_id: str, at: float = 1_700_000_000.0, **more: object) -> Invocation:
    made = Invocation(
        new_id(), function_id, 1, new_id(), at, 12.5, "GET", "/a", 200, StartKind.COLD
    )  # fmt: skip
    return replace(made, **more)  # pyright: ignore[reportArgumentType]


async def test_invocations_are_listed_newest_first_and_written_once(world: World) -> None:
    function = await world.catalogue.create(FIELDS, OWNER, "ann")
    invocations = Invocations(world.database)
    batch = [invocation(function.id, 1_700_000_000.25 + n) for n in range(1200)]
    odd = invocation(function.id, 1_800_000_000.5, path="/\0" + "é" * 300, method="X" * 50, status=499)
    await invocations.add([*batch, odd, invocation("0" * 36)])
    await invocations.add(batch[:5])  # as whoever was not told that they had come
    first = await invocations.list(function.id, limit=3)
    assert first[0] == replace(odd, path="/" + "é" * 199, method="X" * 32)
    assert first[1:] == [*reversed(batch[-3:])]
    last = first[2]
    more = await invocations.list(function.id, before=(round(last.started_at * 1_000_000), last.id), limit=2000)
    assert more == [*reversed(batch[:-2])]
    assert await invocations.list("0" * 36) == []


async def test_the_same_batch_from_two_sides_is_written_once(world: World) -> None:
    function = await world.catalogue.create(FIELDS, OWNER, "ann")
    invocations = Invocations(world.database)
    batch = [invocation(function.id, float(n)) for n in range(300)]
    await asyncio.gather(*(invocations.add(batch) for _ in range(4)))
    assert len(await invocations.list(function.id, limit=1000)) == 300


async def test_old_and_surplus_invocations_go(world: World) -> None:
    busy = await world.catalogue.create(FIELDS, OWNER, "ann")
    calm = await world.catalogue.create({**FIELDS, "name": "calm"}, OWNER, "ann")
    invocations = Invocations(world.database)
    await invocations.add([invocation(one.id, float(n)) for one in (busy, calm) for n in range(10)])
    await invocations.add([invocation(busy.id, 100.0 + n) for n in range(700)])
    sweeper = InvocationSweeper(invocations, 1000, kept=20, clock=lambda: 1005.0)
    would = await sweeper.sweep(dry_run=True)
    assert would.deleted >= 10
    assert (await sweeper.sweep(dry_run=False)).deleted == 5 + 5 + 685
    left = await invocations.list(busy.id, limit=1000)
    assert [one.started_at for one in left] == [799.0 - n for n in range(20)]
    assert [one.started_at for one in await invocations.list(calm.id)] == [9.0, 8.0, 7.0, 6.0, 5.0]
    assert (await sweeper.sweep(dry_run=False)).deleted == 0


# --- what is swept


async def test_code_that_no_version_has_is_swept_and_no_other(world: World) -> None:
    await world.catalogue.create(FIELDS, OWNER, "ann")
    await world.give(ZIP)
    await world.give(OTHER)
    sweeper = CodeSweeper(world.database, world.codes, world.catalogue.locks, 100, lambda: time.time() + 200)
    young = CodeSweeper(world.database, world.codes, world.catalogue.locks, 100)
    assert (await sweeper.sweep(dry_run=False)).deleted == 0
    versions = VersionSweeper(world.database, kept=1)
    assert (await versions.sweep(dry_run=True)).deleted == 2
    assert (await versions.sweep(dry_run=False)).deleted == 2
    assert [one.number for one in await world.catalogue.versions("hello")] == [3]
    assert (await young.sweep(dry_run=False)).deleted == 0
    would = await sweeper.sweep(dry_run=True)
    assert (would.deleted, would.bytes) == (1, len(ZIP))
    assert await sweeper.sweep(dry_run=False) == would
    assert await world.stored() == {digest_of(OTHER)}


async def test_archives_that_nobody_fetches_leave_the_machine(world: World) -> None:
    await world.catalogue.create(FIELDS, OWNER, "ann")
    await world.give(ZIP)
    assert await world.codes.trim(60) == 0
    assert await world.codes.trim(-60) == 1
    assert world.local() == set()
    (version,) = await world.catalogue.current()
    assert (await world.catalogue.fetch(version)).archive.read_bytes() == ZIP


async def test_what_a_killed_server_left_is_swept_at_the_start(world: World) -> None:
    folder = world.folder / "code"
    (folder / ".receiving-0").write_bytes(b"half")
    (folder / ".checking-0" / "tree").mkdir(parents=True)
    await world.codes.open(sweep=False)
    assert world.local() == {".receiving-0", ".checking-0"}
    await world.codes.open()
    assert world.local() == set()


async def test_the_same_code_for_many_functions_at_once_is_stored_once(world: World) -> None:
    names = [f"f-{n}" for n in range(8)]
    for name in names:
        await world.catalogue.create({**FIELDS, "name": name}, OWNER, "ann")
    assert await asyncio.gather(*(world.give(ZIP, name) for name in names)) == [2] * 8
    assert await world.stored() == {digest_of(ZIP)}
    assert {one.code_digest for one in await world.catalogue.current()} == {digest_of(ZIP)}


async def test_a_sweep_beside_uploads_takes_nothing_that_is_needed(world: World, database: Database) -> None:
    """Code comes, goes with its function, and comes again, while everything that nobody has is swept at once."""
    sweeper = CodeSweeper(database, world.codes, world.catalogue.locks, -3600)
    over = asyncio.Event()
    swept = 0

    async def sweep() -> None:
        nonlocal swept
        while not over.is_set():
            swept += (await sweeper.sweep(dry_run=False)).deleted

    async def come_and_go(name: str) -> None:
        for _ in range(15):
            await world.catalogue.create({**FIELDS, "name": name}, OWNER, "ann")
            await world.give(ZIP, name)
            assert await world.objects.size(PREFIX + digest_of(ZIP)) == len(ZIP)
            await world.catalogue.delete(name)

    sweeping = asyncio.create_task(sweep())
    await asyncio.gather(come_and_go("one"), come_and_go("two"))
    over.set()
    await sweeping
    assert swept > 0
    await sweeper.sweep(dry_run=False)
    assert await world.stored() == set()


async def test_a_caller_that_leaves_during_a_fetch_ends_nobody_elses(world: World) -> None:
    await world.catalogue.create(FIELDS, OWNER, "ann")
    await world.give(ZIP)
    (version,) = await world.catalogue.current()
    (world.folder / "code" / version.code_digest).unlink()
    first, second = (asyncio.create_task(world.catalogue.fetch(version)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).archive.read_bytes() == ZIP
    await asyncio.gather(first, return_exceptions=True)
    assert world.local() == {version.code_digest}


async def test_a_full_disk_refuses_code_and_takes_it_when_there_is_room(
    world: World, database: Database, tmp_path: Path
) -> None:
    await world.catalogue.create(FIELDS, OWNER, "ann")
    noise = os.urandom(300_000)
    packed, loose = (
        zipped(Item(b"index.js", b"one"), Item(b"d", noise[:size], method=0)) for size in (300_000, 9_000)
    )
    with small_disk(tmp_path / "disk", 1) as disk:
        codes = CodeStore(disk, world.objects)
        await codes.open()
        catalogue = Catalogue(database, world.vault, codes, ReleasePolicy())

        async def give(data: bytes) -> None:
            async with codes.receiving(pieces(data, 50_000)) as received:
                await catalogue.put_code("hello", received, "ann")

        try:
            for leave, told in ((100_000, "cannot be written here"), (450_000, "cannot be unpacked here")):
                with filled(disk, leave=leave):
                    with pytest.raises(ServiceUnavailable, match=told):
                        await give(packed)
                    assert {path.name for path in disk.iterdir()} == {"ballast"}
            await give(loose)
            await give(packed)
        finally:
            await codes.close()
    assert (await world.catalogue.get("hello")).current.number == 3
    assert await world.stored() == {digest_of(packed), digest_of(loose)}
