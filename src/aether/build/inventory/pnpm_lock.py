"""pnpm-lock.yaml: versions 5.4 and 6 (`/name@1.0.0(peer@2)`) and 9 (`name@1.0.0`)."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from aether.build.inventory.promises import Promise, git_url, hashes
from aether.build.inventory.yamltext import read_yaml

_KEY = re.compile(r"(@[^/]+/[^/@]+|[^/@]+)([/@])(.+)")
_PATCHED = re.compile(r"\(patch_hash=")


class PnpmLock:
    """Implements `Lock`: entries by name and version; pnpm keeps each package in a folder named after both."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        lock = read_yaml(text)
        patched = {_patched_key(key) for key in _table(lock, "patchedDependencies")}
        self._entries: dict[tuple[str, str], Promise] = {}
        for key, entry in _table(lock, "packages").items():
            promise = _entry(key, entry, patched)
            # a folder of the project is listed by its place and not by the version that its package.json has
            self._entries.setdefault((promise.name, "" if promise.local else promise.version), promise)

    def find(self, folder: str, installed_as: str, version: str) -> Promise | None:
        return self._entries.get((installed_as, version)) or self._entries.get((installed_as, ""))

    def required(self) -> Iterable[str]:
        return ()


def _table(value: Mapping[str, Any], name: str) -> dict[str, Mapping[str, Any]]:
    found: object = value.get(name)
    if not isinstance(found, dict):
        return {}
    items = cast(dict[str, object], found).items()
    return {key: cast(dict[str, Any], item) if isinstance(item, dict) else {} for key, item in items}


def _patched_key(key: str) -> str:
    return key.lstrip("/")


def _split(key: str) -> tuple[str, str]:
    """Name and version (or place) of a package's key; what follows in parentheses are the peers it was given."""
    plain = key.removeprefix("/")
    bracket = plain.find("(")
    found = _KEY.fullmatch(plain[:bracket] if bracket > 0 else plain)
    if found is None:
        return plain, ""
    # version 5 writes /name/1.0.0_peer@2
    place = found.group(3)
    return found.group(1), place.partition("_")[0] if found.group(2) == "/" else place


def _entry(key: str, entry: Mapping[str, Any], patched: set[str]) -> Promise:
    name, place = _split(key)
    resolution = entry.get("resolution")
    found = cast(dict[str, str], resolution) if isinstance(resolution, dict) else {}
    named = entry.get("name")
    written = entry.get("version")
    version = written if isinstance(written, str) else place
    tarball = found.get("tarball", "")
    vcs = git_url(tarball)
    if found.get("type") == "git":
        vcs = git_url(f"git+{found.get('repo', '').removeprefix('git+')}#{found.get('commit', '')}")
    return Promise(
        name=named if isinstance(named, str) else name,
        version=version,
        integrity=hashes(found.get("integrity", "")),
        resolved=tarball if tarball.startswith("http") and not vcs else "",
        tarball=tarball.removeprefix("file:") if tarball.startswith("file:") else "",
        vcs=vcs,
        local=found.get("type") == "directory",
        patched=_PATCHED.search(key) is not None or f"{name}@{version}" in patched or name in patched,
        optional=entry.get("optional") == "true",
    )
