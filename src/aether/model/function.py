"""What the owner of a function says of it: its fields, their defaults and their bounds.

How one instance is run from it is in `aether.model.function_instance`; whether the runtime is registered, and whether
a worker has so much memory, is for those to say who know them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, cast

from aether.model.errors import BadRequest

MAX_NAME = 40
MAX_RUNTIME_NAME = 40
MAX_ENTRYPOINT = 255
MAX_VCPU = 32
MIN_MEMORY_MB, MAX_MEMORY_MB = 64, 32 * 1024
MAX_TIMEOUT_SECS = 3600.0
MAX_CONCURRENCY = 1000
MAX_INSTANCES = 1000
MAX_VARIABLES = 500
MAX_ENV_BYTES = 32 * 1024
"""Of names and values in UTF-8: a guest's metadata has room for 51,200 bytes, and carries them in base64 beside other
things."""
_NAME = re.compile(r"[a-z](?:[a-z0-9-]*[a-z0-9])?")
_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_RUNTIME = re.compile(r"[a-z][a-z0-9._-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_OURS = frozenset({"PORT", "PATH", "HOME", "TMPDIR"})


@dataclass(frozen=True, slots=True)
class FunctionDefinition:
    name: str
    runtime: str
    entrypoint: str
    """A file of the code, relative to its root, that the runtime is given to run."""
    vcpu: int = 1
    memory_mb: int = 128
    port: int = 3000
    """Where the function listens; told to it as PORT."""
    env_vars: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    timeout_secs: float = 30.0
    """Until an answer has begun."""
    concurrency: int = 10
    """Requests that one instance is given at once."""
    min_instances: int = 0
    max_instances: int = 10
    snapshot: bool = False
    """Whether instances go on from snapshots of the function, where there are any, instead of starting it."""

    def to_json(self) -> str:
        return json.dumps({**asdict(replace(self, env_vars={})), "env_vars": dict(self.env_vars)}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> FunctionDefinition:
        """Of what `to_json` gave; not checked again."""
        return FunctionDefinition(**json.loads(text))


def define(values: Mapping[str, Any]) -> FunctionDefinition:
    """A definition from fields as they came in. Raises BadRequest, with the field's name in `details`."""
    return changed(None, values)


def changed(before: FunctionDefinition | None, values: Mapping[str, Any]) -> FunctionDefinition:
    """`before` with these fields in place of its own; those that are not named stay, and a name stays for good.

    Raises BadRequest, with the field's name in `details`.
    """
    known = {entry.name for entry in fields(FunctionDefinition)}
    for name in values:
        if name not in known:
            raise _refused(str(name)[:80], f"a function has no field '{str(name)[:80]}'")
    if before is None:
        for name in ("name", "runtime", "entrypoint"):
            if name not in values:
                raise _refused(name, f"a function needs a {name}")
    elif values.get("name", before.name) != before.name:
        raise _refused("name", "the name of a function cannot be changed")
    checked = {name: _CHECKS[name](name, value) for name, value in values.items()}
    made = FunctionDefinition(**checked) if before is None else replace(before, **checked)
    if made.min_instances > made.max_instances:
        raise _refused("min_instances", f"min_instances is above max_instances ({made.max_instances})")
    return made


def check_runtime_name(name: str) -> str:
    """Raises BadRequest."""
    return _runtime("name", name)


def is_function_id(text: str) -> bool:
    """Whether a function is meant by its id; no name looks like one."""
    return _ID.fullmatch(text) is not None


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME or not _NAME.fullmatch(value):
        rule = f"1 to {MAX_NAME} of a-z, 0-9 and '-', with a letter first and no '-' at the end"
        raise _refused(name, f"a function's name is {rule}")
    if is_function_id(value):
        raise _refused(name, "a function's name must not look like an id")
    return value


def _runtime(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_RUNTIME_NAME or not _RUNTIME.fullmatch(value):
        raise _refused(name, f"a runtime's name is 1 to {MAX_RUNTIME_NAME} of a-z, 0-9, '.', '_' and '-'")
    return value


def _entrypoint(name: str, value: Any) -> str:
    parts = value.split("/") if isinstance(value, str) else []
    if not parts or len(str(value).encode("utf-8", "surrogatepass")) > MAX_ENTRYPOINT or not str(value).isprintable():
        raise _refused(name, f"an entrypoint is a path of at most {MAX_ENTRYPOINT} printable characters")
    if any(part in ("", ".", "..") for part in parts) or parts[0].startswith("-"):
        raise _refused(name, "an entrypoint is relative to the code, without '.', '..' or a leading '-' or '/'")
    return str(value)


def _whole(low: int, high: int) -> Any:
    def check(name: str, value: Any) -> int:
        # True is an int in Python, and not a number of anything
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _refused(name, f"{name} is a whole number from {low} to {high}")
        return value

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refused(name, f"{name} is true or false")
    return value


def _timeout(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.1 <= value <= MAX_TIMEOUT_SECS:
        raise _refused(name, f"{name} is a number from 0.1 to {MAX_TIMEOUT_SECS:g}")
    return float(value)


def _env_vars(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise _refused(name, f"{name} are names with their values")
    found: dict[str, str] = {}
    size = 0
    for key, text in cast("Mapping[object, object]", value).items():
        if not isinstance(key, str) or not _VARIABLE.fullmatch(key):
            rule = "letters, digits and '_', not first a digit"
            raise _refused(name, f"'{str(key)[:80]}' cannot name a variable: {rule}")
        if key in _OURS or key.startswith("AETHER_"):
            raise _refused(name, f"{key} is set by Aether itself")
        if not isinstance(text, str) or "\0" in text:
            raise _refused(name, f"the value of {key} is not a text without NUL characters")
        size += len(key) + len(text.encode("utf-8", "surrogatepass"))
        found[key] = text
    if len(found) > MAX_VARIABLES:
        raise _refused(name, f"at most {MAX_VARIABLES} variables can be set")
    if size > MAX_ENV_BYTES:
        raise _refused(
            name,
            f"the variables have {size} bytes together, and a function can be given {MAX_ENV_BYTES}: "
            "keep large values in the code or fetch them",
        )
    return found


_CHECKS: Mapping[str, Any] = {
    "name": _name,
    "runtime": _runtime,
    "entrypoint": _entrypoint,
    "vcpu": _whole(1, MAX_VCPU),
    "memory_mb": _whole(MIN_MEMORY_MB, MAX_MEMORY_MB),
    "port": _whole(1, 65_535),
    "env_vars": _env_vars,
    "timeout_secs": _timeout,
    "concurrency": _whole(1, MAX_CONCURRENCY),
    "min_instances": _whole(0, MAX_INSTANCES),
    "max_instances": _whole(1, MAX_INSTANCES),
    "snapshot": _flag,
}


def _refused(name: str, message: str) -> BadRequest:
    return BadRequest(message, {"field": name})
