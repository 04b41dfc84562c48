"""What a lockfile says of a package: the nouns that every lockfile is read into, and how its texts are understood."""

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote, urlsplit, urlunsplit

_ALGORITHMS = {"sha512": ("SHA-512", 64), "sha384": ("SHA-384", 48), "sha256": ("SHA-256", 32), "sha1": ("SHA-1", 20)}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FORGE = re.compile(r"https://codeload\.github\.com/([^/]+/[^/]+)/tar\.gz/([0-9a-f]{40})")

Hashes = tuple[tuple[str, str], ...]
"""Algorithm in CycloneDX's words and hex, the strongest first."""


@dataclass(frozen=True, slots=True)
class Promise:
    """A lockfile's entry. Empty fields: the lockfile says nothing of it."""

    name: str
    version: str = ""
    integrity: Hashes = ()
    """Of the distribution, a gzipped tar as the registry serves it."""
    checksum: str = ""
    """Yarn's own SHA-512 of the zip it keeps the package in."""
    resolved: str = ""
    """Where the distribution comes from."""
    tarball: str = ""
    """A file of the project that is the distribution, relative to its root."""
    vcs: str = ""
    local: bool = False
    """A folder of the project."""
    bundled: bool = False
    """Comes within the distribution of the package around it."""
    patched: bool = False
    optional: bool = False
    license: str = ""

    @property
    def promises(self) -> bool:
        """Whether the installed bytes can be held against something."""
        return bool(self.integrity or self.checksum)


class Lock(Protocol):
    """A lockfile that was read."""

    @property
    def file(self) -> str:
        """Its name."""
        ...

    def find(self, folder: str, installed_as: str, version: str) -> Promise | None:
        """The entry of the package in `folder`, which others require as `installed_as`. None: it is not listed."""
        ...

    def required(self) -> Iterable[str]:
        """Folders that must hold a package, for lockfiles that say so."""
        ...


def hashes(text: str) -> Hashes:
    """The hashes in a Subresource Integrity text ("sha512-... sha1-..."); what cannot be read is left out."""
    found: dict[str, str] = {}
    for word in text.split():
        name, _, coded = word.partition("?")[0].partition("-")
        known = _ALGORITHMS.get(name)
        if known is None:
            continue
        try:
            raw = base64.b64decode(coded, validate=True)
        except (binascii.Error, ValueError):
            continue
        if len(raw) == known[1]:
            found.setdefault(known[0], raw.hex())
    order = [name for name, _ in _ALGORITHMS.values()]
    return tuple((name, found[name]) for name in order if name in found)


def clean_url(text: str) -> str:
    """`text` without user, password, query and fragment: those may be somebody's credentials."""
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        if parts.port:
            host += f":{parts.port}"
    except ValueError:
        return ""
    return urlunsplit((parts.scheme, host, parts.path, "", "")) if parts.scheme in ("http", "https") else ""


def git_url(text: str) -> str:
    """`text` as `git+https://host/path@commit` without credentials; empty when it does not name a repository."""
    forge = _FORGE.match(text)
    if forge:
        return f"git+https://github.com/{forge.group(1)}.git@{forge.group(2)}"
    where, _, fragment = text.partition("#")
    commit = _COMMIT.search(fragment)
    where = where.removeprefix("git+")
    if where.startswith("git@"):
        where = "ssh://" + where.replace(":", "/", 1)
    if not text.startswith(("git+", "git:", "git@", "ssh:")) and not (commit and where.endswith(".git")):
        return ""
    try:
        parts = urlsplit(where)
    except ValueError:
        return ""
    if not parts.hostname:
        return ""
    scheme = "git" if parts.scheme == "git" else f"git+{parts.scheme}"
    return f"{scheme}://{parts.hostname}{parts.path}" + (f"@{commit.group()}" if commit else "")


def registry_url(registries: "dict[str, str]", name: str, version: str) -> str:
    """Where a registry serves a package; `registries` maps a scope ("@shop"), or "" for the others, to an address.

    Without an address for it the package is named as the package manager's own registry knows it, by its purl."""
    scope, slash, base = name.rpartition("/")
    registry = (registries.get(scope) if slash else None) or registries.get("")
    if not registry:
        return f"pkg:npm/{quote(name, safe='/')}@{quote(version, safe='')}"
    return clean_url(f"{registry.rstrip('/')}/{name}/-/{base}-{version}.tgz")


def registries_of(npmrc: str, yarnrc: str = "") -> dict[str, str]:
    """The registries that a project's .npmrc and .yarnrc.yml name."""
    found: dict[str, str] = {}
    for line in npmrc.splitlines():
        key, equals, value = line.partition("=")
        key, value = key.strip(), value.strip().strip("\"'")
        if equals and value.startswith(("https://", "http://")):
            if key == "registry":
                found[""] = value
            elif key.endswith(":registry") and key.startswith("@"):
                found[key.removesuffix(":registry")] = value
    server = re.search(r"^npmRegistryServer:\s*[\"']?(https?://[^\s\"']+)", yarnrc, re.MULTILINE)
    if server:
        found[""] = server.group(1)
    return found
