"""Whether a symbolic link stays inside the tree that holds it, judged on names alone.

Packing and extracting share this rule. Targets are resolved component by component through the tree's own links:
comparing text is not enough, because `up/..` leads elsewhere when `up` is itself a link.
"""

from collections.abc import Mapping

_MAX_HOPS = 40
"""Linux gives up after this many links (ELOOP). Programs that resolve names themselves may read on, taking the link
for a plain name, and so do we."""


def escapes(name: bytes, target: bytes, links: Mapping[bytes, bytes]) -> bool:
    """True when the link `name` → `target` is absolute, empty or leaves the tree; `links` are all its links by name.

    What the target names need not exist. At most 40 links are followed.
    """
    if not target or target.startswith(b"/") or b"\0" in target:
        return True
    place = name.split(b"/")[:-1]
    todo = target.split(b"/")[::-1]
    hops = 0
    while todo:
        part = todo.pop()
        if part in (b"", b"."):
            continue
        if part == b"..":
            if not place:
                return True
            place.pop()
            continue
        place.append(part)
        through = links.get(b"/".join(place))
        if through is None:
            continue
        hops += 1
        if hops > _MAX_HOPS:
            continue
        if not through or through.startswith(b"/"):
            return True
        place.pop()
        todo.extend(through.split(b"/")[::-1])
    return False
