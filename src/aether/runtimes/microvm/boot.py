"""How every guest of QEMU is booted, also the one that only finds out whether guests boot."""

from __future__ import annotations

from enum import StrEnum

from aether.runtimes.microvm.tsc import tsc_khz


class Accelerator(StrEnum):
    """What executes a guest: the processor (KVM), or a translator of its instructions (TCG)."""

    KVM = "kvm"
    TCG = "tcg"


KVM, TCG = Accelerator.KVM, Accelerator.TCG

MACHINE = "microvm,acpi=on,x-option-roms=off,pit=off,pic=off,rtc=on,isa-serial=on"
"""Devices that kernels can do without are left out; without a clock they wait seconds for one."""

TRANSLATED_MB = 128
"""Room for translated code; too little and Node.js is translated again and again while it starts."""


def processor(accelerator: Accelerator) -> list[str]:
    """QEMU's arguments for what executes the guest."""
    if accelerator == KVM:
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", f"tcg,tb-size={TRANSLATED_MB}", "-cpu", "max"]


def kernel_arguments(accelerator: Accelerator, *words: str) -> str:
    """The kernel's command line, ending in `words`."""
    common = [
        "console=ttyS0 quiet loglevel=1",
        # there is no keyboard controller to ask for a restart, and QEMU ends instead of it
        "reboot=t panic=-1",
        "ipv6.disable=1 random.trust_cpu=on cryptomgr.notests audit=0 lsm=capability rcupdate.rcu_expedited=1",
    ]
    if accelerator == TCG:
        # see tsc.py; an emulated processor does not speculate, so nothing has to be mitigated in it
        khz = tsc_khz()
        common.append(f"tsc_early_khz={khz} tsc=reliable mitigations=off" if khz else "mitigations=off")
    return " ".join([*common, *words])
