"""The keeper's loop: holds the instance's pipes, writes its log, stops and reaps it, answers on `shim.sock`.

Messages on the socket (one datagram each): `status` -> `running` or `exited ...`; `subscribe` -> `log` whenever the
log grew, `listening open` or `listening loopback` where the plan asks for that, and `exited CODE SIGNAL OOM EXPIRED`
at the end; `stop MILLISECONDS` -> `ok`; `dial` hands the connection to the dialer; `attach` joins it to the standard
streams of a run (see `console`), `window ROWS COLUMNS` and `signal N` are for such a run. The keeper's flock on
`lock` says that it lives; `state.json` says how the instance ended.

A run is on a leash: when whoever was attached is gone, or its time is over, the keeper ends it, server or no server.
With a lifeline (the end of a pipe that its server holds) an instance is ended when the server is gone.
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
from .console import READ_BYTES, Console
from .journal import Journal, Splitter
from .plan import NONE, TERMINAL, Plan
from .processes import below, send, started
from .remains import empty_cgroups, memory_kills, write_state
from .restarts import Restarts

SOCKET = "shim.sock"
STATE = "state.json"
LOCK = "lock"
_READ_BYTES = 64 * 1024
_DRAIN_SECS = 3.0
_SHUTDOWN_SECS = 10.0
_OPEN = b"listening open"
_HINT = "the function listens on 127.0.0.1, where nobody can reach it: let it listen on 0.0.0.0"
_DIALER, _EGRESS = "dialer", "egress"
_NAMESPACES_GO_SECS = 0.1
"""The namespaces of a sandbox that ends are gone a moment before its first process is: what fails in between was not
killed."""
_ATTACH_SECS = 20.0
"""How long a run may wait for its caller to attach."""
_STALLED_SECS = 60.0
"""How long an attached reader may stand still before the last output of a run is given up."""
_HANG_UP = (signal.SIGHUP, signal.SIGTERM, signal.SIGCONT)
"""An interactive shell ignores SIGTERM, other programs SIGHUP; a stopped one hears neither until it goes on."""


def main() -> None:
    """Read the plan from stdin, detach, start the instance, say `ok` on stdout, keep it until it has ended."""
    # The server took the lock, so that at no moment neither it nor the keeper vouches for the instance.
    lock = int(sys.argv[1])
    os.set_inheritable(lock, False)
    # uvloop leaves its ends of the standard streams open in a child; held, they would never tell the server "the end"
    os.closerange(3, lock)
    os.closerange(lock + 1, 1 << 16)
    plan = Plan.decode(sys.stdin.buffer.read())
    keep(plan, -1, detach=True)


def keep(plan: Plan, lifeline: int, *, detach: bool = False) -> None:
    """Keep an instance in the folder where this process stands, answering on its stdout; does not return.

    `detach` leaves the calling process behind once the keeper can be talked to."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.path.lexists(SOCKET):
        os.unlink(SOCKET)
    os.umask(0o077)
    listener.bind(SOCKET)
    listener.listen(64)
    listener.setblocking(False)
    if detach:
        if os.fork():
            os._exit(0)
        os.setsid()
    Keeper(plan, listener, lifeline).run()


def _ignore(_number: int, _frame: object) -> None:
    """Only there so that the signal wakes the loop."""


