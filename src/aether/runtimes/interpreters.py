"""The interpreters of this machine that functions run in, wherever they are put."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from aether.model.errors import ServiceUnavailable

MIN_NODE = 20
_ASK_SECS = 30.0


def node_program() -> Path:
    """The Node.js binary of this machine. Raises ServiceUnavailable when there is none or it is too old."""
    program = shutil.which("node")
    if program is None:
        raise ServiceUnavailable(f"functions in Node.js cannot run here: install Node.js {MIN_NODE} or newer")
    told = output([program, "-p", "process.versions.node + '\\n' + process.execPath"]).splitlines()
    if len(told) != 2 or int(told[0].split(".")[0]) < MIN_NODE:
        raise ServiceUnavailable(f"functions need Node.js {MIN_NODE} or newer; here is {told[0] if told else 'none'}")
    return Path(os.path.realpath(told[1]))


def python_program() -> Path:
    """The interpreter that this very process runs, not its environment's stand-in."""
    return Path(os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable))


def output(command: list[str], *, allow_failure: bool = False) -> str:
    """What `command` prints. Raises ServiceUnavailable. Blocks."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASK_SECS, check=False, env={**os.environ, "LC_ALL": "C"}
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceUnavailable(f"{command[0]} does not work here: {error}") from error
    if done.returncode != 0 and not allow_failure:
        raise ServiceUnavailable(f"{command[0]} does not work here: {done.stderr.strip()}")
    return done.stdout
