"""Persistent volumes: `<data>/volumes/<app>/<name>`, shown to every instance of the app and to nothing else.

The folders above are this user's alone; a volume itself belongs to the uid of its app's instances. What lies in it is
the app's: nothing here follows a link in it, and counting and deleting are left to programs that no depth of folders
stops. A deleted volume is moved aside first, so that one deleted halfway is never seen again.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from aether.model.errors import BadRequest, LocalIOError
from aether.model.instance import InstanceSpec, Volume
from aether.model.names import new_id
from aether.runtimes.process.host import HostView

_DELETED = ".deleted-"
_MEASURE_SECS = 20.0


class Volumes:
    """The volumes under one data folder."""

    def __init__(self, data: Path) -> None:
        self._root = data / "volumes"

    def place(self, app: str, name: str) -> Path:
        return self._root / app / name

    def prepare(self, spec: InstanceSpec, view: HostView, uid: int | None) -> None:
        """Make what is missing: volumes of their own (owned by `uid`), and where they are shown below /app.

        Raises BadRequest when a volume cannot be shown at its path. Blocks."""
        for volume in spec.volumes:
            _check_hides_nothing(volume, view)
            if volume.path.startswith("/app/"):
                _make_mount_point(spec.root, volume)
            folder = self.place(spec.app, volume.name)
            for needed in (self._root, folder.parent):
                needed.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            # not only when it is new: whoever made it may have been killed right then
            if uid is not None and folder.lstat().st_uid != uid:
                os.chown(folder, uid, uid, follow_symlinks=False)

    async def names(self, app: str) -> Sequence[str]:
        """The app's volumes in order."""
        try:
            return sorted(entry.name for entry in os.scandir(self._root / app) if not entry.name.startswith("."))
        except FileNotFoundError:
            return []

    async def used_bytes(self, app: str, name: str) -> int | None:
        """What the volume takes on the disk; None when counting takes too long."""
        process = await asyncio.create_subprocess_exec(
            *("du", "-sx", "--block-size=1", "--", os.fspath(self.place(app, name))),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(_MEASURE_SECS):
                said, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            return None
        # files that vanish meanwhile make it fail, and the sum still stands
        return int(said.split()[0]) if said[:1].isdigit() else None

    async def delete(self, app: str, name: str) -> bool:
        """Take the volume away; False when there is none."""
        folder = self.place(app, name)
        doomed = self._root / f"{_DELETED}{new_id()}"
        try:
            folder.rename(doomed)
        except FileNotFoundError:
            return False
        await _erase(doomed)
        return True

    async def delete_all(self, app: str) -> None:
        """Take away every volume of the app."""
        doomed = self._root / f"{_DELETED}{new_id()}"
        try:
            (self._root / app).rename(doomed)
        except FileNotFoundError:
            return
        await _erase(doomed)

    async def clear(self) -> None:
        """Finish what an earlier process was deleting when it was killed."""
        try:
            doomed = [Path(entry.path) for entry in os.scandir(self._root) if entry.name.startswith(_DELETED)]
        except FileNotFoundError:
            return
        for folder in doomed:
            await _erase(folder)


async def _erase(folder: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *("rm", "-rf", "--one-file-system", "--", os.fspath(folder)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    if process.returncode:
        # folders that their app made unwritable stop `rm` where this process is not root
        await asyncio.to_thread(_open_up, folder)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        if folder.exists():
            reason = said.decode(errors="replace").strip().splitlines()
            raise LocalIOError(f"{folder} could not be deleted: {reason[0] if reason else 'rm failed'}")


def _open_up(folder: Path) -> None:
    for place, names, _ in os.walk(folder):
        os.chmod(place, 0o700)
        for name in names:
            if not os.path.islink(os.path.join(place, name)):
                os.chmod(os.path.join(place, name), 0o700)


def _check_hides_nothing(volume: Volume, view: HostView) -> None:
    """Raises BadRequest when this machine shows something of its own to instances there."""
    shown = [
        *view.folders,
        *view.etc,
        *view.tools,
        *(name for _, name in view.links),
        "/proc",
        "/sys",
        "/dev",
        "/tmp",
    ]
    wanted = Path(volume.path)
    for name in shown:
        place = Path(name)
        if place == wanted or place in wanted.parents or wanted in place.parents:
            raise BadRequest(
                f"volume {volume.name} cannot be at {volume.path}: {name} is the machine's own; choose another path"
            )


def _make_mount_point(root: Path, volume: Volume) -> None:
    """Make a folder in the unpacked artifact to show the volume at, following no link that the artifact has."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    at = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in Path(volume.path).parts[2:]:
            try:
                inner = os.open(part, flags, dir_fd=at)
            except FileNotFoundError:
                try:
                    os.mkdir(part, 0o755, dir_fd=at)
                    os.chmod(part, 0o755, dir_fd=at)
                    inner = os.open(part, flags, dir_fd=at)
                except OSError as error:
                    raise BadRequest(
                        f"volume {volume.name}: {volume.path} cannot be made in the artifact's copy: {error.strerror}"
                    ) from error
            except OSError as error:
                raise BadRequest(
                    f"volume {volume.name} cannot be at {volume.path}: the artifact has something there "
                    "that is not a plain folder"
                ) from error
            os.close(at)
            at = inner
    finally:
        os.close(at)
