"""yarn.lock, of Yarn 1 (its own format) and of Yarn 2 and later (YAML). Neither says where packages are installed."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast
from urllib.parse import unquote

from aether.build.inventory.promises import Promise, clean_url, git_url, hashes

_SHA1 = re.compile(r"#([0-9a-f]{40})$")


class YarnLock:
    """Implements `Lock`: entries by the name they are required by and their version."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self._entries: dict[tuple[str, str], Promise] = {}
        for name, promise in _berry(text) if "__metadata:" in text else _classic(text):
            # a patched package is listed beside the one it was made from, and is the one that is installed
            if promise.patched or (name, promise.version) not in self._entries:
                self._entries[name, promise.version] = promise

    def find(self, folder: str, installed_as: str, version: str) -> Promise | None:
        return self._entries.get((installed_as, version))

    def required(self) -> Iterable[str]:
        return ()


def _name_of(pattern: str) -> tuple[str, str]:
    """`@scope/name@range` as name and range."""
    at = pattern.find("@", 1)
    return (pattern, "") if at < 0 else (pattern[:at], pattern[at + 1 :])


# --- Yarn 1 -----------------------------------------------------------------------------------------


def _classic(text: str) -> Iterator[tuple[str, Promise]]:
    patterns: list[str] = []
    fields: dict[str, str] = {}
    for line in [*text.splitlines(), "end:"]:
        if not line.strip() or line.startswith("#"):
            continue
        if not line[0].isspace():
            for pattern in patterns:
                yield _classic_entry(pattern, fields)
            patterns = [_plain(word) for word in _split(line.rstrip().removesuffix(":"))]
            fields = {}
        elif not line.startswith("   "):
            key, _, value = line.strip().partition(" ")
            fields[key] = _plain(value)


def _split(line: str) -> list[str]:
    """`"a@1", b@2` as its words."""
    return re.findall(r'"(?:[^"\\]|\\.)*"|[^\s,"]+', line)


def _plain(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word[1:-1]) if word[:1] == word[-1:] == '"' and len(word) > 1 else word


def _classic_entry(pattern: str, fields: Mapping[str, str]) -> tuple[str, Promise]:
    installed_as, wanted = _name_of(pattern)
    name = _name_of(wanted.removeprefix("npm:"))[0] if wanted.startswith("npm:") else installed_as
    resolved = fields.get("resolved", "")
    promised = hashes(fields.get("integrity", ""))
    sha1 = _SHA1.search(resolved)
    vcs = git_url(resolved)
    if not promised and sha1 and not vcs:
        promised = (("SHA-1", sha1.group(1)),)
    return installed_as, Promise(
        name=name,
        version=fields.get("version", ""),
        integrity=promised,
        resolved=resolved,
        tarball=resolved.partition("#")[0].removeprefix("file:") if resolved.startswith("file:") else "",
        vcs=vcs,
        local=not resolved,
    )


# --- Yarn 2 and later -------------------------------------------------------------------------------


def _berry(text: str) -> Iterator[tuple[str, Promise]]:
    from aether.build.inventory.yamltext import read_yaml

    for key, value in read_yaml(text).items():
        if not isinstance(value, dict) or key == "__metadata":
            continue
        entry = cast(dict[str, Any], value)
        promise = _berry_entry(entry)
        for pattern in key.split(", "):
            yield _name_of(pattern)[0], promise


def _berry_entry(entry: Mapping[str, Any]) -> Promise:
    name, reference = _name_of(str(entry.get("resolution", "")))
    patched = reference.startswith("patch:")
    if patched:
        # patch:NAME@REFERENCE#PATCH, with what is inside escaped
        inner = unquote(reference.removeprefix("patch:").partition("#")[0])
        reference = _name_of(inner)[1]
    place = reference.partition("::")[0]
    tarball = place.startswith("file:") and place.partition("#")[0].endswith((".tgz", ".tar.gz"))
    vcs = git_url(place.replace("#commit=", "#"))
    return Promise(
        name=name,
        version=str(entry.get("version", "")),
        checksum=str(entry.get("checksum", "")).rpartition("/")[2],
        resolved=clean_url(place) if not vcs else "",
        tarball=place.removeprefix("file:").partition("#")[0] if tarball else "",
        vcs=vcs,
        local=entry.get("linkType") == "soft" or (place.startswith(("file:", "portal:", "link:")) and not tarball),
        patched=patched,
    )
