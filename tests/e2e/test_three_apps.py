"""Express, Fastify in TypeScript with a build step, and Python: deploy, change, roll back, survive restarts."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from support.product import Product, copy_example

FIELDS = {
    "artifact", "digest", "size_bytes", "manifest", "sbom", "signature", "provenance", "app", "deployment_id",
    "url", "status", "timings_ms", "bytes_uploaded", "bytes_reused",
}  # fmt: skip

APPS = {
    "express": ("hello", "server.js", "Hello from Express", "Howdy from Express"),
    "fastify-ts": ("hello-fastify", "src/server.ts", "Hello from Fastify", "Howdy from Fastify"),
    "python": ("hello-python", "app.py", "Hello from Flask", "Howdy from Flask"),
}


@pytest.mark.parametrize("example", sorted(APPS))
def test_deploy_change_and_roll_back(up: Product, tmp_path: Path, example: str) -> None:
    app, source, old, new = APPS[example]
    project = copy_example(example, tmp_path / example)
    before = sorted(str(p.relative_to(project)) for p in project.rglob("*"))

    first = up.deploy(project).json
    assert set(first) == FIELDS
    assert first["app"] == app
    assert first["status"] == "active"
    assert json.loads(Path(first["sbom"]).read_text())["bomFormat"] == "CycloneDX"
    assert json.loads(Path(first["manifest"]).read_text())["digest"] == first["digest"]
    assert first["signature"] is None
    assert first["provenance"] is None
    assert set(first["timings_ms"]) == {"detect", "install", "pack", "upload", "rollout", "total"}
    assert hashlib.sha256(Path(first["artifact"]).read_bytes()).hexdigest() == first["digest"]
    assert first["bytes_uploaded"] == first["size_bytes"] == Path(first["artifact"]).stat().st_size
    status, body = up.get(app)
    assert status == 200
    assert old in body
    assert sorted(str(p.relative_to(project)) for p in project.rglob("*")) == before, "deploy dirtied the project"

    changed = project / source
    changed.write_text(changed.read_text().replace(old, new))
    second = up.deploy(project).json
    assert second["digest"] != first["digest"]
    assert new in up.get(app)[1]

    again = up.deploy(project).json
    assert again["digest"] == second["digest"]
    assert again["deployment_id"] == second["deployment_id"]
    assert again["bytes_uploaded"] == 0

    rolled = up.run("rollback", "--app", app, first["digest"][:12], "--format", "json").json
    assert rolled["digest"] == first["digest"]
    assert old in up.get(app)[1]

    releases = up.run("releases", "--app", app, "--format", "json").json["items"]
    assert [r["digest"] for r in sorted(releases, key=lambda r: r["version"])] == [
        first["digest"], second["digest"], first["digest"],
    ]  # fmt: skip
    assert [r["status"] for r in releases].count("active") == 1


def test_built_output_is_packed_and_dev_dependencies_are_not(up: Product, tmp_path: Path) -> None:
    project = copy_example("fastify-ts", tmp_path / "fastify-ts")
    packed = up.deploy(project, "--pack-only", "--out", str(tmp_path / "out")).json
    with tarfile.open(packed["artifact"]) as archive:
        names = archive.getnames()
    assert "dist/server.js" in names
    assert "node_modules/fastify/package.json" in names
    assert not [n for n in names if n.startswith("node_modules/typescript/")]


def test_apps_survive_a_restart_and_a_kill(own: Product, tmp_path: Path) -> None:
    for example in APPS:
        own.deploy(copy_example(example, tmp_path / example))
    assert own.stop() == 0
    own.start()
    for app, _, old, _ in APPS.values():
        status, body = own.get(app)
        assert (status, old in body) == (200, True), body
    own.kill9()
    own.start()
    for app, _, old, _ in APPS.values():
        status, body = own.get(app)
        assert (status, old in body) == (200, True), body
    listed = own.run("list", "--format", "json").json["items"]
    assert {a["name"]: a["release"]["version"] for a in listed} == {app: 1 for app, *_ in APPS.values()}
