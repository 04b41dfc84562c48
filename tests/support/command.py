"""The installed `aether` command as a child process with a home folder of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

AETHER = str(Path(sys.executable).parent / "aether")


def home(folder: Path, base: str) -> dict[str, str]:
    """The environment of a user whose files are in `folder` and whose server is `base`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("AETHER_")}
    xdg = {f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    return {**kept, **xdg, "HOME": str(folder), "AETHER_API_BASE": base}


async def aether(environ: dict[str, str], *words: str, stdin: str = "") -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    process = await asyncio.create_subprocess_exec(
        AETHER, *words, env=environ, stdin=-1, stdout=-1, stderr=-1, cwd=environ["HOME"]
    )
    out, errors = await asyncio.wait_for(process.communicate(stdin.encode()), 60)
    return process.returncode or 0, out.decode(), errors.decode()
