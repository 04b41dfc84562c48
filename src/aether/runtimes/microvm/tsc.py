"""How fast this machine's time stamp counter runs, which emulated processors show to their guests as it is.

A guest that has to find out by itself compares it with an emulated timer, and in one boot of ten never ends.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import time
from functools import cache
from pathlib import Path

_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""rdtsc; shl rdx, 32; or rax, rdx; ret"""
_SAMPLE_SECS = 0.05


@cache
def tsc_khz() -> int:
    """Kilohertz, measured over 50 ms, blocking, once per process; 0 when it cannot be told (not an x86 processor)."""
    cpu = Path("/proc/cpuinfo").read_text()
    if " constant_tsc" not in cpu:
        return 0
    try:
        with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
            page.write(_RDTSC)
            anchor = ctypes.c_char.from_buffer(page)
            read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
            try:
                begun, first = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW), int(read())
                time.sleep(_SAMPLE_SECS)
                ended, last = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW), int(read())
            finally:
                del read, anchor
        return round((last - first) * 1_000_000 / (ended - begun))
    except (OSError, ValueError):  # a system that lets no program make code: the clock it runs at now has to do
        found = re.search(r"^cpu MHz\s*: ([0-9.]+)$", cpu, re.MULTILINE)
        return round(float(found[1]) * 1000) if found else 0
