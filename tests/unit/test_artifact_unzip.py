"""Unpacking hostile zip archives: one reading only, nothing outside, nothing half, nothing left behind."""

from __future__ import annotations

import io
import stat
import zipfile
from pathlib import Path
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.artifact.extract import ArchiveTooLarge, ExtractLimits, InvalidArchive
from aether.artifact.unzip import unzip
from support.zips import Item, deflate, zipped

BIG = 0xFFFFFFFF
HUGE = pack("<2HQ", 1, 8, 1 << 40)


def put(folder: Path, raw: bytes) -> Path:
    path = folder / "in.zip"
    path.write_bytes(raw)
    return path


def refuse(folder: Path, raw: bytes, match: str, **limits: int) -> None:
    """The archive is refused with `match`, and nothing is left of the attempt."""
    (folder / "out").mkdir()
    with pytest.raises((InvalidArchive, ArchiveTooLarge), match=match):
        unzip(put(folder, raw), folder / "out" / "tree", limits=ExtractLimits(**limits))
    assert list((folder / "out").iterdir()) == []
    assert sorted(item.name for item in folder.iterdir()) == ["in.zip", "out"]


def contents(tree: Path) -> dict[str, bytes | None]:
    return {
        str(item.relative_to(tree)): item.read_bytes() if item.is_file() else None for item in sorted(tree.rglob("*"))
    }


def zip64_end(count: int, length: int, start: int, at: int, **fields: int) -> bytes:
    record = pack("<4sQ2H2L4Q", b"PK\6\6", fields.get("size", 44), 45, 45, 0, 0, count, count, length, start)
    return record + pack("<4sLQL", b"PK\6\7", 0, fields.get("place", at), fields.get("disks", 1))


def test_an_archive_of_pythons_own_writer_unpacks(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("d/", b"")
        archive.writestr("d/ä.txt", b"1" * 100_000)
        archive.writestr(zipfile.ZipInfo("stored"), b"2")
        script = zipfile.ZipInfo("run.sh")
        script.external_attr = (stat.S_IFREG | 0o6750) << 16
        archive.writestr(script, b"3")
        with archive.open("wide", "w", force_zip64=True) as member:
            member.write(b"4")
    assert unzip(put(tmp_path, raw.getvalue()), tmp_path / "tree") == 100_003
    assert contents(tmp_path / "tree") == {
        "d": None, "d/ä.txt": b"1" * 100_000, "run.sh": b"3", "stored": b"2", "wide": b"4"
    }  # fmt: skip
    assert (tmp_path / "tree" / "run.sh").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "tree" / "stored").stat().st_mode & 0o7777 == 0o644


def test_an_archive_written_to_a_pipe_unpacks(tmp_path: Path) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: object) -> int:
            raise io.UnsupportedOperation

        tell = seek  # type: ignore[assignment]

    raw = Pipe()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"one" * 1000)
        archive.writestr("b/c", b"")
    unzip(put(tmp_path, raw.getvalue()), tmp_path / "tree")
    assert contents(tmp_path / "tree") == {"a": b"one" * 1000, "b": None, "b/c": b""}


def test_an_archive_with_a_zip64_end_unpacks(tmp_path: Path) -> None:
    plain = zipped(Item(b"a", b"1"))
    start = plain.index(b"PK\1\2")
    end = plain.index(b"PK\5\6")
    raw = zipped(
        Item(b"a", b"1"), count=0xFFFF, here=0xFFFF, start=BIG, end64=zip64_end(1, end - start, start, end)
    )  # fmt: skip
    unzip(put(tmp_path, raw), tmp_path / "tree")
    assert contents(tmp_path / "tree") == {"a": b"1"}


