"""What a user sees of a failure: one line on stderr, or one JSON object on stdout, and the exit code."""

from __future__ import annotations

import json
import os
import sys

from aether.cli.output import escape
from aether.model.errors import AetherError

INTERRUPTED = 130
IO_EXIT = 30
INTERNAL_EXIT = 20
NEWLINE = "\n"


def report(error: BaseException, given: list[str]) -> int:
    """Print `error` for the command line `given` and return the exit code."""
    if isinstance(error, SystemExit):
        return _exit_code(error)
    code, message, exit_code = _described(error, given)
    try:
        if wants_json(given):
            sys.stdout.write(json.dumps({"error": {"code": code, "message": message}}) + "\n")
            sys.stdout.flush()
        else:
            sys.stdout.flush()
    except OSError:
        # stdout is gone (closed pipe, full disk): the exit code and stderr have to do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not wants_json(given):
        sys.stderr.write(f"aether: {escape(message, keep=NEWLINE)}\n")
    return exit_code


def wants_json(given: list[str]) -> bool:
    """Whether `--format json` is on the command line, which may be one that does not parse."""
    pairs = zip(given, [*given[1:], ""], strict=False)
    return any(word == "--format=json" or (word, after) == ("--format", "json") for word, after in pairs)


def _described(error: BaseException, given: list[str]) -> tuple[str, str, int]:
    if isinstance(error, AetherError):
        message = error.message or error.code
        if error.status >= 500 and error.details and "trace_id" in error.details:
            message += f" (trace {error.details['trace_id']})"
        return error.code, message, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", str(error) or "interrupted", getattr(error, "exit_code", INTERRUPTED)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return "io", f"{error.strerror or type(error).__name__}{where}", IO_EXIT
    if "debug" in given or "trace" in given or "--log-level=debug" in given or "--log-level=trace" in given:
        import traceback

        traceback.print_exception(error)
    message = f"internal error: {type(error).__name__}: {error} (--log-level debug shows where)"
    return "internal", message, INTERNAL_EXIT


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    return error.code if isinstance(error.code, int) else 1