class Keeper:
    def __init__(self, plan: Plan, listener: socket.socket, lifeline: int) -> None:
        self._plan = plan
        self._listener = listener
        self._lifeline = lifeline
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
        self._restarts = Restarts()
        self._egress_status: int | None = None
        """How slirp4netns ended, as long as that has not been told."""
        self._stopping = False
        self._killed = False
        self._deadline = 0.0
        self._wait_status: int | None = None
        self._drain_until = 0.0
        self._listening = b""
        self._taken = 0
        self._taken_until = 0.0
        self._paused = False
        self._exit = ""
        self._console: Console | None = None
        self._expires = 0.0
        self._expired = False

    # --- life -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        wakeup, alarm = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.signal(signal.SIGTERM, self._terminated)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self.watch(wakeup, lambda: self._woken(wakeup))
        self.watch(self._listener.fileno(), self._accept)
        if self._lifeline >= 0:
            self.watch(self._lifeline, self._abandoned)
        if self._plan.kind == NONE:
            launch.adopt_orphans()
        self._start()
        try:
            os.write(1, b"ok\n")
        except BrokenPipeError:
            pass  # whoever asked for the start was killed; what has begun goes on and is adopted
        null = os.open("/dev/null", os.O_RDWR)
        for target in (0, 1):
            os.dup2(null, target)
        os.close(null)
        while not self._done():
            for fd, _ in self._poll.poll(self._timeout()):
                if handler := self._handlers.get(fd):
                    handler()
            now = time.monotonic()
            self._keep_time(now)
            for helper in self._restarts.take(now):
                self._mend(helper)
        self._finish()

    def _abandoned(self) -> None:
        """The server is gone, and this instance is not to outlive it."""
        self.unwatch(self._lifeline)
        self._stop(0.0)

    def _terminated(self, _number: int, _frame: object) -> None:
        self._stop(_SHUTDOWN_SECS)

    def _keep_time(self, now: float) -> None:
        if self._deadline and not self._killed and now >= self._deadline:
            self._kill()
        if self._paused and (now >= self._taken_until or self._wait_status is not None):
            self._paused = False
            self._read_streams()
        if self._stopping or self._wait_status is not None:
            return
        if self._expires and now >= self._expires:
            self._expired = True
            self._journal.notice(f"ended: its time of {self._plan.expires_ms / 1000:g} s is over")
            self._stop(_SHUTDOWN_SECS, _HANG_UP)
        elif self._console is not None and self._console.waiting and now >= self._console.attach_by:
            self._hang_up()

    def _start(self) -> None:
        theirs, ours, stdin = launch.standard_streams(self._plan)
        status, status_end = os.pipe2(os.O_CLOEXEC)
        self._main = launch.command(self._plan, theirs, status_end)
        self._main_start = started(self._main)
        for fd in {*theirs, status_end}:
            os.close(fd)
        for read, name in ours.items():
            os.set_blocking(read, False)
            self._streams[read] = (name, Splitter())
        if self._plan.console:
            tty, attach_by = self._plan.console == TERMINAL, time.monotonic() + _ATTACH_SECS
            self._console = Console(self, stdin, tty, attach_by, self._read_streams, self._hang_up)
        else:
            self._read_streams()
        if self._plan.expires_ms:
            self._expires = time.monotonic() + self._plan.expires_ms / 1000
        os.set_blocking(status, False)
        self.watch(status, lambda: self._read_status(status))
        self._record("running")

    def _timeout(self) -> float:
        now = time.monotonic()
        if self._wait_status is not None:
            times = [self._drain_until]
        else:
            times = [due] if (due := self._restarts.next()) is not None else []
            times += [self._deadline] if self._deadline and not self._killed else []
            times += [self._taken_until] if self._paused else []
            if not self._stopping:
                times += [self._expires] if self._expires else []
                times += [self._console.attach_by] if self._console is not None and self._console.waiting else []
        return max(0.0, min(times) - now) if times else -1

    def _done(self) -> bool:
        if self._wait_status is None:
            return False
        blocked = self._console is not None and (self._console.waiting or self._console.blocked)
        return (not self._streams and not blocked) or time.monotonic() >= self._drain_until

    def _finish(self) -> None:
        for name, splitter in self._streams.values():
            self._journal.append(name, splitter.flush())
        if self._console is not None:
            self._console.close()
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
            f"exited {'-' if code is None else code} {'-' if number is None else number} {int(out_of_memory)} "
            f"{int(self._expired)}"
        )
        self._record(
            "exited",
            f'"code": {"null" if code is None else code}, "signal": {"null" if number is None else number}, '
            f'"out_of_memory": {"true" if out_of_memory else "false"}, '
            f'"expired": {"true" if self._expired else "false"}',
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

    def watch(self, fd: int, handler: Callable[[], None], mask: int = select.EPOLLIN) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, mask)

    def change(self, fd: int, mask: int) -> None:
        self._poll.modify(fd, mask)

    def unwatch(self, fd: int) -> None:
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
                os.close(self._egress_handle)
                self._egress_handle = -1
                if self._runs():
                    self._egress_status = status
                    self._restarts.ended(_EGRESS, time.monotonic(), at_least=_NAMESPACES_GO_SECS)
            elif pid == self._dialer_pid:
                self._dialer_pid = 0
                self._forget_dialer()
                if self._runs():
                    self._restarts.ended(_DIALER, time.monotonic())

    def _runs(self) -> bool:
        """Whether the sandbox is there and is to stay: helpers that find its namespaces gone end rightly."""
        return not self._stopping and self._init > 0 and started(self._init) == self._init_start

    def _mend(self, helper: str) -> None:
        """Start a helper again that ended while the app goes on."""
        if not self._runs():
            return
        if helper == _DIALER:
            self._begin_dialer()
            return
        if self._egress_status is not None:
            self._journal.notice(
                f"outgoing connections were cut: slirp4netns gave status {self._egress_status}; it is started again"
            )
            self._egress_status = None
        self._begin_egress()

    def _ended(self, status: int) -> None:
        self._wait_status = status
        self._drain_until = time.monotonic() + (_DRAIN_SECS if self._console is None else _STALLED_SECS)
        if self._console is not None and self._console.waiting:
            self._drain_until = self._console.attach_by
        if self._init_handle >= 0:
            self._signal_init(signal.SIGKILL)
        elif self._plan.kind == NONE:
            self._kill_tree()

    def _read_streams(self) -> None:
        """Read output from now on: nobody who is attached is behind."""
        for fd in self._streams:
            if fd not in self._handlers:
                self.watch(fd, lambda fd=fd: self._read_output(fd))

    def _read_output(self, fd: int) -> None:
        if fd not in self._handlers:
            return  # this turn's reading of the other stream has filled the connection
        name, splitter = self._streams[fd]
        try:
            data = os.read(fd, _READ_BYTES if self._console is None else READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # how a terminal says that nobody has it open any more
        pieces: list[tuple[bool, bytes]] = []
        if self._plan.console != TERMINAL:  # what a terminal shows is no text for a log
            pieces = splitter.feed(data) if data else splitter.flush()
        if not data:
            self.unwatch(fd)
            os.close(fd)
            del self._streams[fd]
        if pieces:
            self._journal.append(name, pieces)
            for subscriber in list(self._subscribers):
                self._tell(subscriber, b"log")
        if data and self._console is not None:
            self._console.send(b"1" if name == b"stdout" else b"2", data)
            if self._wait_status is not None:
                self._drain_until = time.monotonic() + _STALLED_SECS
            if self._console.blocked:
                self._leave_streams()
        elif self._plan.log_rate:
            self._pace(len(data))

    def _leave_streams(self) -> None:
        for fd in self._streams:
            if fd in self._handlers:
                self.unwatch(fd)

    def _pace(self, count: int) -> None:
        """A flood has to wait: what it costs to keep is not within the limits of the instance."""
        now = time.monotonic()
        if now >= self._taken_until:
            self._taken, self._taken_until = 0, now + 1.0
        self._taken += count
        if self._taken > self._plan.log_rate and self._wait_status is None:
            self._paused = True
            self._leave_streams()

    def _attach(self, fd: int) -> None:
        console = self._console
        if console is None or not console.waiting:
            self._drop(fd)
            return
        self.unwatch(fd)
        self._tell(fd, b"ok")
        console.attach(self._clients.pop(fd))
        if self._wait_status is not None:
            self._drain_until = time.monotonic() + _STALLED_SECS
        self._read_streams()

    def _hang_up(self) -> None:
        """Nobody is attached any more: end the run."""
        self._stop(_SHUTDOWN_SECS, _HANG_UP)
        if self._wait_status is not None:
            self._drain_until = min(self._drain_until, time.monotonic() + _DRAIN_SECS)

    def _signal_all(self, number: int) -> None:
        root = os.getpid() if self._plan.kind == NONE else self._init
        if root and not self._stopping:
            self._terminate(root, {self._dialer_pid, self._egress_pid}, (number,))

    def _read_status(self, fd: int) -> None:
        try:
            data = os.read(fd, 4096)
        except BlockingIOError:
            return
        if not data:
            self.unwatch(fd)
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
        self.watch(self._init_handle, self._init_ended)
        self._record("running")
        self._begin_dialer()
        if self._stopping:
            self._kill()

    def _begin_dialer(self) -> None:
        """Start the dialer and give it the connections that wait for one."""
        self._restarts.begun(_DIALER, time.monotonic())
        try:
            self._dialer_pid, self._dialer = launch.dialer(self._init, self._plan)
        except OSError as error:
            self._journal.notice(f"the network of this instance is incomplete: {error}")
            self._restarts.ended(_DIALER, time.monotonic())
            return
        self.watch(self._dialer.fileno(), self._network_up)
        waiting, self._waiting_dials = self._waiting_dials, []
        for fd in waiting:
            self._hand_over(fd)

    def _begin_egress(self) -> None:
        self._restarts.begun(_EGRESS, time.monotonic())
        try:
            self._egress_pid, self._egress_handle = launch.egress(self._plan.slirp, self._init)
        except OSError as error:
            self._journal.notice(f"this instance has no outgoing connections: {error}")
            self._restarts.ended(_EGRESS, time.monotonic())

    def _network_up(self) -> None:
        if self._dialer is None:
            return
        try:
            message = self._dialer.recv(512)
        except OSError:
            message = b""
        if message.startswith(b"listening "):
            self._listens(message)
        if not message or message == _OPEN or not self._plan.tell_listening:
            self.unwatch(self._dialer.fileno())
        if message.startswith(b"listening "):
            return
        if message and message != b"up":
            self._journal.notice(f"this instance has no outgoing connections: {message.decode(errors='replace')}")
        elif message and self._plan.slirp and not self._egress_pid and self._init_handle >= 0:
            self._begin_egress()

    def _listens(self, message: bytes) -> None:
        if message != _OPEN and not self._listening:
            self._journal.notice(_HINT)
        self._listening = message
        for subscriber in list(self._subscribers):
            self._tell(subscriber, message)

    def _init_ended(self) -> None:
        self.unwatch(self._init_handle)
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
        self.watch(fd, lambda: self._request(fd))

    def _drop(self, fd: int) -> None:
        self._subscribers.discard(fd)
        if fd in self._handlers:
            self.unwatch(fd)
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
            if self._listening:
                self._tell(fd, self._listening)
        elif word == b"stop" and argument.isdigit():
            self._stop(int(argument) / 1000)
            self._tell(fd, b"ok")
        elif word == b"attach":
            self._attach(fd)
        elif word == b"window" and self._console is not None:
            rows, _, columns = argument.partition(b" ")
            if rows.isdigit() and columns.isdigit():
                self._console.resize(min(int(rows), 0xFFFF), min(int(columns), 0xFFFF))
        elif word == b"signal" and argument.isdigit():
            self._signal_all(int(argument))
        elif word == b"dial":
            self.unwatch(fd)  # what follows is for the dialer to read
            self._hand_over(fd)
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
        """Give a client to the dialer, or let it wait for one."""
        if self._dialer is not None:
            try:
                socket.send_fds(self._dialer, [b"c"], [fd])
            except OSError:
                self._forget_dialer()  # it has just ended: the next one is started when that is noticed
            else:
                self._drop(fd)
                return
        self._waiting_dials.append(fd)

    def _forget_dialer(self) -> None:
        if self._dialer is not None:
            if self._dialer.fileno() in self._handlers:
                self.unwatch(self._dialer.fileno())
            self._dialer.close()
            self._dialer = None

    # --- the end ----------------------------------------------------------------------------------------------

    def _stop(self, grace_secs: float, numbers: tuple[int, ...] = (signal.SIGTERM,)) -> None:
        deadline = time.monotonic() + grace_secs
        self._deadline = min(self._deadline, deadline) if self._stopping else deadline
        if self._stopping or self._wait_status is not None:
            return
        self._stopping = True
        if self._plan.kind == NONE:
            self._terminate(os.getpid(), {self._dialer_pid, self._egress_pid}, numbers)
        elif self._init == 0:
            self._kill()
        elif self._init_handle >= 0:
            # The sandbox program ends everything as soon as the first process ends. It is held still, so that
            # `npm start` or a shell may go first and the server behind it still gets its grace.
            send(self._main, self._main_start, signal.SIGSTOP)
            if not self._terminate(self._init, set(), numbers):
                self._kill()

    def _terminate(self, root: int, spared: set[int], numbers: tuple[int, ...]) -> int:
        told: dict[int, int] = {}
        for _ in range(3):  # again, for what was being forked meanwhile
            fresh = {pid: start for pid, start in below(root).items() if told.get(pid) != start and pid not in spared}
            if not fresh:
                break
            for pid, start in fresh.items():
                for number in numbers:
                    send(pid, start, number)
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
