"""The guest's kernel, taken from an installed or unpacked Debian package (linux-image-cloud-amd64), and its modules.

Monitors start an uncompressed ELF kernel by the PVH entry: nothing has to be unpacked inside of the guest, which an
emulated processor does slowly, and Firecracker takes no other.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from struct import unpack_from

from aether.model.errors import ServiceUnavailable

MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "squashfs")

_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_UNPACK_SECS = 60.0


@dataclass(frozen=True, slots=True)
class KernelPackage:
    """Where a kernel lies: the compressed image and the folder of its modules."""

    version: str
    image: Path
    modules: Path


def find_kernel(root: Path) -> KernelPackage:
    """The newest cloud kernel below `root`: `/` for installed ones, or a folder that a package was unpacked in.

    Raises ServiceUnavailable with the remedy when there is none.
    """
    found: list[tuple[list[int], KernelPackage]] = []
    for image in (root / "boot").glob("vmlinuz-*-cloud-amd64"):
        version = image.name.removeprefix("vmlinuz-")
        for place in ("lib", "usr/lib"):
            modules = root / place / "modules" / version / "kernel"
            if modules.is_dir():
                numbers = [int(part) for part in version.replace("-", ".").split(".") if part.isdigit()]
                found.append((numbers, KernelPackage(version, image, modules)))
                break
    if not found:
        raise ServiceUnavailable(
            f"there is no kernel for guests in {root}: install linux-image-cloud-amd64, or unpack it into a folder "
            "with dpkg-deb -x and name that"
        )
    return max(found, key=lambda item: item[0])[1]


def module_files(package: KernelPackage) -> list[Path]:
    """The files of MODULES and of those that they need, each after what it needs.

    Raises ServiceUnavailable when one is missing (a compressed one is not taken either).
    """
    known = {file.stem.replace("-", "_"): file for file in package.modules.rglob("*.ko")}
    ordered: list[Path] = []
    pending = list(reversed(MODULES))
    while pending:
        name = pending[-1]
        file = known.get(name)
        if file is None:
            raise ServiceUnavailable(f"the kernel {package.version} has no module {name}")
        absent = [other for other in depends(file.read_bytes()) if known.get(other) not in ordered]
        if set(absent) & set(pending):
            raise ServiceUnavailable(f"the modules of the kernel {package.version} need each other")
        if absent:
            pending += absent
            continue
        pending.pop()
        if file not in ordered:
            ordered.append(file)
    return ordered


def depends(module: bytes) -> list[str]:
    """The modules that a module says it needs, in the `depends` field that modinfo(8) shows."""
    at = module.find(b"\0depends=")
    if at < 0:
        return []
    value = module[at + 9 : module.index(b"\0", at + 1)].decode("ascii")
    return [name.replace("-", "_") for name in value.split(",") if name]


def unpack_kernel(image: bytes) -> bytes:
    """The ELF kernel inside of an x86 bzImage (the boot protocol's `payload_offset`, from 2.08 on).

    Raises ServiceUnavailable when it is packed otherwise than Debian packs it, or lz4 is missing.
    """
    if image[0x202:0x206] != b"HdrS":
        raise ServiceUnavailable("the guest's kernel is not an x86 kernel image")
    setup = (image[0x1F1] or 4) + 1
    offset, length = unpack_from("<2L", image, 0x248)
    start = setup * 512 + offset
    if length < 4 or start + length > len(image):
        raise ServiceUnavailable("the guest's kernel is damaged")
    payload, size = image[start : start + length - 4], unpack_from("<L", image, start + length - 4)[0]
    if not payload.startswith(_LZ4_LEGACY):
        raise ServiceUnavailable("the guest's kernel is not packed by LZ4")
    program = shutil.which("lz4")
    if program is None:
        raise ServiceUnavailable("the guest's kernel cannot be unpacked: lz4 is missing; install lz4")
    done = subprocess.run([program, "-dc"], input=payload, capture_output=True, timeout=_UNPACK_SECS, check=False)
    if done.returncode != 0 or len(done.stdout) != size or not done.stdout.startswith(b"\x7fELF"):
        raise ServiceUnavailable("the guest's kernel is damaged")
    return done.stdout
