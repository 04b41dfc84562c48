"""Files of `NAME=value` lines, read the way developers know them from `.env` files.

Comments and empty lines are skipped, `export ` before a name is allowed. A value in single quotes is taken as it is,
one in double quotes knows \\n, \\t, \\", \\\\ and \\$; both may go over several lines. Nothing is expanded.
"""

from __future__ import annotations

from aether.cli.project import check_variable
from aether.model.errors import UsageError

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "$": "$", "`": "`"}


def parse(text: str, where: str) -> dict[str, str]:
    """The variables of the file `where` with content `text`. Raises UsageError that names the line, not the value."""
    found: dict[str, str] = {}
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        number, line = at + 1, lines[at].strip()
        at += 1
        if not line or line.startswith("#"):
            continue
        name, has_value, value = line.removeprefix("export ").partition("=")
        name, value = name.strip(), value.strip()
        if not has_value or not name:
            raise UsageError(f"{where}, line {number}: write NAME=value")
        try:
            check_variable(name)
        except UsageError:
            raise UsageError(
                f"{where}, line {number}: what is before '=' cannot name a variable: use letters, digits and '_'"
            ) from None
        quote = value[:1]
        if quote in ("'", '"'):
            value = value[1:]
            while (end := _end(value, quote)) < 0:
                if at == len(lines):
                    raise UsageError(f"{where}, line {number}: the value of {name} has no closing {quote}")
                value += "\n" + lines[at]
                at += 1
            rest = value[end + 1 :].strip()
            if rest and not rest.startswith("#"):
                raise UsageError(f"{where}, line {at}: there is something after the closing {quote} of {name}")
            value = value[:end] if quote == "'" else _unescaped(value[:end])
        else:
            value = value.partition(" #")[0].rstrip()
        found[name] = value
    return found


def _end(value: str, quote: str) -> int:
    """Where the quote that closes is; -1 when it is not there."""
    at = 0
    while at < len(value):
        if value[at] == "\\" and quote == '"':
            at += 1
        elif value[at] == quote:
            return at
        at += 1
    return -1


def _unescaped(value: str) -> str:
    pieces: list[str] = []
    at = 0
    while at < len(value):
        following = value[at + 1 : at + 2]
        if value[at] == "\\" and following in _ESCAPES and following:
            pieces.append(_ESCAPES[following])
            at += 1
        else:
            pieces.append(value[at])
        at += 1
    return "".join(pieces)
