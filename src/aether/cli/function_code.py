"""Code of a function as `--code` names it: an archive, or a folder that is packed for the upload."""

from __future__ import annotations

import os
from contextlib import contextmanager

from aether.model.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

    from aether.client.transport import Body


@contextmanager
def archive(given: str | None) -> Generator[Body | None]:
    """What is to be uploaded; None for nothing. Raises UsageError, ConfigError, LocalIOError."""
    if given is None:
        yield None
    elif os.path.isdir(given):
        import tempfile

        with tempfile.TemporaryDirectory(prefix="aether-code-") as work, _file(_packed(given, work)) as body:
            yield body
    elif os.path.isfile(given):
        with _file(given) as body:
            yield body
    else:
        raise UsageError(f"--code: there is no folder and no file '{given}'")


def _packed(folder: str, work: str) -> str:
    from pathlib import Path

    from aether.artifact.pack import pack
    from aether.artifact.tree import LINK, show
    from aether.build.ignore import select

    entries = select(Path(folder)).entries
    if link := next((entry for entry in entries if entry.kind == LINK), None):
        raise UsageError(
            f"'{show(link.name)}' in {folder} is a link, which an archive may not have: list it in .aetherignore, or "
            "write kind = \"function\" into aether.toml and use 'aether deploy'"
        )
    if not entries:
        raise UsageError(f"--code: {folder} has nothing to pack")
    return str(pack(entries, Path(work)).artifact)


@contextmanager
def _file(path: str) -> Generator[Body]:
    from aether.client.upload import FilePart, SourceFile

    with SourceFile(path) as source:
        yield FilePart(source, 0, source.size, lambda _: None)
