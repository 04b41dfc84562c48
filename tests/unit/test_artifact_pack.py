"""Packing: determinism, odd names, links, refusals, and that other readers of tar see the same tree."""

import gzip
import hashlib
import io
import json
import os
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.artifact import pack as packing
from aether.artifact.extract import extract
from aether.artifact.headers import TYPE_FILE, file_header, header
from aether.artifact.pack import Packed, pack
from aether.artifact.tree import Entry, scan
from aether.model.errors import ConfigError, LocalIOError

Tree = dict[bytes, tuple[str, bytes, bool]]


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def tree(root: Path) -> Tree:
    """Kind, content and executability of everything below a folder."""
    found: Tree = {}
    for name, source, kind in scan(root):
        if kind == "l":
            found[name] = (kind, os.readlink(source), False)
        elif kind == "d":
            found[name] = (kind, b"", False)
        else:
            with open(source, "rb") as file:
                found[name] = (kind, file.read(), bool(os.stat(source).st_mode & 0o100))
    return found


def read_with_tarfile(artifact: Path) -> Tree:
    found: Tree = {}
    with tarfile.open(artifact, "r:gz") as archive:
        for member in archive:
            name = os.fsencode(member.name)
            if member.issym():
                found[name] = ("l", os.fsencode(member.linkname), False)
            elif member.isdir():
                found[name] = ("d", b"", False)
            else:
                content = archive.extractfile(member)
                assert content is not None
                found[name] = ("f", content.read(), bool(member.mode & 0o100))
    return found


def packed(root: Path, out: Path, level: int = 2) -> Packed:
    return pack(scan(root), out, level=level)


def test_digests_are_of_the_file_and_of_the_tar(tmp_path: Path) -> None:
    root = write(tmp_path / "app", {"server.js": "x", "lib/big.bin": os.urandom(3_000_000)})
    made = packed(root, tmp_path / "out")
    raw = made.artifact.read_bytes()
    assert made.digest == hashlib.sha256(raw).hexdigest()
    assert made.size_bytes == len(raw)
    plain = gzip.decompress(raw)
    assert made.content_digest == hashlib.sha256(plain).hexdigest()
    assert made.tar_bytes == len(plain)
    assert made.artifact.name == f"app-{made.digest}.tar.gz"
    assert made.manifest.name == f"app-{made.digest}.manifest.json"
    assert made.files == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [made.manifest.name, made.artifact.name]


def test_the_artifact_is_several_gzip_members(tmp_path: Path) -> None:
    root = write(tmp_path / "app", {"big.bin": os.urandom(3_000_000), "a": "1", "z": "2"})
    raw = packed(root, tmp_path / "out").artifact.read_bytes()
    stream, members = io.BytesIO(raw), 0
    import zlib

    rest = stream.read()
    while rest:
        one = zlib.decompressobj(31)
        one.decompress(rest)
        assert one.eof
        rest, members = one.unused_data, members + 1
    assert members >= 5


@pytest.mark.parametrize("level", [0, 1, 2, 3, 6, 9])
def test_the_tar_does_not_depend_on_the_level(tmp_path: Path, level: int) -> None:
    root = write(tmp_path / "app", {"a.txt": "a" * 100_000, "b/c.txt": "hello"})
    assert packed(root, tmp_path / "out", level).content_digest == packed(root, tmp_path / "two").content_digest


