"""What is kept of instances that have ended."""

from __future__ import annotations

import os
from pathlib import Path

from aether.runtimes.trimming import trim_logs


def test_the_newest_logs_are_kept_whole_and_those_of_instances_that_are_there(tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "second", "held", "third", "oldest"]):
        for suffix in (".log", ".log.1"):
            path = tmp_path / "app" / f"{name}{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_text("said")
            os.utime(path, (1000 - age, 1000 - age))
    # an instance's age is that of its newest file
    os.utime(tmp_path / "app" / "oldest.log.1", (2000, 2000))
    assert trim_logs(tmp_path, {"held"}, 2) == 2
    kept = {path.name for path in (tmp_path / "app").iterdir()}
    assert kept == {f"{name}{suffix}" for name in ("oldest", "newest", "held") for suffix in (".log", ".log.1")}
    assert trim_logs(tmp_path, set(), 0) == 3
    assert list((tmp_path / "app").iterdir()) == []
    assert trim_logs(tmp_path / "absent", set(), 0) == 0
