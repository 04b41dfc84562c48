"""package-lock.json and npm-shrinkwrap.json: versions 2 and 3 list packages by folder, version 1 in a tree."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from aether.build.inventory.contents import as_mapping
from aether.build.inventory.promises import Promise, git_url, hashes

Table = Mapping[str, Any]


class NpmLock:
    """Implements `Lock`."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        value: object = json.loads(text)
        lock = as_mapping(value)
        listed = _table(lock, "packages")
        self._packages: dict[str, Table] = dict(listed) if listed else dict(_flattened(lock, ""))

    def find(self, folder: str, installed_as: str, version: str) -> Promise | None:
        entry = self._packages.get(folder)
        if entry is None:
            return None
        resolved = _text(entry, "resolved")
        return Promise(
            name=_text(entry, "name") or installed_as,
            version=_text(entry, "version"),
            integrity=hashes(_text(entry, "integrity")),
            resolved=resolved,
            tarball=resolved.removeprefix("file:") if resolved.startswith("file:") else "",
            vcs=git_url(resolved),
            local="node_modules" not in folder.split("/"),
            bundled=entry.get("inBundle") is True or entry.get("bundled") is True,
            optional=entry.get("optional") is True or entry.get("devOptional") is True,
            license=_text(entry, "license"),
        )

    def required(self) -> Iterable[str]:
        for folder, entry in self._packages.items():
            if not folder or any(entry.get(flag) for flag in ("dev", "optional", "devOptional", "peer", "link")):
                continue
            if "node_modules" in folder.split("/"):
                yield folder


def _table(value: Table, name: str) -> Mapping[str, Table]:
    found: object = value.get(name)
    if not isinstance(found, dict):
        return {}
    items = cast(dict[str, object], found).items()
    return {key: cast(Table, item) for key, item in items if isinstance(item, dict)}


def _text(entry: Table, name: str) -> str:
    value: object = entry.get(name)
    return value if isinstance(value, str) else ""


def _flattened(lock: Table, folder: str) -> Iterator[tuple[str, Table]]:
    """The entries of a version 1 lockfile by the folders they are installed in."""
    prefix = f"{folder}/" if folder else ""
    for name, entry in _table(lock, "dependencies").items():
        place = f"{prefix}node_modules/{name}"
        version = _text(entry, "version")
        if ":" in version:
            # in this version the place of what comes from no registry stands where its version should
            if version.startswith("npm:"):
                real, _, number = version.removeprefix("npm:").rpartition("@")
                entry = {**entry, "name": real, "version": number}
            else:
                entry = {**entry, "resolved": version, "version": ""}
        yield place, entry
        yield from _flattened(entry, place)
