"""Bills of materials of real installations: npm, yarn, pnpm and pip, and what a changed installed file comes to."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from aether.artifact import sbom, strictjson
from aether.artifact.inspect import inspect
from aether.artifact.pack import Packed, pack
from aether.artifact.sbom_document import Subject, properties_of
from aether.artifact.verification import FAILED, Evidence, is_record, verify
from aether.build.inventory.bill import Bill, bill_of
from aether.build.plan import plan, prepare
from aether.build.project import Options
from support.installed import wheel

TOOLS = Path(os.environ.get("AETHER_TEST_CACHE", Path.home() / ".cache" / "aether-tests")) / "managers"
BERRY = TOOLS.with_name("berry")
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="component: npm")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "aether"


@dataclass
class Described:
    packed: Packed
    bill: Bill
    document: bytes

    @property
    def components(self) -> dict[str, dict[str, Any]]:
        """Components by the folder they lie in."""
        return {properties_of(one)["path"]: one for one in json.loads(self.document)["components"]}

    def status(self, path: str) -> str:
        return properties_of(self.components[path])["integrity"]

    def edges(self) -> dict[str, list[str]]:
        return {one["ref"]: one.get("dependsOn", []) for one in json.loads(self.document)["dependencies"]}


def described(root: Path, out: Path, **options: object) -> Described:
    """Build, pack and describe; what is written is valid, and its hashes hold for the artifact."""
    planned = plan(root, Options(**options))  # pyright: ignore
    with prepare(planned) as prepared:
        packed = pack(prepared.entries, out)
        bill = bill_of(prepared, packed)
    project = planned.project
    subject = Subject(project.app, packed.digest, packed.content_digest, project.runtime, properties=bill.properties)
    document = strictjson.write(bill.document(subject))
    legacy = strictjson.write(bill.legacy(subject))
    for data in (document, legacy):
        sbom.check_document(data, packed.digest)
        checks = verify(inspect(packed.artifact, is_record), Evidence(digest=packed.digest, sbom=data))
        assert not [check for check in checks if check.status == FAILED]
    return Described(packed, bill, document)


def project(root: Path, package: Mapping[str, object], **files: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "package.json").write_text(json.dumps({"name": "shop", "version": "1.0.0", **package}))
    for name, content in {"server.js": "console.log(1)", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def lock(root: Path) -> Path:
    command = ["npm", "install", "--package-lock-only", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root


def dependency_folder(cache: Path) -> Path:
    (found,) = [path for path in (cache / "deps").iterdir() if path.is_dir()]
    return found


@needs_npm
def test_npm_in_full(tmp_path: Path) -> None:
    root = project(
        tmp_path / "app",
        {
            "workspaces": ["packages/*"],
            "dependencies": {"is-odd": "3.0.1", "old": "npm:is-number@5.0.0", "@shop/w": "1.0.0"},
            "devDependencies": {"is-even": "1.0.0"},
        },
        **{
            "packages/w/package.json": json.dumps({"name": "@shop/w", "version": "1.0.0"}),
            "packages/w/index.js": "1",
        },
    )
    lock(root)
    found = described(root, tmp_path / "out")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(found.document.decode()) is None
    parts = found.components
    assert {"node_modules/is-odd", "node_modules/is-number", "node_modules/old", "packages/w"} == set(parts)
    assert parts["node_modules/old"]["purl"] == "pkg:npm/is-number@5.0.0"
    assert "purl" not in parts["packages/w"]
    assert found.status("packages/w") == "unpromised"
    assert {found.status(path) for path in parts if path.startswith("node_modules")} == {"verified"}
    hashes = parts["node_modules/is-odd"]["externalReferences"][0]["hashes"]
    promised = json.loads((root / "package-lock.json").read_text())["packages"]["node_modules/is-odd"]["integrity"]
    assert [one["alg"] for one in hashes] == ["SHA-512"]
    assert bytes.fromhex(hashes[0]["content"]) == base64.b64decode(promised.removeprefix("sha512-"))
    edges = found.edges()
    assert "pkg:npm/is-odd@3.0.1" in edges["app"]
    assert edges["pkg:npm/is-odd@3.0.1"] == ["pkg:npm/is-number@6.0.0"]
    assert found.bill.findings == ()


@needs_npm
def test_the_second_deploy_looks_at_nothing_and_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = lock(project(tmp_path / "app", {"dependencies": {"is-odd": "3.0.1"}}))
    first = described(root, tmp_path / "out")
    assert not first.bill.known

    def refuse(*command: object, **_: object) -> None:
        raise AssertionError(f"a process was started: {command}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    second = described(root, tmp_path / "out")
    assert second.bill.known
    assert second.document == first.document
    (root / "server.js").write_text("console.log(2)")
    third = described(root, tmp_path / "out")
    assert third.bill.known
    assert third.components == first.components


@needs_npm
def test_an_edited_workspace_has_another_hash_and_nothing_else(tmp_path: Path) -> None:
    files = {"packages/w/package.json": json.dumps({"name": "w", "version": "1.0.0"}), "packages/w/index.js": "1"}
    root = lock(
        project(tmp_path / "app", {"workspaces": ["packages/*"], "dependencies": {"is-odd": "3.0.1"}}, **files)
    )
    first = described(root, tmp_path / "out")
    (root / "packages" / "w" / "index.js").write_text("2")
    second = described(root, tmp_path / "out")
    assert second.bill.known
    differing = {path for path, one in second.components.items() if one != first.components[path]}
    assert differing == {"packages/w"}


@needs_npm
def test_a_changed_installed_file_is_a_finding(tmp_path: Path, cache: Path) -> None:
    root = lock(project(tmp_path / "app", {"dependencies": {"is-odd": "3.0.1"}}))
    assert described(root, tmp_path / "out").bill.findings == ()
    modules = dependency_folder(cache) / "node_modules"
    clean = (modules / "is-number" / "index.js").read_text()
    (modules / "is-number" / "index.js").write_text(clean + "\nprocess.exit(1)\n")
    (modules / "is-odd" / "extra.js").write_text("!")
    (modules / "loose.js").write_text("!")
    found = described(root, tmp_path / "out")
    assert not found.bill.known
    assert (found.status("node_modules/is-number"), found.status("node_modules/is-odd")) == ("differs", "differs")
    said = "\n".join(found.bill.findings)
    differs = (
        "is-number 6.0.0 (node_modules/is-number) differ from what package-lock.json promises: 1 changed (index.js)"
    )
    assert differs in said
    assert "1 added (extra.js)" in said
    assert "node_modules/loose.js belongs to no package" in said
    assert properties_of(found.components["node_modules/is-number"])["finding"] == "1 changed (index.js)"
    assert any("differ from" in value for value in properties_of(json.loads(found.document)["metadata"]).values())
    (modules / "is-number" / "index.js").write_text(clean)
    (modules / "is-odd" / "extra.js").unlink()
    (modules / "loose.js").unlink()
    assert described(root, tmp_path / "out").bill.findings == ()


@needs_npm
def test_what_cannot_be_compared_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = lock(project(tmp_path / "app", {"dependencies": {"is-odd": "3.0.1"}}))
    with prepare(plan(root)):
        pass
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "empty"))
    found = described(root, tmp_path / "out")
    assert found.bill.counts == {"unproven": 2}
    assert found.bill.told() == "2 packages, 2 not at hand to compare"
    assert found.bill.findings == ()


@needs_npm
def test_what_the_user_leaves_out_is_not_missing(tmp_path: Path) -> None:
    root = lock(
        project(
            tmp_path / "app", {"dependencies": {"is-odd": "3.0.1"}}, **{".aetherignore": "node_modules/**/*.md\n"}
        )
    )
    found = described(root, tmp_path / "out")
    assert found.bill.counts == {"verified": 2}


@needs_npm
def test_a_project_without_a_lockfile_promises_nothing(tmp_path: Path) -> None:
    root = project(tmp_path / "app", {"dependencies": {"is-odd": "3.0.1"}})
    found = described(root, tmp_path / "out")
    assert found.bill.counts == {"unpromised": 2}
    assert found.bill.findings == ()
    assert not found.bill.complete


@needs_npm
def test_a_damaged_note_of_an_earlier_deploy_is_made_anew(tmp_path: Path, cache: Path) -> None:
    root = lock(project(tmp_path / "app", {"dependencies": {"is-odd": "3.0.1"}}))
    first = described(root, tmp_path / "out")
    (note,) = (cache / "sbom").glob("*.json")
    note.write_text('{"components": [')
    second = described(root, tmp_path / "out")
    assert (second.bill.known, second.document) == (False, first.document)


@pytest.fixture
def managers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Yarn (classic) and pnpm on PATH, installed once by npm into the tests' own cache."""
    bin_folder = TOOLS / "node_modules" / ".bin"
    for folder, packages in ((TOOLS, ["yarn@1", "pnpm@9"]), (BERRY, ["@yarnpkg/cli-dist@4"])):
        if (folder / "node_modules").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"component: yarn and pnpm from npm ({done.stderr.strip().splitlines()[-1]})")
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")


