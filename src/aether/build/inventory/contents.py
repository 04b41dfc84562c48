"""What was packed: the members of an artifact by path, and the bytes they were packed from, held to their hashes."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from aether.artifact.manifest import Listed
from aether.artifact.tree import Entry, show
from aether.build.project import Excluded
from aether.model.errors import LocalIOError


class Contents:
    """The members of an artifact. Paths are bytes, as in the archive; folders as text are UTF-8 with escapes."""

    def __init__(self, members: Iterable[Listed], entries: Iterable[Entry], excluded: Sequence[Excluded]) -> None:
        self.members = {member.path: member for member in members}
        self._sources = {entry.name: entry.source for entry in entries}
        self._files_out = {item.path for item in excluded if not item.path.endswith("/")}
        self._folders_out = {item.path for item in excluded if item.path.endswith("/")}

    def source(self, path: bytes) -> bytes | None:
        """Where the member lies on this machine."""
        return self._sources.get(path) or None

    def read(self, path: bytes) -> bytes:
        """The content of a file that was packed. Raises LocalIOError when it has changed since."""
        source, member = self._sources[path], self.members[path]
        try:
            with open(source, "rb") as file:
                content = file.read()
        except OSError as error:
            raise LocalIOError(f"cannot read '{show(path)}': {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != member.sha256:
            raise LocalIOError(f"'{show(path)}' changed after it was packed: stop what writes to it and try again")
        return content

    def hash_again(self, path: bytes, algorithm: str) -> str:
        """Another hash of a file that was packed, of the very bytes that were. Raises LocalIOError."""
        return hashlib.new(algorithm, self.read(path)).hexdigest()

    def left_out(self, path: bytes) -> bool:
        """Whether the user's own rules keep this path out of the artifact."""
        shown = show(path)
        if shown in self._files_out:
            return True
        if not self._folders_out:
            return False
        parts = shown.split("/")
        return any("/".join(parts[:count]) + "/" in self._folders_out for count in range(1, len(parts)))


def text_of(path: bytes) -> str:
    """A path as text that `path_of` turns into the same bytes again."""
    return path.decode("utf-8", "surrogateescape")


def path_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def shown(text: str) -> str:
    """A folder for a document: bytes that are not UTF-8 and control bytes are escaped."""
    return show(path_of(text))


def as_mapping(value: object) -> Mapping[str, object]:
    """`value` if it is a JSON object, else an empty one."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType, reportUnknownMemberType]
