"""The file format, without touching a disk: a tar whose first member says what it is and whose last one proves it.

    aether-backup.json   format, versions, what is in it, how the keys are kept
    database/aether.db   the database as of one moment
    data/uids.json       which user id each app has
    keys.sealed | keys.json   every other file of the data directory: keys, tokens, certificates
    objects/...          artifacts
    volumes/...          volumes of apps
    logs/...             what apps wrote, when asked for
    manifest.jsonl       one line for each member before it: name, kind, mode, owner, size, SHA-256
    manifest.mac         HMAC-SHA256 of the manifest, when there is a passphrase

A reader computes the manifest itself and compares; a file that was cut or altered anywhere has none, or another one.
With a passphrase also an attacker who can compute digests is refused.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from aether.model.errors import LocalIOError

FORMAT = 1
HEADER, DATABASE, UIDS = "aether-backup.json", "database/aether.db", "data/uids.json"
KEYS_SEALED, KEYS_PLAIN = "keys.sealed", "keys.json"
MANIFEST, MAC = "manifest.jsonl", "manifest.mac"
TREES = ("objects", "volumes", "logs")
KEPT_SEALED, KEPT_PLAIN, KEPT_ELSEWHERE = "sealed", "plain", "none"
_ABOUT = b"aether backup keys"
_NONCE_BYTES = 12
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class Kdf:
    """How a passphrase became keys (scrypt)."""

    salt: bytes
    n: int = 1 << 15
    r: int = 8
    p: int = 1

    def to_json(self) -> dict[str, Any]:
        return {"name": "scrypt", "salt": base64.b64encode(self.salt).decode(), "n": self.n, "r": self.r, "p": self.p}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Kdf:
        """Raises ValueError for what no backup of ours has: the numbers decide over memory and time."""
        kdf = Kdf(base64.b64decode(values["salt"]), int(values["n"]), int(values["r"]), int(values["p"]))
        if values.get("name") != "scrypt" or not (
            8 <= len(kdf.salt) <= 64 and 2 <= kdf.n <= 1 << 20 and 1 <= kdf.r <= 32 and 1 <= kdf.p <= 16
        ):
            raise ValueError("not a key derivation of a backup")
        return kdf

    def keys(self, passphrase: str) -> BackupKeys:
        memory = 128 * self.r * (self.n + self.p + 2)
        derived = hashlib.scrypt(
            passphrase.encode(), salt=self.salt, n=self.n, r=self.r, p=self.p, maxmem=memory + (1 << 20), dklen=64
        )
        return BackupKeys(derived, self)


class BackupKeys:
    """What a passphrase gives: one key that seals, one that vouches for the manifest."""

    def __init__(self, derived: bytes, kdf: Kdf) -> None:
        if len(derived) != 64:
            raise ValueError("64 bytes are needed")
        self.kdf = kdf
        self._cipher = AESGCM(derived[:32])
        self._mac = derived[32:]

    def seal(self, plain: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, _ABOUT)

    def unseal(self, sealed: bytes) -> bytes:
        """Raises LocalIOError."""
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _ABOUT)
        except (InvalidTag, ValueError):
            raise LocalIOError("the keys in the backup do not open: is the passphrase right?") from None

    def mac(self) -> hmac.HMAC:
        """To be fed the manifest."""
        return hmac.new(self._mac, digestmod=hashlib.sha256)


def header_of(
    name: str, *, size: int, source: os.stat_result | None = None, link: str | None = None
) -> tarfile.TarInfo:
    """The tar header of a member; without `source` it is a private file of the server's."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    if source is not None:
        info.mode, info.uid, info.gid = source.st_mode & 0o7777, source.st_uid, source.st_gid
        info.mtime = int(source.st_mtime)
    if link is not None:
        info.type, info.linkname, info.size = tarfile.SYMTYPE, link, 0
    return info


def header_bytes(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> bytes:
    """What fills the last block of a member's content."""
    return b"\0" * (-size % _BLOCK)


def end_of_archive() -> bytes:
    return b"\0" * (2 * _BLOCK)


def manifest_line(info: tarfile.TarInfo, sha256: str) -> bytes:
    """What the manifest says of a member, whoever computes it."""
    kind = "link" if info.issym() else "folder" if info.isdir() else "file"
    values = [info.name, kind, info.mode, info.uid, info.gid, int(info.mtime), info.size, info.linkname, sha256]
    return json.dumps(values, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def check_member(info: tarfile.TarInfo) -> None:
    """Raise LocalIOError for a member that no backup of ours has: it could write where it should not."""
    parts = info.name.split("/")
    if not info.name or any(part in ("", ".", "..") for part in parts) or "\0" in info.name:
        raise LocalIOError(f"the backup holds a member with the impossible name {info.name[:200]!r}")
    if parts[0] in TREES and len(parts) > 1:
        plain = info.isreg() or (parts[0] == "volumes" and (info.isdir() or info.issym()))
    else:
        plain = info.isreg() and info.name in (HEADER, DATABASE, UIDS, KEYS_SEALED, KEYS_PLAIN, MANIFEST, MAC)
    if not plain or info.size < 0:
        raise LocalIOError(f"the backup holds something that does not belong into one: {info.name[:200]!r}")


def encode_keys(files: Mapping[str, bytes]) -> bytes:
    """The private files of a data directory as one document."""
    return json.dumps({name: base64.b64encode(content).decode() for name, content in files.items()}).encode()


def decode_keys(document: bytes) -> dict[str, bytes]:
    """Raises LocalIOError."""
    try:
        found: dict[str, str] = json.loads(document)
        files = {name: base64.b64decode(content) for name, content in found.items()}
    except (ValueError, AttributeError, TypeError):
        raise LocalIOError("the keys in the backup cannot be read") from None
    for name in files:
        if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
            raise LocalIOError(f"the backup holds a key with the impossible name {name[:200]!r}")
    return files
