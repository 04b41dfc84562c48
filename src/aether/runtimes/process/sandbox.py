"""The sandbox of an instance as arguments of bubblewrap, and the shell script that runs inside it. Pure.

As root, bubblewrap sets up with three capabilities and `setpriv` gives up everything for a uid of the app's own; as
an ordinary user it works in a user namespace. Variables are exported by the inner script, read from a descriptor:
after privileges are gone (LD_PRELOAD must not meet a privileged program) and off every command line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aether.model.errors import BadRequest
from aether.model.instance import InstanceSpec
from aether.runtimes.process.host import HostView
from aether.runtimes.process.shim.plan import ARGS_FD, NONE, SCRIPT_FD, SECCOMP_FD, STATUS_FD

USER_ID = 1000
"""Uid and gid inside a user namespace."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHELL_OWNED = frozenset({"PPID", "UID", "EUID", "OPTIND", "SHELLOPTS", "BASHOPTS", "BASH_VERSINFO"})
_SCRIPT = b". /proc/self/fd/%d" % SCRIPT_FD


@dataclass(frozen=True, slots=True)
class Tools:
    """Programs of this machine that a sandbox is made with; absolute paths."""

    bwrap: str
    setpriv: str
    setsid: str = ""


def options(
    spec: InstanceSpec,
    view: HostView,
    etc: Path,
    *,
    as_root: bool,
    groups: Sequence[tuple[Path, str]] = (),
    volumes: Sequence[tuple[Path, str]] = (),
) -> list[bytes]:
    """Arguments for `bwrap --args`: namespaces, mounts, filter.

    `etc` holds the synthesised files of /etc; `groups` are cgroup folders and where they are shown, read-only;
    `volumes` are the app's own folders, the only ones of this machine that an instance can write to.
    """
    limits = spec.limits
    arguments = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if as_root:
        arguments += ["--cap-drop", "ALL"]
        for name in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            arguments += ["--cap-add", name]
    else:
        arguments += ["--unshare-user", "--disable-userns", "--uid", str(USER_ID), "--gid", str(USER_ID)]
    arguments += ["--hostname", spec.app, "--die-with-parent", "--new-session"]
    arguments += ["--seccomp", str(SECCOMP_FD), "--json-status-fd", str(STATUS_FD)]
    for folder in view.folders:
        arguments += ["--ro-bind", folder, folder]
    for target, name in view.links:
        arguments += ["--symlink", target, name]
    files = [f"/etc/{name}" for name in sorted(etc_files(spec, USER_ID))]
    outside = [place for _, place in volumes if not place.startswith("/app/")]
    for folder in _parents([*view.etc, *files, *view.tools, *(place for _, place in groups), *outside]):
        arguments += ["--perms", "0755", "--dir", folder]
    for name in view.etc:
        arguments += ["--ro-bind-try", name, name]
    for name in files:
        arguments += ["--ro-bind", str(etc / Path(name).name), name]
    for prefix in view.tools:
        arguments += ["--ro-bind", prefix, prefix]
    for folder, place in groups:
        arguments += ["--ro-bind", str(folder), place]
    for folder in view.hidden:
        arguments += ["--tmpfs", folder, "--remount-ro", folder]
    arguments += ["--proc", "/proc", "--dev", "/dev"]
    arguments += [*_tmpfs("/dev/shm", limits.tmp_bytes), "--remount-ro", "/dev"]
    arguments += _tmpfs("/tmp", limits.tmp_bytes)
    arguments += ["--ro-bind", str(spec.root), "/app", "--chdir", "/app"]
    for folder, place in volumes:
        arguments += ["--bind", str(folder), place]
    arguments += ["--remount-ro", "/"]
    return [argument.encode("utf-8", "surrogateescape") for argument in arguments]


def _parents(paths: list[str]) -> list[str]:
    """Folders above `paths`, outermost first; the sandbox program would make them for its own user only."""
    found = {str(folder) for path in paths for folder in Path(path).parents if str(folder) != "/"}
    return sorted(found)


def _tmpfs(path: str, size: int) -> list[str]:
    return ["--perms", "1777", *(["--size", str(size)] if size else []), "--tmpfs", path]


def command(tools: Tools, uid: int | None) -> list[bytes]:
    """The program to start: bubblewrap, then (with a `uid`) the loss of every privilege, then the inner script."""
    words = [tools.bwrap, "--args", str(ARGS_FD), "--"]
    if uid is not None:
        words += [tools.setpriv, "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--no-new-privs"]
        words += ["--bounding-set=-all", "--inh-caps=-all", "--"]
    return [*(word.encode() for word in words), *plain_command()]


def plain_command() -> list[bytes]:
    """The inner script without a sandbox."""
    return [b"/bin/sh", b"-c", _SCRIPT]


def etc_files(spec: InstanceSpec, uid: int, *, egress: bool = False) -> dict[str, str]:
    """Names and contents of the files of /etc that are made for the instance."""
    return {
        "passwd": f"root:x:0:0:root:/:/bin/sh\napp:x:{uid}:{uid}:app:/tmp:/bin/sh\n",
        "group": f"root:x:0:\napp:x:{uid}:\n",
        "hosts": f"127.0.0.1 localhost {spec.app}\n::1 localhost\n",
        "hostname": f"{spec.app}\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        "resolv.conf": "nameserver 10.0.2.3\n" if egress else "# this instance has no egress\n",
    }


def environment(
    spec: InstanceSpec, path: tuple[str, ...], *, app_dir: str = "/app", port: int | None = None
) -> dict[str, str]:
    """All variables of the instance; the spec's own win. Raises BadRequest for a name no shell can pass on."""
    python = Path(spec.root) / ".aether" / "python"
    values = {"PATH": ":".join((f"{app_dir}/.aether/python/bin", *path)) if python.is_dir() else ":".join(path)}
    values |= {"HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "NODE_ENV": "production"}
    # npm would ask its registry for news of itself at every start and print them among the app's lines
    values["NPM_CONFIG_UPDATE_NOTIFIER"] = "false"
    if python.is_dir():
        values["PYTHONPATH"] = f"{app_dir}/.aether/python"
    if spec.port:
        values["PORT"] = str(spec.port if port is None else port)
    for name, value in spec.env.items():
        if not _VARIABLE.fullmatch(name) or name in _SHELL_OWNED:
            raise BadRequest(f"'{name}' cannot name an environment variable of an app")
        if "\0" in value:
            raise BadRequest(f"the value of {name} contains a NUL byte")
    return values | spec.env


def script(
    variables: dict[str, str], command: str, *, kind: str, pids: int = 0, folder: str = "/app", setsid: str = ""
) -> bytes:
    """The inner script: limits (when `pids` is given), variables, then `/bin/sh -c command` in `folder`; by `setsid`
    the command leads a session of its own whose terminal is its stdin."""
    if "\0" in command:
        raise BadRequest("the start command contains a NUL byte")
    lines: list[str] = []
    if pids:
        lines.append(f"ulimit -p {pids} 2>/dev/null || ulimit -u {pids}")
    if kind == NONE:
        lines.append(f"cd {_quoted(folder)} || exit 127")
        lines.append("unset PWD OLDPWD")
    lines += [f"export {name}={_quoted(value)}" for name, value in variables.items()]
    lines.append(f"exec {SCRIPT_FD}<&- {ARGS_FD}<&- {SECCOMP_FD}<&- {STATUS_FD}<&-")
    session = f"{_quoted(setsid)} --ctty --wait " if setsid else ""
    lines.append(f"exec {session}/bin/sh -c {_quoted(command)}")
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
