"""The supply chain as a user meets it: a signed deploy whose documents the registry keeps, keys, verification."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from support.product import AETHER, HELLO, Product, node_app

THIRD = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
NAMES = ("manifest", "sbom", "signature", "provenance")


@pytest.fixture(scope="module")
def key(up: Product) -> Path:
    path = up.home / "signing.key"
    up.run("keys", "generate", "--out", str(path))
    return path


@pytest.fixture(scope="module")
def signed(up: Product, key: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """An app whose key is known, deployed with a signature."""
    up.run("apps", "create", "signed")
    up.run("keys", "add", f"{key}.pub", "--app", "signed")
    folder = node_app(tmp_path_factory.mktemp("signed") / "app", HELLO % "signed")
    done = up.run("deploy", str(folder), "--app", "signed", "--format", "json", env={"AETHER_SIGNING_KEY": str(key)})
    return done.json


def test_a_deploy_names_the_documents_it_wrote(signed: dict[str, object]) -> None:
    digest = signed["digest"]
    for name, ending in zip(NAMES, ("manifest.json", "sbom.json", "sig", "provenance.json"), strict=True):
        path = Path(str(signed[name]))
        assert path.name == f"app-{digest}.{ending}"
        assert path.is_file()
    assert signed["status"] == "active"
    assert not [path for path in Path(str(signed["artifact"])).parent.iterdir() if path.name.endswith(".part")]


def test_the_registry_keeps_them(up: Product, signed: dict[str, object]) -> None:
    digest = str(signed["digest"])
    for name in ("manifest", "sbom", "provenance"):
        status, kept, _ = up.api("GET", f"/artifacts/{digest}/{name}?app=signed")
        assert status == 200
        assert kept == json.loads(Path(str(signed[name])).read_bytes())
    _, meta, _ = up.api("GET", f"/artifacts/{digest}/meta?app=signed")
    assert meta["verified"] is True
    assert meta["signature"] == Path(str(signed["signature"])).read_text().strip()


def test_in_toto_and_securesystemslib_accept_the_provenance(
    up: Product, signed: dict[str, object], key: Path
) -> None:
    raw = json.loads(Path(str(signed["provenance"])).read_bytes())
    shown = up.run("keys", "show", "--format", "json", env={"AETHER_SIGNING_KEY": str(key)}).json
    theirs = SSlibKey(shown["key_id"], "ed25519", "ed25519", {"public": shown["public_key_hex"]})
    envelope = Envelope.from_dict(raw)
    assert set(envelope.verify([theirs], 1)) == {shown["key_id"]}
    value = json.loads(envelope.payload)
    subjects = [{"name": one["name"], "digest": one["digest"]} for one in value["subject"]]
    statement = Statement([], value["predicateType"], value["predicate"])
    for one in subjects:
        subject = statement.pb.subject.add()
        subject.name = one["name"]
        subject.digest.update(one["digest"])
    statement.validate()
    assert subjects == [{"name": "signed/app.tar.gz", "digest": {"sha256": signed["digest"]}}]


def test_verify_a_file_a_cached_digest_and_one_of_the_registry(
    up: Product, signed: dict[str, object], key: Path, tmp_path: Path
) -> None:
    digest, artifact = str(signed["digest"]), str(signed["artifact"])
    offline = {"AETHER_API_BASE": "http://127.0.0.1:9"}
    for what in (artifact, digest):
        found = up.run("verify", what, "--key", f"{key}.pub", "--strict", "--format", "json", env=offline).json
        assert found["verified"] is True
        assert {check["status"] for check in found["checks"]} == {"ok"}
    fresh = {"XDG_CACHE_HOME": str(tmp_path)}
    shutil.copytree(
        up.home / "cache" / "aether", tmp_path / "aether", ignore=shutil.ignore_patterns("artifacts", "deps")
    )
    there = up.run("verify", digest, "--app", "signed", "--strict", "--format", "json", env=fresh).json
    assert there["verified"] is True
    assert {check["status"] for check in there["checks"]} == {"ok"}
    assert not list(tmp_path.rglob("app-*.tar.gz"))


def test_what_was_altered_fails_with_30(up: Product, signed: dict[str, object], key: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Path(str(signed["artifact"])).parent, tmp_path / "copy"))
    artifact = folder / Path(str(signed["artifact"])).name
    data = bytearray(artifact.read_bytes())
    data[len(data) // 2] ^= 1
    artifact.write_bytes(data)
    done = up.run("verify", str(artifact), "--key", f"{key}.pub", check=False)
    assert done.code == 30
    assert done.stdout.splitlines()[-1] == "NOT verified"
    assert done.stdout.startswith("failed")


def test_wrong_input_to_verify(up: Product, signed: dict[str, object], tmp_path: Path) -> None:
    cases = [
        (["verify"], 2, "DIGEST|FILE"),
        (["verify", "nonsense"], 2, "64 lower-case hex"),
        (["verify", str(tmp_path / "absent.tar.gz")], 30, "there is no file"),
        (["verify", "0" * 64], 2, ""),
        (["verify", str(signed["artifact"]), "--key", "xyz"], 10, "32 bytes of Ed25519"),
        (["verify", str(signed["artifact"]), "--sbom", str(tmp_path / "absent")], 30, "cannot read"),
    ]
    for words, code, said in cases:
        done = up.run(*words, check=False)
        assert done.code == code, f"{words}: {done}"
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_deploying_the_same_again_sends_no_document_twice(up: Product, key: Path, tmp_path: Path) -> None:
    folder = node_app(tmp_path / "twice", HELLO % "twice")
    env = {"AETHER_SIGNING_KEY": str(key)}
    up.run("deploy", str(folder), "--app", "twice", env=env)
    again = up.run("--log-level", "debug", "deploy", str(folder), "--app", "twice", env=env)
    sent = [line for line in again.stderr.splitlines() if "/artifacts/" in line and "POST" in line]
    assert not [line for line in sent if "/manifest" in line or "/sbom" in line]


def test_a_signing_key_that_is_none(up: Product, tmp_path: Path) -> None:
    folder = node_app(tmp_path / "app", HELLO % "x")
    secret = "ab" * 31
    open_to_all = tmp_path / "open.key"
    open_to_all.write_text("ab" * 32)
    open_to_all.chmod(0o644)
    for value, said in (
        (secret, "is not a signing key"),
        (str(tmp_path / "absent.key"), "a file that is not there"),
        (str(open_to_all), "everybody can read"),
        (str(tmp_path), "is not a file"),
    ):
        done = up.run("deploy", str(folder), "--pack-only", check=False, env={"AETHER_SIGNING_KEY": value})
        assert done.code in (10, 30), done
        assert said in done.stderr or "cannot be read" in done.stderr
        assert secret not in done.stderr + done.stdout
    done = up.run("deploy", str(folder), "--dry-run", check=False, env={"AETHER_REQUIRE_PROVENANCE": "1"})
    assert (done.code, "AETHER_SIGNING_KEY is not" in done.stderr) == (10, True)
    done = up.run("deploy", str(folder), "--dry-run", check=False, env={"AETHER_PROVENANCE_TIMEOUT_MS": "soon"})
    assert done.code == 10


def test_provenance_that_takes_too_long(up: Product, key: Path, tmp_path: Path) -> None:
    folder = node_app(tmp_path / "app", HELLO % "x")
    (folder / ".git").mkdir()
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    env = {
        "AETHER_SIGNING_KEY": str(key),
        "AETHER_PROVENANCE_TIMEOUT_MS": "300",
        "PATH": f"{slow.parent}{os.pathsep}{os.environ['PATH']}",
    }
    started = time.monotonic()
    dry = up.run("deploy", str(folder), "--dry-run", "--format", "json", env=env).json
    assert dry["note"] == "timeout"
    done = up.run("deploy", str(folder), "--pack-only", "--format", "json", env=env).json
    assert (done["provenance"], done["note"]) == (None, "timeout")
    assert done["signature"] is not None
    refused = up.run("deploy", str(folder), check=False, env={**env, "AETHER_REQUIRE_PROVENANCE": "true"})
    assert refused.code == 20
    assert "AETHER_REQUIRE_PROVENANCE is set" in refused.stderr
    assert time.monotonic() - started < 120


def test_flags_of_the_bill_of_materials(up: Product, tmp_path: Path) -> None:
    folder = node_app(tmp_path / "app", HELLO % "x")
    none = up.run("deploy", str(folder), "--pack-only", "--no-sbom", "--out", str(tmp_path / "a"), "--format", "json")
    assert (none.json["sbom"], none.json["signature"], none.json["provenance"]) == (None, None, None)
    assert sorted(path.name.partition(".")[2] for path in (tmp_path / "a").iterdir()) == ["manifest.json", "tar.gz"]
    old = up.run(
        "deploy", str(folder), "--pack-only", "--legacy-sbom", "--out", str(tmp_path / "b"), "--format", "json"
    )
    assert json.loads(Path(old.json["sbom"]).read_bytes())["schema"] == "aether-sbom-v1"


def test_keys_of_an_app(up: Product, key: Path, tmp_path: Path) -> None:
    up.run("apps", "create", "keyed")
    assert up.run("keys", "list", "--app", "keyed").stdout == "keyed has no keys\n"
    up.run("keys", "add", f"{key}.pub", "--app", "keyed")
    up.run("keys", "generate", "--out", str(tmp_path / "second.key"))
    assert (tmp_path / "second.key").stat().st_mode & 0o777 == 0o600
    up.run("user", "create", "dora", "--no-password")
    up.run("team", "create", "keyers")
    up.run("team", "add", "keyers", "dora")
    up.run("apps", "transfer", "keyed", "--to", "keyers")
    token = {"AETHER_TOKEN": up.run("user", "token", "dora", "--expires", "1h").stdout.strip()}
    second = str(tmp_path / "second.key.pub")
    refused = up.run("keys", "add", second, "--app", "keyed", check=False, env=token)
    assert refused.code == 10
    stranger = {**token, "AETHER_SIGNING_KEY": str(tmp_path / "second.key")}
    assert up.run("keys", "add", THIRD, "--app", "keyed", check=False, env=stranger).code == 10
    up.run("keys", "add", second, "--app", "keyed", env={**token, "AETHER_SIGNING_KEY": str(key)})
    keys = up.run("keys", "list", "--app", "keyed", "--format", "json").json
    assert [one["active"] for one in keys] == [True, True]
    added = next(one for one in keys if one["public_key_hex"] == Path(second).read_text().strip())
    refused = up.run("keys", "deactivate", "nosuch", "--app", "keyed", check=False)
    assert (refused.code, "aether keys list --app keyed" in refused.stderr) == (2, True)
    up.run("keys", "deactivate", added["key_id"], "--app", "keyed")
    assert "deactivated" in up.run("keys", "list", "--app", "keyed").stdout
    again = up.run("keys", "generate", "--out", str(tmp_path / "second.key"), check=False)
    assert (again.code, "never overwritten" in again.stderr) == (30, True)


def test_a_private_key_is_never_published(up: Product, tmp_path: Path) -> None:
    seed = "ab" * 32
    (tmp_path / "hex.key").write_text(seed)
    up.run("apps", "create", "careful")
    done = up.run("keys", "add", str(tmp_path / "hex.key"), "--app", "careful", check=False)
    assert (done.code, "public or a private key" in done.stderr) == (10, True)
    done = up.run("keys", "add", seed, "--app", "careful", check=False, env={"AETHER_SIGNING_KEY": seed})
    assert (done.code, "private key in AETHER_SIGNING_KEY" in done.stderr) == (10, True)
    assert up.run("keys", "list", "--app", "careful", "--format", "json").json == []


def test_old_artifacts_go_with_their_documents(up: Product, key: Path, tmp_path: Path) -> None:
    folder = tmp_path / "app"
    for number in range(5):
        node_app(folder, HELLO % str(number))
        up.run("deploy", str(folder), "--pack-only", "--app", "pruned", env={"AETHER_SIGNING_KEY": str(key)})
    kept = [path.name for path in (up.home / "cache" / "aether" / "artifacts" / "pruned").iterdir()]
    assert len(kept) == 3 * 5
    assert len({name[: len("app-") + 64] for name in kept}) == 3


def test_a_killed_deploy_leaves_whole_documents_or_none(up: Product, key: Path, tmp_path: Path) -> None:
    folder = node_app(tmp_path / "app", HELLO % "killed")
    env = {**up.env, "AETHER_SIGNING_KEY": str(key)}
    home = up.home / "cache" / "aether" / "artifacts" / "killed"
    words = [AETHER, "deploy", str(folder), "--pack-only", "--app", "killed"]
    started = time.monotonic()
    subprocess.run(words, env=env, check=True, capture_output=True)
    whole = time.monotonic() - started
    for number in range(12):
        (folder / "number.txt").write_text(str(number))
        child = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(whole * (number + 1) / 12)
        child.kill()
        child.wait(10)
        for artifact in home.glob("app-*.tar.gz"):
            found = up.run("verify", str(artifact), "--format", "json", check=False).json
            assert not [check for check in found["checks"] if check["status"] == "failed"], found
    up.run("deploy", str(folder), "--pack-only", "--app", "killed", env={"AETHER_SIGNING_KEY": str(key)})
    assert not list(home.glob(".pack-*"))


def test_a_server_that_insists_takes_what_a_signed_deploy_sends(own: Product, tmp_path: Path) -> None:
    own.stop()
    wants = {"AETHER_REQUIRE_SIGNATURE": "1", "AETHER_ENFORCE_SBOM": "1", "AETHER_REQUIRE_PROVENANCE": "1"}
    own.extra_env.update(wants)
    own.start()
    for name in wants:
        del own.extra_env[name]
    folder = node_app(tmp_path / "strict", HELLO % "strict")
    own.run("apps", "create", "strict")
    key = tmp_path / "s.key"
    own.run("keys", "generate", "--out", str(key))
    unsigned = own.run("deploy", str(folder), "--app", "strict", "--format", "json", check=False)
    assert unsigned.json["error"]["code"] == "signature_required"
    env = {"AETHER_SIGNING_KEY": str(key)}
    unknown = own.run("deploy", str(folder), "--app", "strict", "--format", "json", check=False, env=env)
    assert unknown.json["error"]["code"] == "signature_required"
    own.run("keys", "add", f"{key}.pub", "--app", "strict")
    bare = own.run("deploy", str(folder), "--app", "strict", "--no-sbom", "--format", "json", check=False, env=env)
    assert bare.json["error"]["code"] == "sbom_required"
    done = own.run("deploy", str(folder), "--app", "strict", "--format", "json", env=env).json
    assert done["status"] == "active"
    assert own.get("strict")[1] == "strict\n"
