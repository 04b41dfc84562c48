"""QEMU's command lines: for a machine that boots, one that a snapshot is made of, and one that goes on from it.

The three differ in where memory comes from and in what is run; devices and their places are the same, as what was
saved of them has to fit.
"""

from __future__ import annotations

from collections.abc import Sequence

from aether.runtimes.microvm.boot import MACHINE, Accelerator, processor
from aether.runtimes.microvm.network import GUEST_MAC


def command_line(
    program: str, name: str, accelerator: Accelerator, memory_mb: int, vcpus: int, arguments: str,
    files: Sequence[int], tap: int,
) -> list[str]:  # fmt: skip
    """`files` are descriptors of kernel, initramfs, root file system and code."""
    kernel, initramfs, root, code = files
    return [
        *_machine(program, name, accelerator, memory_mb, vcpus, MACHINE),
        *_kernel(kernel, initramfs, arguments),
        *_devices(root, code, tap),
    ]


def making_command_line(
    program: str, name: str, accelerator: Accelerator, memory_mb: int, vcpus: int, arguments: str,
    files: Sequence[int], tap: int,
) -> list[str]:  # fmt: skip
    """`files` are those of a boot, with any image in the place of the code, and a memory file and a control line."""
    kernel, initramfs, root, code, memory, control = files
    return [
        *_machine(program, name, accelerator, memory_mb, vcpus, f"{MACHINE},memory-backend=memory"),
        *_memory(memory, memory_mb, "on"),
        *_kernel(kernel, initramfs, arguments),
        *_devices(root, code, tap),
        *_control(control),
    ]


def restoring_command_line(
    program: str, name: str, accelerator: Accelerator, memory_mb: int, vcpus: int, files: Sequence[int], tap: int, *,
    only_user: bool = False,
) -> list[str]:  # fmt: skip
    """`files` are descriptors of root file system, code, memory, and the control line. `only_user`: whether no other
    machine goes on, or will, from this memory."""
    root, code, memory, control = files
    return [
        *_machine(program, name, accelerator, memory_mb, vcpus, f"{MACHINE},memory-backend=memory"),
        # "off": what the machine writes is its own, it gets copies of the pages that it changes
        *_memory(memory, memory_mb, "on" if only_user else "off"),
        *("-incoming", "defer"),
        *_devices(root, code, tap),
        *_control(control),
    ]


def _machine(
    program: str, name: str, accelerator: Accelerator, memory_mb: int, vcpus: int, machine: str
) -> tuple[str, ...]:
    return (
        program,
        *("-name", name),
        *("-machine", machine),
        *processor(accelerator),
        *("-m", str(memory_mb), "-smp", str(vcpus)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
    )


def _kernel(kernel: int, initramfs: int, arguments: str) -> tuple[str, ...]:
    return ("-kernel", f"/proc/self/fd/{kernel}", "-initrd", f"/proc/self/fd/{initramfs}", "-append", arguments)


def _devices(root: int, code: int, tap: int) -> tuple[str, ...]:
    drive = "driver=file,read-only=on,locking=off,filename=/dev/fdset"
    # the last transport is found first and becomes vda; the first is left out, its interrupt reaches no guest
    return (
        *("-serial", "stdio"),
        *("-global", "virtio-mmio.force-legacy=false"),
        *("-add-fd", f"fd={root},set=1", "-blockdev", f"{drive}/1,node-name=root"),
        *("-add-fd", f"fd={code},set=2", "-blockdev", f"{drive}/2,node-name=code"),
        *("-device", "virtio-blk-device,drive=root,bus=virtio-mmio-bus.3"),
        *("-device", "virtio-blk-device,drive=code,bus=virtio-mmio-bus.2"),
        *("-netdev", f"tap,id=net,fd={tap}"),
        *("-device", f"virtio-net-device,netdev=net,mac={GUEST_MAC},bus=virtio-mmio-bus.1"),
    )


def _memory(memory: int, memory_mb: int, share: str) -> tuple[str, ...]:
    path = f"/proc/self/fd/{memory}"
    return ("-object", f"memory-backend-file,id=memory,size={memory_mb}M,mem-path={path},share={share}")


def _control(control: int) -> tuple[str, ...]:
    return ("-chardev", f"socket,id=control,fd={control}", "-mon", "chardev=control,mode=control")