@pytest.mark.parametrize(
    ("items", "match"),
    [
        ([Item(b"/etc/x", b"1")], "absolute name"),
        ([Item(b"../x", b"1")], "leads out"),
        ([Item(b"a/../../x", b"1")], "leads out"),
        ([Item(b"a/./b", b"1")], "leads out"),
        ([Item(b"a//b", b"1")], "leads out"),
        ([Item(b"..\\x", b"1")], "backslash"),
        ([Item(b"", b"1")], "no name"),
        ([Item(b".", b"1")], "no name"),
        ([Item(b"a\0b", b"1")], "cannot be a file name"),
        ([Item(b"x" * 256, b"1")], "cannot be a file name"),
        ([Item(b"\xff", b"1")], "not UTF-8"),
        ([Item(b"a", b"/etc/passwd", mode=stat.S_IFLNK | 0o777)], "is a link"),
        ([Item(b"a", mode=stat.S_IFIFO)], "neither a file nor a folder"),
        ([Item(b"a", mode=stat.S_IFCHR)], "neither a file nor a folder"),
        ([Item(b"a", b"1", mode=stat.S_IFDIR | 0o755)], "or the other way round"),
        ([Item(b"a/", mode=stat.S_IFREG | 0o755)], "or the other way round"),
        ([Item(b"a", b"1", attributes=0x10)], "or the other way round"),
        ([Item(b"a/", b"1")], "yet has content"),
        ([Item(b"a", b"1"), Item(b"a", b"2")], "twice"),
        ([Item(b"a", b"1"), Item(b"./a", b"2")], "twice"),
        ([Item(b"a", b"1"), Item(b"a/")], "twice"),
        ([Item(b"a", b"1"), Item(b"a/b", b"2")], "not a folder"),
        ([Item(b"a", b"1"), Item(b"A", b"2")], "case does not count"),
        ([Item(b"d/a", b"1"), Item(b"D/b", b"2")], "case does not count"),
        ([Item("é".encode(), b"1"), Item("e\u0301".encode(), b"2")], "case does not count"),
        ([Item("ß".encode(), b"1"), Item(b"SS", b"2")], "case does not count"),
        ([Item(b"a", b"1", flags=0x1)], "encrypted"),
        ([Item(b"a", b"1", flags=0x41)], "encrypted"),
        ([Item(b"a", b"1", flags=0x2000)], "encrypted"),
        ([Item(b"a", b"1", flags=0x20)], "way of packing"),
        ([Item(b"a", b"1", method=12)], "neither stored nor deflated"),
        ([Item(b"a", b"1", method=9)], "neither stored nor deflated"),
        ([Item(b"a", b"1", crc=7)], "wrong checksum"),
        ([Item(b"a", b"1", method=0, crc=7)], "wrong checksum"),
        ([Item(b"a", b"12", size=1)], "longer than"),
        ([Item(b"a", b"12", size=3)], "shorter than"),
        ([Item(b"a", b"12", method=0, size=1)], "two sizes"),
        ([Item(b"a", b"12", local_size=3)], "two sizes"),
        ([Item(b"a", b"1", raw=deflate(b"1") + b"more")], "does not end where"),
        ([Item(b"a", b"1" * 5000, raw=deflate(b"1" * 5000)[:-3])], "does not end where"),
        ([Item(b"a", b"1", raw=b"\xff\xff\xff")], "damaged"),
        ([Item(b"a", b"1", local_name=b"b")], "in another place"),
        ([Item(b"a", b"1", local_method=0)], "in another place"),
        ([Item(b"a", b"1", local_flags=0x800)], "in another place"),
        ([Item(b"a", b"1"), Item(b"b", b"1", offset=0, local_name=b"a")], "overlaps"),
        ([Item(b"a", b"1"), Item(b"b", b"2", offset=5)], "overlaps|not where"),
        ([Item(b"a", b"1", offset=900)], "belong to no member|beyond"),
        ([Item(b"a", b"1", before=b"#!/bin/sh\n")], "belong to no member"),
        ([Item(b"a", b"1"), Item(b"b", b"2", before=b"hidden")], "belong to no member"),
        ([Item(b"a", b"1", packed=100)], "beyond|two sizes"),
        ([Item(b"a", b"1", flags=8)], "two sizes"),
        ([Item(b"a", b"1", flags=8, descriptor=b"PK\7\x08" + bytes(12))], "two sizes"),
        ([Item(b"a", b"1", disk=1)], "several parts"),
        ([Item(b"a", b"1", size=BIG)], "not there"),
        ([Item(b"a", b"1", size=BIG, extra=pack("<2HL", 1, 4, 1))], "wrong length"),
        ([Item(b"a", b"1", extra=pack("<2HQ", 1, 8, 1))], "wrong length"),
        (
            [Item(b"a", b"1", size=BIG, extra=pack("<2HQ", 1, 8, 1 << 40), local_extra=pack("<2HQ", 1, 8, 1 << 40))],
            "more than",
        ),
        ([Item(b"a", b"1", size=BIG, extra=pack("<2HQ", 1, 8, 7), local_size=1)], "two sizes"),
        ([Item(b"a", b"1", packed=BIG, extra=pack("<2HQ", 1, 8, 1 << 50))], "not there|beyond|two sizes"),
        ([Item(b"a", b"1", offset=BIG, extra=pack("<2HQ", 1, 8, 1 << 60))], "belong to no member|beyond"),
        ([Item(b"a", b"1", extra=b"\1\0\xff\xff")], "cannot be read"),
        ([Item(b"a", b"1", extra=pack("<2HBL", 0x7075, 6, 1, 0) + b"b")], "two names"),
    ],
)
def test_members_that_may_not_be(tmp_path: Path, items: list[Item], match: str) -> None:
    refuse(tmp_path, zipped(*items), match)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "not a zip file"),
        (b"hello", "not a zip file"),
        (zipped(Item(b"a", b"1"))[:-1], "not a zip file"),
        (zipped(Item(b"a", b"1"), after=b"x"), "not a zip file"),
        (zipped(Item(b"a", b"1"), comment=zipped()), "two ways"),
        (zipped(Item(b"a", b"1"), comment_length=3), "not a zip file"),
        (zipped(Item(b"a", b"1"), disk=1), "several parts"),
        (zipped(Item(b"a", b"1"), here=0), "several parts"),
        (zipped(Item(b"a", b"1"), count=2, here=2), "cut off"),
        (zipped(Item(b"a", b"1"), Item(b"b", b"1"), count=1, here=1), "more than it says"),
        (zipped(Item(b"a", b"1"), gap=b"hidden"), "belong to no member"),
        (zipped(Item(b"a", b"1"), start=3), "not where"),
        (b"MZ" + zipped(Item(b"a", b"1")), "not where"),
        (zipped(Item(b"a", b"1"), start=BIG), "not there"),
        (zipped(Item(b"a", b"1"), count=0xFFFF, here=0xFFFF), "not there"),
        (zipped(Item(b"a", b"1"), end64=zip64_end(1, 1, 1, 1)), "zip64 record is not where"),
        (zipped(Item(b"a", b"1"), end64=zip64_end(2, 47, 34, 81)), "do not agree"),
        (zipped(Item(b"a", b"1"), count=0xFFFF, here=0xFFFF, end64=zip64_end(1 << 40, 47, 34, 81)), "more than"),
        (zipped(Item(b"a", b"1"), end64=zip64_end(1, 47, 34, 81, size=99)), "damaged"),
        (zipped(Item(b"a", b"1"), end64=zip64_end(1, 47, 34, 81, disks=2)), "several parts"),
    ],
)
def test_ends_that_lie(tmp_path: Path, raw: bytes, match: str) -> None:
    refuse(tmp_path, raw, match)


