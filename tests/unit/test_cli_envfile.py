"""Files of NAME=value lines."""

from __future__ import annotations

import pytest

from aether.cli.envfile import parse
from aether.model.errors import UsageError

KEY = "-----BEGIN KEY-----\nabc=\n-----END KEY-----"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A=1\n\n# comment\nexport B = two words # not this\n", {"A": "1", "B": "two words"}),
        ('A=\'$x \\n "q"\'\nB="a\\nb \\"c\\" \\$d \\z"', {"A": '$x \\n "q"', "B": 'a\nb "c" $d \\z'}),
        (f'K="{KEY}"\nA=1', {"K": KEY, "A": "1"}),
        (f"K='{KEY}' # a key\r\nA=x#y", {"K": KEY, "A": "x#y"}),
        ("A=\nB=''\nC=a=b", {"A": "", "B": "", "C": "a=b"}),
        ("A=1\nA=2", {"A": "2"}),
        ("", {}),
    ],
)
def test_what_a_file_says(text: str, found: dict[str, str]) -> None:
    assert parse(text, "f") == found


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A=1\nhunter22", 2),
        ("\n1A=hunter22", 2),
        ("A='hunter22\nx", 1),
        ('A="hunter22" x', 1),
        ("=hunter22", 1),
    ],
)
def test_a_broken_line_is_named_by_its_number_and_its_value_is_not_told(text: str, line: int) -> None:
    with pytest.raises(UsageError, match=f"f, line {line}: ") as told:
        parse(text, "f")
    assert "hunter22" not in told.value.message
