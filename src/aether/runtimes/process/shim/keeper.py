"""The keeper's loop: holds the instance's pipes, writes its log, stops and reaps it, answers on `shim.sock`.

Messages on the socket (one datagram each): `status` -> `running` or `exited ...`; `subscribe` -> `log` whenever the
log grew and `exited CODE SIGNAL OOM` at the end; `stop MILLISECONDS` -> `ok`; `dial` hands the connection to the
dialer. The keeper's flock on `lock` says that it lives; `state.json` says how the instance ended.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable

from . import launch
from .journal import Journal, Splitter
from .plan import NONE, Plan
from .processes import below, send, started
from .remains import empty_cgroups, memory_kills, write_state

SOCKET = "shim.sock"
STATE = "state.json"
LOCK = "lock"
_READ_BYTES = 64 * 1024
_DRAIN_SECS = 3.0
_SHUTDOWN_SECS = 10.0


def main() -> None:
    """Read the plan from stdin, detach, start the instance, say `ok` on stdout, keep it until it has ended."""
    # The server took the lock, so that at no moment neither it nor the keeper vouches for the instance.
    lock = int(sys.argv[1])
    os.set_inheritable(lock, False)
    # uvloop leaves its ends of the standard streams open in a child; held, they would never tell the server "the end"
    os.closerange(3, lock)
    os.closerange(lock + 1, 1 << 16)
    plan = Plan.decode(sys.stdin.buffer.read())
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.path.lexists(SOCKET):
        os.unlink(SOCKET)
    os.umask(0o077)
    listener.bind(SOCKET)
    listener.listen(64)
    listener.setblocking(False)
    if os.fork():
        os._exit(0)
    os.setsid()
    Keeper(plan, listener).run()


def _ignore(_number: int, _frame: object) -> None:
    """Only there so that the signal wakes the loop."""


class Keeper:
    def __init__(self, plan: Plan, listener: socket.socket) -> None:
        self._plan = plan
        self._listener = listener
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._clients: dict[int, socket.socket] = {}
        self._subscribers: set[int] = set()
        self._waiting_dials: list[int] = []
        self._journal = Journal(plan.log, plan.log_bytes)
        self._streams: dict[int, tuple[bytes, Splitter]] = {}
        self._status = b""
        self._main = 0
        self._main_start = 0
        self._init = 0
        self._init_start = 0
        self._init_handle = -1
        self._dialer_pid = 0
        self._dialer: socket.socket | None = None
        self._egress_pid = 0
        self._egress_handle = -1
        self._stopping = False
        self._killed = False
        self._deadline = 0.0
        self._wait_status: int | None = None
        self._drain_until = 0.0
        self._exit = ""

    # --- life -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        wakeup, alarm = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.signal(signal.SIGTERM, self._terminated)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._watch(wakeup, lambda: self._woken(wakeup))
        self._watch(self._listener.fileno(), self._accept)
        if self._plan.kind == NONE:
            launch.adopt_orphans()
        self._start()
        os.write(1, b"ok\n")
        null = os.open("/dev/null", os.O_RDWR)
        for target in (0, 1):
            os.dup2(null, target)
        os.close(null)
        while not self._done():
            for fd, _ in self._poll.poll(self._timeout()):
                if handler := self._handlers.get(fd):
                    handler()
            if self._deadline and not self._killed and time.monotonic() >= self._deadline:
                self._kill()
        self._finish()

    def _terminated(self, _number: int, _frame: object) -> None:
        self._stop(_SHUTDOWN_SECS)

    def _start(self) -> None:
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        self._main = launch.command(self._plan, pipes[0][1], pipes[1][1], pipes[2][1])
        self._main_start = started(self._main)
        for _, write in pipes:
            os.close(write)
        for name, (read, _) in zip((b"stdout", b"stderr"), pipes, strict=False):
            os.set_blocking(read, False)
            self._streams[read] = (name, Splitter())
            self._watch(read, lambda fd=read: self._read_output(fd))
        status = pipes[2][0]
        os.set_blocking(status, False)
        self._watch(status, lambda: self._read_status(status))
        self._record("running")

    def _timeout(self) -> float:
        if self._wait_status is not None:
            return max(0.0, self._drain_until - time.monotonic())
        if self._deadline and not self._killed:
            return max(0.0, self._deadline - time.monotonic())
        return -1

    def _done(self) -> bool:
        if self._wait_status is None:
            return False
        return not self._streams or time.monotonic() >= self._drain_until

    def _finish(self) -> None:
        for name, splitter in self._streams.values():
            self._journal.append(name, splitter.flush())
        kills = memory_kills(self._plan.memory_events)
        if kills:
            self._journal.notice("a process was killed because the memory limit was reached")
        for problem in empty_cgroups(self._plan.cgroups, _DRAIN_SECS):
            self._journal.notice(problem)
        if self._dialer is not None:
            self._dialer.close()
        if self._egress_handle >= 0:
            os.close(self._egress_handle)
        self._reap_helpers()
        code, number = self._outcome()
        out_of_memory = kills > 0 and code != 0 and not self._stopping
        self._exit = (
            f"exited {'-' if code is None else code} {'-' if number is None else number} {int(out_of_memory)}"
        )
        self._record(
            "exited",
            f'"code": {"null" if code is None else code}, "signal": {"null" if number is None else number}, '
            f'"out_of_memory": {"true" if out_of_memory else "false"}',
        )
        self._journal.close()
        if os.path.lexists(SOCKET):
            os.unlink(SOCKET)
        for fd in list(self._subscribers):
            self._tell(fd, self._exit.encode())
        os._exit(0)  # nothing is left to tidy, and whoever waits for this process should not wait for the interpreter

    def _outcome(self) -> tuple[int | None, int | None]:
        code = os.waitstatus_to_exitcode(self._wait_status or 0)
        if code < 0:
            return None, -code
        if self._plan.kind != NONE and 128 < code <= 128 + 64:
            return None, code - 128  # the sandbox reports a signal as a shell does
        return code, None

    # --- descriptors ------------------------------------------------------------------------------------------

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        del self._handlers[fd]
        self._poll.unregister(fd)

    def _woken(self, fd: int) -> None:
        os.read(fd, 512)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._main:
                self._ended(status)
            elif pid == self._egress_pid:
                self._egress_pid = 0
                # one that found its namespace already gone has nothing to tell
                if not self._stopping and started(self._init) == self._init_start:
                    self._journal.notice(f"outgoing connections ended: slirp4netns gave status {status}")
            elif pid == self._dialer_pid:
                self._dialer_pid = 0
                self._forget_dialer()

    def _ended(self, status: int) -> None:
        self._wait_status = status
        self._drain_until = time.monotonic() + _DRAIN_SECS
        if self._init_handle >= 0:
            self._signal_init(signal.SIGKILL)
        elif self._plan.kind == NONE:
            self._kill_tree()

    def _read_output(self, fd: int) -> None:
        name, splitter = self._streams[fd]
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return
        pieces = splitter.feed(data) if data else splitter.flush()
        if not data:
            self._unwatch(fd)
            os.close(fd)
            del self._streams[fd]
        if pieces:
            self._journal.append(name, pieces)
            for subscriber in list(self._subscribers):
                self._tell(subscriber, b"log")

    def _read_status(self, fd: int) -> None:
        try:
            data = os.read(fd, 4096)
        except BlockingIOError:
            return
        if not data:
            self._unwatch(fd)
            os.close(fd)
            return
        self._status += data
        if not self._init and b"\n" in self._status:
            _, found, rest = self._status.partition(b'"child-pid": ')
            digits = rest.split(b",", 1)[0].split(b" ", 1)[0]
            if found and digits.isdigit():
                self._contained(int(digits))

    def _contained(self, init: int) -> None:
        """The sandbox exists: `init` is its first process."""
        try:
            self._init_handle = os.pidfd_open(init)
        except OSError:
            return  # already over; the end arrives as the exit of the sandbox program
        self._init, self._init_start = init, started(init)
        self._watch(self._init_handle, self._init_ended)
        self._record("running")
        try:
            self._dialer_pid, self._dialer = launch.dialer(init, self._plan.port)
            self._watch(self._dialer.fileno(), self._network_up)
        except OSError as error:
            self._journal.notice(f"the network of this instance is incomplete: {error}")
        if self._stopping:
            self._kill()
        waiting, self._waiting_dials = self._waiting_dials, []
        for fd in waiting:
            self._hand_over(fd)

    def _network_up(self) -> None:
        if self._dialer is None:
            return
        try:
            message = self._dialer.recv(16)
        except OSError:
            message = b""
        self._unwatch(self._dialer.fileno())
        if message and self._plan.slirp and not self._egress_pid and self._init_handle >= 0:
            try:
                self._egress_pid, self._egress_handle = launch.egress(self._plan.slirp, self._init)
            except OSError as error:
                self._journal.notice(f"this instance has no outgoing connections: {error}")

    def _init_ended(self) -> None:
        self._unwatch(self._init_handle)
        os.close(self._init_handle)
        self._init_handle = -1
        send(self._main, self._main_start, signal.SIGCONT)

    # --- clients ----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # gone before it was taken, or out of descriptors: the peer tries again
        client.setblocking(False)
        fd = client.fileno()
        self._clients[fd] = client
        self._watch(fd, lambda: self._request(fd))

    def _drop(self, fd: int) -> None:
        self._subscribers.discard(fd)
        if fd in self._handlers:
            self._unwatch(fd)
        self._clients.pop(fd).close()

    def _request(self, fd: int) -> None:
        try:
            message = self._clients[fd].recv(256)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        word, _, argument = message.partition(b" ")
        if word == b"status":
            self._tell(fd, b"running")
        elif word == b"subscribe":
            self._subscribers.add(fd)
            self._tell(fd, b"log")
        elif word == b"stop" and argument.isdigit():
            self._stop(int(argument) / 1000)
            self._tell(fd, b"ok")
        elif word == b"dial":
            if self._init:
                self._hand_over(fd)
            else:
                self._unwatch(fd)  # what follows is for the dialer to read
                self._waiting_dials.append(fd)
        else:
            self._drop(fd)

    def _tell(self, fd: int, message: bytes) -> None:
        try:
            self._clients[fd].send(message)
        except BlockingIOError:
            pass  # its queue is full of wake-ups already
        except OSError:
            self._drop(fd)

    def _hand_over(self, fd: int) -> None:
        if self._dialer is not None:
            try:
                socket.send_fds(self._dialer, [b"c"], [fd])
            except OSError:
                self._forget_dialer()
        self._drop(fd)

    def _forget_dialer(self) -> None:
        if self._dialer is not None:
            if self._dialer.fileno() in self._handlers:
                self._unwatch(self._dialer.fileno())
            self._dialer.close()
            self._dialer = None

    # --- the end ----------------------------------------------------------------------------------------------

    def _stop(self, grace_secs: float) -> None:
        deadline = time.monotonic() + grace_secs
        self._deadline = min(self._deadline, deadline) if self._stopping else deadline
        if self._stopping or self._wait_status is not None:
            return
        self._stopping = True
        if self._plan.kind == NONE:
            self._terminate(os.getpid(), {self._dialer_pid, self._egress_pid})
        elif self._init == 0:
            self._kill()
        elif self._init_handle >= 0:
            # The sandbox program ends everything as soon as the first process ends. It is held still, so that
            # `npm start` or a shell may go first and the server behind it still gets its grace.
            send(self._main, self._main_start, signal.SIGSTOP)
            if not self._terminate(self._init, set()):
                self._kill()

    def _terminate(self, root: int, spared: set[int]) -> int:
        told: dict[int, int] = {}
        for _ in range(3):  # again, for what was being forked meanwhile
            fresh = {pid: start for pid, start in below(root).items() if told.get(pid) != start and pid not in spared}
            if not fresh:
                break
            for pid, start in fresh.items():
                send(pid, start, signal.SIGTERM)
            told |= fresh
        return len(told)

    def _kill(self) -> None:
        self._killed = True
        if self._plan.kind == NONE:
            self._kill_tree()
        elif self._init_handle >= 0:
            self._signal_init(signal.SIGKILL)
        elif self._init == 0 and self._wait_status is None:
            send(self._main, self._main_start, signal.SIGKILL)

    def _kill_tree(self) -> None:
        for _ in range(100):
            left = below(os.getpid())
            if not left:
                return
            for pid, start in left.items():
                send(pid, start, signal.SIGKILL)
            time.sleep(0.002)

    def _signal_init(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._init_handle, number)
        except ProcessLookupError:
            return

    def _reap_helpers(self) -> None:
        until = time.monotonic() + 1.0
        for pid in (self._dialer_pid, self._egress_pid):
            while pid:
                try:
                    ended, _ = os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    break
                if ended:
                    break
                if time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.002)

    def _record(self, phase: str, more: str = "") -> None:
        roles = {
            "keeper": (os.getpid(), started(os.getpid())),
            "main": (self._main, self._main_start),
            "init": (self._init, self._init_start),
        }
        write_state(STATE, phase, roles, more)
