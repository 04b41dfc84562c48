"""What an announced artifact may look like. Pure: raises, or returns nothing."""

from __future__ import annotations

from collections.abc import Sequence

from aether.artifact.signature import check_signature
from aether.model.errors import BadRequest, MissingDigest
from aether.model.names import check_digest
from aether.registry.idempotency import MAX_LENGTH as MAX_IDEMPOTENCY_KEY
from aether.registry.upload_rows import Said

MAX_RUNTIME = 64
MAX_ETAG = 200


def check_artifact_digest(digest: str) -> None:
    """Raises MissingDigest, InvalidDigest."""
    if not digest:
        raise MissingDigest("a digest is needed: the SHA-256 of the .tar.gz in 64 lower-case hex characters")
    check_digest(digest)


def check_described(content_digest: str | None, runtime: str | None) -> None:
    if content_digest is not None:
        check_digest(content_digest)
    if runtime is not None and not (1 <= len(runtime) <= MAX_RUNTIME and runtime.isprintable()):
        raise BadRequest(f"a runtime has 1 to {MAX_RUNTIME} printable characters")


def check_said(said: Said) -> None:
    """Raises InvalidDigest, BadRequest."""
    check_described(said.content_digest, said.runtime)
    if said.signature is not None:
        check_signature(said.signature)
    key = said.idempotency_key
    if key is not None and not (1 <= len(key) <= MAX_IDEMPOTENCY_KEY and "\0" not in key):
        raise BadRequest(f"an idempotency key has 1 to {MAX_IDEMPOTENCY_KEY} characters")


def check_parts(parts: Sequence[tuple[int, str]], count: int) -> None:
    """Raises BadRequest unless `parts` are all of `count` parts, once each and in order."""
    numbers = [number for number, _ in parts]
    if missing := sorted(set(range(1, count + 1)) - set(numbers)):
        shown = ", ".join(str(number) for number in missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise BadRequest(f"the upload has {count} parts; missing: {shown}", {"missing": missing[:100]})
    if beyond := [number for number in numbers if not 1 <= number <= count]:
        raise BadRequest(f"the upload has {count} parts; there is no part {beyond[0]}")
    if numbers != sorted(set(numbers)):
        raise BadRequest("the parts must be named once each, in the order of their numbers")
    for number, etag in parts:
        if not (1 <= len(etag) <= MAX_ETAG and etag.isascii() and etag.isprintable()):
            raise BadRequest(f"the etag of part {number} is not one that a store gave out")
