"""What /openapi.json says beyond what the framework can see: how routes fail, and which of them answer in two ways.

Every failure is the one envelope, and each route names the statuses that it can fail with; a client made from the
description then knows them all. A test calls every route with what the description allows and more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from litestar import Litestar

from aether.api.authorization import PUBLIC_PATHS
from aether.api.errors import Envelope
from aether.api.function_views import CodeOfArtifact

_FAILURES = {
    400: "The request does not fit.",
    401: "No valid token.",
    403: "The caller may not do this.",
    404: "There is no such thing, or it belongs to others.",
    409: "It contradicts what is already there.",
    413: "The body is larger than is taken.",
    429: "Too many tries; Retry-After says when to come again.",
    500: "A fault of the server; its log names the trace id.",
    503: "The server, or something it needs, cannot serve now.",
}
_GUESSED = frozenset({"/auth/login", "/auth/refresh", "/auth/device", "/auth/device/token"})
"""Public routes that take a secret."""
_SECOND_ANSWERS = {
    ("/deployments", "post"): (200, 201, "The newest deployment, or the one of the same key, once more."),
}
"""Another status with the same body as the documented one."""


def describe(app: Litestar) -> bytes:
    """OpenAPI 3.1 of the routes, as JSON."""
    spec: dict[str, Any] = app.openapi_schema.to_schema()
    schemas = spec.setdefault("components", {}).setdefault("schemas", {})
    schemas["Error"] = msgspec.json.schema_components([Envelope])[1]["Envelope"]
    # bodies that are read by hand; what their handlers name is there already
    for name, shape in msgspec.json.schema_components([CodeOfArtifact], ref_template=_REF)[1].items():
        schemas.setdefault(name, shape)
    for struct in _structs(msgspec.Struct):
        if struct.__struct_config__.forbid_unknown_fields and struct.__name__ in schemas:
            schemas[struct.__name__]["additionalProperties"] = False
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            _describe(path, method, operation)
    return msgspec.json.encode(spec)


_REF = "#/components/schemas/{name}"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_DOCUMENT = {"application/json": {"schema": {"type": "object"}}}
_RAW_BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("/artifacts", "post"): {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary", "description": "A .tar.gz."}}
    },
    ("/api/functions/{function}/code", "post"): {
        "application/zip": _BINARY,
        "application/gzip": _BINARY,
        "application/json": {"schema": {"$ref": "#/components/schemas/CodeOfArtifact"}},
    },
    ("/api/functions/runtimes", "post"): {"application/octet-stream": _BINARY},
    ("/artifacts/{digest}/manifest", "post"): _DOCUMENT,
    ("/artifacts/{digest}/sbom", "post"): _DOCUMENT,
    ("/artifacts/{digest}/provenance", "post"): _DOCUMENT,
}
"""Bodies that are taken as they are."""


def _describe(path: str, method: str, operation: dict[str, Any]) -> None:
    responses: dict[str, Any] = operation["responses"]
    if (body := _RAW_BODIES.get((path, method))) is not None:
        operation["requestBody"] = {"required": True, "content": body}
    if (more := _SECOND_ANSWERS.get((path, method))) is not None:
        status, like, told = more
        responses[str(status)] = {**responses[str(like)], "description": told}
    for status in sorted(_failures(path, method, operation)):
        responses[str(status)] = {
            "description": _FAILURES[status],
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
    if path in PUBLIC_PATHS:
        operation["security"] = []


def _failures(path: str, method: str, operation: dict[str, Any]) -> Iterator[int]:
    public = path in PUBLIC_PATHS
    yield from (500, 503)
    if not public or path in _GUESSED:
        yield from (400, 401, 403, 404, 429)
    if method not in ("get", "head"):
        yield 409
    if "requestBody" in operation:
        yield 413


def _structs(base: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    for struct in base.__subclasses__():
        yield struct
        yield from _structs(struct)
