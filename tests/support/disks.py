"""Small disks that a test can fill for real: a tmpfs of its own, mounted as root."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_BLOCK = 1 << 16


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Path]:
    """A filesystem of this size at `path`; skips the test, naming the component, where none can be mounted."""
    path.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "aether-test", str(path)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode != 0:
        pytest.skip("component: a small disk (mounting a tmpfs needs root)")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def filled(folder: Path, *, leave: int = 0) -> Iterator[Path]:
    """Use up all of the disk that holds `folder`, but for about `leave` bytes; free again at the end or when the
    file that is yielded is removed."""
    ballast = folder / "ballast"
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        size = _BLOCK
        while size:
            try:
                os.write(descriptor, b"\1" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2
        if leave:
            os.ftruncate(descriptor, max(0, os.fstat(descriptor).st_size - leave))
        yield ballast
    finally:
        os.close(descriptor)
        ballast.unlink(missing_ok=True)
