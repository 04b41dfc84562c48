"""Writing results: JSON, tables, and text from strangers made safe for a terminal."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# C0, DEL, C1, and the marks that reorder or hide text: a terminal would act on them
_RANGES = ((0, 0x20), (0x7F, 0xA0), (0x200B, 0x2010), (0x2028, 0x202F), (0x2066, 0x206A), (0xFEFF, 0xFF00))
_UNSAFE = frozenset(point for first, end in _RANGES for point in range(first, end))


class _Escapes(dict[int, str]):
    """A table for str.translate that is filled as characters come by."""

    def __init__(self, keep: str) -> None:
        super().__init__()
        self._keep = keep

    def __missing__(self, point: int) -> str:
        text = chr(point)
        if text not in self._keep and (point in _UNSAFE or 0xD800 <= point < 0xE000):
            text = text.encode("unicode_escape").decode("ascii")
        self[point] = text
        return text


_tables: dict[str, _Escapes] = {}


def escape(text: str, *, keep: str = "") -> str:
    """`text` with control characters written as `\\x1b` and the like; those in `keep` stay."""
    if text.isascii() and text.isprintable():
        return text
    table = _tables.get(keep)
    if table is None:
        table = _tables[keep] = _Escapes(keep)
    return text.translate(table)


def write(text: str) -> None:
    """A line of a result on stdout."""
    sys.stdout.write(text + "\n")


def write_json(content: object) -> None:
    """One JSON object as a result: indented on a terminal, one line in a pipe."""
    import json

    sys.stdout.write(json.dumps(content, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False) + "\n")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Left-aligned columns under `heads`; cells are escaped. Empty cells show as `-`."""
    cells = [[escape(str(cell)) if cell not in (None, "") else "-" for cell in row] for row in rows]
    widths = [max(len(head), *(len(row[i]) for row in cells)) if cells else len(head) for i, head in enumerate(heads)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [list(heads), *cells]
    )


def fields(pairs: Iterable[tuple[str, object]]) -> str:
    """`name  value` lines with aligned values; empty values are left out."""
    shown = [(name, escape(str(value))) for name, value in pairs if value not in (None, "")]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in shown)


def moment(text: str | None) -> str:
    """An API time for people: to the second, UTC."""
    return "" if not text else text[:19].replace("T", " ") + "Z"


def size(count: int) -> str:
    """Bytes for people, in powers of 1000."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
