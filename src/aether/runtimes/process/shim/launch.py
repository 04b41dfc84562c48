"""Starts the programs around one instance: the sandboxed command, the dialer and the egress helper."""

from __future__ import annotations

import os
import resource
import signal
import socket

from .plan import ARGS_FD, NONE, SCRIPT_FD, SECCOMP_FD, STATUS_FD, TERMINAL, Plan

_PARKED = 200
"""Descriptors are moved here first so that laying them out cannot overwrite one that is still needed."""


def command(plan: Plan, streams: tuple[int, int, int], status: int) -> int:
    """Fork and run the plan's program inside its cgroups; returns its pid. Errors appear on its stderr."""
    arguments = _memory("arguments", b"".join(item + b"\0" for item in plan.options))
    script = _memory("script", plan.script)
    seccomp = _memory("filter", bytes.fromhex(plan.filter_hex))
    layout = {0: streams[0], 1: streams[1], 2: streams[2], SCRIPT_FD: script}
    if plan.kind != NONE:
        layout |= {ARGS_FD: arguments, SECCOMP_FD: seccomp, STATUS_FD: status}
    pid = os.fork()
    if pid == 0:
        _become(plan, layout)
    for fd in (arguments, script, seccomp):
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
            if plan.console == TERMINAL:
                take_terminal()
            _die_with_parent()
        os.execve(plan.argv[0], plan.argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"})
    except (OSError, ValueError) as error:
        os.write(2, f"aether: cannot start: {error}\n".encode())
    finally:
        os._exit(127)


def standard_streams(plan: Plan) -> tuple[tuple[int, int, int], dict[int, bytes], int]:
    """Open what the program gets as its standard streams.

    Returns its ends; the keeper's ends of its output by name; and the keeper's end of its input, -1 for none.
    """
    if plan.console == TERMINAL:
        ours, theirs = os.openpty()
        _give(plan, theirs)
        return (theirs, theirs, theirs), {ours: b"stdout"}, os.dup(ours)
    out, err = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    read, write = (os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), -1)
    if plan.console:
        os.close(read)
        read, write = os.pipe2(os.O_CLOEXEC)
        _give(plan, read)
    for fd in (out[1], err[1]):
        _give(plan, fd)
    return (read, out[1], err[1]), {out[0]: b"stdout", err[0]: b"stderr"}, write


def _give(plan: Plan, fd: int) -> None:
    """Let the program open the stream again as /dev/stdout: that checks who owns it."""
    if plan.owner >= 0:
        os.fchown(fd, plan.owner, -1)


def take_terminal() -> None:
    """Make stdin the controlling terminal of this session (TIOCSCTTY)."""
    import fcntl

    fcntl.ioctl(0, 0x540E, 0)


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


def dialer(init_pid: int, plan: Plan) -> tuple[int, socket.socket]:
    """Fork the dialer into the network namespace of `init_pid`; returns its pid and control socket.

    It says `up` on the socket when the sandbox has set up its loopback device and what must not be reached is
    refused: nobody may touch the network before. Anything else it says is why there must be no way out.
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
            from .dialer import Dialer, await_loopback, enter

            follower = None
            if plan.slirp:
                from .routes import Follower, Machine, Refusals, parse

                machine = Machine()
                enter(init_pid, user_namespace=os.geteuid() != 0)
                refusals = Refusals([parse(item) for item in plan.refused], [parse(item) for item in plan.allowed])
                follower = Follower(machine, refusals)
            else:
                enter(init_pid, user_namespace=os.geteuid() != 0)
            await_loopback()
            try:
                if follower is not None:
                    follower.begin()
                os.write(keep, b"up")
            except OSError as error:
                # fail closed: what cannot be refused is not connected to anything
                follower = None
                os.write(keep, b"refused nothing: " + str(error).encode()[:200])
            Dialer(socket.socket(fileno=keep), plan.port, follower, tell_listening=plan.tell_listening).serve()
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
