"""`aether backup`: everything a server keeps, in one file; from the running server, or from its folder."""

from __future__ import annotations

import os
import sys
import time

from aether.cli.arguments import add_format
from aether.cli.passphrase import read
from aether.model.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context

_SILENCE_S = 120.0


def configure(parser: Parser) -> None:
    parser.add_argument("--out", metavar="FILE", help="default: aether-backup-TIME.tar; - is standard output")
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="this folder, on which no server runs (default: the running server)",
    )
    parser.add_argument(
        "--passphrase-file", metavar="FILE", help="its first line seals the keys (default: asked on the terminal)"
    )
    parser.add_argument("--without-keys", action="store_true", help="leave the keys out; you keep secrets.key")
    parser.add_argument("--plain-keys", action="store_true", help="put the keys in unsealed: guard the file")
    parser.add_argument("--no-volumes", action="store_true", help="leave the volumes of apps out")
    parser.add_argument("--logs", action="store_true", help="take what apps wrote with it")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    if arguments.without_keys and arguments.plain_keys:
        raise UsageError("--without-keys and --plain-keys exclude each other")
    request = _request(arguments)
    began = time.monotonic()
    blocks = _offline(arguments, request) if arguments.data_dir else _online(context, request)
    out = arguments.out or time.strftime("aether-backup-%Y%m%d-%H%M%S.tar")
    if out == "-":
        if sys.stdout.isatty():
            raise UsageError("a backup is not for a terminal: give --out FILE, or a pipe")
        for block in blocks:
            sys.stdout.buffer.write(block)
        sys.stdout.buffer.flush()
        return 0
    size = _save(out, blocks)
    seconds = round(time.monotonic() - began, 2)
    result = {"file": os.path.abspath(out), "size_bytes": size, "keys": request["keys"], "seconds": seconds}

    def text() -> str:
        keys = {
            "sealed": "keys sealed with the passphrase",
            "plain": "keys unsealed: guard it like the server",
            "none": "WITHOUT keys: it is worth nothing without the server's secrets.key",
        }[str(request["keys"])]
        return f"{result['file']} ({size} bytes, {seconds} s; {keys})"

    context.result(result, text)
    return 0


def _request(arguments: Arguments) -> dict[str, Any]:
    """What the server is asked for. The passphrase stays here; the server gets what scrypt makes of it."""
    request: dict[str, Any] = {"volumes": not arguments.no_volumes, "logs": bool(arguments.logs)}
    if arguments.without_keys or arguments.plain_keys:
        return {**request, "keys": "plain" if arguments.plain_keys else "none"}
    passphrase = read(arguments.passphrase_file, new=True)
    if passphrase is None:
        raise UsageError(
            "the keys in a backup need a passphrase: give --passphrase-file FILE, --without-keys or --plain-keys"
        )
    import base64
    import hashlib

    salt, n, r, p = os.urandom(16), 1 << 15, 8, 1
    key = hashlib.scrypt(passphrase.encode(), salt=salt, n=n, r=r, p=p, maxmem=1 << 26, dklen=64)
    kdf = {"name": "scrypt", "salt": base64.b64encode(salt).decode(), "n": n, "r": r, "p": p}
    return {**request, "keys": "sealed", "key": base64.b64encode(key).decode(), "kdf": kdf}


def _online(context: Context, request: dict[str, Any]) -> Iterator[bytes]:
    with context.api.transport.stream("/backup", content=request, timeout_s=_SILENCE_S) as answer:
        while block := answer.read(_SILENCE_S):
            yield block


def _offline(arguments: Arguments, request: dict[str, Any]) -> Iterator[bytes]:
    import base64
    from pathlib import Path

    from aether.backup.format import BackupKeys, Kdf
    from aether.backup.write import Plan
    from aether.topology import backups

    keys = None
    if request["keys"] == "sealed":
        keys = BackupKeys(base64.b64decode(request["key"]), Kdf.from_json(request["kdf"]))
    plan = Plan(keys, request["keys"] == "plain", request["volumes"], request["logs"])
    with backups.offline(Path(arguments.data_dir).expanduser().absolute(), plan) as made:
        yield from made.stream()


def _save(out: str, blocks: Iterator[bytes]) -> int:
    """Write `out` (0600), whole or not at all; returns its size."""
    part, size = f"{out}.part", 0
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            for block in blocks:
                file.write(block)
                size += len(block)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, out)
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise
    return size
