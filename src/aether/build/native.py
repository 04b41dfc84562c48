"""Whether native code fits the machine it will run on: ELF, Mach-O and PE headers against the target."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aether.artifact.tree import FILE, Entry, show
from aether.build.project import Target
from aether.model.errors import ConfigError

_ELF_MACHINES = {62: "x64", 183: "arm64", 3: "ia32", 40: "arm", 243: "riscv64", 22: "s390x", 21: "ppc64"}
_MACH_CPUS = {0x01000007: "x64", 0x0100000C: "arm64", 7: "ia32"}
_PE_MACHINES = {0x8664: "x64", 0xAA64: "arm64", 0x14C: "ia32"}
_PLATFORM = re.compile(r"[-/](?:darwin|win32|linux|linuxmusl|android|freebsd|openbsd|sunos|aix)(?=[-/.]|$)")


@dataclass(frozen=True, slots=True)
class Machine:
    """What a native file was built for, in Node's words."""

    os: str  # linux | darwin | win32
    cpus: tuple[str, ...]

    def fits(self, target: Target) -> bool:
        return self.os == target.os and target.cpu in self.cpus

    def __str__(self) -> str:
        name = {"darwin": "macOS", "win32": "Windows", "linux": "Linux"}[self.os]
        return f"{name} {'/'.join(self.cpus)}"


def machine_of(path: "Path | bytes") -> Machine | None:
    """What the file at `path` was built for; None when it is no native code or cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return None
    return machine_of_bytes(head)


def machine_of_bytes(head: bytes) -> Machine | None:
    """`machine_of` for the first 4096 bytes of a file."""
    if head[:4] == b"\x7fELF" and len(head) >= 20:
        number = int.from_bytes(head[18:20], "big" if head[5] == 2 else "little")
        return Machine("linux", (_ELF_MACHINES.get(number, f"machine {number}"),))
    if head[:4] in (b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe"):
        number = int.from_bytes(head[4:8], "little")
        return Machine("darwin", (_MACH_CPUS.get(number, f"cpu {number}"),))
    if head[:4] == b"\xca\xfe\xba\xbe" and 0 < (count := int.from_bytes(head[4:8], "big")) < 20:
        numbers = [int.from_bytes(head[8 + 20 * i : 12 + 20 * i], "big") for i in range(count)]
        return Machine("darwin", tuple(_MACH_CPUS.get(number, f"cpu {number}") for number in numbers))
    if head[:2] == b"MZ":
        at = int.from_bytes(head[60:64], "little")
        if head[at : at + 4] == b"PE\0\0":
            number = int.from_bytes(head[at + 4 : at + 6], "little")
            return Machine("win32", (_PE_MACHINES.get(number, f"machine {number}"),))
    return None


def check_native_modules(entries: Iterable[Entry], target: Target) -> None:
    """Raise ConfigError when a package's native modules (`*.node`) cannot be loaded on `target`.

    A package that carries binaries for several platforms passes if one of them fits; so does a package for one
    foreign platform whose sibling for the target is there as well.
    """
    fitting: set[bytes] = set()
    foreign: dict[bytes, tuple[Entry, Machine]] = {}
    built_here: list[tuple[Entry, Machine]] = []
    for entry in entries:
        if entry.kind != FILE or not entry.name.endswith(b".node"):
            continue
        machine = machine_of(entry.source)
        if machine is None:
            continue
        package = _package(entry.name)
        family = _family(package)
        if machine.fits(target):
            fitting.update((package, family))
        elif b"/build/Release/" in entry.name:
            built_here.append((entry, machine))
        else:
            foreign.setdefault(package, (entry, machine))
    bad = built_here + [
        found for package, found in foreign.items() if package not in fitting and _family(package) not in fitting
    ]
    if not bad:
        return
    entry, machine = bad[0]
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    name = show(_package(entry.name).rpartition(b"node_modules/")[2])
    raise ConfigError(
        f"the native module '{show(entry.name)}'{more} is built for {machine}, the server runs "
        f"{Machine(target.os, (target.cpu,))}: deploy from a machine like the server (a CI job, a Linux container), "
        f"or use a version of '{name}' that ships a prebuilt binary for {target.os}-{target.cpu}",
        details={"path": show(entry.name), "built_for": str(machine)},
    )


def check_binary(path: Path, target: Target) -> None:
    """Raise ConfigError when the program at `path` is native code for another platform."""
    machine = machine_of(path)
    if machine is not None and not machine.fits(target):
        flags = "GOOS=linux GOARCH=" + {"x64": "amd64"}.get(target.cpu, target.cpu)
        raise ConfigError(
            f"'{path.name}' is built for {machine}, the server runs {Machine(target.os, (target.cpu,))}: "
            f"build it for that platform (Go: {flags}; Rust: --target)"
        )


def _package(name: bytes) -> bytes:
    """The folder of the package that holds a file, by its name in the archive."""
    head, marker, tail = name.rpartition(b"node_modules/")
    parts = tail.split(b"/")
    size = 2 if tail.startswith(b"@") else 1
    return head + marker + b"/".join(parts[:size]) if marker else b"/".join(name.split(b"/")[:-1])


def _family(package: bytes) -> bytes:
    """A package's path up to the platform in its last name: '@next/swc-linux-x64-gnu' → '@next/swc'."""
    head, marker, tail = package.rpartition(b"node_modules/")
    found = _PLATFORM.search(tail.decode("utf-8", "replace"))
    return head + marker + tail[: found.start()] if found else package
