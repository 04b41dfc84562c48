"""What may be said of a function, and what is refused with the name of the field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.model.errors import BadRequest
from aether.model.function import MAX_ENV_BYTES, FunctionDefinition, changed, define, is_function_id

LEAST = {"name": "hello", "runtime": "node20", "entrypoint": "handler.js"}


def test_the_defaults_are_those_of_the_contract() -> None:
    made = define(LEAST)
    assert made == FunctionDefinition("hello", "node20", "handler.js")
    assert (made.vcpu, made.memory_mb, made.port, made.env_vars) == (1, 128, 3000, {})
    assert (made.timeout_secs, made.concurrency, made.min_instances, made.max_instances) == (30.0, 10, 0, 10)
    assert made.snapshot is False


def test_everything_can_be_said_and_comes_back_from_json() -> None:
    made = define({
        "name": "a-1", "runtime": "python3.11", "entrypoint": "src/app.py", "vcpu": 2, "memory_mb": 512, "port": 80,
        "env_vars": {"A": "ä\n", "_b": ""}, "timeout_secs": 1, "concurrency": 1, "min_instances": 2,
        "max_instances": 2, "snapshot": True,
    })  # fmt: skip
    assert FunctionDefinition.from_json(made.to_json()) == made
    assert "ä" not in repr(made), "values of variables may be secrets"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""), ("name", "Hello"), ("name", "-a"), ("name", "a-"), ("name", "a" * 41), ("name", "a/b"),
        ("name", 5), ("name", "a0000000-0000-4000-8000-000000000000"), ("name", "a\n"),
        ("runtime", ""), ("runtime", "../node"), ("runtime", "node 20"), ("runtime", None), ("runtime", "n" * 41),
        ("entrypoint", ""), ("entrypoint", "/etc/passwd"), ("entrypoint", "a/../b"), ("entrypoint", "./a"),
        ("entrypoint", "--inspect"), ("entrypoint", "a\0b"), ("entrypoint", "a\nb"), ("entrypoint", "a//b"),
        ("entrypoint", "a" * 256), ("entrypoint", 1), ("entrypoint", "\ud800"),
        ("vcpu", 0), ("vcpu", 33), ("vcpu", True), ("vcpu", 1.0), ("vcpu", "1"),
        ("memory_mb", 63), ("memory_mb", 1 << 20), ("port", 0), ("port", 65_536),
        ("timeout_secs", 0), ("timeout_secs", 3601), ("timeout_secs", float("nan")), ("timeout_secs", "30"),
        ("timeout_secs", True), ("concurrency", 0), ("concurrency", 1001),
        ("min_instances", -1), ("min_instances", 11), ("max_instances", 0), ("max_instances", 1001),
        ("env_vars", []), ("env_vars", {"PORT": "1"}), ("env_vars", {"AETHER_X": "1"}), ("env_vars", {"1A": ""}),
        ("env_vars", {"A": 1}), ("env_vars", {"A": "\0"}), ("env_vars", {"A=B": ""}), ("env_vars", {1: ""}),
        ("env_vars", {"A": "x" * MAX_ENV_BYTES}), ("env_vars", {f"A{n}": "" for n in range(501)}),
        ("snapshot", 1), ("snapshot", "yes"), ("snapshot", None), ("colour", "red"),
    ],
    ids=lambda value: ascii(value)[:24] if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_field(field: str, value: Any) -> None:
    with pytest.raises(BadRequest) as refused:
        define({**LEAST, field: value})
    assert refused.value.details == {"field": field}
    assert len(refused.value.message) < 250


@pytest.mark.parametrize("field", sorted(LEAST))
def test_what_has_no_default_must_be_said(field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        define({name: value for name, value in LEAST.items() if name != field})
    assert refused.value.details == {"field": field}


def test_a_change_keeps_what_it_does_not_name_and_never_the_name() -> None:
    before = define({**LEAST, "env_vars": {"A": "1"}, "max_instances": 5})
    after = changed(before, {"name": "hello", "memory_mb": 256, "min_instances": 5})
    assert (after.memory_mb, after.min_instances, after.env_vars) == (256, 5, {"A": "1"})
    assert changed(after, {"env_vars": {}}).env_vars == {}
    for wrong in ({"name": "other"}, {"max_instances": 4}):
        with pytest.raises(BadRequest):
            changed(after, wrong)


def test_an_id_is_told_from_a_name() -> None:
    assert is_function_id("0190b5f0-7a3c-7d5e-8f00-0123456789ab")
    assert not is_function_id("hello")
    assert not is_function_id("0190b5f0-7a3c-7d5e-8f00-0123456789aB")


ANYTHING = st.none() | st.integers() | st.text() | st.lists(st.integers())


@given(st.dictionaries(st.text(max_size=10) | st.sampled_from(["port", "env_vars", "runtime"]), ANYTHING, max_size=5))
def test_whatever_comes_in_is_taken_or_refused(values: dict[str, Any]) -> None:
    details: Any = None
    try:
        made = define({**LEAST, **values})
    except BadRequest as refused:
        details = refused.details
    if details is None:
        assert FunctionDefinition.from_json(made.to_json()) == made
    else:
        assert set(details) == {"field"}
