"""What volumes an app may ask for, and how they are written down."""

import json
from collections.abc import Sequence
from itertools import pairwise

from aether.model.errors import BadRequest
from aether.model.instance import Volume

MAX_VOLUMES = 8
"""Of one app."""
MAX_NAME = 40
_SYSTEM = frozenset(
    (
        "bin",
        "boot",
        "dev",
        "etc",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "proc",
        "root",
        "run",
        "sbin",
        "sys",
        "tmp",
        "usr",
    )
)
_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")


def to_json(volumes: Sequence[Volume]) -> str:
    return json.dumps([{"name": volume.name, "path": volume.path} for volume in volumes], separators=(",", ":"))


def from_json(text: str) -> tuple[Volume, ...]:
    return tuple(Volume(**item) for item in json.loads(text))


def check_volumes(volumes: Sequence[Volume]) -> None:
    """Raise BadRequest naming the volume that cannot be, and why. Whether this machine has something of its own at a
    path is the runtime's to say."""
    if len(volumes) > MAX_VOLUMES:
        raise BadRequest(f"an app has {MAX_VOLUMES} volumes at most", {"field": "volumes"})
    for volume in volumes:
        _check_volume(volume)
    names = [volume.name for volume in volumes]
    for name in names:
        if names.count(name) > 1:
            raise BadRequest(f"volume {name} is named twice", {"field": "volumes"})
    places = sorted(volume.path + "/" for volume in volumes)
    for outer, inner in pairwise(places):
        if inner.startswith(outer):
            raise BadRequest(
                f"volumes cannot lie in one another: {outer[:-1]} and {inner[:-1]}", {"field": "volumes"}
            )


def _check_volume(volume: Volume) -> None:
    name, path = volume.name, volume.path
    if not 1 <= len(name) <= MAX_NAME or not _NAME.issuperset(name) or name[0] == "-":
        raise BadRequest(
            f"'{name[:MAX_NAME]}' cannot name a volume: use 1 to {MAX_NAME} of a-z, 0-9 and '-'", {"field": "volumes"}
        )
    parts = path.split("/")[1:]
    plain = path.startswith("/") and len(path) <= 200 and path.isprintable()
    if not plain or not all(part not in ("", ".", "..") for part in parts):
        raise BadRequest(
            f"volume {name}: the path must be absolute and plain, as in /data, not '{path[:200]}'",
            {"field": "volumes"},
        )
    if parts[0] in _SYSTEM:
        raise BadRequest(
            f"volume {name} cannot be at {path}: /{parts[0]} is the system's; use /data or a folder of the app's, "
            "as in /app/uploads",
            {"field": "volumes"},
        )
    if parts == ["app"] or parts[:2] == ["app", ".aether"]:
        raise BadRequest(
            f"volume {name} cannot be at {path}, it would hide the app; use a folder in it, as in /app/uploads",
            {"field": "volumes"},
        )
