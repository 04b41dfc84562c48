"""Running package managers and builds: output line by line, a time limit, and no process left behind."""

import os
import re
import select
import signal
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Timer

from aether.build.project import OnLine
from aether.build.tools import clean_environment
from aether.model.errors import BuildFailed, ConfigError

TAIL_LINES = 20
_FIRST_LINES = 8
_ERROR = re.compile(r"npm (?:error|ERR!)|\s?ERR_PNPM|error |ERROR:|\S* YN\d+: .*(?:Error|isn't|can't)")
_LONGEST_LINE = 4096
_LOOK_MS = 200
"""How soon the end of a command is noticed whose output stays open."""
_GRACE_S = 3.0


def run(
    argv: Sequence[str],
    cwd: Path,
    *,
    what: str,
    timeout_s: float,
    on_line: OnLine | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run `argv` in `cwd`; `what` names the step in messages.

    The environment is this process's without any AETHER_* variable, plus `env`. Standard input is empty.
    Raises BuildFailed with the last lines of output, and the first that speak of an error where those are not among
    them (also under details["log_tail"]), when it fails or takes longer
    than `timeout_s` seconds, ConfigError when there is no such program. On any exception, Ctrl-C among them, the
    whole process group is ended first.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    first: list[tuple[int, str]] = []
    count = 0
    late: list[bool] = []
    try:
        child = subprocess.Popen(
            list(argv),
            cwd=cwd,
            env={**clean_environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise ConfigError(f"{what}: there is no program '{argv[0]}'") from error

    def expire() -> None:
        late.append(True)
        _end_group(child.pid, signal.SIGKILL)

    timer = Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        for line in _lines(child):
            tail.append(line)
            if len(first) < _FIRST_LINES and (first or _ERROR.match(line)):
                first.append((count, line))
            count += 1
            if on_line is not None:
                on_line(line)
        code = child.wait()
    finally:
        timer.cancel()
        if child.poll() is None:
            _end_group(child.pid, signal.SIGTERM)
            try:
                child.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                _end_group(child.pid, signal.SIGKILL)
                child.wait()
        # what the command left running in its group would keep files of a removed folder open
        _end_group(child.pid, signal.SIGKILL)
        if child.stdout is not None:
            child.stdout.close()
    if late:
        raise _failed(f"{what} took longer than {timeout_s:g} s and was ended", _telling(first, tail, count))
    if code:
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        raise _failed(f"{what} {how}", _telling(first, tail, count))


def _lines(child: "subprocess.Popen[bytes]") -> Iterator[str]:
    """Lines of output until it ends, or until the command has ended and nothing more comes.

    A program that the command left in the background may hold the pipe open for ever.
    """
    assert child.stdout is not None
    fd = child.stdout.fileno()
    ready = select.poll()
    ready.register(fd, select.POLLIN | select.POLLHUP)
    pending = b""
    while True:
        if ready.poll(_LOOK_MS):
            data = os.read(fd, 1 << 16)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                yield _text(line)
            if len(pending) > _LONGEST_LINE:
                yield _text(pending)
                pending = b""
        elif child.poll() is not None:
            break
    if pending:
        yield _text(pending)


def _text(line: bytes) -> str:
    return line[:_LONGEST_LINE].decode("utf-8", "replace").rstrip("\r")


def _telling(first: list[tuple[int, str]], tail: "deque[str]", count: int) -> list[str]:
    """The last lines; where a tool buries its error under advice, its first lines are put before fewer of them."""
    rest = count - (TAIL_LINES - _FIRST_LINES)
    head = [line for number, line in first if number < rest]
    if not head or first[0][0] >= count - TAIL_LINES:
        return list(tail)
    return head + list(tail)[len(head) - TAIL_LINES :]


def _failed(message: str, lines: list[str]) -> BuildFailed:
    while lines and not lines[-1].strip():
        lines.pop()
    text = "\n".join(f"  {line}" for line in lines)
    return BuildFailed(f"{message}:\n{text}" if lines else message, details={"log_tail": lines})


def _end_group(group: int, with_signal: signal.Signals) -> None:
    try:
        os.killpg(group, with_signal)
    except (ProcessLookupError, PermissionError):
        # nobody is left in the group (macOS says EPERM for a group of zombies)
        return
