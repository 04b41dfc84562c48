"""What every runtime of functions asks of a spec, so that a function which one of them takes the others take too."""

from __future__ import annotations

import re

from aether.model.errors import BadRequest
from aether.model.function_instance import FunctionSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise BadRequest(f"'{name}' cannot name an instance")


def check_spec(spec: FunctionSpec) -> None:
    """Raises BadRequest; variables and the port are judged by `microvm.assignment`."""
    check_name(spec.instance_id)
    if not 64 <= spec.memory_mb <= 65_536 or not 1 <= spec.vcpus <= 32:
        raise BadRequest("a function takes 64 to 65536 MB of memory and 1 to 32 processors")
    path = spec.entrypoint
    if not path or path.startswith(("/", "-")) or ".." in path.split("/"):
        raise BadRequest("an entry point is a file in the code, by its path from the code's root")
