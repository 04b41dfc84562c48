"""Starts the programs around one instance: the sandboxed command, the dialer and the egress helper."""

from __future__ import annotations

import os
import resource
import signal
import socket

from .plan import ARGS_FD, NONE, SCRIPT_FD, SECCOMP_FD, STATUS_FD, Plan

_PARKED = 200
"""Descriptors are moved here first so that laying them out cannot overwrite one that is still needed."""


def command(plan: Plan, stdout: int, stderr: int, status: int) -> int:
    """Fork and run the plan's program inside its cgroups; returns its pid. Errors appear on its stderr."""
    arguments = _memory("arguments", b"".join(item + b"\0" for item in plan.options))
    script = _memory("script", plan.script)
    seccomp = _memory("filter", bytes.fromhex(plan.filter_hex))
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    layout = {0: null, 1: stdout, 2: stderr, SCRIPT_FD: script}
    if plan.kind != NONE:
        layout |= {ARGS_FD: arguments, SECCOMP_FD: seccomp, STATUS_FD: status}
    pid = os.fork()
    if pid == 0:
        _become(plan, layout)
    for fd in (arguments, script, seccomp, null):
        os.close(fd)
    return pid


def _become(plan: Plan, layout: dict[int, int]) -> None:
    try:
        for target, source in layout.items():
            os.dup2(source, _PARKED + target, inheritable=False)
        for target in layout:
            os.dup2(_PARKED + target, target, inheritable=True)
        for group in plan.cgroups:
            with open(os.path.join(group, b"cgroup.procs"), "wb", buffering=0) as file:
                file.write(b"0")
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.umask(0o022)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_NOFILE, plan.open_files)
        if plan.data_bytes:
            _limit(resource.RLIMIT_DATA, plan.data_bytes)
        if plan.kind == NONE:
            os.setsid()
            _die_with_parent()
        os.execve(plan.argv[0], plan.argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"})
    except (OSError, ValueError) as error:
        os.write(2, f"aether: cannot start: {error}\n".encode())
    finally:
        os._exit(127)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _memory(name: str, data: bytes) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _die_with_parent() -> None:
    _prctl(1, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ended (PR_SET_CHILD_SUBREAPER)."""
    _prctl(36, 1)


def _prctl(option: int, value: int) -> None:
    import ctypes  # half a megabyte that only the unsandboxed kind needs

    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def dialer(init_pid: int, port: int) -> tuple[int, socket.socket]:
    """Fork the dialer into the network namespace of `init_pid`; returns its pid and control socket.

    It says `up` on the socket when the sandbox has set up its loopback device: nobody may touch the network before.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            keep = os.dup(theirs.fileno()) if theirs.fileno() < 3 else theirs.fileno()
            os.closerange(3, keep)
            os.closerange(keep + 1, 4096)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            from .dialer import Dialer, await_loopback, enter, refuse_link_local

            enter(init_pid, user_namespace=os.geteuid() != 0)
            await_loopback()
            os.write(keep, b"up")
            try:
                refuse_link_local()
            except OSError as error:
                # without a route there is no egress to refuse; with one the notice is what an operator needs
                os.write(2, f"aether: link-local addresses stay reachable: {error}\n".encode())
            Dialer(socket.socket(fileno=keep), port).serve()
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    return pid, ours


def egress(program: bytes, init_pid: int) -> tuple[int, int]:
    """Start slirp4netns for the network namespace of `init_pid`; returns its pid and the descriptor that keeps it.

    It ends by itself when that descriptor is closed, so also when the keeper is killed.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    arguments = [
        program,
        b"--configure",
        b"--mtu=65520",
        b"--disable-host-loopback",
        b"--enable-seccomp",
        b"--exit-fd=%d" % read,
    ]
    owner = -1
    if os.geteuid() == 0:
        arguments += [b"--enable-sandbox", b"%d" % init_pid, b"tap0"]
    else:  # its own sandbox needs a root in the instance's user namespace, and that has none
        from .dialer import owner_of

        path = f"/proc/{init_pid}/ns/net"
        network = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        owner = owner_of(network)
        os.close(network)
        arguments += [b"--netns-type=path", b"--userns-path=/proc/self/fd/%d" % owner, path.encode(), b"tap0"]
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open("/dev/null", os.O_RDWR)
            for target in (0, 1, 2):
                os.dup2(null, target, inheritable=True)
            os.set_inheritable(read, True)
            if owner >= 0:
                os.set_inheritable(owner, True)
            os.execve(program, arguments, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
        finally:
            os._exit(127)
    os.close(read)
    if owner >= 0:
        os.close(owner)
    return pid, write
