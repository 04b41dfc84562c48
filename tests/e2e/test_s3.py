"""`aether up` on an S3 bucket, as an operator and a developer meet it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import s3_servers
from support.product import HELLO, Product, node_app
from support.s3_servers import S3Server


@pytest.fixture(params=s3_servers.kinds())
def server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    running = s3_servers.running(request.param)
    yield running
    running.ensure()


@pytest.fixture
def bucket(server: S3Server) -> str:
    return server.new_bucket()


@pytest.fixture
def up(tmp_path: Path, server: S3Server, bucket: str) -> Iterator[Product]:
    it = Product(tmp_path / "home", extra_env=server.settings(bucket))
    try:
        it.start()
        it.login()
        yield it
    finally:
        it.close()


def keys(server: S3Server, bucket: str) -> list[str]:
    return [item["Key"] for item in server.boto().list_objects_v2(Bucket=bucket).get("Contents", ())]


def test_an_app_is_deployed_from_a_bucket_and_comes_back_from_it(
    up: Product, server: S3Server, bucket: str, tmp_path: Path
) -> None:
    project = node_app(tmp_path / "shop", HELLO % "first")
    made = up.deploy(project, "--app", "shop").json
    assert f"artifacts/shop/{made['digest']}/app.tar.gz" in keys(server, bucket)
    assert [key for key in keys(server, bucket) if not key.startswith("artifacts/")] == []
    assert not any((up.data / "objects").glob("**/*.gz"))
    assert "first" in up.get("shop")[1]
    up.stop()
    shutil.rmtree(up.data / "releases")
    up.start()
    assert "first" in up.get("shop")[1], "unpacked again from the bucket"
    found = json.loads(up.run("doctor", "--format", "json", check=False).stdout)
    (check,) = [check for check in found["checks"] if check["name"] == "object store"]
    assert check["status"] == "ok"
    assert f"bucket {bucket} at {server.endpoint}" in check["message"]
    assert found["settings"]["AETHER_STORAGE_MODE"] == "s3"


def test_a_bucket_that_goes_away_and_comes_back(up: Product, server: S3Server, tmp_path: Path) -> None:
    project = node_app(tmp_path / "shop", HELLO % "first")
    up.deploy(project, "--app", "shop")
    server.kill9()
    assert "first" in up.get("shop")[1], "apps need no bucket"
    status, ready, _ = up.api("GET", "/readyz")
    assert status == 503
    assert "cannot be reached" in ready["details"]["checks"]["objects"]
    up.stop()
    up.start()
    assert "first" in up.get("shop")[1], "a server starts without its bucket"
    assert "the object store is away" in up.errors()
    server.start()
    assert up.api("GET", "/readyz")[0] == 200
    node_app(tmp_path / "shop", HELLO % "second")
    up.deploy(project, "--app", "shop")
    assert "second" in up.get("shop")[1]


def test_wrong_settings_are_refused_with_what_to_do(tmp_path: Path, server: S3Server, bucket: str) -> None:
    for wrong, told in (
        ({"AETHER_ARTIFACT_BUCKET": "aether-nowhere"}, "there is no bucket 'aether-nowhere'"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "AWS_SECRET_ACCESS_KEY"),
        ({"AETHER_STORAGE_MODE": "cloud"}, "AETHER_STORAGE_MODE must be filesystem or s3"),
        ({"AETHER_S3_ENDPOINT_URL": "minio:9000"}, "is not a URL like"),
        ({"AETHER_S3_SSE": "rot13"}, "AETHER_S3_SSE must be AES256 or aws:kms"),
        ({"AETHER_S3_SSE_KMS_KEY": "x"}, "with AETHER_S3_SSE=aws:kms only"),
    ):
        it = Product(tmp_path / "home", extra_env={**server.settings(bucket), **wrong})
        it.home.mkdir(exist_ok=True)
        done = it.run("up", "--port", str(it.port), check=False)
        assert done.code == 10, done
        assert told in done.stderr
        assert "Traceback" not in done.stderr
