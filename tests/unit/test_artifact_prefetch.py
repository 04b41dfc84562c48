"""Prefetching: off for trees in memory, on once the disk is needed, and never changing what is packed."""

import os
import resource
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from aether.artifact import prefetch
from aether.artifact.pack import pack
from aether.artifact.tree import Entry, scan
from aether.model.errors import LocalIOError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[bytes]:
    """The files asked for in advance."""
    found: set[bytes] = set()
    real = prefetch._ask_for  # pyright: ignore[reportPrivateUsage]

    def ask(source: bytes) -> None:
        found.add(source)
        real(source)

    monkeypatch.setattr(prefetch, "_ask_for", ask)
    return found


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that delivers a thousand blocks between two looks."""
    blocks = iter(range(0, 1 << 40, 1000))
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_inblock=next(blocks)))


def tree(root: Path) -> list[Entry]:
    root.mkdir()
    for number in range(3000):
        (root / f"f{number}").write_text(str(number))
    return scan(root)


def test_a_tree_in_memory_is_not_asked_for(
    tmp_path: Path, asked: set[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_inblock=5))
    pack(tree(tmp_path / "app"), tmp_path / "out")
    assert asked == set()


@pytest.mark.usefixtures("cold")
def test_a_cold_tree_is_asked_for_and_packed_the_same(tmp_path: Path, asked: set[bytes]) -> None:
    before = threading.active_count()
    entries = tree(tmp_path / "app")
    made = pack(entries, tmp_path / "out")
    assert asked
    assert asked <= {os.fsencode(entry.source) for entry in entries}
    assert threading.active_count() == before
    asked.clear()
    assert pack(entries, tmp_path / "out2").digest == made.digest


@pytest.mark.usefixtures("cold", "asked")
def test_a_missing_file_is_reported_by_the_reader_and_threads_end(tmp_path: Path) -> None:
    before = threading.active_count()
    entries = tree(tmp_path / "app")
    (tmp_path / "app" / "f999").unlink()
    with pytest.raises(LocalIOError, match="cannot read 'f999'"):
        pack(entries, tmp_path / "out")
    assert threading.active_count() == before
