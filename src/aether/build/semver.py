"""Which major versions a Node version range admits (node-semver's grammar, as far as majors need it)."""

import re

from aether.model.errors import ConfigError

Version = tuple[int, int, int]

_TOP: Version = (1 << 30, 0, 0)
_PARTIAL = r"[v=\s]*(\d+|[xX*])(?:\.(\d+|[xX*]))?(?:\.(\d+|[xX*]))?(?:[-+][0-9A-Za-z.+-]*)?"
_COMPARATOR = re.compile(rf"(\^|~>?|>=|<=|>|<|=)?\s*{_PARTIAL}")
_HYPHEN = re.compile(rf"\s*{_PARTIAL}\s+-\s+{_PARTIAL}\s*")


def _numbers(parts: tuple[str | None, ...]) -> list[int]:
    found: list[int] = []
    for part in parts:
        if part is None or not part.isdigit():
            break
        found.append(int(part))
    return found


def _low(known: list[int]) -> Version:
    padded = [*known, 0, 0, 0]
    return padded[0], padded[1], padded[2]


def _next(known: list[int], keep: int) -> Version:
    """The first version beyond those that share the first `keep` numbers of `known`."""
    if not known or keep < 1:
        return _TOP
    head = known[:keep]
    head[-1] += 1
    return _low(head)


def _span(operator: str, known: list[int]) -> tuple[Version, Version]:
    """The versions [low, high) that one comparator admits."""
    low, beyond = _low(known), _next(known, len(known))
    match operator:
        case ">=":
            return low, _TOP
        case ">":
            return (beyond if known else _TOP), _TOP
        case "<":
            return (0, 0, 0), low
        case "<=":
            return (0, 0, 0), beyond
        case "^":
            lead = next((at for at, number in enumerate(known) if number), len(known) - 1)
            return low, _next(known, lead + 1)
        case "~" | "~>":
            return low, _next(known, min(2, len(known)))
        case _:
            return low, beyond


def admits(text: str, major: int) -> bool:
    """True when some version `major`.x.y satisfies the range `text`. Raises ConfigError for an unreadable range."""
    for part in text.split("||"):
        low, high = (major, 0, 0), (major + 1, 0, 0)
        hyphen = _HYPHEN.fullmatch(part)
        if hyphen:
            groups = hyphen.groups()
            spans = [_span(">=", _numbers(groups[:3])), _span("<=", _numbers(groups[3:]))]
        else:
            rest = part.strip()
            spans = list[tuple[Version, Version]]()
            while rest:
                found = _COMPARATOR.match(rest)
                if found is None:
                    raise ConfigError(f"package.json: engines.node '{text}' is not a version range")
                spans.append(_span(found.group(1) or "", _numbers(found.groups()[1:])))
                rest = rest[found.end() :].lstrip(" ,\t")
        for span_low, span_high in spans:
            low, high = max(low, span_low), min(high, span_high)
        if low < high:
            return True
    return False
