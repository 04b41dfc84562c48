"""Judging documents that come with artifacts, off the event loop: in a thread, or what is large in a process of its
own, with bounds on memory and time, because reading it would take more of either than a server can spare.

What a document must be is the business of `aether.artifact`. Run as a program this module is that process: it gets
the document on its standard input and says on its output what was wrong with it.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from collections.abc import Callable, Mapping

from aether.artifact import manifest, sbom
from aether.model.errors import AetherError, BadRequest, from_wire
from aether.registry.records import MANIFEST, SBOM

LARGE_BYTES = 2 << 20
_MEMORY_BYTES = 2 << 30
_TIMEOUT_SECS = 60.0


def _manifest(body: bytes, digest: str) -> str:
    return f"{manifest.check(body, digest).files} files"


_JUDGES: Mapping[str, Callable[[bytes, str], str]] = {MANIFEST: _manifest, SBOM: sbom.check_document}


class Judges:
    """One document at a time in a thread, and one in a process."""

    def __init__(self) -> None:
        self._thread, self._process = asyncio.Lock(), asyncio.Lock()

    async def check(self, kind: str, body: bytes, digest: str) -> str:
        """What the document is, in a few words. Raises BadRequest, DigestMismatch."""
        if len(body) < LARGE_BYTES:
            async with self._thread:
                return await asyncio.to_thread(_JUDGES[kind], body, digest)
        async with self._process:
            return await _in_process(kind, body, digest)


async def _in_process(kind: str, body: bytes, digest: str) -> str:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, kind, digest,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(_TIMEOUT_SECS):
            said, _ = await child.communicate(body)
    except TimeoutError:
        raise BadRequest(f"the {kind} takes too long to read") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        raise BadRequest(f"the {kind} takes too much to read")
    verdict = json.loads(said)
    if "code" in verdict:
        raise from_wire(400, verdict["code"], verdict["message"])
    return str(verdict["found"])


def _main(kind: str, digest: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    try:
        verdict = {"found": _JUDGES[kind](sys.stdin.buffer.read(), digest)}
    except AetherError as error:
        verdict = {"code": error.code, "message": error.message}
    sys.stdout.write(json.dumps(verdict))


if __name__ == "__main__":
    _main(*sys.argv[1:])
