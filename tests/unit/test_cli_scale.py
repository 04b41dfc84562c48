"""What `aether scale` understands."""

import pytest

from aether.cli.scale import sizes_of
from aether.model.errors import UsageError


@pytest.mark.parametrize(
    ("words", "sizes"), [([], {}), (["web=3"], {"web": 3}), (["0"], {"web": 0}), (["web=50"], {"web": 50})]
)
def test_sizes(words: list[str], sizes: dict[str, int]) -> None:
    assert sizes_of(words) == sizes


@pytest.mark.parametrize("words", [["web"], ["web="], ["=3"], ["web=-1"], ["web=51"], ["web=²"], ["1", "web=2"]])
def test_what_is_no_size_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        sizes_of(words)
