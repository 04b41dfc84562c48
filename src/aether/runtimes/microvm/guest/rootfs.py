"""A root file system per language: the interpreter of this machine, the libraries it was linked with, and no more.

There is no shell and no package manager in it: what a function does not need is of use to intruders only.
"""

from __future__ import annotations

import compileall
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from aether.model.errors import ServiceUnavailable
from aether.runtimes.interpreters import node_program, output, python_program

RUNTIMES = ("node", "python")
"""What is shipped; others are registered with a root file system of their own."""

_FOLDERS = ("app", "dev", "etc", "proc", "tmp", "usr/bin", "usr/lib")
_ETC = {
    "passwd": "root:x:0:0::/:/sbin/nologin\nfunction:x:1000:1000::/tmp:/sbin/nologin\n",
    "group": "root:x:0:\nfunction:x:1000:\n",
    "hosts": "127.0.0.1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "os-release": 'NAME="Aether guest"\nID=aether\n',
}
REHEARSALS = {
    "node": (
        "usr/lib/aether/rehearsal.js",
        """const http = require("http"), path = "/tmp/rehearsal";
const server = http.createServer((request, response) => response.end("x"));
server.listen(path, () => http.get({socketPath: path, agent: false}, (response) => {
  response.resume();
  response.on("end", () => server.close());
}));
""",
    ),
    "python": (
        "usr/lib/aether/rehearsal.py",
        """import asyncio, http.server, json, socket, ssl, threading
here, there = socket.socketpair()
there.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
http.server.BaseHTTPRequestHandler.log_message = lambda *_: None
http.server.BaseHTTPRequestHandler(here, ("", 0), None)
""",
    ),
}
"""What a guest runs before a snapshot of it is made, and where that lies: what most functions do first, but no
connection, for which the kernel would draw secrets that all clones had in common."""

_LIBRARY = re.compile(r"(?:=> |^\s+)(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)
_LEFT_OUT = {
    *("__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo"),
    *("ensurepip", "lib2to3", "pydoc_data", "venv", "config"),
}


def sources(runtime: str) -> list[Path]:
    """The files that tell when a root file system must be made again."""
    if runtime == "node":
        return [node_program()]
    return [python_program(), Path(sysconfig.get_paths()["stdlib"]) / "os.py"]


def make_tree(runtime: str, tree: Path) -> None:
    """Put the root file system of `runtime` into the new folder `tree`. Blocks. Raises ServiceUnavailable."""
    tree.mkdir(mode=0o755)
    for name in _FOLDERS:
        (tree / name).mkdir(parents=True, exist_ok=True)
    for name, text in _ETC.items():
        (tree / "etc" / name).write_text(text)
    # a machine's own answer of the resolver would say where it stands; a guest with a way out is told by its host
    (tree / "etc" / "resolv.conf").write_text("")
    path, text = REHEARSALS[runtime]
    (tree / path).parent.mkdir()
    (tree / path).write_text(text)
    if runtime == "node":
        program = node_program()
        _copy(program, tree / "usr/bin/node")
        _libraries([program], tree)
    else:
        _python(tree)
    for folder, folders, files in os.walk(tree):
        for name in folders:
            os.chmod(os.path.join(folder, name), 0o755)
        for name in files:
            path = os.path.join(folder, name)
            os.chmod(path, 0o755 if os.stat(path).st_mode & 0o111 else 0o644)


def _python(tree: Path) -> None:
    program, library = python_program(), Path(sysconfig.get_paths()["stdlib"])
    target = tree / "usr/lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(library, target, ignore=_ignored, symlinks=False)
    _copy(program, tree / "usr/bin/python3")
    # compiled here once instead of by every guest at its first import; hashes instead of times keep it reproducible
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, os.fspath(target), f"/{target.relative_to(tree)}"],
        env={"PATH": os.defpath, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        raise ServiceUnavailable("the standard library of Python could not be compiled")
    _libraries([program, *target.glob("lib-dynload/*.so")], tree)


_COMPILE = f"""
import sys, py_compile, {compileall.__name__}
compileall.compile_dir(sys.argv[1], quiet=2, stripdir=sys.argv[1], prependdir=sys.argv[2],
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""


def _ignored(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in _LEFT_OUT or name.startswith("config-") or name.endswith(".a")}


def _libraries(programs: Iterable[Path], tree: Path) -> None:
    """Copy what the loader finds for `programs` to the places where it finds them, the loader included."""
    found: set[str] = set()
    for program in programs:
        told = output(["ldd", os.fspath(program)], allow_failure=True)
        if " => not found" in told:
            continue  # a module of the standard library whose library is not installed does not work here either
        found.update(_LIBRARY.findall(told))
    for name in sorted(found):
        _copy(Path(name), tree / name.lstrip("/"))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)
