"""Code of functions: taken in and judged, kept in the object store under its digest, and fetched onto this machine.

An archive is unpacked once when it comes, by the readers that will unpack it for an image, and thrown away again:
what may not be unpacked, or lacks its entrypoint, is refused at the upload and not at the first call. Which code is
still needed is the catalogue's to know (`aether.functions.retention`).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aether.artifact.extract import ExtractLimits, extract
from aether.artifact.unzip import unzip
from aether.functions.contents import CHECKING, Arrived, Contents, Objects
from aether.model.errors import BadRequest, ServiceUnavailable
from aether.model.function_instance import Code, CodeForm

PREFIX = "functions/"
"""Of the keys in the object store; the digest follows."""
MAX_CODE_BYTES = 256 << 20
"""Of an archive."""
LIMITS = ExtractLimits(max_bytes=1 << 30, max_entries=100_000, max_ratio=200)
"""Of what comes out of it; those of whoever makes images of it."""

_ZIP = (b"PK\3\4", b"PK\5\6")
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Received(Arrived):
    """An archive that has come in whole and is not kept yet."""

    form: CodeForm


class CodeStore(Contents):
    """`folder` is this machine's: archives by their digest, and what is being received."""

    def __init__(
        self,
        folder: Path,
        objects: Objects,
        *,
        max_bytes: int = MAX_CODE_BYTES,
        limits: ExtractLimits = LIMITS,
        threads: int = 2,
    ) -> None:
        super().__init__(folder, objects, prefix=PREFIX, what="code", max_bytes=max_bytes, threads=threads)
        self._limits = limits
        # apart, so that nobody waits for an archive of somebody else's to be unpacked
        self._checks = ThreadPoolExecutor(threads, thread_name_prefix="code-checks")

    async def close(self) -> None:
        await super().close()
        await asyncio.to_thread(self._checks.shutdown, wait=True)

    @asynccontextmanager
    async def receiving(self, body: AsyncIterator[bytes], form: CodeForm | None = None) -> AsyncGenerator[Received]:
        """Take in an archive; it is gone on leaving unless it was kept. `form` is what its sender says; without, and
        for zip and tar.gz, what it begins with decides.

        Raises BadRequest, PayloadTooLarge, and whatever `body` raises."""
        async with self.arriving(body) as came:
            found = await self.run(lambda: _form(came.path, form))
            yield Received(came.path, came.digest, came.size_bytes, found)

    async def check(self, received: Received, entrypoint: str) -> None:
        """Unpack it as it will be unpacked, and look for the entrypoint. Raises BadRequest, and ServiceUnavailable
        when there is no room for it."""

        def unpack() -> None:
            with tempfile.TemporaryDirectory(prefix=CHECKING, dir=self.folder) as work:
                tree = Path(work) / "tree"
                match received.form:
                    case CodeForm.ZIP:
                        unzip(received.path, tree, limits=self._limits)
                    case CodeForm.TAR_GZ:
                        extract(received.path, tree, limits=self._limits, plain=True)
                    case CodeForm.ARTIFACT:
                        extract(received.path, tree, limits=self._limits)
                # its links do not lead out, or it had been refused
                if not (tree / entrypoint).is_file():
                    raise BadRequest(
                        f"the code has no file '{entrypoint}', which is the function's entrypoint",
                        {"field": "entrypoint"},
                    )

        try:
            await asyncio.get_running_loop().run_in_executor(self._checks, unpack)
        except OSError as error:
            raise ServiceUnavailable(f"the code cannot be unpacked here: {error.strerror}") from error

    async def fetch(self, digest: str, form: CodeForm) -> Code:
        """The archive on this machine. Raises what `have` does."""
        return Code(await self.have(digest), form, digest)


def _form(path: Path, said: CodeForm | None) -> CodeForm:
    with path.open("rb") as file:
        start = file.read(4)
    found = CodeForm.ZIP if start in _ZIP else CodeForm.TAR_GZ if start.startswith(_GZIP) else None
    if found is None:
        raise BadRequest("the code is neither a zip nor a tar.gz archive")
    if said is None or said is found:
        return found
    if said is CodeForm.ARTIFACT and found is CodeForm.TAR_GZ:
        return said
    raise BadRequest(f"the code was announced as {said.value} and is a {found.value} archive")
