"""Archives that mean harm, uploaded and deployed through the whole product: refused with the reason, nothing left."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import Server, hello, server

MIB = 1 << 20


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("hostile"), AETHER_MAX_ARTIFACT_SIZE_BYTES=str(8 * MIB)) as it:
        it.deploy("steady", hello("steady"))
        it.api("POST", "/apps", {"name": "evil"})
        yield it


def archive(*members: tuple[tarfile.TarInfo, bytes], server_js: bool = True) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        if server_js:
            tar.addfile(*_opened(member("server.js", b"setInterval(() => {}, 1000)")))
        for each in members:
            tar.addfile(*_opened(each))
    return out.getvalue()


def _opened(each: tuple[tarfile.TarInfo, bytes]) -> tuple[tarfile.TarInfo, io.BytesIO]:
    return each[0], io.BytesIO(each[1])


def member(
    name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    info.devmajor, info.devminor = 1, 3
    return info, data if kind == tarfile.REGTYPE else b""


def sparse() -> bytes:
    """A header that promises more than any disk has."""
    info = tarfile.TarInfo("huge")
    info.size = 1 << 42
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 10240)


def bomb() -> bytes:
    info = tarfile.TarInfo("zeros")
    info.size = 1 << 30
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as packed:
        packed.write(info.tobuf())
        for _ in range(1024):
            packed.write(bytes(MIB))
        packed.write(b"\0" * 10240)
    return out.getvalue()


def crowd() -> bytes:
    """More entries than anybody needs, in few bytes."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as packed:
        for number in range(1_200_000):
            if number % 1000 == 0:
                block = b"".join(_empty(number + each) for each in range(1000))
                packed.write(block)
        packed.write(b"\0" * 1024)
    return out.getvalue()


def _empty(number: int) -> bytes:
    head = bytearray(_TEMPLATE)
    head[0:9] = b"%09d" % number
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


_TEMPLATE = tarfile.TarInfo("0" * 9).tobuf(tarfile.USTAR_FORMAT)

ATTACKS: dict[str, Callable[[], bytes]] = {
    "above": lambda: archive(member("../escaped")),
    "deep above": lambda: archive(member("a/b/../../../escaped")),
    "absolute": lambda: archive(member("/tmp/aether-test-escaped")),
    "link out": lambda: archive(member("out", kind=tarfile.SYMTYPE, link="../../..")),
    "absolute link": lambda: archive(member("out", kind=tarfile.SYMTYPE, link="/etc/passwd")),
    "through a link": lambda: archive(
        member("d", kind=tarfile.SYMTYPE, link="."),
        member("d/up", kind=tarfile.SYMTYPE, link="../.."),
        member("d/up/x"),
    ),
    "hard link out": lambda: archive(member("out", kind=tarfile.LNKTYPE, link="../../../../../etc/passwd")),
    "device": lambda: archive(member("null", kind=tarfile.CHRTYPE)),
    "disk": lambda: archive(member("sda", kind=tarfile.BLKTYPE)),
    "pipe": lambda: archive(member("pipe", kind=tarfile.FIFOTYPE)),
    "twice": lambda: archive(member("same"), member("same", b"other")),
    "a file that is a folder": lambda: archive(member("a"), member("a/b")),
    "sparse": sparse,
    "bomb": bomb,
    "long name": lambda: archive(member("n" * 300)),
    "long path": lambda: archive(member("/".join(["d" * 100] * 60))),
    "no archive": lambda: b"this is not gzip",
    "cut short": lambda: archive(member("noise", hashlib.sha256(b"x").digest() * 4000))[:-2000],
    "trailing": lambda: archive(member("x")) + b"trailing rubbish",
    "control bytes": lambda: archive(member("a\nb\x1b[2J")),
    "crowd": crowd,
}
HARMLESS = {"control bytes", "trailing"}
"""May be taken or refused, but must do no harm."""


