"""Config versions: the environment variables of an app, kept as numbered, unchangeable sets.

What a change does to a running app (a deployment of the same artifact) is the deployments service's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from aether.model.errors import BadRequest

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_OURS = frozenset({"PORT", "PATH", "HOME", "TMPDIR"})
MAX_VARIABLES = 500
MAX_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class Config:
    version: int
    env: Mapping[str, str]


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


def changed(
    before: Mapping[str, str], put: Mapping[str, str], unset: Collection[str], *, replace: bool
) -> dict[str, str]:
    """The variables after a change. Raises BadRequest when the result cannot be an environment."""
    if both := sorted(set(put) & set(unset)):
        raise BadRequest(f"{both[0]} is both set and unset")
    env = {} if replace else {name: value for name, value in before.items() if name not in unset}
    env.update(put)
    check_env(env)
    return env
