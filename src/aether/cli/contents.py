"""What is inside two artifacts, compared file by file without unpacking either to disk."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile

from aether.model.errors import AetherError, Internal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

    from aether.client.api import Api


def compare_artifacts(api: Api, a: str, b: str) -> dict[str, list[str]]:
    """Paths that the artifact `b` adds to `a`, lacks, or has with another content, mode or target."""
    before, after = listing(api.download(a)), listing(api.download(b))
    return {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": sorted(path for path in before.keys() & after.keys() if before[path] != after[path]),
    }


def listing(artifact: bytes) -> dict[str, str]:
    """Path to a fingerprint of what is there. Raises AetherError for bytes that are no artifact."""
    found: dict[str, str] = {}
    try:
        with gzip.open(io.BytesIO(artifact)) as plain, tarfile.open(fileobj=plain, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                digest = _sha256(content) if content else member.linkname
                if not member.isdir():
                    found[member.name] = f"{member.mode:o} {member.type!r} {digest}"
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged(error) from error
    return found


def _sha256(content: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := content.read(1024 * 1024):
        digest.update(block)
    return digest.hexdigest()


def _damaged(error: Exception) -> AetherError:
    return Internal(f"an artifact of the registry cannot be read: {error}")
