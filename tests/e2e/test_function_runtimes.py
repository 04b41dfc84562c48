"""Registered runtimes as an admin has them: added, listed, saved, refused where no machine runs, and removed."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from aether.runtimes.microvm.images import make_image
from support.product import Done, Product, product


def image(folder: Path) -> Path:
    for tool in ("mksquashfs", "unsquashfs"):
        if shutil.which(tool) is None:
            pytest.skip("component: squashfs-tools")
    tree = folder / "tree"
    for inside in ("app", "dev", "proc", "tmp", "usr/bin"):
        (tree / inside).mkdir(parents=True)
    program = tree / "usr/bin/run"
    program.write_text("#!/bin/true\n")
    program.chmod(0o755)
    make_image(tree, folder / "mine.sqfs")
    return folder / "mine.sqfs"


def runtimes(up: Product, *words: str, check: bool = True) -> Done:
    return up.run("function", "runtimes", *words, check=check)


def test_a_runtime_from_its_adding_to_its_removal(tmp_path: Path) -> None:
    file = image(tmp_path)
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 300 << 20)  # more than code may have
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with product(tmp_path / "home", AETHER_FUNCTION_RUNTIME="process") as up:
        assert [line.split()[0] for line in runtimes(up).stdout.splitlines()] == ["NAME", "node", "python"]
        for words, said in (
            (("add", "mine"), "--rootfs"),
            (("add", "mine", "--rootfs", str(file)), "--init"),
            (("add", "mine", "--rootfs", str(tmp_path / "none"), "--init", "/usr/bin/run"), "no file"),
            (("add", "mine", "--rootfs", str(file), "--init", "/usr/bin/run 'a"), "--init"),
            (("add", "mine", "--rootfs", str(file), "--init", "/usr/bin/other"), "/usr/bin/other"),
            (("add", "mine", "--rootfs", __file__, "--init", "/usr/bin/run"), "mksquashfs"),
            (("add", "mine", "--rootfs", str(large), "--init", "/usr/bin/run"), "mksquashfs"),
            (("add",), "NAME"),
            (("remove",), "NAME"),
            (("list", "mine"), "NAME"),
            (("remove", "mine", "--init", "x"), "add"),
            (("remove", "mine"), "mine"),
            (("remove", "node"), "shipped"),
        ):
            done = runtimes(up, *words, check=False)
            assert (done.code != 0, said in done.stderr) == (True, True), (words, done)
        added = runtimes(up, "add", "mine", "--rootfs", str(file), "--init", "/usr/bin/run --flag 'a b'")
        assert added.stdout == f"added mine, {digest[:12]}\n"
        listed = runtimes(up, "list", "--format", "json").json["items"]
        assert [(one["name"], one["shipped"]) for one in listed] == [
            ("node", True), ("python", True), ("mine", False),
        ]  # fmt: skip
        assert (listed[2]["digest"], listed[2]["init"]) == (digest, ["/usr/bin/run", "--flag", "a b"])
        assert f"{digest[:12]}" in runtimes(up).stdout

        code = tmp_path / "code"
        code.mkdir()
        (code / "index.js").write_text("")
        up.run("function", "create", "f", "--runtime", "mine", "--entrypoint", "index.js", "--code", str(code))
        done = up.run("function", "invoke", "f", check=False)
        assert done.code == 40
        shown = up.run("function", "show", "f", "--format", "json").json
        assert "needs virtual machines" in shown["state"]["last_failure"]["reason"]
        done = runtimes(up, "remove", "mine", check=False)
        assert (done.code != 0, "versions of f" in done.stderr) == (True, True), done

        saved = tmp_path / "b.tar"
        up.run("backup", "--out", str(saved), "--plain-keys")
        up.stop()
        shutil.rmtree(up.data)
        assert up.run("restore", str(saved), "--format", "json").json["missing"] == []
        kept = up.data / "objects" / "runtimes" / digest
        assert (kept.read_bytes(), kept.stat().st_mode & 0o777) == (file.read_bytes(), 0o400)
        up.start()
        assert runtimes(up, "list", "--format", "json").json["items"] == listed

        up.run("function", "delete", "f", "--yes")
        assert runtimes(up, "remove", "mine").stdout == "removed mine\n"
        assert "mine" not in runtimes(up).stdout
