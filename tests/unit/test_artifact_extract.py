"""Unpacking hostile archives: nothing outside, nothing half, nothing left behind."""

import errno
import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.artifact.extract import ArchiveTooLarge, ExtractLimits, InvalidArchive, extract, sweep
from aether.artifact.links import escapes
from aether.artifact.pack import pack
from aether.artifact.reader import clean_name
from aether.artifact.tree import scan
from aether.model.errors import BadRequest


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=kind, linkname=target)


def tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def archive(tmp_path: Path, raw: bytes, *, compress: bool = True) -> Path:
    path = tmp_path / "in.tar.gz"
    path.write_bytes(gzip.compress(raw, 1) if compress else raw)
    return path


def refuse(tmp_path: Path, raw: bytes, match: str, *, compress: bool = True, **limits: int) -> None:
    """The archive is refused with `match`, and the folder it would have been unpacked in is as before."""
    path = archive(tmp_path, raw, compress=compress)
    (tmp_path / "releases").mkdir(exist_ok=True)
    with pytest.raises(BadRequest, match=match) as caught:
        extract(path, tmp_path / "releases" / "r1", limits=ExtractLimits(**limits))
    assert isinstance(caught.value, InvalidArchive | ArchiveTooLarge)
    assert list((tmp_path / "releases").iterdir()) == []
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in.tar.gz", "releases"]


DIRECTORY = {"type": tarfile.DIRTYPE}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_archives_of_other_tools_unpack(tmp_path: Path, form: int) -> None:
    long = "d/" + "n" * 90 + "/" + "m" * 60
    raw = tar(
        member("./a", b"1", mode=0o777), member("d", **DIRECTORY), member(long, b"2"), link("l", "a"), form=form
    )
    stats = extract(archive(tmp_path, raw), tmp_path / "out")
    assert (tmp_path / "out" / "a").read_bytes() == b"1"
    assert (tmp_path / "out" / "a").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "out" / long).read_bytes() == b"2"
    assert (tmp_path / "out" / "l").readlink() == Path("a")
    assert (stats.files, stats.directories, stats.links, stats.bytes) == (2, 2, 1, 2)


def test_setuid_and_odd_modes_are_dropped(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        extract(archive(tmp_path, tar(member("a", mode=0o6777), member("b", mode=0o000))), tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "a").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "out" / "b").stat().st_mode & 0o7777 == 0o644


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([member("/etc/cron.d/x", b"1")], "absolute name"),
        ([member("../x", b"1")], "leads out"),
        ([member("a/../../x", b"1")], "leads out"),
        ([member("a/./b", b"1")], "leads out"),
        ([member("a//b", b"1")], "leads out"),
        ([link("a", "/etc")], "outside of the archive"),
        ([link("a", "../x")], "outside of the archive"),
        ([link("d/a", "../../x")], "outside of the archive"),
        ([link("d/up", ".."), link("d/out", "up/../x")], "outside of the archive"),
        ([link("a", "."), member("a/b", b"1")], "below 'a', which is not a folder"),
        ([link("a", "b"), member("a", b"1")], "twice"),
        ([member("a", b"1"), member("a", b"2")], "twice"),
        ([member("a", b"1"), member("a", **DIRECTORY)], "twice"),
        ([member("a", b"1"), member("a/b", b"2")], "not a folder"),
        ([member("a", **DIRECTORY), link("a", "b")], "twice"),
        ([member("a", b"1"), link("b", "a", tarfile.LNKTYPE)], "hard link"),
        ([link("b", "/etc/passwd", tarfile.LNKTYPE)], "hard link"),
        ([member("a", type=tarfile.CHRTYPE)], "device"),
        ([member("a", type=tarfile.BLKTYPE)], "device"),
        ([member("a", type=tarfile.FIFOTYPE)], "named pipe"),
        ([member("a", type=b"S")], "sparse"),
        ([member("a", type=b"Z")], "unknown kind"),
        ([member("x" * 256, b"1")], "cannot be a file name"),
        ([member("/".join(["d"] * 200), b"1")], "cannot be a file name"),
        ([member("")], "no name"),
    ],
)
def test_members_that_may_not_be(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], match: str) -> None:
    refuse(tmp_path, tar(member("good", b"kept?"), *members), match)


