"""The rules of S3 for the parts of an upload, pure and the same for every store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aether.model.errors import BadRequest
from aether.model.objects import MAX_PARTS, MIN_PART_BYTES, Part


def bare(etag: str) -> str:
    """An ETag without the quotes that it has in a header."""
    return etag.strip().removeprefix("W/").strip('"')


def check_number(number: int) -> None:
    if not 1 <= number <= MAX_PARTS:
        raise BadRequest(f"parts are numbered from 1 to {MAX_PARTS}")


def check_order(wanted: Sequence[tuple[int, str]]) -> None:
    """Raises BadRequest unless (number, etag) name at least one part, each once, in ascending order."""
    if not wanted:
        raise BadRequest("an upload is finished with at least one part")
    numbers = [number for number, _ in wanted]
    if numbers != sorted(set(numbers)):
        raise BadRequest("the parts must be named once each, in ascending order")
    check_number(numbers[0])
    check_number(numbers[-1])


def check_parts(arrived: Iterable[Part], wanted: Sequence[tuple[int, str]]) -> list[Part]:
    """The parts that `wanted` names, in its order. Raises BadRequest."""
    check_order(wanted)
    found = {(part.number, part.etag): part for part in arrived}
    chosen: list[Part] = []
    for number, etag in wanted:
        part = found.get((number, bare(etag)))
        if part is None:
            raise BadRequest(f"part {number} has not arrived, or has another ETag by now; send it again")
        chosen.append(part)
    for part in chosen[:-1]:
        if part.size_bytes < MIN_PART_BYTES:
            raise BadRequest(f"part {part.number} is too small: every part but the last has {MIN_PART_BYTES} bytes")
    return chosen
