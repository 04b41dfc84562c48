"""Config versions: the variables of an app, plain and secret, kept as numbered, unchangeable sets.

What a change does to a running app (a deployment of the same artifact) is the deployments service's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aether.apps.vault import Variables
from aether.model.errors import BadRequest

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_OURS = frozenset({"PORT", "PATH", "HOME", "TMPDIR"})
MAX_VARIABLES = 500
MAX_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class Config:
    version: int
    variables: Variables


@dataclass(frozen=True, slots=True)
class Change:
    """What to do to the variables of an app; with `replace` the ones not named are unset too.

    A name that is a secret stays one until it is unset, in whichever of the two it is given a new value.
    """

    put: Mapping[str, str] = field(default_factory=dict[str, str])
    secrets: Mapping[str, str] = field(default_factory=dict[str, str])
    unset: Sequence[str] = ()
    replace: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*self.put, *self.secrets, *self.unset))


@dataclass(frozen=True, slots=True)
class VariableChange:
    """`change` is added, removed or changed. A value that became a secret counts as changed."""

    name: str
    change: str
    secret: bool


def check_env(env: Mapping[str, str]) -> None:
    """Raise BadRequest naming the variable that cannot be set."""
    for name, value in env.items():
        if not _NAME.fullmatch(name):
            raise BadRequest(f"'{name[:80]}' cannot name a variable: letters, digits and '_', not first a digit")
        if name in _OURS or name.startswith("AETHER_"):
            raise BadRequest(f"{name} is set by Aether itself")
        if "\0" in value:
            raise BadRequest(f"the value of {name} contains a NUL byte")
    if len(env) > MAX_VARIABLES:
        raise BadRequest(f"at most {MAX_VARIABLES} variables can be set")
    if sum(len(name) + len(value.encode("utf-8", "surrogatepass")) for name, value in env.items()) > MAX_BYTES:
        raise BadRequest(f"all variables together may have at most {MAX_BYTES} bytes")


def changed(before: Variables, change: Change) -> Variables:
    """The variables after a change. Raises BadRequest when the result cannot be an environment."""
    for name in sorted(change.names):
        if sum(name in names for names in (change.put, change.secrets, change.unset)) > 1:
            raise BadRequest(f"{name} is named twice: set it, set it as a secret, or unset it")
    kept = {} if change.replace else {name: before.env[name] for name in before.env if name not in change.unset}
    env = {**kept, **change.put, **change.secrets}
    check_env(env)
    return Variables(env, frozenset(change.secrets)).keeping(before.secrets - set(change.unset))


def differences(a: Variables, b: Variables) -> list[VariableChange]:
    """The names whose value, or whether it is a secret, differs, in order."""
    found: list[VariableChange] = []
    for name in sorted(a.env.keys() | b.env.keys()):
        secret = name in a.secrets or name in b.secrets
        if name not in a.env:
            found.append(VariableChange(name, "added", secret))
        elif name not in b.env:
            found.append(VariableChange(name, "removed", secret))
        elif a.env[name] != b.env[name] or (name in a.secrets) != (name in b.secrets):
            found.append(VariableChange(name, "changed", secret))
    return found