def test_a_link_cannot_be_written_through_whatever_the_order(tmp_path: Path) -> None:
    outside = tmp_path / "releases"
    outside.mkdir()
    refuse(tmp_path, tar(member("d", **DIRECTORY), link("d/l", "."), member("d/l/x", b"1")), "not a folder")


def test_archives_cut_anywhere_are_refused(tmp_path: Path) -> None:
    raw = tar(member("a", b"x" * 3000), member("b/c", b"y" * 700))
    for size in (0, 100, 512, 600, 1024, 3000, 4096, len(raw.rstrip(b"\0"))):
        refuse(tmp_path, raw[:size], "truncated|empty|damaged|end is not marked")
    packed = gzip.compress(raw, 1)
    for size in range(1, len(packed)):
        refuse(tmp_path, packed[:size], "truncated|damaged|not gzip", compress=False)


def test_a_member_of_gzip_missing_at_the_end_is_noticed(tmp_path: Path) -> None:
    raw = tar(member("a", b"x" * 3000))
    both = gzip.compress(raw[:1024]) + gzip.compress(raw[1024:])
    extract(archive(tmp_path, both, compress=False), tmp_path / "out")
    (tmp_path / "out" / "a").unlink()
    (tmp_path / "out").rmdir()
    refuse(tmp_path, gzip.compress(raw[:1024]), "truncated", compress=False)


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    raw = tar(member("a", b"1"))
    refuse(tmp_path, gzip.compress(raw) + b"more", "do not belong", compress=False)
    refuse(tmp_path, gzip.compress(raw) + gzip.compress(b"more"), "do not belong", compress=False)
    refuse(tmp_path, raw + b"x" * 512, "do not belong")
    extract(archive(tmp_path, raw + bytes(5000)), tmp_path / "out")


def test_damage_is_noticed(tmp_path: Path) -> None:
    raw = bytearray(tar(member("a", b"1" * 600)))
    packed = bytearray(gzip.compress(bytes(raw)))
    packed[-6] ^= 1
    refuse(tmp_path, bytes(packed), "damaged", compress=False)
    raw[0] ^= 1
    refuse(tmp_path, bytes(raw), "checksum")
    refuse(tmp_path, b"not gzip at all", "not gzip", compress=False)
    refuse(tmp_path, b"plain text" * 200, "damaged")


def test_limits(tmp_path: Path) -> None:
    raw = tar(*(member(f"f{i}", b"x" * 1000) for i in range(30)))
    refuse(tmp_path, raw, "more than 20000 bytes", max_bytes=20_000)
    refuse(tmp_path, raw, "more than 10 members", max_entries=10)
    deep = tar(*(member("/".join([f"d{i}"] * 20), b"") for i in range(4)))
    refuse(tmp_path, deep, "more than 40 members", max_entries=40)


def test_bombs_are_stopped_by_their_ratio(tmp_path: Path) -> None:
    refuse(tmp_path, tar(member("zeros", bytes(100 << 20))), "more than 100 times", max_ratio=100)


def test_a_size_that_lies_is_noticed(tmp_path: Path) -> None:
    info, _ = member("a", b"1")
    info.size = 1 << 40
    refuse(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + bytes(4096), "truncated")
    folder, _ = member("d", **DIRECTORY)
    folder.size = 512
    refuse(tmp_path, folder.tobuf() + bytes(4096), "has content")


@pytest.mark.parametrize(
    "body", [b"", b"99999 path=x\n", b"6 path\n", b"x path=a\n", b"11 path=a/b\n junk", b"-5 a=b\n", b"9 path=a"]
)
def test_extended_headers_that_cannot_be_read(tmp_path: Path, body: bytes) -> None:
    raw = tar(member("././@PaxHeader", body, type=b"x"), member("a", b"1"), form=tarfile.USTAR_FORMAT)
    if not body:
        extract(archive(tmp_path, raw), tmp_path / "out")
        return
    refuse(tmp_path, raw, "damaged")


