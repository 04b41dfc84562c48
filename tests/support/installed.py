"""Artifacts packed from folders written by a test, and what was packed, as the inventory sees it."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

from aether.artifact.manifest import read
from aether.artifact.pack import Packed, pack
from aether.artifact.tree import scan
from aether.build.inventory.contents import Contents


def tree(root: Path, files: dict[str, str | bytes | dict[str, object]], links: dict[str, str] | None = None) -> Path:
    """Write `files` below `root`: a mapping is written as JSON, a package.json for example."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    for name, target in (links or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(target, root / name)
    return root


def packed(root: Path, out: Path) -> tuple[Packed, Contents]:
    """`root` as an artifact, and its contents."""
    entries = scan(root)
    made = pack(entries, out)
    return made, Contents(read(made.manifest.read_bytes()).entries, entries, ())


def wheel(folder: Path, name: str, version: str = "1.0") -> Path:
    """A wheel with a module and a program, so that installing needs no network."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = '{version}'\ndef main():\n    print('{name} {version}')\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", f"[console_scripts]\n{name}={name}:main\n")
        archive.writestr(f"{info}/RECORD", "")
    return path
