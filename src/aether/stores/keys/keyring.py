"""The keys that seal secrets at rest: a short list outside the database, of which the first one writes and all read.

A sealed text is `a1:<key id>:<base64url of nonce and ciphertext>`, AES-256-GCM with a random nonce of 96 bits and the
identity of the row as associated data, so that a text moved to another row does not open. A key's id is derived from
its bytes: a wrong key has a wrong id and is named as missing instead of failing as if the data were damaged.

Where the keys come from, first match wins: AETHER_SECRETS_KEY (base64, several with commas), the file that
AETHER_SECRETS_KEY_FILE names, `<data>/secrets.key`. Only the last is ever made by the server, and none is ever
rewritten: the operator puts a new key before the others, and the next start seals everything anew with it
(`aether.apps.sealing`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from aether.model.errors import ConfigError, ServiceUnavailable

FILE_NAME = "secrets.key"
KEY_BYTES = 32
_NONCE_BYTES = 12
_SCHEME = "a1"
_HEAD = (
    "# Aether seals configuration and secrets with these keys: the first one writes, all of them read.\n"
    "# Whoever has this file and the database can read every secret; without it nobody can.\n"
)


def key_id(key: bytes) -> str:
    """12 hex characters that name a key and tell nothing about it."""
    return hashlib.sha256(b"aether secrets key id\0" + key).hexdigest()[:12]


def sealed_with(text: str) -> str | None:
    """Id of the key that sealed `text`; None for a text that is not sealed."""
    scheme, _, rest = text.partition(":")
    return rest.partition(":")[0] if scheme == _SCHEME else None


@dataclass(frozen=True, slots=True)
class Source:
    """Where the keys come from, in the words of whoever set it up."""

    name: str
    file: Path | None
    """None for keys from the environment."""


class Keyring:
    """Implements `Sealer`."""

    def __init__(self, keys: Sequence[bytes], source: Source) -> None:
        self.source = source
        self._keys = list(keys)
        self._ciphers = {key_id(key): AESGCM(key) for key in keys}
        self._newest = key_id(self._keys[0])

    @property
    def newest(self) -> str:
        """Id of the key that seals."""
        return self._newest

    @property
    def mark(self) -> str:
        """What every text sealed with the newest key begins with."""
        return f"{_SCHEME}:{self._newest}:"

    @property
    def ids(self) -> list[str]:
        """Ids of all keys, the one that seals first."""
        return [key_id(key) for key in self._keys]

    def seal(self, plain: bytes, about: str) -> str:
        """`plain` as text that opens only with one of these keys and the same `about`."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._ciphers[self._newest].encrypt(nonce, plain, about.encode())
        return self.mark + base64.urlsafe_b64encode(nonce + sealed).decode()

    def unseal(self, text: str, about: str) -> bytes:
        """Raises ServiceUnavailable when the key is missing or the text was altered or belongs to another row."""
        identity = sealed_with(text)
        cipher = self._ciphers.get(identity or "")
        if cipher is None:
            raise ServiceUnavailable(f"the key {identity or '?'} that sealed {about} is not in {self.source.name}")
        try:
            data = base64.urlsafe_b64decode(text.rpartition(":")[2])
            return cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], about.encode())
        except (InvalidTag, ValueError):
            raise ServiceUnavailable(
                f"what is stored as {about} was altered, or belongs to another row: it does not open with its key"
            ) from None


def load(data_dir: Path, *, given: str, file: Path | None, in_use: Collection[str]) -> Keyring:
    """The keys of a server whose database says that `in_use` seal something.

    A missing file of the server's own is made only when nothing is sealed yet. Raises ConfigError, naming what is
    missing and what to do, and OSError when the new file cannot be written.
    """
    if given:
        source = Source("AETHER_SECRETS_KEY", None)
        keys = [_key(text, source.name) for text in given.split(",") if text.strip()]
    elif file is not None:
        source = Source(f"{file} (AETHER_SECRETS_KEY_FILE)", file)
        keys = _read(file, source)
        if keys is None:
            raise ConfigError(f"the key file {file} that AETHER_SECRETS_KEY_FILE names is missing: {_make(file)}")
    else:
        path = data_dir / FILE_NAME
        source = Source(str(path), path)
        keys = _read(path, source)
        if keys is None:
            if in_use:
                raise ConfigError(
                    f"{path} is missing, and configuration and secrets in {data_dir} are sealed with its key "
                    f"({', '.join(sorted(in_use))}): put the file back from where you keep it (or give the key as "
                    "AETHER_SECRETS_KEY or AETHER_SECRETS_KEY_FILE); a new key could not read them, so none was made"
                )
            keys = [secrets.token_bytes(KEY_BYTES)]
            write_keys(path, keys)
    if not keys:
        raise ConfigError(f"{source.name} holds no key: {_make(source.file)}")
    keyring = Keyring(keys, source)
    if missing := sorted(set(in_use) - set(keyring.ids)):
        raise ConfigError(
            f"{source.name} does not hold the key {', '.join(missing)} that sealed configuration and secrets in "
            f"{data_dir}; it holds {', '.join(keyring.ids)}: add the missing key after the others, one a line "
            "(in AETHER_SECRETS_KEY after a comma)"
        )
    return keyring


def encode_keys(keys: Sequence[bytes]) -> bytes:
    """The content of a key file."""
    return (_HEAD + "".join(base64.b64encode(key).decode() + "\n" for key in keys)).encode()


def write_keys(file: Path, keys: Sequence[bytes]) -> None:
    """Write a key file (0600), whole or not at all, and on the disk before this returns. Raises OSError."""
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as out:
        out.write(encode_keys(keys))
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(file: Path, source: Source) -> list[bytes] | None:
    """The keys in `file`, None when there is no such file. Raises ConfigError when others can read it."""
    try:
        with file.open("rb") as content:
            mode = os.fstat(content.fileno()).st_mode
            text = content.read(64 * 1024).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"the key file {file} cannot be read: {error.strerror or error}") from error
    if mode & 0o007:
        raise ConfigError(f"everybody can read the key file {file}: 'chmod 600 {file}'")
    lines = (line.strip() for line in text.splitlines())
    return [_key(line, source.name) for line in lines if line and not line.startswith("#")]


def _key(text: str, where: str) -> bytes:
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{where} holds something that is not a key: a key is {KEY_BYTES} bytes in base64")
    return key


def _make(file: Path | None) -> str:
    return f"make one with 'openssl rand -base64 {KEY_BYTES}{f' > {file}' if file else ''}'"
