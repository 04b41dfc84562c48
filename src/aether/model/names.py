"""Names and identifiers: what an app may be called, and time-ordered ids (UUIDv7, RFC 9562 section 5.7)."""

import os
import time

from aether.model.errors import BadRequest, InvalidDigest

MAX_APP_NAME = 40
RESERVED_APP_NAMES = frozenset({"api", "localhost", "www", "aether"})
_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz")
_NAME = _LOWER | frozenset("0123456789-")
_HEX = frozenset("0123456789abcdef")


def new_id() -> str:
    """A UUIDv7 as 36 lower-case characters; ids made later on one machine sort later (millisecond grain)."""
    value = (int(time.time() * 1000) & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def check_app_name(name: str) -> str:
    """Return `name` if it may name an app (a DNS label that starts with a letter), else raise BadRequest."""
    if not 1 <= len(name) <= MAX_APP_NAME or name[0] not in _LOWER or name[-1] == "-" or not _NAME.issuperset(name):
        raise BadRequest(
            f"'{name}' cannot name an app: use 1 to {MAX_APP_NAME} of a-z, 0-9 and '-', "
            "start with a letter and do not end with '-'"
        )
    if name in RESERVED_APP_NAMES:
        raise BadRequest(f"'{name}' is reserved; choose another app name")
    return name


def app_name_from(text: str) -> str:
    """The nearest legal app name to free text such as a package name; empty if nothing legal is left."""
    text = text.rsplit("/", 1)[-1].lower()
    label = "".join(c if c in _NAME else "-" for c in text)
    label = label.lstrip("-0123456789")[:MAX_APP_NAME].strip("-")
    return f"{label}-app"[:MAX_APP_NAME] if label in RESERVED_APP_NAMES else label


def check_digest(digest: str) -> str:
    """Return `digest` if it is a SHA-256 in 64 lower-case hex characters, else raise InvalidDigest."""
    if len(digest) != 64 or not _HEX.issuperset(digest):
        raise InvalidDigest("a digest is a SHA-256 written as 64 lower-case hex characters")
    return digest
