"""What an instance may see of this machine's files: system folders and the toolchains that live outside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SYSTEM_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
TOOLS = ("node", "python3")

_ETC = (
    "alternatives",
    "ca-certificates",
    "ca-certificates.conf",
    "crypto-policies",
    "gai.conf",
    "host.conf",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "mime.types",
    "os-release",
    "pki/ca-trust",
    "pki/tls",
    "protocols",
    "python3",
    "python3.11",
    "services",
    "ssl/certs",
    "ssl/openssl.cnf",
    "timezone",
)
"""Parts of /etc that programs need and that say nothing about this machine's secrets."""


@dataclass(frozen=True, slots=True)
class HostView:
    """`links` and `folders` are shown at their own path; `tools` are toolchain prefixes outside /usr."""

    folders: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    etc: tuple[str, ...]
    tools: tuple[str, ...]
    hidden: tuple[str, ...]
    """Folders inside the shown ones that must look empty."""

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(f"{prefix}/bin" for prefix in self.tools) + SYSTEM_PATH


def survey(data_dir: Path, environ: Mapping[str, str] = os.environ) -> HostView:
    """Look at this machine once; `data_dir` is never shown, whatever lies around it."""
    folders = ["/usr"]
    links: list[tuple[str, str]] = []
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            links.append((os.readlink(name), name))
        elif os.path.isdir(name):
            folders.append(name)
    data = Path(os.path.realpath(data_dir))
    home = Path(os.path.realpath(os.path.expanduser("~")))
    tools: list[str] = []
    for name in TOOLS:
        prefix = _prefix(name, environ.get("PATH", os.defpath), folders)
        if (
            prefix is not None
            and str(prefix) not in tools
            and not _contains(prefix, data)
            and not _contains(prefix, home)
        ):
            tools.append(str(prefix))
    hidden = [str(data)] if any(_contains(Path(shown), data) for shown in [*folders, *tools]) else []
    return HostView(
        folders=tuple(folders),
        links=tuple(links),
        etc=tuple(f"/etc/{name}" for name in _ETC if os.path.exists(f"/etc/{name}")),
        tools=tuple(tools),
        hidden=tuple(hidden),
    )


def _prefix(name: str, path: str, folders: list[str]) -> Path | None:
    """The prefix of the first real `name` on `path` when it lies outside the system folders."""
    for entry in path.split(os.pathsep):
        found = shutil.which(name, path=entry) if entry.startswith("/") else None
        if found is None or _is_script(found):  # a version manager's stand-in needs all of the manager
            continue
        real = Path(os.path.realpath(found))
        if any(_contains(Path(folder), real) for folder in folders):
            return None
        prefix = real.parent.parent
        # a folder like ~/.local has a bin too, but is no toolchain: only what looks like one is shown
        libraries = (prefix / "include" / "node", prefix / "lib" / "node_modules", prefix / "lib" / real.name)
        if real.parent.name == "bin" and any(folder.is_dir() for folder in libraries):
            return prefix
    return None


def _is_script(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return True


def _contains(folder: Path, inner: Path) -> bool:
    return folder == inner or folder in inner.parents
