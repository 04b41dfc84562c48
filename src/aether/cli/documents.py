"""The documents of an artifact: bill of materials, signature and provenance; made beside it, sent to the registry.

    app-<digest>.sbom.json          CycloneDX 1.6, or aether-sbom-v1 with --legacy-sbom; not with --no-sbom
    app-<digest>.sig                Ed25519, 128 hex characters; with AETHER_SIGNING_KEY
    app-<digest>.provenance.json    SLSA provenance in a DSSE envelope; with AETHER_SIGNING_KEY

Each file appears complete or not at all. Provenance is bounded in time (AETHER_PROVENANCE_TIMEOUT_MS) because git may
take long; AETHER_REQUIRE_PROVENANCE=1 makes its absence an error before anything is sent.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from aether.cli.signing import VARIABLE, flag, milliseconds, signing_seed
from aether.model.errors import BuildFailed, ConfigError, LocalIOError, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from aether.artifact.pack import Packed
    from aether.build.inventory.bill import Bill
    from aether.build.origin import Commit, GitQuestion
    from aether.build.project import Prepared
    from aether.cli.arguments import Arguments
    from aether.cli.context import Context
    from aether.cli.progress import Progress

REQUIRED, TIMEOUT = "AETHER_REQUIRE_PROVENANCE", "AETHER_PROVENANCE_TIMEOUT_MS"
_TIMEOUT_MS = 10_000
_SHOWN = 5


class Wanted:
    """Which documents a deploy is to have, and what they need that can fail early. Raises ConfigError."""

    def __init__(self, arguments: Arguments, environ: Mapping[str, str]) -> None:
        self.sbom = "" if arguments.no_sbom else "aether-sbom-v1" if arguments.legacy_sbom else "cyclonedx-1.6"
        self.level: int = arguments.compression_level
        self.seed = signing_seed(environ)
        self.required = flag(environ, REQUIRED)
        self.timeout_s = milliseconds(environ, TIMEOUT, _TIMEOUT_MS) / 1000
        self.epoch = _epoch(environ)
        self.started = time.time()
        if self.required and self.seed is None:
            raise ConfigError(
                f"{REQUIRED} is set and {VARIABLE} is not: provenance is worth what its signature is worth; "
                "'aether keys generate' makes a key"
            )

    def ask_git(self, root: Path) -> GitQuestion | None:
        """Have git asked in the background, when provenance is to be made."""
        if self.seed is None:
            return None
        from aether.build.origin import GitQuestion

        return GitQuestion(root)

    def foreseen(self, root: Path) -> tuple[list[str], dict[str, Any]]:
        """Names of the files that a deploy would write, and what a dry run says besides: the key, the commit, and
        a note when git takes too long for provenance."""
        endings = [".tar.gz", ".manifest.json", *([".sbom.json"] if self.sbom else [])]
        more: dict[str, Any] = {}
        if self.seed is not None:
            from aether.artifact.signature import key_id, public_key

            more["signing_key_id"] = key_id(public_key(self.seed))
            endings.append(".sig")
            question = self.ask_git(root)
            try:
                commit = question.answer(self.timeout_s) if question is not None else None
                more["commit"] = None if commit is None else {"commit": commit.commit, "dirty": commit.dirty}
                endings.append(".provenance.json")
            except TimeoutError:
                more["note"] = "timeout"
        return [f"app-<digest>{ending}" for ending in endings], more


class Documents:
    """What lies beside an artifact. Paths are None for what was not made."""

    __slots__ = ("manifest", "note", "provenance", "sbom", "signature", "signature_hex", "took_ms")

    def __init__(self, manifest: Path) -> None:
        self.manifest = manifest
        self.sbom: Path | None = None
        self.signature: Path | None = None
        self.signature_hex: str | None = None
        self.provenance: Path | None = None
        self.note: str | None = None
        """Why provenance is missing that could have been there."""
        self.took_ms = 0.0

    def described(self) -> dict[str, Any]:
        """The fields of `deploy --format json`."""
        found: dict[str, Any] = {"manifest": str(self.manifest.absolute())}
        for name in ("sbom", "signature", "provenance"):
            path: Path | None = getattr(self, name)
            found[name] = None if path is None else str(path.absolute())
        if self.note is not None:
            found["note"] = self.note
        return found


def beside(artifact: Path, ending: str) -> Path:
    """The path of a document of `artifact`."""
    return artifact.with_name(artifact.name.removesuffix(".tar.gz") + ending)


def make(
    context: Context, progress: Progress, prepared: Prepared, packed: Packed, wanted: Wanted, git: GitQuestion | None
) -> Documents:
    """Write the documents of a packed artifact, while what was packed can still be read.

    Raises LocalIOError, BuildFailed when provenance is required and took too long.
    """
    started = time.monotonic()
    found = Documents(packed.manifest)
    progress.begin("documents")
    said: list[str] = []
    if wanted.sbom:
        from aether.build.inventory.bill import bill_of

        bill = bill_of(prepared, packed, cache=prepared.plan.options.cache)
        found.sbom = _write_sbom(prepared, packed, wanted, bill)
        said.append(f"sbom of {bill.told()}")
        _warn(context, bill)
    if wanted.seed is not None:
        from aether.artifact.signature import key_id, public_key, sign

        found.signature_hex = sign(packed.digest, wanted.seed)
        found.signature = beside(packed.artifact, ".sig")
        write_whole(found.signature, f"{found.signature_hex}\n".encode())
        said.append(f"signed with key {key_id(public_key(wanted.seed))}")
        _attest(context, prepared, packed, wanted, git, found)
        if found.provenance is not None:
            said.append("provenance")
    found.took_ms = progress.end("; ".join(said)) if said else (time.monotonic() - started) * 1000
    return found


def _warn(context: Context, bill: Bill) -> None:
    for finding in bill.findings[:_SHOWN]:
        context.log.warn(f"sbom: {finding}")
    if len(bill.findings) > _SHOWN:
        context.log.warn(f"sbom: {len(bill.findings) - _SHOWN} more findings are in the document")


def _write_sbom(prepared: Prepared, packed: Packed, wanted: Wanted, bill: Bill) -> Path:
    from aether import __version__
    from aether.artifact import strictjson
    from aether.artifact.sbom_document import LEGACY, Subject
    from aether.build.node_project import NodeProject

    project, described = prepared.plan.project, prepared.described
    version: object = described.package.get("version") if isinstance(described, NodeProject) else None
    subject = Subject(
        app=project.app,
        digest=packed.digest,
        content_digest=packed.content_digest,
        runtime=project.runtime,
        version=version if isinstance(version, str) and version else None,
        aether_version=__version__,
        timestamp=wanted.epoch,
        properties=bill.properties,
        complete=bill.complete,
    )
    path = beside(packed.artifact, ".sbom.json")
    content = bill.legacy(subject) if wanted.sbom == LEGACY else bill.document(subject)
    write_whole(path, strictjson.write(content))
    return path


def _attest(
    context: Context,
    prepared: Prepared,
    packed: Packed,
    wanted: Wanted,
    git: GitQuestion | None,
    found: Documents,
) -> None:
    """Write the provenance, or note that it took too long."""
    assert wanted.seed is not None
    try:
        commit = git.answer(wanted.timeout_s) if git is not None else None
    except TimeoutError:
        message = f"no provenance: git did not answer within {wanted.timeout_s * 1000:.0f} ms ({TIMEOUT})"
        if wanted.required:
            raise BuildFailed(f"{message}, and {REQUIRED} is set") from None
        found.note = "timeout"
        context.log.warn(message)
        return
    from aether.artifact import dsse, provenance

    payload = provenance.encode(provenance.statement(_build(prepared, packed, wanted, commit, found)))
    found.provenance = beside(packed.artifact, ".provenance.json")
    write_whole(found.provenance, dsse.Envelope(payload).signed(wanted.seed).encode())


def _build(prepared: Prepared, packed: Packed, wanted: Wanted, commit: Commit | None, found: Documents) -> Any:
    from aether import __version__
    from aether.artifact.provenance import MEDIA_JSON, MEDIA_SBOM, Build, Resource
    from aether.build.origin import inputs, versions
    from aether.model.names import new_id

    plan = prepared.plan
    project, options = plan.project, plan.options
    made = [Resource("manifest", {"sha256": _sha256(packed.manifest)}, media_type=MEDIA_JSON)]
    if found.sbom is not None:
        media = MEDIA_JSON if wanted.sbom == "aether-sbom-v1" else MEDIA_SBOM
        made.append(Resource("sbom", {"sha256": _sha256(found.sbom)}, media_type=media))
    return Build(
        app=project.app,
        digest=packed.digest,
        content_digest=packed.content_digest,
        parameters={
            "app": project.app,
            "runtime": project.runtime,
            "start": project.start,
            "ignoreScripts": options.ignore_scripts,
        },
        internal={"kind": project.kind, "steps": list(plan.steps), "compressionLevel": wanted.level},
        used=[*([commit.resource()] if commit else []), *inputs(prepared)],
        made=made,
        invocation_id=new_id(),
        started_on=_rfc3339(wanted.started),
        finished_on=_rfc3339(time.time()),
        versions={"aether": __version__, **versions(prepared)},
    )


def _epoch(environ: Mapping[str, str]) -> str | None:
    """SOURCE_DATE_EPOCH as a time, the only one that a bill of materials may carry."""
    text = environ.get("SOURCE_DATE_EPOCH", "").strip()
    return _rfc3339(float(text)) if text.isdecimal() and len(text) < 12 else None


def _rfc3339(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Have `content` on the disk as `path`, replacing what was there; a kill leaves the one or the other.

    Raises LocalIOError.
    """
    part = path.with_name(f".pack-{os.getpid()}-{path.name}.part")
    try:
        with part.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    except OSError as error:
        raise LocalIOError(f"cannot write {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


# --- to the registry --------------------------------------------------------------------------------


def send(context: Context, app: str, digest: str, documents: Documents, *, known: bool) -> int:
    """Have the registry keep the documents of a stored artifact; returns the bytes sent.

    Over several connections at once, because the server reads and checks every one. What the registry has already
    (`known`: the artifact was there before) is not sent again. A server that keeps no documents is told of and passed
    over. Raises what the server says of a document that it refuses.
    """
    from aether.client.documents import send_documents

    paths = {"manifest": documents.manifest, "sbom": documents.sbom, "provenance": documents.provenance}
    given = {kind: path.read_bytes() for kind, path in paths.items() if path is not None}
    if known:
        there = dict(context.api.artifact(digest, app))
        given = {
            kind: data
            for kind, data in given.items()
            if there.get(f"{kind}_digest") != hashlib.sha256(data).hexdigest()
        }
    if not given:
        return 0
    outcomes = send_documents(context.api, app, digest, given)
    for failure in outcomes.values():
        if failure is not None and not isinstance(failure, NotFound):
            raise failure
    unknown = [kind for kind, failure in outcomes.items() if failure is not None]
    if unknown:
        context.log.warn(f"the server keeps no {' and no '.join(unknown)}: it is older than this command")
    return sum(len(data) for kind, data in given.items() if kind not in unknown)
