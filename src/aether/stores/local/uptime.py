"""A clock that all processes of this machine share and nobody can set, and a name for as long as it counts.

Times of two boots must never be compared, so whatever is kept with a time is kept with the boot it belongs to. The
clock stands still while the machine sleeps: nobody on it could have renewed anything meanwhile.
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

_LINUX = Path("/proc/sys/kernel/random/boot_id")


def uptime() -> float:
    """Seconds since some moment of this boot, the same in every process."""
    return time.monotonic()


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Another text after every start of the machine. Raises OSError where the system does not tell one."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except subprocess.SubprocessError as error:
            raise OSError(f"the system does not tell when it was started: {error}") from error
    else:
        found = _LINUX.read_text().strip()
    if not found:
        raise OSError("the system does not tell when it was started")
    return found