def test_an_extended_header_cannot_smuggle_names(tmp_path: Path) -> None:
    body = b"18 path=../escape\n"
    refuse(tmp_path, tar(member("p", body, type=b"x"), member("a"), form=tarfile.USTAR_FORMAT), "leads out")
    body = b"13 path=a\0b\n\n"
    refuse(tmp_path, tar(member("p", body, type=b"x"), member("a"), form=tarfile.USTAR_FORMAT), "cannot be|damaged")
    body = b"12 path=all\n"
    refuse(tmp_path, tar(member("p", body, type=b"g"), member("a"), form=tarfile.USTAR_FORMAT), "all its members")


def test_an_existing_target_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError):
        extract(archive(tmp_path, tar(member("a"))), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in.tar.gz", "out"]


def test_sweep_removes_what_a_killed_extraction_left(tmp_path: Path) -> None:
    (tmp_path / ".extracting-1-abc" / "d").mkdir(parents=True)
    (tmp_path / "release").mkdir()
    assert sweep(tmp_path) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["release"]


def test_durable_extraction_gives_the_same(tmp_path: Path) -> None:
    stats = extract(archive(tmp_path, tar(member("a", b"1"))), tmp_path / "out", durable=True)
    assert stats.files == 1
    assert (tmp_path / "out" / "a").read_bytes() == b"1"


def test_stats_carry_the_content_digest(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "x").write_bytes(b"1" * 2_000_000)
    made = pack(scan(tmp_path / "app"), tmp_path / "art")
    stats = extract(made.artifact, tmp_path / "out")
    assert (stats.content_digest, stats.tar_bytes) == (made.content_digest, made.tar_bytes)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 4095), value=st.integers(0, 255), second=st.integers(0, 2047))
def test_no_altered_byte_gets_anything_outside(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int, second: int
) -> None:
    base = tmp_path_factory.mktemp("fuzz")
    raw = bytearray(tar(member("a/b", b"x" * 600), link("a/l", "b"), member("c", b"y"), form=tarfile.USTAR_FORMAT))
    raw[at % len(raw)] = value
    raw[second] ^= 0x20
    path = archive(base, bytes(raw))
    try:
        extract(path, base / "out")
    except BadRequest:
        assert not (base / "out").exists()
    assert {item.name for item in base.iterdir()} <= {"in.tar.gz", "out"}


SEGMENT = st.sampled_from([b"a", b"b", b"c", b"..", b"."])
PATH = st.lists(SEGMENT, min_size=1, max_size=5).map(b"/".join)


@settings(max_examples=300)
@given(
    links=st.dictionaries(st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=3).map(b"/".join), PATH)
)
def test_no_link_judged_safe_resolves_outside(
    tmp_path_factory: pytest.TempPathFactory, links: dict[bytes, bytes]
) -> None:
    """The rule is compared with what the kernel says of the same links."""
    top = tmp_path_factory.mktemp("links")
    root = os.fsencode(top / "x" / "y" / "root")
    os.makedirs(root)
    made: dict[bytes, bytes] = {}
    for name, target in sorted(links.items()):
        if any(name.startswith(other + b"/") for other in made):
            continue
        os.makedirs(os.path.dirname(root + b"/" + name), exist_ok=True)
        if not os.path.lexists(root + b"/" + name):
            os.symlink(target, root + b"/" + name)
            made[name] = target
    if any(escapes(name, target, made) for name, target in made.items()):
        return
    for name in made:
        try:
            os.stat(root + b"/" + name)
        except OSError as error:
            if error.errno == errno.ELOOP:
                continue  # leads nowhere; realpath would read on as if the loop were a plain name
        real = os.path.realpath(root + b"/" + name)
        assert real == root or real.startswith(root + b"/")


@given(st.binary(max_size=60))
def test_clean_names_stay_inside(raw: bytes) -> None:
    try:
        name = clean_name(raw)
    except InvalidArchive:
        return
    assert not name.startswith(b"/")
    assert b"\0" not in name
    assert not {b"..", b"."} & set(name.split(b"/"))
