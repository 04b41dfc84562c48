"""What a guest is told to run, as it travels: see guest/source/metadata.c, which reads it."""

from __future__ import annotations

import re
import secrets
from base64 import b64encode
from collections.abc import Mapping, Sequence

from aether.model.errors import BadRequest

MAX_BYTES = 51_200 - 1_024
"""What Firecracker's metadata store takes (--mmds-size-limit), less room for the document around it."""
_MAX_WORDS = 1024
_RANDOM_BYTES = 64
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def encode(argv: Sequence[str], env: Mapping[str, str], *, port: int, secret: str, time_ns: int) -> bytes:
    """The assignment in base64. Raises BadRequest for what no guest can take; no value is named."""
    if not 1 <= port <= 65_535:
        raise BadRequest("a function's port is between 1 and 65535")
    for word in argv:
        if "\0" in word:
            raise BadRequest("a function's entry point may not hold a zero byte")
    for name, value in env.items():
        if not _NAME.fullmatch(name):
            raise BadRequest(f"'{name[:80]}' cannot be the name of a variable")
        if "\0" in value:
            raise BadRequest(f"the variable {name} holds a zero byte")
    if not argv or max(len(argv), len(env)) > _MAX_WORDS:
        raise BadRequest(f"a function takes 1 to {_MAX_WORDS} arguments and at most {_MAX_WORDS} variables")
    records = ["v=1", f"s={secret}", f"r={secrets.token_hex(_RANDOM_BYTES)}"]
    records += [f"t={time_ns}", f"p={port}", *(f"a={word}" for word in argv)]
    records += [f"e={name}={value}" for name, value in env.items()]
    body = b64encode(b"".join(record.encode("utf-8", "surrogateescape") + b"\0" for record in [*records, "z="]))
    if len(body) > MAX_BYTES:
        raise BadRequest(
            f"the function's variables take {len(body)} bytes where a guest can be given {MAX_BYTES}: "
            "keep large values in the code or fetch them"
        )
    return body
