"""Code images by the real mksquashfs: same tree, same bytes; each is made once; attacks leave nothing."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.artifact.extract import ArchiveTooLarge, ExtractLimits, InvalidArchive
from aether.artifact.pack import pack
from aether.artifact.tree import scan
from aether.model.errors import BadRequest, DigestMismatch
from aether.model.function_instance import Code, CodeForm
from aether.runtimes.microvm import images
from aether.runtimes.microvm.images import Image, ImageStore
from support.zips import Item, zipped

if shutil.which("mksquashfs") is None:
    pytest.skip("component: squashfs-tools", allow_module_level=True)

FILES = {"index.js": b"serve()", "lib/a.js": b"a" * 9000, "lib/deep/er/b": b"", "z": b"\0" * 5}


def put(path: Path, raw: bytes) -> tuple[Path, str]:
    path.write_bytes(raw)
    return path, sha256(raw).hexdigest()


def tar(files: dict[str, bytes], *, newest: int = 0, **fields: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number, (name, content) in enumerate(files.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid = len(content), newest + number, 1000 + number
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return gzip.compress(out.getvalue(), 1)


def zip_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def reverse(files: dict[str, bytes]) -> dict[str, bytes]:
    return dict(reversed(files.items()))


def listed(image: Image) -> list[str]:
    return subprocess.run(
        ["unsquashfs", "-lls", "-d", "", str(image.path)], check=True, capture_output=True, text=True
    ).stdout.splitlines()


async def test_one_tree_makes_one_image_whatever_archive_it_came_in(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    made = [
        await store.image(code(put(tmp_path / "1", tar(FILES, newest=1_700_000_000)), CodeForm.TAR_GZ)),
        await store.image(code(put(tmp_path / "2", tar(reverse(FILES), mode=0o4600)), CodeForm.TAR_GZ)),
        await store.image(code(put(tmp_path / "3", zip_of(FILES)), CodeForm.ZIP)),
        await store.image(code(put(tmp_path / "4", zip_of(reverse(FILES))), CodeForm.ZIP)),
    ]
    assert len({image.path for image in made}) == 4
    assert {image.digest for image in made} == {sha256(made[0].path.read_bytes()).hexdigest()}
    assert {image.path.stat().st_mode & 0o7777 for image in made} == {0o600}
    assert stat.S_IMODE((tmp_path / "images").stat().st_mode) == 0o700
    lines = "\n".join(listed(made[0]))
    assert "root/root" in lines
    assert "/lib/deep/er/b" in lines


def code(put: tuple[Path, str], form: CodeForm) -> Code:
    return Code(put[0], form, put[1])


async def test_a_private_umask_changes_nothing(tmp_path: Path) -> None:
    archive, digest = put(tmp_path / "in", tar(FILES))
    plain = await ImageStore(tmp_path / "a").image(Code(archive, CodeForm.TAR_GZ, digest))
    before = os.umask(0o077)
    try:
        private = await ImageStore(tmp_path / "b").image(Code(archive, CodeForm.TAR_GZ, digest))
    finally:
        os.umask(before)
    assert plain.digest == private.digest


async def test_an_artifact_keeps_its_links_and_an_upload_may_have_none(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "tool.js").write_text("tool()")
    (tree / "bin" / "tool").symlink_to("../tool.js")
    packed = pack(scan(tree), tmp_path / "packed").artifact
    digest = sha256(packed.read_bytes()).hexdigest()
    store = ImageStore(tmp_path / "images")
    image = await store.image(Code(packed, CodeForm.ARTIFACT, digest))
    assert any(line.endswith("/bin/tool -> ../tool.js") for line in listed(image))
    with pytest.raises(InvalidArchive, match="is a link"):
        await store.image(Code(packed, CodeForm.TAR_GZ, digest))


async def test_each_image_is_made_once_and_who_goes_away_ends_nobody_elses_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    make = images.make_image

    def counted(tree: Path, target: Path) -> None:
        calls.append(target)
        make(tree, target)

    monkeypatch.setattr(images, "make_image", counted)
    store, other = ImageStore(tmp_path / "images"), ImageStore(tmp_path / "images")
    archive, digest = put(tmp_path / "in", zip_of(FILES))
    tasks = [asyncio.create_task(store.image(Code(archive, CodeForm.ZIP, digest))) for _ in range(20)]
    tasks += [asyncio.create_task(other.image(Code(archive, CodeForm.ZIP, digest))) for _ in range(5)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    assert len(set(done[1:])) == 1
    assert len(calls) == 1
    archive.unlink()
    assert await ImageStore(tmp_path / "images").image(Code(archive, CodeForm.ZIP, digest)) == done[1]
    store.sweep()
    assert sorted(item.suffix for item in (tmp_path / "images").iterdir()) == [".digest", ".sqfs"]


@pytest.mark.parametrize(
    ("form", "raw", "match"),
    [
        (CodeForm.ZIP, zipped(Item(b"../x", b"1")), "leads out"),
        (CodeForm.ZIP, zipped(Item(b"a", b"1", mode=stat.S_IFLNK)), "is a link"),
        (CodeForm.ZIP, zipped(Item(b"a", bytes(3 << 20))), "more than"),
        (CodeForm.ZIP, tar(FILES), "not a zip file"),
        (CodeForm.TAR_GZ, zip_of(FILES), "not gzip"),
        (CodeForm.TAR_GZ, tar({"../x": b"1"}), "leads out"),
        (CodeForm.TAR_GZ, tar({"a": b""}, type=tarfile.SYMTYPE, linkname="b"), "is a link"),
        (CodeForm.TAR_GZ, tar({"a": b""}, type=tarfile.LNKTYPE, linkname="b"), "hard link"),
        (CodeForm.TAR_GZ, tar({"a": b"1", "A": b"2"}), "case does not count"),
        (CodeForm.TAR_GZ, tar({"a": bytes(3 << 20)}), "more than"),
        (CodeForm.TAR_GZ, tar({str(n): b"" for n in range(60)}), "more than"),
        (CodeForm.ARTIFACT, tar({"a": b""}, type=tarfile.SYMTYPE, linkname="/etc"), "outside"),
    ],
    ids=lambda value: value if isinstance(value, str) else "archive",
)
async def test_attacks_leave_nothing(tmp_path: Path, form: CodeForm, raw: bytes, match: str) -> None:
    store = ImageStore(tmp_path / "images", limits=ExtractLimits(max_bytes=2 << 20, max_entries=50))
    with pytest.raises((InvalidArchive, ArchiveTooLarge), match=match):
        await store.image(code(put(tmp_path / "in", raw), form))
    assert [item.suffix for item in (tmp_path / "images").iterdir()] == [".lock"]
    assert store.sweep() == 0
    assert list((tmp_path / "images").iterdir()) == []


async def test_wrong_digests_are_refused(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    archive, _ = put(tmp_path / "in", zip_of(FILES))
    with pytest.raises(DigestMismatch):
        await store.image(Code(archive, CodeForm.ZIP, "0" * 64))
    with pytest.raises(BadRequest):
        await store.image(Code(archive, CodeForm.ZIP, "../" * 22))


async def test_what_a_killed_build_left_is_swept_and_not_taken_for_an_image(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    archive, digest = put(tmp_path / "in", zip_of(FILES))
    key = store.key(Code(archive, CodeForm.ZIP, digest))
    left = tmp_path / "images" / f"{key}.part-gone" / "tree"
    left.mkdir(parents=True)
    (tmp_path / "images" / f"{key}.lock").touch()
    (tmp_path / "images" / f"{key}.digest").write_text("0" * 64)
    assert store.sweep() == 1
    assert store.sweep() == 0
    image = await store.image(Code(archive, CodeForm.ZIP, digest))
    assert image.digest == sha256(image.path.read_bytes()).hexdigest()


NAME = st.text(st.characters(codec="utf-8", categories=["Ll", "Nd"]), min_size=1, max_size=6)
TREES = st.dictionaries(NAME, st.one_of(st.binary(max_size=300), st.dictionaries(NAME, st.binary(max_size=9))))


@settings(max_examples=6)
@given(TREES, st.randoms(use_true_random=False))
def test_any_tree_makes_the_same_image_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, bytes | dict[str, bytes]], random: object
) -> None:
    flat: dict[str, bytes] = {}
    for name, value in tree.items():
        if isinstance(value, bytes):
            flat[name] = value
        else:
            flat |= {f"{name}/{inner}": content for inner, content in value.items()}
    folded = [name.casefold() for name in flat]
    if len(set(folded)) != len(folded) or len({name.split("/")[0].casefold() for name in flat}) != len(
        {name.split("/")[0] for name in flat}
    ):
        return
    order = list(flat.items())
    random.shuffle(order)  # type: ignore[attr-defined]
    folder = tmp_path_factory.mktemp("trees")
    store = ImageStore(folder / "images")
    made = [
        store.made(code(put(folder / "1", tar(flat)), CodeForm.TAR_GZ), "one"),
        store.made(code(put(folder / "2", zip_of(dict(order))), CodeForm.ZIP), "two"),
    ]
    assert made[0].digest == made[1].digest