def test_bombs_are_refused_by_bytes_entries_and_ratio(tmp_path: Path) -> None:
    zeros = bytes(70 << 20)
    bomb = zipped(Item(b"a", zeros))
    refuse(tmp_path, bomb, "200 times", max_ratio=200)


def test_a_bomb_that_hides_its_size_stops_at_what_it_told(tmp_path: Path) -> None:
    refuse(tmp_path, zipped(Item(b"a", bytes(8 << 20), size=10)), "longer than")


def test_too_many_bytes_and_members(tmp_path: Path) -> None:
    many = zipped(*(Item(b"%d" % n) for n in range(11)))
    for name, raw, limits in (
        ("bytes", zipped(Item(b"a", b"12345")), {"max_bytes": 4}),
        ("members", many, {"max_entries": 10}),
        ("folders", zipped(Item(b"a/b/c/d/e", b"1")), {"max_entries": 4}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        refuse(folder, raw, "more than", **limits)


NAMES = st.lists(
    st.text(st.characters(codec="ascii", categories=["Ll", "Nd"]), min_size=1, max_size=4), min_size=1, max_size=3
).map("/".join)


@settings(max_examples=40)
@given(st.dictionaries(NAMES, st.binary(max_size=200), max_size=8), st.booleans())
def test_what_another_writer_packed_comes_out_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], deflated: bool
) -> None:
    files = {name: data for name, data in files.items() if not any(other.startswith(name + "/") for other in files)}
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    folder = tmp_path_factory.mktemp("zip")
    unzip(put(folder, raw.getvalue()), folder / "tree")
    assert {name: data for name, data in contents(folder / "tree").items() if data is not None} == files


@settings(max_examples=150)
@given(st.data())
def test_an_archive_with_changed_bytes_is_refused_or_read_as_every_reader_would(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever is changed, no other content comes out: it is refused, or read as another reader would."""
    files = {b"a/one": b"first", b"two": b"second" * 50}
    raw = bytearray(zipped(*(Item(name, content) for name, content in files.items())))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("changed")
    try:
        unzip(put(folder, bytes(raw)), folder / "tree")
    except (InvalidArchive, ArchiveTooLarge):
        assert not (folder / "tree").exists()
        return
    with zipfile.ZipFile(io.BytesIO(bytes(raw))) as archive:
        theirs = {name.rstrip("/"): archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    found = {name: content for name, content in contents(folder / "tree").items() if content is not None}
    assert found == {name.removeprefix("./"): content for name, content in theirs.items()}
