"""Forks keepers, so that a start does not wait for an interpreter; for servers whose instances are to start fast.

Its stdin is a connection to the server. One message is one keeper to fork, with five descriptors: the instance's lock
and folder, where errors go, the plan, and where to answer. The answer is the keeper's pid, then what keepers say. The
nursery ends when the server's end of the connection is closed; keepers that it forked end by their lifeline.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys

from . import dialer
from .keeper import keep
from .plan import Plan

FDS = 5
_LOADED = (dialer,)
"""Keepers load it when they need it, which is once for all of them here."""


def main() -> None:
    lifeline = int(sys.argv[1])
    os.set_inheritable(lifeline, False)
    os.closerange(3, lifeline)
    os.closerange(lifeline + 1, 1 << 16)
    control = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    for target in (0, 1):
        os.dup2(null, target)
    os.close(null)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # its server decides when it ends, and is told the same
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    gc.freeze()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 16, FDS)
        if not message:
            return
        if len(fds) == FDS and os.fork() == 0:
            _become_keeper(control, lifeline, fds)
        for fd in fds:
            os.close(fd)


def _become_keeper(control: socket.socket, lifeline: int, fds: list[int]) -> None:
    """Does not return; what goes wrong ends this process with a word where its errors go."""
    os.setsid()
    control.close()
    _, folder, errors, plan, answer = fds  # the lock stays open for as long as this process lives
    os.fchdir(folder)
    os.dup2(answer, 1)
    os.dup2(errors, 2)
    os.write(1, b"%d\n" % os.getpid())
    with open(plan, "rb") as file:
        found = Plan.decode(file.read())
    for fd in (folder, errors, answer):
        os.close(fd)
    keep(found, lifeline)