def upload(up: Server, blob: bytes) -> tuple[int, Any, str]:
    digest = hashlib.sha256(blob).hexdigest()
    body = {"app": "evil", "digest": digest, "size_bytes": len(blob), "runtime": "node20"}
    status, signed = up.api("POST", "/artifacts/presign", body)
    if status != 200 or signed["method"] != "PUT":
        return status, signed, digest
    status, answer = up.api("PUT", signed["url"], blob)
    assert status == 200, answer
    status, answer = up.api("POST", "/artifacts/complete", {**body, "upload_id": signed["upload_id"]})
    return status, answer, digest


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_is_refused_and_leaves_nothing(up: Server, attack: str) -> None:
    status, answer, digest = upload(up, ATTACKS[attack]())
    began = time.monotonic()
    if status == 200:
        status, made = up.api(
            "POST", "/deployments", {"app": "evil", "digest": digest, "command": "node server.js", "timeout_secs": 5}
        )
        if status == 201:
            ended = up.settled(made["id"])
            assert ended["status"] == "failed", ended
            reason = ended["error"]["message"]
            assert reason
            assert "Traceback" not in reason
            assert "\x1b" not in reason
            if attack not in HARMLESS:
                assert "answer" not in reason, f"it was unpacked and started: {reason}"
        else:
            assert 400 <= status < 500, made
    else:
        assert 400 <= status < 500, answer
        assert answer["message"]
    assert time.monotonic() - began < 60
    left = list((up.data / "releases").glob("evil/*"))
    assert not left or attack in HARMLESS, left
    assert not Path("/tmp/aether-test-escaped").exists()
    assert not list(up.data.rglob("escaped"))
    assert up.said("steady") == "steady"


def test_more_than_is_allowed_is_refused_before_a_byte_is_sent(up: Server) -> None:
    body = {"app": "evil", "digest": "0" * 64, "size_bytes": 9 * MIB}
    status, answer = up.api("POST", "/artifacts/presign", body)
    assert (status, answer["code"]) == (413, "payload_too_large")


def test_urls_and_keys_work_once_and_for_what_they_were_made(up: Server) -> None:
    blob = archive(member("once"))
    digest = hashlib.sha256(blob).hexdigest()
    body = {"app": "evil", "digest": digest, "size_bytes": len(blob)}
    signed = up.api("POST", "/artifacts/presign", body)[1]
    status, answer = up.api("PUT", signed["url"].replace("expires=", "expires=9"), blob)
    assert status == 403, answer
    assert up.api("PUT", signed["url"], blob[:-1])[0] == 400
    assert up.api("PUT", signed["url"], blob + b"x")[0] in (400, 413)
    wrong = bytes(len(blob))
    assert up.api("PUT", signed["url"], wrong)[0] == 200
    status, answer = up.api("POST", "/artifacts/complete", {**body, "upload_id": signed["upload_id"]})
    assert (status, answer["code"]) == (400, "digest_mismatch")
    again = up.api("POST", "/artifacts/presign", body)[1]
    assert up.api("PUT", again["url"], blob)[0] == 200
    done = {**body, "upload_id": again["upload_id"]}
    key = {"Idempotency-Key": "k1"}
    assert up.api("POST", "/artifacts/complete", done, key)[0] == 200
    assert up.api("POST", "/artifacts/complete", done, key)[0] == 200
    # the URL lives on, the artifact does not change any more
    up.api("PUT", again["url"], wrong)
    assert up.api("GET", f"/artifacts/{digest}/meta")[1]["size_bytes"] == len(blob)
    status, answer = up.api("GET", f"/artifacts/{digest}/download")
    assert status == 307
    begun = {"app": "steady", "digest": up.upload("steady", hello("two")), "command": "node server.js"}
    first = up.api("POST", "/deployments", begun, {"Idempotency-Key": "d1"})[1]
    assert up.api("POST", "/deployments", begun, {"Idempotency-Key": "d1"})[1]["id"] == first["id"]
    status, answer = up.api("POST", "/deployments", {**begun, "command": "node other.js"}, {"Idempotency-Key": "d1"})
    assert (status, answer["code"]) == (409, "idempotency_conflict"), answer
    up.settled(first["id"])
