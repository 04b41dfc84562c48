"""Uploads through everything that networks, stores and people do to them, on every object store there is.

Each test ends with the invariant of `support.uploads`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from aether.client import parts
from aether.client.api import Api
from aether.model.errors import BadRequest, NetworkError
from support import s3_servers
from support.cutter import cutter
from support.uploads import MIB, PART, Told, World, world

AWAY_SECS = 10.0
S3_KINDS = s3_servers.kinds()
KINDS = ["filesystem", *S3_KINDS]
ONE_PIECE, IN_PARTS = 6 * MIB, 4 * PART + 12_345


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(request.param, tmp_path_factory.mktemp("uploads")) as it:
        yield it


@pytest.fixture
def it(shared: World) -> Iterator[World]:
    yield shared
    shared.check()
    shared.stored.clear()
    shared.failed.clear()


@pytest.mark.parametrize("size", [ONE_PIECE, IN_PARTS])
def test_sent_once_and_known_from_then_on(it: World, size: int) -> None:
    path = it.file(size)
    before = it.network.sent
    assert it.send(path).bytes_sent == size
    assert size <= it.network.sent - before < size * 1.01
    assert it.send(path).bytes_sent == 0
    assert not [key for key in it.objects() if key.startswith(("pending/", "claimed/"))]


# --- the network


def test_the_network_of_these_tests_hands_a_reset_on() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        cutter(server.getsockname()) as network,
        socket.create_connection(("127.0.0.1", network.port), 20) as client,
    ):
        there, _ = server.accept()
        client.sendall(b"x")
        there.settimeout(20)
        assert there.recv(1) == b"x"
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        there.close()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


@pytest.mark.parametrize("size", [ONE_PIECE, IN_PARTS])
def test_a_connection_that_is_cut_in_the_middle(it: World, size: int) -> None:
    watch = Told()
    it.network.once_sent(3 * MIB, it.network.cut)
    if size == IN_PARTS:
        it.network.once_sent(15 * MIB, it.network.cut)
    it.send(it.file(size), watch)
    assert watch.troubles


def test_only_the_parts_that_were_cut_are_sent_again(it: World) -> None:
    """Four parts are under way at once; what arrived before the cut is not sent twice."""
    before = it.network.sent
    it.network.once_sent(18 * MIB, it.network.cut)
    it.send(it.file(12 * PART))
    assert it.network.sent - before < 12 * PART + 4 * PART + MIB


def test_a_network_that_is_away_for_ten_seconds(it: World) -> None:
    """For the directory store this is the whole server, for S3 the store alone."""
    watch = Told()
    it.network.once_sent(12 * MIB, lambda: void(it.network.away(AWAY_SECS)))
    began = time.monotonic()
    it.send(it.file(IN_PARTS), watch)
    assert AWAY_SECS <= time.monotonic() - began < AWAY_SECS + 20
    assert watch.troubles


def test_a_network_that_stays_away_is_given_up_and_the_next_upload_goes_on(
    it: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PATIENCE_S", 2.0)
    path = it.file(IN_PARTS)
    it.network.once_sent(PART * 3 + MIB, it.network.down)
    it.network.rate = 4 * MIB
    with pytest.raises(NetworkError):
        it.send(path)
    it.network.rate = 0
    it.network.up()
    watch = Told()
    before = it.network.sent
    sent = it.send(path, watch)
    assert it.network.sent - before < sent.bytes_sent * 1.01 + 100_000
    assert sent.bytes_sent <= IN_PARTS
    assert not watch.troubles


def test_a_slow_client_gets_through_and_holds_nobody_up(it: World) -> None:
    it.network.rate = 400_000
    watch = Told()
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(it.send, it.file(IN_PARTS), watch)
        it.network.wait_sent(MIB)
        it.network.rate = 0
        began = time.monotonic()
        assert pool.submit(it.send, it.file(ONE_PIECE)).result(20).bytes_sent == ONE_PIECE
        assert time.monotonic() - began < 8
        assert not slow.done()
        assert slow.result(100).bytes_sent == IN_PARTS
    assert not watch.troubles


# --- the store


@pytest.mark.parametrize("shared", S3_KINDS, indirect=True, scope="module")
@pytest.mark.parametrize("size", [ONE_PIECE, IN_PARTS])
@pytest.mark.parametrize("phase", ["presign", "put", "complete", "hash"])
def test_s3_is_gone_in_each_phase(it: World, phase: str, size: int) -> None:
    secs = AWAY_SECS if (phase, size) == ("put", IN_PARTS) else 4.0
    watch = Told()
    assert it.s3 is not None
    assert it.inner is not None
    if type(it.s3).kill9 is s3_servers.S3Server.kill9:
        pytest.skip("a server that is not ours to kill")
    killed = threading.Event()

    def kill() -> None:
        assert it.s3 is not None
        it.s3.kill9()
        killed.set()

    path = it.file(size)
    if phase == "presign":
        kill()
    elif phase == "put":
        it.network.once_sent(size // 2, kill)
    elif phase == "hash":
        it.inner.once_received(size // 2, kill)
    with ThreadPoolExecutor() as pool, Doing(it, complete=kill if phase == "complete" else None) as api:
        sent = pool.submit(it.send, path, watch, api=api)
        try:
            assert killed.wait(30)
            time.sleep(secs)
        finally:
            it.s3.start()  # from this thread: it dies with the one that starts it
        sent.result(80)
    assert watch.troubles or phase == "hash", "only the server's own reads go on by themselves"


class Doing(Api):
    """The real API; before completing it does something."""

    def __init__(self, it: World, *, complete: Callable[[], None] | None) -> None:
        super().__init__(it.api().transport)
        self._before = complete

    def complete(self, *args: Any, **kwargs: Any) -> Any:
        before, self._before = self._before, None
        if before is not None:
            before()
        return super().complete(*args, **kwargs)


# --- URLs


@pytest.mark.parametrize("kind", KINDS)
def test_urls_that_expire_in_the_middle(kind: str, tmp_path: Path) -> None:
    """However slow the machine is, what is held for longer than URLs live comes too late."""
    with world(kind, tmp_path, AETHER_PRESIGN_EXPIRE_SECS="2") as it:
        for size in (ONE_PIECE, IN_PARTS):
            watch = Told()
            with Late(it) as api:
                it.send(it.file(size), watch, api=api)
            # a store may hang up on a body that it will not take, and its answer is lost then
            told = ("expired", "AccessDenied", "Broken pipe", "Connection reset")
            assert any(word in said for said in watch.troubles for word in told), watch.troubles
        it.check()


class Late(Api):
    """The real API; what is sent with the first URLs it has signed arrives when they have expired."""

    def __init__(self, it: World) -> None:
        super().__init__(it.api().transport)
        self._it = it
        self._held = False

    def _hold(self) -> None:
        if not self._held:
            self._held = True
            self._it.network.hold(3.5)

    def presign(self, *args: Any, **kwargs: Any) -> Any:
        made = super().presign(*args, **kwargs)
        if "multipart" not in made or made["multipart"]["threshold_bytes"] > kwargs["size_bytes"]:
            self._hold()
        return made

    def presign_parts(self, *args: Any, **kwargs: Any) -> Any:
        made = super().presign_parts(*args, **kwargs)
        self._hold()
        return made


# --- clients


PROGRAM = """
import hashlib, sys
from aether.client.api import Api
from aether.client.transfer import Announced, Watch, transfer
from aether.client.transport import Transport
data = open(sys.argv[2], 'rb').read()
with Api(Transport(sys.argv[1], sys.stdin.readline().strip())) as api:
    transfer(api, Announced('shop', hashlib.sha256(data).hexdigest(), len(data)), sys.argv[2], Watch())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_client_that_is_killed_sends_only_what_is_missing_when_it_comes_back(it: World, how: int) -> None:
    size = 10 * PART + 77
    path = it.file(size)
    enough = threading.Event()
    it.network.once_sent(7 * PART, enough.set)
    it.network.rate = 20 * MIB
    run = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, it.base, str(path)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert run.stdin is not None
        run.stdin.write(f"{it.token()}\n".encode())
        run.stdin.close()
        assert enough.wait(60)
        run.send_signal(how)
        assert run.wait(10) != 0
    finally:
        run.kill()
        run.wait()
        it.network.rate = 0
    time.sleep(0.5)
    watch = Told()
    before = it.network.sent
    sent = it.send(path, watch)
    assert watch.had is not None
    assert watch.had[0] >= 2
    assert sent.bytes_sent == size - watch.had[0] * PART
    assert it.network.sent - before < sent.bytes_sent * 1.01


