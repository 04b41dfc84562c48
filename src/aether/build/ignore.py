"""What of a project is packed and why the rest is not. Nothing is left out without a reason that can be shown.

    never          .git, .env*, private keys, credentials of package managers and Aether's own files, all of them
                   outside node_modules; node_modules/.cache
    .aetherignore  gitignore globs of the project, everywhere
    .gitignore     the project's and its folders', except built output and node_modules
    replaced       folders that an installation will provide

A folder that is left out is not looked into. Reading and compiling of patterns is pathspec's.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from aether.artifact.tree import DIRECTORY, FILE, LINK, Entry, kind_of, show
from aether.build.project import Excluded
from aether.model.errors import ConfigError, LocalIOError

_MODULES = b"node_modules"
_BUILT = frozenset({b"dist", b"build", b"out", b".next", b".nuxt", b".output", b".svelte-kit"})
_VERSION_CONTROL = frozenset({b".git", b".hg", b".svn", b".jj"})
_KEY_NAMES = frozenset({b"id_rsa", b"id_dsa", b"id_ecdsa", b"id_ed25519"})
_KEY_SUFFIXES = (b".pem", b".key", b".p8", b".pk8")
_CREDENTIALS = {
    b".npmrc": (b"_authToken", b"_auth", b"_password"),
    b".yarnrc.yml": (b"npmAuthToken", b"npmAuthIdent"),
    b".pypirc": (b"password",),
    b".netrc": (b"password",),
}
_ARTIFACT = re.compile(rb"app-[0-9a-f]{64}\.(?:tar\.gz|(?:manifest|sbom|provenance)\.json|sig)|\.pack-.*\.part")
_LOOK_BYTES = 256 << 10

_SECRET = "environment file, may hold secrets: set them with 'aether config'"
_KEY = "private key"


class _Run(NamedTuple):
    """Neighbouring patterns of one polarity as a single expression."""

    ignores: bool
    regex: re.Pattern[str]


class _Rule(NamedTuple):
    ignores: bool
    regex: re.Pattern[str]
    text: str


class Rules:
    """The patterns of one ignore file; the last one that matches decides, as git has it."""

    def __init__(self, lines: Iterable[str], name: str) -> None:
        self.name = name
        self._rules = list(_rules(lines, name))
        self._runs: list[_Run] = []
        group: list[_Rule] = []
        for rule in [*reversed(self._rules), None]:
            if group and (rule is None or rule.ignores != group[0].ignores):
                joined = "|".join(f"(?:{one.regex.pattern})" for one in group)
                self._runs.append(_Run(group[0].ignores, re.compile(joined, re.DOTALL)))
                group = []
            if rule is not None:
                group.append(rule)

    def __bool__(self) -> bool:
        return bool(self._runs)

    def judge(self, path: str) -> bool | None:
        """True: ignored, False: explicitly not, None: not mentioned. A folder's path ends with '/'."""
        for run in self._runs:
            if run.regex.fullmatch(path):
                return run.ignores
        return None

    def reason(self, path: str) -> str:
        """Which pattern ignores `path`."""
        text = next(rule.text for rule in reversed(self._rules) if rule.regex.fullmatch(path))
        return f"{self.name}: {text}"


def _rules(lines: Iterable[str], name: str) -> Iterator[_Rule]:
    from pathspec import GitIgnoreSpec

    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r\n")
        # git lets 'a/**' match what is in a folder, not the folder, so that '!a/b' may follow
        asked = f"{text}/*" if text.endswith("/**") else f"{text}*/" if text.endswith("/**/") else text
        try:
            patterns = list(GitIgnoreSpec.from_lines([asked]).patterns)
        except ValueError as error:
            raise ConfigError(f"{name}, line {number}: '{text}' is not a pattern") from error
        for pattern in patterns:
            regex = getattr(pattern, "regex", None)
            if pattern.include is not None and isinstance(regex, re.Pattern):
                plain = str(regex.pattern).replace("?P<ps_d>", "?:")  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
                # pathspec searches and takes in all that lies below; here each path is judged by itself, in full
                whole = {".": ".+", "(?:/)": ".+/"}.get(plain, plain)
                yield _Rule(pattern.include, re.compile(whole, re.DOTALL), text)


