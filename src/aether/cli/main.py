"""The console script: the table of verbs, the global flags, and what becomes of every failure.

It imports nothing but what the interpreter has loaded anyway, so that `aether --help` costs what Python costs;
a verb's module is imported when the verb is called and brings `configure(parser)` and `run(arguments, context)`.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol, cast

    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context

    class Verb(Protocol):
        """What a verb's module offers."""

        def configure(self, parser: Parser) -> None: ...

        def run(self, arguments: Arguments, context: Context) -> int: ...


GROUPS: "dict[str, dict[str, str]]" = {
    "Ship": {
        "deploy": "build, pack, upload and roll out a project",
        "rollback": "make an earlier release the active one again",
        "releases": "list the releases of an app, or compare two",
        "scale": "show and change how many instances of an app run",
        "config": "show and change the environment of an app",
        "run": "run a command in a new sandbox of an app",
        "volumes": "list the volumes of an app, and delete one",
        "function": "create, change, call and delete functions",
    },
    "Look": {
        "list": "list apps",
        "status": "show how an app is doing",
        "logs": "show or follow what an app writes",
        "hosts": "let an app answer to hosts of its own",
        "open": "print the address of an app and open it in a browser",
        "apps": "create, show, transfer and delete apps",
        "verify": "check an artifact, who signed it and what it is made of",
    },
    "Set up": {
        "up": "run the whole platform on this machine",
        "server": "run one of several servers that share a database",
        "login": "log in to a server",
        "logout": "revoke the session and forget it",
        "user": "create, list and disable users, and make tokens for CI",
        "team": "create, list and delete teams and say who is in them",
        "keys": "make a signing key, and say whose signatures of an app count",
        "audit": "show who changed what",
        "gc": "take away what nobody needs any more",
        "backup": "save the whole server into one file",
        "restore": "make a server's data directory from a backup",
        "doctor": "check this machine, the session and the server",
        "completions": "print a completion script for bash, zsh or fish",
    },
}
"""Every verb with its line of help; the verb `x` lives in `aether.cli.x`."""

LOG_LEVELS = ("trace", "debug", "info", "warn", "error")
LOG_FORMATS = ("auto", "text", "json")
_CHOICES = {"--log-level": LOG_LEVELS, "--log-format": LOG_FORMATS}
_INTERRUPTED = 130
_BROKEN_PIPE = 141


def verbs() -> "dict[str, str]":
    """Verb to line of help."""
    return {verb: line for group in GROUPS.values() for verb, line in group.items()}


def help_text() -> str:
    """What `aether --help` prints."""
    lines = ["usage: aether [--log-level LEVEL] [--log-format FORMAT] COMMAND [ARGUMENTS]", ""]
    for title, group in GROUPS.items():
        lines += [f"{title}:", *(f"  {verb:<13}{line}" for verb, line in group.items()), ""]
    lines += [
        "Global flags (before or after the command):",
        f"  --log-level   {'|'.join(LOG_LEVELS)} (default: info)",
        f"  --log-format  {'|'.join(LOG_FORMATS)} (default: auto)",
        "  --version     print the version",
        "  --help        print this, or the help of a command: aether COMMAND --help",
    ]
    return "\n".join(lines) + "\n"


def entry(argv: "list[str] | None" = None) -> int:
    """Run one command and return its exit code; the console script (no `argv`) ends the process with it."""
    try:
        code = _guarded(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        # another Ctrl-C before the first one was told of
        code = _INTERRUPTED
    if argv is None:
        _leave(code)
    return code


def _guarded(given: "list[str]") -> int:
    try:
        code = _dispatch(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader (`| head`) has what it wanted; the interpreter must not try to flush again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except BaseException as error:  # noqa: BLE001 - the last line of defence: every failure becomes an exit code
        from aether.cli.failure import report
        from aether.cli.interrupts import end_at_once

        with end_at_once():
            return report(error, given)


def _leave(code: int) -> None:
    """End the process without taking the interpreter apart, which would cost a tenth of a short command."""
    if "threading" in sys.modules or "atexit" in sys.modules:
        # somebody may have something left to do: leave the long way
        return
    sys.stderr.flush()
    os._exit(code)


def _dispatch(given: "list[str]") -> int:
    flags: dict[str, str] = {}
    rest = list(given)
    while rest and rest[0].startswith("-"):
        flag, has_value, value = rest.pop(0).partition("=")
        if flag in ("-h", "--help"):
            sys.stdout.write(help_text())
            return 0
        if flag in ("-V", "--version"):
            from aether import __version__

            sys.stdout.write(f"aether {__version__}\n")
            return 0
        if flag not in _CHOICES:
            _usage(f"unknown flag '{flag}'")
        if not has_value:
            value = rest.pop(0) if rest else ""
        if value not in _CHOICES[flag]:
            _usage(f"{flag} must be one of {', '.join(_CHOICES[flag])}")
        flags[flag] = value
    if not rest:
        sys.stderr.write(help_text())
        return 2
    verb, *rest = rest
    if verb == "help":
        if not rest:
            sys.stdout.write(help_text())
            return 0
        verb, rest = rest[0], ["--help"]
    known = verbs()
    if verb not in known:
        _unknown(verb, list(known))
    return _run(verb, known[verb], rest, flags)


def _run(verb: str, line: str, rest: "list[str]", flags: "dict[str, str]") -> int:
    from aether.cli.arguments import Parser
    from aether.cli.context import Context

    module = load(verb)
    parser = Parser(prog=f"aether {verb}", description=f"{line[0].upper()}{line[1:]}.")
    module.configure(parser)
    arguments = parser.read(rest)
    context = Context(
        log_level=arguments.log_level or flags.get("--log-level", "info"),
        log_format=arguments.log_format or flags.get("--log-format", "auto"),
        as_json=arguments.format == "json",
    )
    with context:
        return module.run(arguments, context)


def load(verb: str) -> "Verb":
    """The module of `verb`."""
    module = __import__(f"aether.cli.{verb}", fromlist=["run"])
    return cast("Verb", module) if TYPE_CHECKING else module


def _usage(message: str) -> None:
    from aether.model.errors import UsageError

    raise UsageError(f"{message}; see 'aether --help'")


def _unknown(verb: str, known: "list[str]") -> None:
    import difflib

    near = difflib.get_close_matches(verb, known, n=1, cutoff=0.5)
    _usage(f"there is no command '{verb}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
