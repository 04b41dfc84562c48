"""`aether verify`: hold an artifact against its manifest, signature, provenance and bill of materials.

A file, or a digest that is in this machine's cache, is checked without the network: its documents lie beside it, or
are named. A digest that is not here is downloaded, if a server was given, with the documents that the registry keeps.
Keys come from --key, or with --app from the server, which is then trusted to know them.

Exit code 0 when nothing failed, 30 otherwise. What could not be checked is said, and fails only with --strict.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from aether.cli.arguments import add_format
from aether.cli.artifacts import digest_in, find
from aether.cli.output import escape
from aether.cli.signing import public_key_of
from aether.model.errors import LocalIOError, NotFound, UsageError
from aether.model.names import check_app_name, check_digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.artifact.verification import Check, Evidence
    from aether.cli.arguments import Arguments, Parser
    from aether.cli.context import Context

FAILED_EXIT = 30
_KINDS = {"manifest": ".manifest.json", "sbom": ".sbom.json", "provenance": ".provenance.json", "signature": ".sig"}
_MAX_BYTES = 256 << 20


def configure(parser: Parser) -> None:
    parser.add_argument("artifact", metavar="DIGEST|FILE", help="a .tar.gz file, or the SHA-256 of one")
    parser.add_argument(
        "--key",
        action="append",
        metavar="HEX|FILE",
        help="a public key whose signatures count: 64 hex characters or a file; may be repeated",
    )
    parser.add_argument(
        "--app", metavar="NAME", help="the app it must be of; without --key its keys on the server count"
    )
    for kind in _KINDS:
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"its {kind} (default: the file beside it)")
    parser.add_argument("--strict", action="store_true", help="what cannot be checked counts as failed")
    add_format(parser)


def run(arguments: Arguments, context: Context) -> int:
    if arguments.app:
        check_app_name(arguments.app)
    keys = [public_key_of(text, context.environ) for text in arguments.key or ()]
    if not keys and arguments.app:
        keys = [key["public_key_hex"] for key in context.api.public_keys(arguments.app) if key["active"]]
        if not keys:
            context.log.warn(f"{arguments.app} has no active key on {context.api.base}")
    path = Path(arguments.artifact)
    if path.is_file():
        return _report(arguments, context, path, _beside(arguments, path, keys))
    if os.sep in arguments.artifact or arguments.artifact.endswith(".gz"):
        raise LocalIOError(f"there is no file '{arguments.artifact}'")
    digest = check_digest(arguments.artifact)
    cached = find(context, digest, arguments.app)
    if cached is not None:
        return _report(arguments, context, cached, _beside(arguments, cached, keys))
    with tempfile.TemporaryDirectory(prefix="aether-verify-") as folder:
        downloaded = Path(folder) / f"app-{digest}.tar.gz"
        evidence = _from_server(arguments, context, downloaded, digest, keys)
        return _report(arguments, context, downloaded, evidence)


def _beside(arguments: Arguments, artifact: Path, keys: list[str]) -> Evidence:
    """What was named, else what lies beside the artifact."""
    from aether.artifact.verification import Evidence

    found: dict[str, bytes | None] = {}
    for kind, ending in _KINDS.items():
        named = getattr(arguments, kind)
        path = Path(named) if named else artifact.with_name(artifact.name.removesuffix(".tar.gz") + ending)
        found[kind] = _read(path) if named or path.is_file() else None
    return Evidence(
        digest=_asked(arguments) or digest_in(artifact.name),
        manifest=found["manifest"],
        signature=_signature(found["signature"]),
        provenance=found["provenance"],
        sbom=found["sbom"],
        keys=keys,
        app=arguments.app,
    )


def _asked(arguments: Arguments) -> str | None:
    """The digest on the command line; None where a file stands."""
    text = str(arguments.artifact)
    return None if os.path.isfile(text) else text


def _signature(data: bytes | None) -> str | None:
    return None if data is None else data.decode("ascii", "replace").strip()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise LocalIOError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise LocalIOError(f"{path} is larger than {_MAX_BYTES} bytes: it is no document of an artifact")
    return data


def _from_server(arguments: Arguments, context: Context, path: Path, digest: str, keys: list[str]) -> Evidence:
    """Download the artifact to `path`, and its documents, of which those that were named come from their files."""
    from aether.artifact.verification import Evidence
    from aether.client.download import download
    from aether.client.session import endpoint

    if endpoint(context.environ).base_from == "default":
        raise UsageError(
            f"there is no artifact {digest[:12]} on this machine and no server was given: "
            "name a file, log in with 'aether login', or set AETHER_API_BASE"
        )
    api, app = context.api, arguments.app
    about = api.artifact(digest, app)
    download(api.transport, digest, str(path), app=app, size_bytes=about["size_bytes"])
    found: dict[str, bytes | None] = {}
    for kind in ("manifest", "sbom", "provenance"):
        named = getattr(arguments, kind)
        try:
            found[kind] = _read(Path(named)) if named else api.document(digest, kind, app or about["app"])
        except NotFound:
            found[kind] = None
    signed = _signature(_read(Path(arguments.signature))) if arguments.signature else about.get("signature")
    return Evidence(
        digest=digest,
        manifest=found["manifest"],
        signature=signed,
        provenance=found["provenance"],
        sbom=found["sbom"],
        keys=keys,
        app=app,
    )


def _report(arguments: Arguments, context: Context, path: Path, evidence: Evidence) -> int:
    from aether.artifact.inspect import inspect
    from aether.artifact.verification import FAILED, UNCHECKED, is_record, verify

    seen = inspect(path, is_record)
    checks = verify(seen, evidence)
    bad = {FAILED, UNCHECKED} if arguments.strict else {FAILED}
    verified = not any(check.status in bad for check in checks)
    content = {
        "digest": seen.digest,
        "file": str(path.absolute()),
        "verified": verified,
        "checks": [{"name": one.name, "status": one.status, "detail": one.detail} for one in checks],
    }
    context.result(content, lambda: _text(checks, verified))
    return 0 if verified else FAILED_EXIT


def _text(checks: list[Check], verified: bool) -> str:
    width = max(len(check.name) for check in checks)
    lines = [f"{check.status:<12} {check.name:<{width}}  {escape(check.detail)}" for check in checks]
    return "\n".join([*lines, "verified" if verified else "NOT verified"])
