"""The passphrase of a backup: from a terminal or the first line of a file, never from the command line."""

from __future__ import annotations

import sys

from aether.model.errors import UsageError

MIN_CHARS = 12


def read(file: str | None, *, new: bool) -> str | None:
    """None when there is no file and nobody to ask. Raises UsageError for a `new` one that is too short, OSError."""
    if file is not None:
        with sys.stdin if file == "-" else open(file, encoding="utf-8") as source:
            found = source.readline().rstrip("\r\n")
    elif sys.stdin.isatty():
        from getpass import getpass

        found = getpass("Passphrase of the backup: ")
        if new and getpass("Once more: ") != found:
            raise UsageError("the two passphrases differ")
    else:
        return None
    if new and len(found) < MIN_CHARS:
        raise UsageError(f"a passphrase has at least {MIN_CHARS} characters: it is all that protects the keys")
    return found