def read_rules(path: bytes, name: str) -> Rules | None:
    """The rules of an ignore file, None if there is none or nothing in it."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            rules = Rules(file, name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LocalIOError(f"cannot read {name}: {error.strerror}") from error
    return rules or None


@dataclass(slots=True)
class Selection:
    """What a walk found: entries to pack, and what is left out with its reason."""

    entries: list[Entry] = field(default_factory=list[Entry])
    excluded: list[Excluded] = field(default_factory=list[Excluded])


class _Folder(NamedTuple):
    path: bytes
    prefix: bytes  # name in the archive with a '/' at its end, empty for the root
    local: tuple[tuple[int, Rules], ...]  # rules of .gitignore files on the way down and where their paths start
    modules: bool  # inside node_modules
    built: bool  # inside built output


def select(
    root: Path,
    *,
    replaced: Iterable[bytes] = (),
    prefix: bytes = b"",
    modules: bool = False,
    extra: Iterable[tuple[bytes, str]] = (),
) -> Selection:
    """Walk `root` and sort everything below it into packed and left out.

    `replaced` names folders (relative to `root`) that an installation provides; `extra` gives further names with a
    reason each. For an installed node_modules folder pass its `prefix` and `modules=True`: then only `.cache` and the
    patterns in `.aetherignore` of `root` count. Raises ConfigError for devices, pipes and sockets.
    """
    aether = read_rules(os.fsencode(root / ".aetherignore"), ".aetherignore")
    return _Walk(aether, frozenset(replaced), dict(extra)).run(os.fsencode(root), prefix, modules)


def select_modules(folder: Path, prefix: bytes, ignore_from: Path) -> Selection:
    """`select` for an installed node_modules `folder`, with the patterns of the project in `ignore_from`."""
    aether = read_rules(os.fsencode(ignore_from / ".aetherignore"), ".aetherignore")
    return _Walk(aether, frozenset(), {}).run(os.fsencode(folder), prefix + b"/", modules=True)


class _Walk:
    def __init__(self, aether: Rules | None, replaced: frozenset[bytes], extra: dict[bytes, str]) -> None:
        self._aether = aether
        self._replaced = replaced
        self._extra = extra
        self._found = Selection()

    def run(self, root: bytes, prefix: bytes, modules: bool) -> Selection:
        pending = [_Folder(root, prefix, (), modules, False)]
        while pending:
            folder = pending.pop()
            try:
                with os.scandir(folder.path) as items:
                    if folder.modules:
                        self._in_modules(folder, items, pending)
                    else:
                        self._outside(folder, list(items), pending)
            except OSError as error:
                raise LocalIOError(f"cannot read folder '{show(folder.path)}': {error.strerror}") from error
        self._found.excluded.sort(key=lambda one: one.path)
        return self._found

    def _in_modules(self, folder: _Folder, items: Iterable["os.DirEntry[bytes]"], pending: list[_Folder]) -> None:
        prefix, entries, aether = folder.prefix, self._found.entries, self._aether
        bookkeeping = prefix.endswith(b"node_modules/")
        for item in items:
            name = prefix + item.name
            kind = _kind(item)
            if bookkeeping and (reason := _bookkeeping(item.name)):
                self._leave_out(name, kind, reason)
                continue
            if aether is not None:
                path = os.fsdecode(name) + ("/" if kind == DIRECTORY else "")
                if aether.judge(path):
                    self._leave_out(name, kind, aether.reason(path))
                    continue
            entries.append(Entry(name, item.path, kind or kind_of(item, name)))
            if kind == DIRECTORY:
                pending.append(_Folder(item.path, name + b"/", (), True, False))

    def _outside(self, folder: _Folder, items: list["os.DirEntry[bytes]"], pending: list[_Folder]) -> None:
        local = folder.local
        if not folder.built and any(item.name == b".gitignore" for item in items):
            label = show(folder.prefix) + ".gitignore"
            rules = read_rules(folder.path + b"/.gitignore", label)
            if rules is not None:
                local = (*local, (len(os.fsdecode(folder.prefix)), rules))
        for item in items:
            name = folder.prefix + item.name
            kind = _kind(item)
            built, modules = folder.built, item.name == _MODULES and kind == DIRECTORY
            reason = self._never(item, name, kind) or self._by_aetherignore(name, kind)
            if reason is None and not built and not modules and local:
                reason = _by_gitignore(name, kind, local)
                if reason is not None and kind == DIRECTORY and _is_built(name):
                    reason, built = None, True
            if reason is not None:
                self._leave_out(name, kind, reason)
                continue
            self._found.entries.append(Entry(name, item.path, kind or kind_of(item, name)))
            if kind == DIRECTORY:
                pending.append(_Folder(item.path, name + b"/", local, modules, built or _is_built(name)))

    def _leave_out(self, name: bytes, kind: str, reason: str) -> None:
        self._found.excluded.append(Excluded(show(name) + ("/" if kind == DIRECTORY else ""), reason))

    def _never(self, item: "os.DirEntry[bytes]", name: bytes, kind: str) -> str | None:
        last = item.name
        if last in _VERSION_CONTROL:
            return "version control"
        if last.startswith(b".env"):
            return _SECRET
        if name in self._replaced:
            return "installed afresh for the artifact"
        if name in self._extra:
            return self._extra[name]
        if name == b".aether" and kind == DIRECTORY:
            return "Aether's own files"
        if kind == DIRECTORY:
            if last == b"cache" and name.endswith(b".next/cache"):
                return "build cache"
            return None
        if last in _KEY_NAMES:
            return _KEY
        if kind != FILE:
            return None
        if last.endswith(_KEY_SUFFIXES) and _mentions(item.path, (b"PRIVATE KEY",)):
            return _KEY
        if last in _CREDENTIALS and _mentions(item.path, _CREDENTIALS[last]):
            return "holds credentials"
        if last.endswith((b".gz", b".json", b".part", b".sig")) and _ARTIFACT.fullmatch(last):
            return "an artifact of an earlier deploy"
        return None

    def _by_aetherignore(self, name: bytes, kind: str) -> str | None:
        if self._aether is None:
            return None
        path = os.fsdecode(name) + ("/" if kind == DIRECTORY else "")
        return self._aether.reason(path) if self._aether.judge(path) else None


def _kind(item: "os.DirEntry[bytes]") -> str:
    """The kind of an item; empty for what cannot be packed, which may yet be left out for a reason."""
    if item.is_symlink():
        return LINK
    if item.is_dir(follow_symlinks=False):
        return DIRECTORY
    return FILE if item.is_file(follow_symlinks=False) else ""


def _bookkeeping(name: bytes) -> str | None:
    if name == b".cache":
        return "cache of tools"
    if name in (b".modules.yaml", b".yarn-state.yml", b".yarn-integrity") or name.startswith(
        b".pnpm-workspace-state"
    ):
        return "notes of the package manager"
    return None


def _by_gitignore(name: bytes, kind: str, local: tuple[tuple[int, Rules], ...]) -> str | None:
    path = os.fsdecode(name) + ("/" if kind == DIRECTORY else "")
    for start, rules in reversed(local):
        below = path[start:]
        verdict = rules.judge(below)
        if verdict is not None:
            return rules.reason(below) if verdict else None
    return None


def _is_built(name: bytes) -> bool:
    return name.rpartition(b"/")[2] in _BUILT


def _mentions(path: bytes, words: tuple[bytes, ...]) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(_LOOK_BYTES)
    except OSError:
        # what cannot be read is reported when it is packed
        return False
    return any(word in head for word in words)


__all__ = ["Rules", "Selection", "read_rules", "select", "select_modules"]
