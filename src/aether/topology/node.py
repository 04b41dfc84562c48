"""Which Node.js this machine has, and what that means for an artifact built for another one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess

_NODE = re.compile(r"node(\d+)")


async def node_major() -> int | None:
    """Major version of the `node` that apps get, or None."""
    return await asyncio.to_thread(find_node_major)


def find_node_major() -> int | None:
    """As `node_major`; blocks."""
    program = shutil.which("node")
    if program is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, IndexError):
        said = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=10, check=True, env={"PATH": os.defpath}
        ).stdout
        return int(said.strip().lstrip("v").split(".")[0])
    return None


def warning(runtime: str | None, major: int | None) -> str | None:
    """What to tell about an artifact whose runtime is not exactly what this machine has."""
    match = _NODE.fullmatch(runtime or "")
    if match is None or major == int(match[1]):
        return None
    if major is None:
        return f"the artifact was built for Node.js {match[1]}, and this server has no Node.js"
    return f"the artifact was built for Node.js {match[1]}, and this server has Node.js {major}"
