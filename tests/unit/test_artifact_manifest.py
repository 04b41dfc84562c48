"""Manifests: what pack writes is read as it stands, and anything pack would not write is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.artifact import manifest
from aether.artifact.pack import Packed, pack
from aether.artifact.tree import scan
from aether.model.errors import BadRequest, DigestMismatch


def _packed(tmp_path: Path) -> Packed:
    root = tmp_path / "tree"
    (root / "bin").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "bin" / "run").write_text("#!/bin/sh\n")
    (root / "bin" / "run").chmod(0o755)
    (root / "link").symlink_to("bin/run")
    (root / 'odd "name"\n').write_bytes(b"x" * 1000)
    with open(os.fsencode(root) + b"/\xff\xfe", "wb") as file:
        file.write(b"not UTF-8")
    return pack(scan(root), tmp_path / "out")


def test_what_pack_writes_is_read(tmp_path: Path) -> None:
    packed = _packed(tmp_path)
    found = manifest.check(packed.manifest.read_bytes(), packed.digest)
    assert (found.digest, found.content_digest) == (packed.digest, packed.content_digest)
    assert (found.size_bytes, found.tar_bytes, found.files) == (packed.size_bytes, packed.tar_bytes, packed.files)
    assert [(one.path, one.kind, one.size) for one in found.entries] == [
        (b"bin", "d", 0),
        (b"bin/run", "f", 10),
        (b"empty", "d", 0),
        (b"link", "l", 0),
        (b'odd "name"\n', "f", 1000),
        (b"\xff\xfe", "f", 9),
    ]
    assert found.entries[1].executable
    assert not found.entries[4].executable
    assert found.entries[3].target == b"bin/run"


def test_another_artifact_s_manifest_is_told(tmp_path: Path) -> None:
    packed = _packed(tmp_path)
    with pytest.raises(DigestMismatch, match=packed.digest):
        manifest.check(packed.manifest.read_bytes(), "0" * 64)


FILE = {"path": "a", "type": "file", "mode": "0644", "size": 3, "sha256": "a" * 64}


def _whole(*entries: Any, **changes: Any) -> bytes:
    value = {
        "version": 1,
        "entries": list(entries),
        "files": sum(isinstance(one, dict) and one.get("type") == "file" for one in entries),
        "tar_bytes": 1024,
        "size_bytes": 100,
        "content_digest": "b" * 64,
        "digest": "c" * 64,
    } | changes
    return json.dumps({name: one for name, one in value.items() if one is not ...}).encode()


def test_the_smallest_manifests_are_read() -> None:
    assert manifest.read(_whole()).entries == []
    assert len(manifest.read(_whole(FILE)).entries) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"[1]",
        _whole(version=2),
        _whole(version=True),
        _whole(more=1),
        _whole(digest=...),
        _whole(digest="C" * 64),
        _whole(content_digest=5),
        _whole(tar_bytes=-1),
        _whole(size_bytes=1.5),
        _whole(files=1),
        _whole(FILE, tar_bytes=2),
        _whole(FILE, FILE),
        _whole({**FILE, "path": "b"}, FILE),
        _whole({**FILE, "path": "../a"}),
        _whole({**FILE, "path": "/a"}),
        _whole({**FILE, "path": "a/"}),
        _whole({**FILE, "path": "./a"}),
        _whole({**FILE, "path": ""}),
        _whole({**FILE, "path": "a\0"}),
        _whole({**FILE, "path": {"base64": "YQ=="}}),
        _whole({**FILE, "path": {"base64": "*"}}),
        _whole({**FILE, "path": {"base64": "//4=", "more": 1}}),
        _whole({**FILE, "path": ["a"]}),
        _whole({**FILE, "mode": "0777"}),
        _whole({**FILE, "mode": 420}),
        _whole({**FILE, "mode": []}),
        _whole({**FILE, "size": True}),
        _whole({**FILE, "size": -3}),
        _whole({**FILE, "sha256": "A" * 64}),
        _whole({**FILE, "sha256": None}),
        _whole({**FILE, "more": 1}),
        _whole({"path": "a", "type": "fifo", "mode": "0644"}),
        _whole({"path": "a", "type": ["file"], "mode": "0644"}),
        _whole({"path": "a", "type": "symlink", "mode": "0777"}),
        _whole({"path": "a", "type": "symlink", "mode": "0777", "target": 1}),
        _whole("a"),
    ],
)
def test_what_pack_would_not_write_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        manifest.read(data)


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(values)
def test_any_entry_is_read_or_refused(value: Any) -> None:
    with pytest.raises(BadRequest):
        manifest.read(_whole(value))