@needs_npm
@pytest.mark.usefixtures("managers")
@pytest.mark.parametrize("name", ["yarn", "pnpm", "berry"])
def test_yarn_and_pnpm(tmp_path: Path, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = project(
        tmp_path / "app",
        {"dependencies": {"is-odd": "3.0.1", "old": "npm:is-number@5.0.0"}, "devDependencies": {"is-even": "1.0.0"}},
    )
    command = [name, "install", "--ignore-scripts"]
    if name == "berry":
        monkeypatch.setenv("YARN_GLOBAL_FOLDER", str(tmp_path / "berry"))
        (root / ".yarn" / "releases").mkdir(parents=True)
        shutil.copy(BERRY / "node_modules/@yarnpkg/cli-dist/bin/yarn.js", root / ".yarn/releases/yarn.cjs")
        (root / ".yarnrc.yml").write_text("yarnPath: .yarn/releases/yarn.cjs\nnodeLinker: node-modules\n")
        (root / "yarn.lock").touch()
        command = ["node", ".yarn/releases/yarn.cjs", "install", "--no-immutable"]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    shutil.rmtree(root / "node_modules")
    found = described(root, tmp_path / "out")
    assert {one["purl"] for one in found.components.values()} == {
        "pkg:npm/is-odd@3.0.1",
        "pkg:npm/is-number@6.0.0",
        "pkg:npm/is-number@5.0.0",
    }
    assert found.bill.counts == {"verified": 3}
    assert found.bill.findings == ()
    assert found.edges()["pkg:npm/is-odd@3.0.1"] == ["pkg:npm/is-number@6.0.0"]
    assert set(found.edges()["app"]) == {"pkg:npm/is-odd@3.0.1", "pkg:npm/is-number@5.0.0"}
    odd = next(path for path in found.components if path.endswith("node_modules/is-odd"))
    (dependency_folder(cache) / odd / "index.js").write_text("changed")
    changed = described(root, tmp_path / "out")
    assert changed.status(odd) == "differs"
    assert "1 changed (index.js)" in changed.bill.findings[0]


def test_python_packages(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    made = wheel(tmp_path / "wheels", "greet")
    root = tmp_path / "app"
    root.mkdir()
    (root / "app.py").write_text("import greet; greet.main()")
    (root / "requirements.txt").write_text("greet==1.0\n")
    found = described(root, tmp_path / "out")
    (one,) = found.components.values()
    assert (one["name"], one["version"], one["purl"]) == ("greet", "1.0", "pkg:pypi/greet@1.0")
    reference = one["externalReferences"][0]
    assert reference["url"] == f"file:{made.name}"
    assert reference["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(made.read_bytes()).hexdigest()}]
    assert found.edges()["app"] == ["pkg:pypi/greet@1.0"]
    assert found.bill.counts == {"verified": 1}
    target = dependency_folder(cache) / "python"
    (target / "bin" / "greet").write_text("#!/bin/sh\n")
    (target / "sitecustomize.py").write_text("import os")
    changed = described(root, tmp_path / "out")
    said = "\n".join(changed.bill.findings)
    assert "1 changed (bin/greet)" in said
    assert ".aether/python/sitecustomize.py belongs to no package" in said


def test_static_folders_and_programs_have_a_small_document(tmp_path: Path) -> None:
    static = tmp_path / "site"
    static.mkdir()
    (static / "index.html").write_text("<p>hello</p>")
    found = described(static, tmp_path / "out")
    assert (found.components, found.bill.complete) == ({}, False)
    program = tmp_path / "program"
    program.mkdir()
    shutil.copy(os.path.realpath(sys.executable), program / "run")
    binary = described(program, tmp_path / "out", runtime="binary", start="./run")
    assert binary.components["run"]["type"] == "file"