def test_times_owners_and_order_of_creation_leave_no_trace(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a": "1", "b/c": "2", "b.txt": "3"})
    two = write(tmp_path / "two", {"b.txt": "3", "b/c": "2", "a": "1"})
    os.utime(two / "a", (1, 1))
    (two / "a").chmod(0o600)
    (two / "b").chmod(0o700)
    first, second = packed(one, tmp_path / "out"), packed(two, tmp_path / "out")
    assert (first.digest, first.content_digest) == (second.digest, second.content_digest)


def test_modes_are_one_of_two(tmp_path: Path) -> None:
    root = write(tmp_path / "app", {"plain": "", "run": ""})
    (root / "plain").chmod(0o666)
    (root / "run").chmod(0o711)
    with tarfile.open(packed(root, tmp_path / "out").artifact) as archive:
        seen = {member.name: (member.mode, member.uid, member.gid, member.mtime, member.uname) for member in archive}
    assert seen == {"plain": (0o644, 0, 0, 315532801, ""), "run": (0o755, 0, 0, 315532801, "")}


def odd_tree(root: Path) -> Path:
    write(root, {"plain": "x", "deep/" + "/".join(["d" * 60] * 6) + "/file": "deep"})
    base = os.fsencode(root)
    for name in (
        b"new\nline",
        b"not-utf8-\xff\xfe",
        b"\xc3\xa4 umlaut",
        b" space ",
        b"-dash",
        b"back\\slash",
        b"n" * 255,
        b"\xff" * 200,
        b"tab\t",
    ):
        with open(base + b"/" + name, "wb") as file:
            file.write(name)
    os.mkdir(base + b"/empty")
    os.mkdir(base + b"/empty-\xfe\n")
    os.symlink(b"plain", base + b"/good")
    os.symlink(b"nowhere/at/all", base + b"/dangling")
    os.symlink(b"../plain", base + b"/deep/up")
    os.symlink(b"x" * 180 + b"\xff", base + b"/far")
    os.symlink(b"loop", base + b"/loop")
    os.link(base + b"/plain", base + b"/hard")
    return root


def test_odd_names_links_and_empty_folders_survive(tmp_path: Path) -> None:
    root = odd_tree(tmp_path / "app")
    made = packed(root, tmp_path / "out")
    expected = tree(root)
    extract(made.artifact, tmp_path / "back")
    assert tree(tmp_path / "back") == expected
    assert read_with_tarfile(made.artifact) == expected
    (tmp_path / "gnu").mkdir()
    subprocess.run(["tar", "xzf", made.artifact, "-C", tmp_path / "gnu"], check=True)
    assert tree(tmp_path / "gnu") == expected
    listed = subprocess.run(["tar", "tzf", made.artifact], check=True, capture_output=True)
    assert listed.stderr == b""
    again = packed(tmp_path / "back", tmp_path / "out2")
    assert again.content_digest == made.content_digest


def test_the_manifest_lists_everything(tmp_path: Path) -> None:
    root = write(tmp_path / "app", {"run.sh": "#!", "a/b": "12345"})
    (root / "run.sh").chmod(0o755)
    (root / "link").symlink_to("a/b")
    with open(os.fsencode(root) + b"/\xff", "wb"):
        pass
    made = packed(root, tmp_path / "out")
    manifest = json.loads(made.manifest.read_text())
    entries = manifest.pop("entries")
    assert manifest == {
        "version": 1,
        "files": 3,
        "digest": made.digest,
        "content_digest": made.content_digest,
        "size_bytes": made.size_bytes,
        "tar_bytes": made.tar_bytes,
    }
    assert entries == [
        {"path": "a", "type": "directory", "mode": "0755"},
        {"path": "a/b", "type": "file", "mode": "0644", "size": 5, "sha256": hashlib.sha256(b"12345").hexdigest()},
        {"path": "link", "type": "symlink", "mode": "0777", "target": "a/b"},
        {"path": "run.sh", "type": "file", "mode": "0755", "size": 2, "sha256": hashlib.sha256(b"#!").hexdigest()},
        {
            "path": {"base64": "/w=="},
            "type": "file",
            "mode": "0644",
            "size": 0,
            "sha256": hashlib.sha256().hexdigest(),
        },
    ]


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "a/../../x", "", "up/../x"])
def test_links_that_leave_the_tree_are_refused(tmp_path: Path, target: str) -> None:
    root = write(tmp_path / "app", {"a/b/file": "x"})
    (root / "a/up").symlink_to("..")
    place = root / "a" / "link" if target == "up/../x" else root / "link"
    if not target:
        with pytest.raises(FileNotFoundError):
            os.symlink("", place)
        return
    place.symlink_to(target)
    with pytest.raises(ConfigError, match=r"link.*outside of what is packed"):
        packed(root, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_special_files_are_refused_by_name(tmp_path: Path) -> None:
    root = write(tmp_path / "app", {"a": ""})
    os.mkfifo(root / "pipe")
    with pytest.raises(ConfigError, match="'pipe' is a named pipe"):
        scan(root)
    (root / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "sock"))
        with pytest.raises(ConfigError, match="'sock' is a socket"):
            scan(root)
    (root / "sock").unlink()
    try:
        os.mknod(root / "null", 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        return
    with pytest.raises(ConfigError, match="'null' is a character device"):
        scan(root)


def test_entries_may_come_from_several_places(tmp_path: Path) -> None:
    write(tmp_path / "project", {"server.js": "s"})
    write(tmp_path / "cache", {"express/index.js": "e"})
    entries = scan(tmp_path / "project") + scan(tmp_path / "cache", b"node_modules/")
    made = pack(entries, tmp_path / "out")
    assert sorted(read_with_tarfile(made.artifact)) == [
        b"node_modules",
        b"node_modules/express",
        b"node_modules/express/index.js",
        b"server.js",
    ]


def test_a_name_twice_or_as_file_and_folder_is_refused(tmp_path: Path) -> None:
    source = os.fsencode(write(tmp_path, {"f": "x"}) / "f")
    with pytest.raises(ConfigError, match="twice"):
        pack([Entry(b"a", source, "f"), Entry(b"a", source, "f")], tmp_path / "out")
    with pytest.raises(ConfigError, match="as a file and as a folder"):
        pack([Entry(b"a", source, "f"), Entry(b"a/b", source, "f")], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"\.\."):
        pack([Entry(b"../b", source, "f")], tmp_path / "out")


@pytest.mark.parametrize("size", [10, 2_000_000])
@pytest.mark.parametrize("change", [-1, 1, 600_000])
def test_a_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, size: int, change: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "app", {"growing.log": b"x" * size})
    real = os.fstat

    def then_change(fd: int) -> os.stat_result:
        found = real(fd)
        monkeypatch.setattr(os, "fstat", real)
        os.truncate(root / "growing.log", max(0, size + change))
        return found

    entries = scan(root)
    monkeypatch.setattr(os, "fstat", then_change)
    with pytest.raises(LocalIOError, match=r"'growing\.log' changed while it was read"):
        pack(entries, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_replaced_by_a_link_or_gone_is_an_error(tmp_path: Path) -> None:
    root = write(tmp_path / "app", {"a": "x", "b": "y"})
    entries = scan(root)
    (root / "a").unlink()
    with pytest.raises(LocalIOError, match="cannot read 'a'"):
        pack(entries, tmp_path / "out")
    (root / "a").symlink_to("/etc/passwd")
    with pytest.raises(LocalIOError, match="cannot read 'a'"):
        pack(entries, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource
    import signal

    root = write(tmp_path / "app", {"big": os.urandom(30_000_000)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(LocalIOError, match="cannot write the artifact"):
            packed(root, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_leaves_no_file_and_no_thread(tmp_path: Path) -> None:
    import threading

    root = write(tmp_path / "app", {str(i): "x" for i in range(600)})
    before = threading.active_count()

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(scan(root), tmp_path / "out", progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []
    assert threading.active_count() == before


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    root = write(tmp_path / "app", {str(i): "x" for i in range(600)})
    seen: list[tuple[int, int]] = []
    pack(scan(root), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 600)
    assert seen[-1] == (600, 600)
    assert seen == sorted(seen)


def test_an_empty_tree_packs(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    made = packed(tmp_path / "app", tmp_path / "out")
    assert made.tar_bytes == 1024
    extract(made.artifact, tmp_path / "back")
    assert tree(tmp_path / "back") == {}


def test_one_changed_file_leaves_most_members_as_they_were(tmp_path: Path) -> None:
    root = write(tmp_path / "app", {f"d{i % 7}/f{i}": os.urandom(20_000) for i in range(400)})
    before = members_of(packed(root, tmp_path / "out").artifact)
    (root / "d3" / "f3").write_bytes(os.urandom(33_333))
    after = members_of(packed(root, tmp_path / "out").artifact)
    assert len(after - before) <= 2 < len(after)


def members_of(artifact: Path) -> set[bytes]:
    import zlib

    rest, found = artifact.read_bytes(), set[bytes]()
    while rest:
        one = zlib.decompressobj(31)
        one.decompress(rest)
        found.add(rest[: len(rest) - len(one.unused_data)])
        rest = one.unused_data
    return found


@given(name=st.binary(min_size=1, max_size=400), size=st.integers(0, 1 << 40))
def test_headers_are_read_back_by_tarfile(name: bytes, size: int) -> None:
    parts = [part[:255] for part in name.replace(b"\0", b"x").split(b"/") if part not in (b"", b".", b"..")]
    name = b"/".join(parts) or b"x"
    block = header(name, 0o755, size, TYPE_FILE)
    member = tarfile.TarFile(fileobj=io.BytesIO(block + bytes(1024))).next()
    assert member is not None
    assert (os.fsencode(member.name), member.size, member.mode) == (name, size, 0o755)
    assert file_header(name, 0o755, size) == block


NAMES = (
    st.binary(min_size=1, max_size=30)
    .map(lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_"))
    .filter(lambda name: name not in (b".", b".."))
)
CONTENT = st.one_of(st.binary(max_size=50), st.integers(0, 1_500_000).map(lambda size: b"\x01\x02" * (size // 2)))


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.dictionaries(NAMES, CONTENT, max_size=4),
        lambda below: st.dictionaries(NAMES, st.one_of(CONTENT, below), max_size=4),
        max_leaves=12,
    )
)
def test_any_tree_comes_back(tmp_path_factory: pytest.TempPathFactory, shape: dict[bytes, object]) -> None:
    base = tmp_path_factory.mktemp("tree")
    make(os.fsencode(base / "app"), shape)
    made = packed(base / "app", base / "out")
    extract(made.artifact, base / "back")
    assert tree(base / "back") == tree(base / "app") == read_with_tarfile(made.artifact)
    assert packed(base / "back", base / "out").content_digest == made.content_digest


def make(folder: bytes, shape: dict[bytes, object]) -> None:
    os.mkdir(folder)
    for name, value in shape.items():
        if isinstance(value, dict):
            make(folder + b"/" + name, value)
        else:
            assert isinstance(value, bytes)
            with open(folder + b"/" + name, "wb") as file:
                file.write(value)


def test_segments_never_exceed_their_buffer() -> None:
    assert packing.SEGMENT_CUT + packing.SEGMENT_MIN <= packing.CAPACITY
