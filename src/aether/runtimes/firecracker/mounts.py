"""Shows files of the server's in a jail: read-only there, and owned by the jail's own user.

Images are shared by machines and are root's, mode 0600, so no user of a machine may open them. An idmapped mount
(Linux 5.12) shows each machine the same file as its own, without a copy and without a right for anybody else. Mounts
are made in a mount namespace that only the machine's processes are in: they have no name on the host and are gone
with the processes, also after kill -9 of the server.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from aether.model.errors import ServiceUnavailable

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_SLAVE = 0x4000, 0x80000
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 0x1, 0x80000
_MOVE_MOUNT_F_EMPTY_PATH, _AT_EMPTY_PATH, _AT_FDCWD = 0x4, 0x1000, -100
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _IDMAP = 0x1, 0x2, 0x4, 0x8, 0x100000
Made = TypeVar("Made")
_libc = ctypes.CDLL(None, use_errno=True)


class _Attributes(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class Owners:
    """User namespaces that map the server's user to one other; kept, as making one takes a process and 4 ms."""

    def __init__(self) -> None:
        self._made: dict[int, int] = {}

    def namespace(self, user: int) -> int:
        """A descriptor that stays this object's. Two threads must not ask for the same user at a time. Blocks."""
        if (found := self._made.get(user)) is None:
            self._made[user] = found = _make_namespace(user)
        return found

    def close(self) -> None:
        while self._made:
            os.close(self._made.popitem()[1])


def with_files(files: Mapping[Path, Path], namespace: int, make: Callable[[], Made]) -> Made:
    """What `make` makes, a process, where every existing file of the keys of `files` shows what its value is.

    Raises ServiceUnavailable where the kernel or the file system cannot do that, OSError. Blocks.
    """
    made: list[Made] = []
    failed: list[BaseException] = []

    def work() -> None:
        # in a thread of its own, which stays in the mount namespace until it ends
        try:
            _enter_new_namespace()
            for target, source in files.items():
                _show(source, target, namespace)
            made.append(make())
        except BaseException as error:  # noqa: BLE001 (raised by the caller's thread)
            failed.append(error)

    thread = threading.Thread(target=work, name="aether-mounts")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _enter_new_namespace() -> None:
    _check(_libc.unshare(_CLONE_NEWNS))
    # what is mounted here must not come about on the host
    _check(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_SLAVE | _MS_REC), None))


def _show(source: Path, target: Path, namespace: int) -> None:
    tree = _check(
        _libc.syscall(
            _OPEN_TREE, _AT_FDCWD, os.fsencode(source), ctypes.c_uint(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC)
        )
    )
    try:
        wanted = _Attributes(_RDONLY | _NOSUID | _NODEV | _NOEXEC | _IDMAP, 0, 0, namespace)
        size = ctypes.c_size_t(ctypes.sizeof(wanted))
        try:
            _check(
                _libc.syscall(_MOUNT_SETATTR, tree, b"", ctypes.c_uint(_AT_EMPTY_PATH), ctypes.byref(wanted), size)
            )
        except OSError as error:
            raise ServiceUnavailable(
                f"images cannot be shown in jails here ({error.strerror}): Firecracker needs Linux 5.12 or newer and "
                "the data folder on a file system with idmapped mounts, such as ext4 or xfs"
            ) from error
        _check(
            _libc.syscall(
                _MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
            )
        )
    finally:
        os.close(tree)


def _make_namespace(user: int) -> int:
    # only a process with one thread may enter a user namespace; it says by a byte that it is in
    with subprocess.Popen(
        ["unshare", "--user", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"x")
        if process.stdout.read(1) != b"x":
            said = process.stderr.read().decode("utf-8", "replace").strip()
            raise ServiceUnavailable(f"images cannot be shown in jails here: there are no user namespaces ({said})")
        for kind, mine in (("uid", os.geteuid()), ("gid", os.getegid())):
            Path(f"/proc/{process.pid}/{kind}_map").write_text(f"{mine} {user} 1")
        found = os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        process.stdin.close()
        return found


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
