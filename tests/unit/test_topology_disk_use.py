"""What the parts of a data directory take, counted as the disk does, and never for longer than anybody waits."""

from __future__ import annotations

import os
from pathlib import Path

from aether.topology.disk_use import Use, disk_use, told


def made(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))


def test_every_part_is_counted_by_its_blocks(tmp_path: Path) -> None:
    made(tmp_path / "objects" / "artifacts" / "a" / "b" / "app.tar.gz", 3_000_000)
    made(tmp_path / "logs" / "a" / "1.log", 100_000)
    made(tmp_path / "aether.db", 50_000)
    made(tmp_path / "aether.db-wal", 50_000)
    made(tmp_path / "elsewhere", 9_000_000)
    (tmp_path / "logs" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    os.link(tmp_path / "logs" / "a" / "1.log", tmp_path / "logs" / "a" / "same")
    with (tmp_path / "logs" / "a" / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 30)
    found = {use.part: use for use in disk_use(tmp_path)}
    assert all(use.whole for use in found.values())
    assert 3_000_000 <= found["artifacts"].bytes < 3_100_000
    assert 100_000 <= found["logs"].bytes < 150_000
    assert 100_000 <= found["database"].bytes < 120_000
    assert (found["releases"].bytes, found["volumes"].bytes) == (0, 0)


def test_it_ends_when_patience_does_and_says_so(tmp_path: Path) -> None:
    for number in range(20):
        made(tmp_path / "releases" / str(number), 5000)
    found = disk_use(tmp_path, patience_secs=-1)
    assert [use.whole for use in found] == [True, False, True, True, True]
    assert "releases at least" in told(found)


def test_a_folder_that_is_not_there_takes_nothing(tmp_path: Path) -> None:
    assert {use.bytes for use in disk_use(tmp_path / "none")} == {0}


def test_sizes_are_told_in_units_that_people_read() -> None:
    assert told([Use("a", 12), Use("b", 3 << 20), Use("c", 5 << 40, whole=False)]) == (
        "a 12 B, b 3.0 MiB, c at least 5120.0 GiB"
    )
