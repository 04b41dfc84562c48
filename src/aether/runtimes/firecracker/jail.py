"""The jail of one machine: its folder, what the jailer is called with, and what is read and taken out of it.

What lies in the folder `root` belongs to the monitor, so whoever breaks out of a guest may put links and other
things there: nothing in it is followed, and everything is reached from a descriptor of the folder itself.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aether.model.errors import ServiceUnavailable
from aether.runtimes.firecracker.cgroups import Cgroups, holds, limits

KERNEL, INITRAMFS, ROOTFS, CODE = "vmlinux", "initramfs", "rootfs", "code"
STATE, MEMORY = "snapshot.state", "snapshot.memory"
"""Names in a jail. Snapshots hold those of the drives, so they are the same in each."""
TAKEN_STATE, TAKEN_MEMORY = "taken.state", "taken.memory"
"""What the monitor writes when a snapshot is taken."""
SOCKET = "api.socket"
LABEL_FLAG = b"--id"
"""What stands before the jail's name in the command lines of jailer and monitor."""
MAX_OPEN_FILES = 256
_STATE_BYTES = 64 << 20
"""Room for what a snapshot has beside the memory."""
_INSTANCE = "instance"


@dataclass(frozen=True, slots=True)
class Programs:
    jailer: Path
    firecracker: Path


@dataclass(frozen=True, slots=True)
class Jail:
    """`key` is its own among those of `parent`, which is the machines of one data folder and their cgroups."""

    base: Path
    program: str
    parent: str
    key: str
    user: int

    @property
    def name(self) -> str:
        """The jailer's --id, which also labels its processes and names its cgroup below `parent`."""
        return f"{self.parent}-{self.key}"

    @property
    def folder(self) -> Path:
        return self.base / self.program / self.name

    @property
    def root(self) -> Path:
        return self.folder / "root"


def jailer_command(
    programs: Programs, jail: Jail, *, network: str, cgroup_version: int, memory_mb: int, vcpus: int, level: str
) -> list[str]:  # fmt: skip
    """The jailer's command line; `network` is the path of the machine's network namespace."""
    wanted = limits(cgroup_version, memory_mb, vcpus)
    return [
        os.fspath(programs.jailer),
        *("--id", jail.name),
        *("--exec-file", os.fspath(programs.firecracker)),
        *("--uid", str(jail.user), "--gid", str(jail.user)),
        *("--chroot-base-dir", os.fspath(jail.base)),
        *("--netns", network),
        "--new-pid-ns",
        *("--cgroup-version", str(cgroup_version), "--parent-cgroup", jail.parent),
        *(word for item in wanted for word in ("--cgroup", item)),
        *("--resource-limit", f"no-file={MAX_OPEN_FILES}"),
        # the largest file it has to write is the memory of a snapshot
        *("--resource-limit", f"fsize={(memory_mb << 20) + _STATE_BYTES}"),
        "--",
        *("--api-sock", f"/{SOCKET}", "--level", level),
    ]


def make_jail(jail: Jail, files: Sequence[str], instance_id: str) -> None:
    """Make the folder, with a place for each of `files`. Blocks."""
    for folder in (jail.base, jail.folder.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
    for folder in (jail.folder, jail.root):
        folder.mkdir(mode=0o700)
    for name in files:
        os.close(os.open(jail.root / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    fd = os.open(jail.folder / _INSTANCE, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        file.write(instance_id)


def remove_jail(jail: Jail) -> None:
    """Remove the folder once no process is in it. Blocks."""
    if jail.folder.exists():
        shutil.rmtree(jail.folder)


def instance_of(jail: Jail) -> str:
    """Whose jail it is; the jail's own name when its maker was killed before it could say so."""
    try:
        return (jail.folder / _INSTANCE).read_text() or jail.name
    except FileNotFoundError:
        return jail.name


def open_monitor(jail: Jail, cgroups: Cgroups) -> int:
    """A descriptor (pidfd) of the process that the jailer, which has ended well, says it started.

    Raises ServiceUnavailable when it has ended already."""
    with _Root(jail) as root:
        try:
            fd = os.open(f"{jail.program}.pid", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
        except OSError as error:
            raise ServiceUnavailable(f"the jailer did not say what it started ({error})") from error
        with open(fd, "rb") as file:
            text = file.read(20)
    if not text.isdigit():
        raise ServiceUnavailable("the jailer did not say what it started")
    over = ServiceUnavailable("Firecracker ended as soon as it was started; its reason is in the log")
    try:
        handle = os.pidfd_open(int(text))
    except ProcessLookupError as error:
        raise over from error
    # the number may be another's by now: what the descriptor stands for is looked at after it is had. Not by its
    # command line, which is empty for a moment while a program becomes another.
    if not holds(cgroups, jail.parent, jail.name, int(text)):
        os.close(handle)
        raise over
    return handle


def open_socket(jail: Jail) -> socket.socket | None:
    """A connected, non-blocking socket to the monitor's API; None while it does not listen yet. Raises OSError."""
    with _Root(jail) as root:
        try:
            place = os.open(SOCKET, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
        except FileNotFoundError:
            return None
    try:
        seen = os.fstat(place)
        if not stat.S_ISSOCK(seen.st_mode) or seen.st_uid != jail.user:
            raise ServiceUnavailable("what lies in the jail in place of the monitor's socket is not its socket")
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            # by descriptor: paths of sockets are short, and this one cannot be exchanged any more
            made.connect(f"/proc/self/fd/{place}")
        except ConnectionRefusedError:
            made.close()
            return None
        except BaseException:
            made.close()
            raise
        return made
    finally:
        os.close(place)


def take_files(jail: Jail, files: Mapping[str, Path]) -> None:
    """Move regular files that the monitor wrote out of the jail; they are root's then, mode 0600. Blocks.

    Raises ServiceUnavailable when one is something else, OSError when the target lies on another file system.
    """
    with _Root(jail) as root:
        for name, target in files.items():
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root)
            try:
                seen = os.fstat(fd)
                if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1 or seen.st_uid != jail.user:
                    raise ServiceUnavailable(f"what the monitor left as {name} is no file of its own")
                os.fchown(fd, os.geteuid(), os.getegid())
                os.fchmod(fd, 0o600)
                os.rename(name, target, src_dir_fd=root)
                if not os.path.samestat(seen, os.lstat(target)):
                    raise ServiceUnavailable(f"{name} was exchanged while it was taken out of the jail")
            finally:
                os.close(fd)


class _Root:
    """A descriptor of the jail's root folder, for as long as it is entered."""

    def __init__(self, jail: Jail) -> None:
        self._path = jail.root
        self._fd = -1

    def __enter__(self) -> int:
        self._fd = os.open(self._path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_RDONLY | os.O_CLOEXEC)
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
