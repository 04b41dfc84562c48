# ruff: noqa: E501 - the rows of a Markdown table cannot be broken
"""Write docs/cli.md from the parsers themselves.

python scripts/make_cli_docs.py           write the file
python scripts/make_cli_docs.py --check   exit 1 when the file is not what would be written
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aether.cli.arguments import Parser
from aether.cli.main import GROUPS, LOG_FORMATS, LOG_LEVELS, load

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """\
# Command line

`aether [--log-level LEVEL] [--log-format FORMAT] COMMAND [ARGUMENTS]`

This page is made from the parsers by `scripts/make_cli_docs.py`. Results go to stdout; progress, warnings and the
client's own log go to stderr, so a command can be piped.

| everywhere | |
|---|---|
| `--log-level {levels}` | how much stderr tells (info); before or after the command |
| `--log-format {formats}` | `json` writes the client's own messages as JSON lines |
| `--format text\\|json` | on every command that prints a result; a failure is then `{{"error": {{"code", "message"}}}}` and nothing else on stdout |
| `--app NAME` | where a command needs an app: default is the one that `aether.toml`, `package.json` or `pyproject.toml` of this folder names, else the folder's name |
| `--version`, `--help` | also `aether help COMMAND` |

| environment and files | |
|---|---|
| `AETHER_API_BASE` | the server; else the session's, else `api_base` of the configuration, else `http://127.0.0.1:8080` |
| `AETHER_TOKEN` | the token; wins over the session |
| `AETHER_SIGNING_KEY` | the key that `deploy` signs with: a path, 64 hex characters, or PEM |
| `AETHER_REQUIRE_PROVENANCE`, `AETHER_PROVENANCE_TIMEOUT_MS` | `1`: no deploy without provenance; how long git may take for it (10000) |
| `${{XDG_CONFIG_HOME:-~/.config}}/aether/config.toml` | `api_base = "https://..."` |
| `${{XDG_CACHE_HOME:-~/.cache}}/aether/session.json` | what `aether login` keeps (mode 0600); beside it dependencies and artifacts that may be deleted at any time |

## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 2 | wrong usage: flags, names, an app or release that does not exist |
| 10 | configuration: `aether.toml`, `package.json`, the session, a token that is missing, wrong or too weak |
| 20 | the build failed, or an internal error |
| 30 | files and disks of this machine; a port or data directory in use; an artifact that arrived damaged, or that `verify` found wrong |
| 40 | the network, or a server that is away or overloaded |
| 50 | the rollout failed: the app did not become healthy (its last lines are shown), or something ended the rollout |
| 130, 143 | ended by Ctrl-C or SIGTERM; a rollout under way was cancelled first |
| 141 | the reader of stdout went away (`\\| head`) |
"""


def document() -> str:
    """The whole page."""
    parts = [HEAD.format(levels="\\|".join(LOG_LEVELS), formats="\\|".join(LOG_FORMATS))]
    for title, verbs in GROUPS.items():
        parts.append(f"\n## {title}\n")
        for verb, line in verbs.items():
            parser = Parser(prog=f"aether {verb}")
            load(verb).configure(parser)
            parts.append(f"\n### `aether {verb}`\n\n{line[0].upper()}{line[1:]}.\n\n{_body(parser)}")
            for name, action in parser.actions.items():
                said = (action.description or "").strip()
                parts.append(f"\n#### `aether {verb} {name}`\n\n{said}\n\n{_body(action)}")
    return "".join(parts)


def _body(parser: Parser) -> str:
    shown = [option for option in parser.options if option.help != argparse.SUPPRESS and option.dest != "help"]
    usage = " ".join([parser.prog, *(_usage(option) for option in shown), *(["[ACTION]"] if parser.actions else [])])
    rows = "".join(f"| {_names(option)} | {_cell(option.help or '')} |\n" for option in shown)
    table = f"\n| | |\n|---|---|\n{rows}" if rows else ""
    return f"`{usage}`\n{table}"


def _metavar(option: argparse.Action) -> str:
    if option.nargs == 0:
        return ""
    if option.choices is not None:
        return "|".join(str(choice) for choice in option.choices)
    return str(option.metavar or option.dest.upper())


def _usage(option: argparse.Action) -> str:
    if not option.option_strings:
        name = _metavar(option)
        return {"?": f"[{name}]", "+": f"{name} [{name} ...]", "*": f"[{name} ...]"}.get(str(option.nargs), name)
    text = f"{option.option_strings[-1]} {_metavar(option)}".rstrip()
    return text if option.required else f"[{text}]"


def _names(option: argparse.Action) -> str:
    metavar = _metavar(option)
    names = option.option_strings or [metavar]
    return ", ".join(f"`{_cell(f'{name} {metavar}'.rstrip() if option.option_strings else name)}`" for name in names)


def _cell(text: str) -> str:
    return text.replace("%%", "%").replace("|", "\\|")


def main() -> int:
    made = document()
    if "--check" in sys.argv[1:]:
        if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == made:
            return 0
        sys.stderr.write(f"{TARGET.name} is not up to date: run python scripts/make_cli_docs.py\n")
        return 1
    TARGET.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
