"""What a person sees on a terminal: the screen after a command, with its bars drawn and erased."""

from __future__ import annotations

import json
import os
import pty
import re
from pathlib import Path

from support.product import AETHER, Product, node_app

_PIECE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


def screen(output: str) -> list[str]:
    """The lines left on a wide terminal, by the few control sequences that bars are drawn with."""
    lines, row, column = [""], 0, 0
    for number, command, control, text in _PIECE.findall(output):
        if control == "\r":
            column = 0
        elif control == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif command == "A":
            row = max(0, row - int(number or 1))
        elif command == "K":
            lines[row] = "" if number == "2" else lines[row][:column]
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines]


def on_terminal(up: Product, *words: str) -> tuple[int, list[str]]:
    """Run the command on a terminal of its own; its exit code and what the screen shows in the end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(AETHER, [AETHER, *words], {**up.env, "TERM": "xterm", "COLUMNS": "160", "LINES": "50"})
    pieces: list[bytes] = []
    try:
        while piece := os.read(terminal, 65536):
            pieces.append(piece)
    except OSError:
        # how Linux says that the other end of a terminal is closed
        pass
    finally:
        os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, screen(b"".join(pieces).decode())


def test_the_apps_last_lines_survive_the_bars(up: Product, tmp_path: Path) -> None:
    lines = [f"reason {number}" for number in range(6)]
    project = node_app(tmp_path / "screen", f"console.error({json.dumps(chr(10).join(lines))}); process.exit(3);")
    code, shown = on_terminal(up, "deploy", str(project))
    assert code == 50, shown
    assert [line for line in shown if line.startswith("  | reason")] == [f"  | {line}" for line in lines], shown
    assert shown[-2].startswith("aether: screen: the app exited with code 3"), shown
    phases = [
        line.split()[1] for line in shown if line[2:].startswith(("detect", "install", "pack", "upload", "roll"))
    ]
    assert phases == ["detect", "install", "pack", "upload", "rollout"], shown