def put_by_hand(signed: dict[str, Any], base: str, sent: bytes, announced: int) -> bytes:
    """A PUT that announces so many bytes, sends these, and hangs up."""
    url = urlsplit(signed["url"] if "://" in signed["url"] else base + signed["url"])
    headers = {k: v for k, v in signed["headers"].items() if k.lower() not in ("content-length", "host")}
    head = [f"PUT {url.path}?{url.query} HTTP/1.1", f"Host: {url.netloc}", f"Content-Length: {announced}"]
    head += [f"{name}: {value}" for name, value in headers.items()]
    with socket.create_connection((url.hostname or "", url.port or 80), 20) as sock:
        answer = b""
        with contextlib.suppress(OSError):  # hung up on us, at whatever byte, which is an answer too
            sock.sendall("\r\n".join([*head, "", ""]).encode() + sent)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while data := sock.recv(65_536):
                answer += data
        return answer


def takes_truncated(it: World) -> bool:
    """versitygw 1.8 answers 200 to a body that ends early, and lists it as whole."""
    return it.s3 is not None and it.s3.name == "versitygw"


@pytest.mark.parametrize("announced", ["whole", "short"])
def test_a_truncated_upload_is_nothing(it: World, announced: str) -> None:
    data = os.urandom(ONE_PIECE)
    digest = hashlib.sha256(data).hexdigest()
    half = data[: len(data) // 2]
    body = {"digest": digest, "size_bytes": len(data)}
    with it.api() as api:
        signed = api.presign("shop", **body)
        answer = put_by_hand(dict(signed), it.base, half, len(data) if announced == "whole" else len(half))
        assert takes_truncated(it) or b" 200 " not in answer.split(b"\r\n")[0], answer
        with pytest.raises(BadRequest):
            api.complete("shop", **body, upload_id=signed["upload_id"])
    it.failed.add(digest)


def test_truncated_parts_are_not_parts(it: World) -> None:
    data = os.urandom(2 * PART)
    digest = hashlib.sha256(data).hexdigest()
    body = {"digest": digest, "size_bytes": len(data)}
    with it.api() as api:
        begun = api.init_multipart("shop", **body)
        upload = begun["upload_id"]
        assert upload is not None
        one, two = api.presign_parts("shop", upload, [1, 2])
        etag = api.transport.put(one["url"], Bytes(data[:PART]), headers=one["headers"]).headers["etag"]
        answer = put_by_hand(dict(two), it.base, data[PART : PART + MIB], PART)
        assert takes_truncated(it) or b" 200 " not in answer.split(b"\r\n")[0], answer
        listed = [part["part_number"] for part in api.init_multipart("shop", **body)["parts"]]
        assert listed == ([1, 2] if takes_truncated(it) else [1])
        with pytest.raises(BadRequest):
            api.complete("shop", **body, upload_id=upload, parts=[(1, etag)])
        with pytest.raises(BadRequest):
            api.complete("shop", **body, upload_id=upload, parts=[(1, etag), (2, etag)])
    path = it.folder / "late.tar.gz"
    path.write_bytes(data)
    watch = Told()
    assert it.send(path, watch).bytes_sent == PART, "and the upload goes on after all that"
    assert watch.had == (1, 2)


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._left = data

    def read(self, size: int = -1, /) -> bytes:
        block, self._left = self._left[:size], self._left[size:]
        return block


# --- many at once


GROWTH_BYTES = 50 * 1000 * 1000


@pytest.mark.parametrize("in_parts", [False, True])
def test_64_uploads_at_once_need_little_memory(it: World, in_parts: bool) -> None:
    """In one piece the bytes of all of them are hashed at once, in parts they come over 192 connections."""
    size = 2 * PART + 1000 if in_parts else 5 * MIB
    files = [it.file(size) for _ in range(64)]
    for _ in range(3):
        it.send(it.file(size))
    before = peak_rss(it, reset=True)
    with ThreadPoolExecutor(64) as pool:
        for sent in [pool.submit(it.send, path) for path in files]:
            assert sent.result(150).bytes_sent == size
    assert len(it.stored) == 64 + 3
    growth = peak_rss(it) - before
    print(f"growth {growth / 1e6:.1f} MB")
    assert growth < GROWTH_BYTES


def peak_rss(it: World, *, reset: bool = False) -> int:
    """Bytes of the server's largest resident set since the last reset; with `reset` what it is now."""
    assert it.up.process is not None
    process = Path(f"/proc/{it.up.process.pid}")
    if reset:
        (process / "clear_refs").write_text("5")
    line = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def void(_: object) -> None:
    """For callbacks that give something back."""
