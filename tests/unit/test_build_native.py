"""Native modules against the target platform."""

import struct
from pathlib import Path

import pytest

from aether.artifact.tree import scan
from aether.build.native import Machine, check_binary, check_native_modules, machine_of_bytes
from aether.build.project import Target
from aether.model.errors import ConfigError

X64, ARM = Target("linux", "x64"), Target("linux", "arm64")


def elf(machine: int, big: bool = False) -> bytes:
    order = ">" if big else "<"
    return b"\x7fELF\x02" + (b"\2" if big else b"\1") + bytes(10) + struct.pack(f"{order}HH", 3, machine) + bytes(40)


MACH_ARM = b"\xcf\xfa\xed\xfe" + struct.pack("<I", 0x0100000C) + bytes(24)
FAT = b"\xca\xfe\xba\xbe" + struct.pack(">I", 2) + struct.pack(">I16x", 0x01000007) + struct.pack(">I16x", 0x0100000C)
PE = b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + struct.pack("<H", 0x8664)


@pytest.mark.parametrize(
    ("head", "machine"),
    [
        (elf(62), Machine("linux", ("x64",))),
        (elf(183), Machine("linux", ("arm64",))),
        (elf(22, big=True), Machine("linux", ("s390x",))),
        (MACH_ARM, Machine("darwin", ("arm64",))),
        (FAT, Machine("darwin", ("x64", "arm64"))),
        (PE, Machine("win32", ("x64",))),
        (b"#!/bin/sh\n", None),
        (b"", None),
        (b"\x7fELF", None),
        (b"\xca\xfe\xba\xbe\x00\x00\x00\x37", None),
    ],
)
def test_headers(head: bytes, machine: Machine | None) -> None:
    assert machine_of_bytes(head) == machine


def modules(root: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = root / "node_modules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.mark.parametrize(
    "files",
    [
        {"bcrypt/build/Release/b.node": elf(62)},
        {"sqlite/prebuilds/linux-x64/s.node": elf(62), "sqlite/prebuilds/darwin-arm64/s.node": MACH_ARM},
        {"@next/swc-linux-x64-gnu/s.node": elf(62), "@next/swc-darwin-arm64/s.node": MACH_ARM},
        {"odd/not-native.node": b"module.exports = 1"},
    ],
)
def test_fitting_modules_pass(tmp_path: Path, files: dict[str, bytes]) -> None:
    check_native_modules(scan(modules(tmp_path, **files)), X64)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"bcrypt/build/Release/b.node": MACH_ARM}, "bcrypt/build/Release/b.node.*built for macOS arm64"),
        ({"@a/b/build/Release/b.node": elf(183)}, "built for Linux arm64, the server runs Linux x64.*'@a/b'"),
        ({"@next/swc-darwin-arm64/s.node": MACH_ARM}, "prebuilt binary for linux-x64"),
        ({"sq/prebuilds/darwin-arm64/s.node": MACH_ARM, "sq/prebuilds/win32-x64/s.node": PE}, "built for"),
        ({"a/build/Release/x.node": FAT, "b/build/Release/x.node": PE}, r"\(and 1 more\)"),
        ({"a/prebuilds/linux-x64/x.node": elf(62), "a/build/Release/x.node": MACH_ARM}, "macOS"),
    ],
)
def test_foreign_modules_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_native_modules(scan(modules(tmp_path, **files)), X64)


def test_programs(tmp_path: Path) -> None:
    (tmp_path / "serve").write_bytes(elf(62))
    check_binary(tmp_path / "serve", X64)
    with pytest.raises(
        ConfigError, match=r"'serve' is built for Linux x64, the server runs Linux arm64.*GOARCH=arm64"
    ):
        check_binary(tmp_path / "serve", ARM)
