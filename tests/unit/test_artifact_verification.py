"""Verification: what was packed and signed passes, and each thing that somebody altered is named."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from aether.artifact import dsse, provenance, signature, strictjson, treehash
from aether.artifact.inspect import Seen, inspect
from aether.artifact.pack import Packed
from aether.artifact.provenance import Build, Resource
from aether.artifact.sbom_document import Package, Subject, component, document
from aether.artifact.verification import FAILED, OK, UNCHECKED, Evidence, is_record, verify
from support.installed import packed, tree

SEED, OTHER = bytes(range(32)), bytes(range(1, 33))
KEY, OTHER_KEY = signature.public_key(SEED), signature.public_key(OTHER)


class Made:
    """An artifact with everything that belongs to it."""

    def __init__(self, root: Path) -> None:
        files = {"server.js": "1", "node_modules/a/index.js": "a", "node_modules/a/package.json": {"name": "a"}}
        self.packed, contents = packed(tree(root / "tree", files, {"link": "server.js"}), root / "out")  # type: ignore[arg-type]
        owned = treehash.by_folder(contents.members.values(), [b"node_modules/a"])
        part = Package(
            "a", "a", "1", "node_modules/a", tree=treehash.tree_of(owned[b"node_modules/a"], b"node_modules/a/")
        )
        subject = Subject("shop", self.packed.digest, self.packed.content_digest, "node20")
        parts = [component(part, frozenset())]
        self.sbom = strictjson.write(document(subject, parts, {"app": ["a"]}, "app"))
        self.manifest = self.packed.manifest.read_bytes()
        self.provenance = self.attested(SEED)

    def attested(self, seed: bytes, **changes: object) -> bytes:
        build = Build(
            "shop", self.packed.digest, self.packed.content_digest, {}, {}, [],
            [Resource("sbom", {"sha256": __import__("hashlib").sha256(self.sbom).hexdigest()})],
            "id", "2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z", {},
        )  # fmt: skip
        payload = provenance.encode(provenance.statement(replace(build, **changes)))  # type: ignore[arg-type]
        return dsse.Envelope(payload).signed(seed).encode()

    def evidence(self) -> Evidence:
        return Evidence(
            digest=self.packed.digest,
            manifest=self.manifest,
            signature=signature.sign(self.packed.digest, SEED),
            provenance=self.provenance,
            sbom=self.sbom,
            keys=[OTHER_KEY, KEY],
            app="shop",
        )


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def see(made: Packed) -> Seen:
    return inspect(made.artifact, is_record)


def statuses(seen: Seen, evidence: Evidence) -> dict[str, str]:
    return {check.name: check.status for check in verify(seen, evidence)}


def test_what_is_as_it_was_made_passes(made: Made) -> None:
    assert set(statuses(see(made.packed), made.evidence()).values()) == {OK}


def test_what_is_not_there_is_not_checked(made: Made) -> None:
    found = statuses(see(made.packed), Evidence())
    assert found == {
        "digest": UNCHECKED, "archive": OK, "manifest": UNCHECKED, "signature": UNCHECKED, "provenance": UNCHECKED,
        "sbom": UNCHECKED,
    }  # fmt: skip
    without_keys = statuses(see(made.packed), replace(made.evidence(), keys=[]))
    assert (without_keys["signature"], without_keys["provenance signature"]) == (UNCHECKED, UNCHECKED)
    assert statuses(see(made.packed), Evidence(keys=[KEY]))["signature"] == FAILED


def altered(data: bytes, change: Callable[[dict], object]) -> bytes:  # type: ignore[type-arg]
    value = json.loads(data)
    change(value)
    return json.dumps(value).encode()


def _swap_size(value: dict) -> None:  # type: ignore[type-arg]
    entry = next(one for one in value["entries"] if one["type"] == "file")
    entry["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda m: {"digest": "0" * 64}, {"digest"}),
        (lambda m: {"signature": signature.sign(m.packed.digest, bytes(32))}, {"signature"}),
        (lambda m: {"signature": "nonsense"}, {"signature"}),
        (lambda m: {"signature": signature.sign("0" * 64, SEED)}, {"signature"}),
        (lambda m: {"keys": [OTHER_KEY]}, {"signature", "provenance signature"}),
        (lambda m: {"manifest": altered(m.manifest, _swap_size)}, {"manifest"}),
        (lambda m: {"manifest": altered(m.manifest, lambda v: v.update(digest="0" * 64))}, {"manifest"}),
        (lambda m: {"manifest": altered(m.manifest, lambda v: v["entries"].pop(0))}, {"manifest"}),
        (lambda m: {"manifest": altered(m.manifest, lambda v: v.update(content_digest="0" * 64))}, {"manifest"}),
        (lambda m: {"manifest": b"{}"}, {"manifest"}),
        (lambda m: {"provenance": m.attested(bytes(32))}, {"provenance signature"}),
        (lambda m: {"provenance": m.attested(SEED, digest="0" * 64)}, {"provenance"}),
        (lambda m: {"provenance": m.attested(SEED, app="other")}, {"provenance"}),
        (lambda m: {"provenance": altered(m.provenance, lambda v: v.update(payload="e30="))}, {"provenance"}),
        (lambda m: {"provenance": b"not json"}, {"provenance"}),
        (lambda m: {"sbom": altered(m.sbom, lambda v: v.update(version=2))}, {"provenance"}),
        (lambda m: {"sbom": altered(m.sbom, lambda v: v.update(more=2))}, {"sbom", "provenance"}),
        (
            lambda m: {"sbom": altered(m.sbom, lambda v: v["components"][0]["hashes"][0].update(content="0" * 64))},
            {"sbom", "provenance"},
        ),
    ],
)
def test_what_somebody_altered_is_named(made: Made, change: Callable[[Made], dict], failing: set[str]) -> None:  # type: ignore[type-arg]
    evidence = replace(made.evidence(), **change(made))
    found = statuses(see(made.packed), evidence)
    assert {name for name, status in found.items() if status == FAILED} == failing


def test_an_altered_envelope_is_signed_by_nobody(made: Made) -> None:
    envelope = dsse.decode(made.provenance)
    swapped = replace(envelope, payload=envelope.payload + b" ")
    found = statuses(see(made.packed), replace(made.evidence(), provenance=swapped.encode()))
    assert (found["provenance"], found["provenance signature"]) == (OK, FAILED)


def test_another_artifact_passes_nothing(made: Made, tmp_path: Path) -> None:
    other, _ = packed(tree(tmp_path / "other", {"server.js": "2"}), tmp_path / "out")
    found = statuses(see(other), made.evidence())
    assert {name for name, status in found.items() if status == FAILED} == {
        "digest", "manifest", "signature", "provenance", "sbom"
    }  # fmt: skip


def test_the_same_content_compressed_anew_is_another_artifact(made: Made, tmp_path: Path) -> None:
    again = tmp_path / "again.tar.gz"
    again.write_bytes(gzip.compress(gzip.decompress(made.packed.artifact.read_bytes()), 1))
    seen = inspect(again, is_record)
    assert seen.content_digest == made.packed.content_digest
    found = statuses(seen, made.evidence())
    assert {"digest", "signature", "manifest", "provenance", "sbom"} <= {
        name for name, status in found.items() if status == FAILED
    }


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_truncated_artifact_fails_whatever_is_said_of_it(made: Made, tmp_path: Path, cut: int) -> None:
    short = tmp_path / "short.tar.gz"
    short.write_bytes(made.packed.artifact.read_bytes()[:-cut])
    found = statuses(inspect(short, is_record), made.evidence())
    assert (found["archive"], found["digest"]) == (FAILED, FAILED)


def test_bytes_that_are_no_archive(tmp_path: Path) -> None:
    for content in (b"", b"hello", gzip.compress(b"hello")):
        path = tmp_path / "x.tar.gz"
        path.write_bytes(content)
        assert statuses(inspect(path, is_record), Evidence())["archive"] == FAILED
