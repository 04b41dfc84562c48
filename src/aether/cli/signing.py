"""The signing key of this machine: where it comes from, and files of keys. What a key's text means is `signature`'s.

    AETHER_SIGNING_KEY    the seed as 64 hex characters, a private key in PEM, or the path of a file that holds either

A key never stands on a command line: other users of a machine can read those.
"""

from __future__ import annotations

import os
import stat

from aether.model.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "AETHER_SIGNING_KEY"
_MAX_BYTES = 64 * 1024


def signing_seed(environ: Mapping[str, str]) -> bytes | None:
    """The seed that AETHER_SIGNING_KEY names; None when it is not set. Raises ConfigError, which never shows it."""
    text = environ.get(VARIABLE, "").strip()
    if not text:
        return None
    from aether.artifact.signature import read_seed

    if not text.startswith("-----BEGIN") and os.path.exists(os.path.expanduser(text)):
        return seed_in(os.path.expanduser(text), VARIABLE)
    if "/" in text and not text.startswith("-----BEGIN"):
        raise ConfigError(f"{VARIABLE} names a file that is not there: {text}")
    return read_seed(text, VARIABLE)


def seed_in(path: str, named_by: str = "") -> bytes:
    """The seed in a file. Raises ConfigError when it cannot be read, everybody can read it, or it holds no key."""
    from aether.artifact.signature import read_seed

    where = f"{path} ({named_by})" if named_by else path
    text, mode = _read(path, where)
    if mode & 0o007:
        raise ConfigError(f"everybody can read the signing key in {path}: 'chmod 600 {path}'")
    return read_seed(text, where)


def public_key_of(text: str, environ: Mapping[str, str]) -> str:
    """The public key that a word on the command line is, or that the file it names holds: PEM (public, or private of
    which only the public half is taken), or hex in a file whose name ends with .pub.

    Raises ConfigError, also where the word is the private key itself.
    """
    from aether.artifact.signature import public_key, read_public_key, read_seed

    if not os.path.exists(text):
        if len(text) == 64 and (seed := _quiet_seed(environ)) is not None and text.lower() == seed.hex():
            raise ConfigError(
                f"that is the private key in {VARIABLE}, not its public key: 'aether keys show' tells it"
            )
        return read_public_key(text, f"'{text}' is no file, and as a key")
    content, _ = _read(text, text)
    if "PRIVATE KEY" in content:
        return public_key(read_seed(content, text))
    if _is_hex_key(content) and not text.endswith(".pub"):
        # a seed looks the same, and would be published as if it were the public half
        raise ConfigError(
            f"nobody can tell whether the hex characters in {text} are a public or a private key: "
            "give the public key itself, or a file in PEM or with the ending .pub"
        )
    return read_public_key(content, text)


def _is_hex_key(content: str) -> bool:
    word = content.strip().lower()
    return len(word) == 64 and set(word) <= set("0123456789abcdef")


def _quiet_seed(environ: Mapping[str, str]) -> bytes | None:
    try:
        return signing_seed(environ)
    except ConfigError:
        # whoever adds a key is not to be kept from it by a variable that says nothing of it
        return None


def _read(path: str, where: str) -> tuple[str, int]:
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
                raise ConfigError(f"{where} is not a file")
            return file.read(_MAX_BYTES).decode("utf-8", "replace"), mode
    except OSError as error:
        raise ConfigError(f"the key file {where} cannot be read: {error.strerror or error}") from error


def flag(environ: Mapping[str, str], name: str) -> bool:
    """A setting that is on or off. Raises ConfigError for anything else."""
    text = environ.get(name, "").strip().lower()
    if text in ("1", "true"):
        return True
    if text in ("", "0", "false"):
        return False
    raise ConfigError(f"{name} is 1 or 0 (true or false), not '{text[:40]}'")


def milliseconds(environ: Mapping[str, str], name: str, default: int) -> int:
    """A time in milliseconds. Raises ConfigError."""
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or not 1 <= int(text) <= 3_600_000:
        raise ConfigError(f"{name} is a time in milliseconds from 1 to 3600000, not '{text[:40]}'")
    return int(text)
