"""`aether keys`: the key that this machine signs with, and the public keys of an app, whose signatures count.

A private key is written to a file and nowhere else. An app's key is added by an admin, or by whoever holds a key of
the app that counts already: AETHER_SIGNING_KEY, or --with FILE, then signs the new one.
"""

from __future__ import annotations

import os

from aether.cli.arguments import add_app, add_format
from aether.cli.output import fields, moment, table
from aether.cli.project import app_of
from aether.cli.signing import VARIABLE, public_key_of, seed_in, signing_seed
from aether.client.session import config_path
from aether.model.errors import ConfigError, LocalIOError, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context


def configure(parser: Parser) -> None:
    make = parser.add_action("generate", "make a signing key in a file of its own, never over another")
    make.add_argument("--out", metavar="FILE", help="the file (default: signing.key beside config.toml)")
    add_format(make)
    add_format(parser.add_action("show", f"show the public key of {VARIABLE}"))
    listing = parser.add_action("list", "list the keys of an app (also without an action)")
    add_app(listing)
    add_format(listing)
    add = parser.add_action("add", "let signatures of a key count")
    add.add_argument("key", metavar="HEX|FILE", help="the public key: 64 hex characters, a .pub file or PEM")
    add.add_argument("--with", dest="existing", metavar="FILE", help="a private key of the app that counts already")
    add_app(add)
    add_format(add)
    end = parser.add_action("deactivate", "let signatures of a key count no more")
    end.add_argument(
        "id", metavar="ID", help="the id, the key id or the public key, as 'aether keys list' shows them"
    )
    add_app(end)
    add_format(end)
    add_app(parser)
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    match arguments.action:
        case "generate":
            return _generate(arguments, context)
        case "show":
            return _show(context)
        case "add":
            return _add(arguments, context)
        case "deactivate":
            return _deactivate(arguments, context)
        case _:
            return _list(arguments, context)


def _generate(arguments: Arguments, context: Context) -> int:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    from aether.artifact.signature import key_id, public_key

    path = arguments.out or os.path.join(os.path.dirname(config_path(context.environ)), "signing.key")
    key = Ed25519PrivateKey.generate()
    public = public_key(key.private_bytes_raw())
    _create(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    try:
        _create(f"{path}.pub", f"{public}\n".encode(), 0o644)
    except LocalIOError:
        os.unlink(path)
        raise
    found = {"file": path, "public_key_file": f"{path}.pub", "key_id": key_id(public), "public_key_hex": public}

    def text() -> str:
        return fields((("private key", path), ("public key", public), ("key id", found["key_id"]))) + (
            f"\nsign with it:  export {VARIABLE}={path}\nlet it count:  aether keys add {path}.pub --app NAME"
        )

    context.result(found, text)
    return 0


def _create(path: str, content: bytes, mode: int) -> None:
    """A new file, whole and on the disk. Raises LocalIOError, also when there is one."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
    except FileExistsError:
        raise LocalIOError(f"{path} is there already: a key is never overwritten; choose another --out") from None
    except OSError as error:
        raise LocalIOError(f"cannot write {path}: {error.strerror}") from error


def _show(context: Context) -> int:
    from aether.artifact.signature import key_id, public_key

    seed = signing_seed(context.environ)
    if seed is None:
        raise ConfigError(f"{VARIABLE} is not set: 'aether keys generate' makes a key")
    public = public_key(seed)
    found = {"key_id": key_id(public), "public_key_hex": public}
    context.result(found, lambda: fields((("public key", public), ("key id", found["key_id"]))))
    return 0


def _list(arguments: Arguments, context: Context) -> int:
    from aether.artifact.signature import key_id

    app = app_of(arguments)
    keys = context.api.public_keys(app)
    rows = [
        (
            one["id"],
            one.get("key_id") or key_id(one["public_key_hex"]),
            "active" if one["active"] else "deactivated",
            one.get("created_by", ""),
            moment(one["created_at"]),
            one["public_key_hex"],
        )
        for one in keys
    ]
    heads = ("ID", "KEY ID", "STATE", "ADDED BY", "ADDED", "PUBLIC KEY")
    context.result(keys, lambda: table(heads, rows) if rows else f"{app} has no keys")
    return 0


def _add(arguments: Arguments, context: Context) -> int:
    from aether.artifact.signature import authorize, key_id, public_key

    app = app_of(arguments)
    new = public_key_of(arguments.key, context.environ)
    seed = seed_in(arguments.existing) if arguments.existing else signing_seed(context.environ)
    authorization: dict[str, str] | None = None
    if seed is not None and (existing := public_key(seed)) != new:
        counts = any(one["active"] and one["public_key_hex"] == existing for one in context.api.public_keys(app))
        # an admin needs none, and one by a key that does not count would only be refused
        if counts or arguments.existing:
            authorization = {"public_key_hex": existing, "signature_hex": authorize(app, new, seed)}
    made = context.api.add_public_key(app, new, authorization=authorization)
    context.result(made, lambda: f"signatures of key {key_id(new)} count for {app} (id {made['id']})")
    return 0


def _deactivate(arguments: Arguments, context: Context) -> int:
    from aether.artifact.signature import key_id

    app = app_of(arguments)
    known = {
        name: one
        for one in context.api.public_keys(app)
        for name in (one["id"], key_id(one["public_key_hex"]), one["public_key_hex"])
    }
    ended = known.get(arguments.id)
    if ended is None:
        raise NotFound(
            f"app '{app}' has no key '{arguments.id[:64]}': 'aether keys list --app {app}' shows those it has"
        )
    context.api.deactivate_public_key(app, ended["id"])
    found = {"deactivated": ended["id"], "key_id": key_id(ended["public_key_hex"])}
    context.result(found, lambda: f"signatures of key {found['key_id']} count for {app} no more")
    return 0
