"""Secrets in lines of text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aether.apps.masking import Masker


def test_values_are_hidden_the_longest_first() -> None:
    masker = Masker(["password", "password-and-more", "short", "first line\nsecond line\nend"])
    assert masker.mask("a password-and-more, a password") == "a ****, a ****"
    assert masker.mask("short first line second line end") == "short **** **** end"


def test_without_secrets_nothing_changes() -> None:
    assert Masker(()).mask("anything") == "anything"
    assert Masker(["", "\n"]).mask("any\nthing") == "any\nthing"


@given(st.lists(st.text(min_size=8, alphabet="ab.?+()[]é"), max_size=4), st.text(alphabet="ab.?+()[]é"), st.data())
def test_no_value_is_left_whole(values: list[str], around: str, data: st.DataObject) -> None:
    value = data.draw(st.sampled_from(values or ["aaaaaaaa"]))
    masked = Masker([*values, value]).mask(f"{around}{value}{around}")
    assert not [known for known in values if known in masked]
