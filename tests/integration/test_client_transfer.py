"""The client's upload, piece by piece, against small real HTTP servers that play API and object store and break in
chosen ways."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.client import dial, lanes
from aether.client.api import Api
from aether.client.transfer import Announced, Sent, Watch, transfer
from aether.client.transport import Transport
from aether.client.upload import SourceFile
from aether.model.errors import (
    AetherError,
    DigestMismatch,
    Forbidden,
    LocalIOError,
    NetworkError,
    PayloadTooLarge,
)
from support.breaking import Exchange, Handler, Server, serving

PART = 1_000_000
TCP_REPAIR = 19
"""Linux: a connection that is closed in this state is gone, and its peer is told nothing."""
EXPIRED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
DONE = {
    "artifact_url": "/a",
    "digest": "d",
    "duplicate": False,
    "app_linked": True,
    "verified": False,
    "size_bytes": 1,
}


class Registry:
    """Keeps uploads in memory; `api` is the server that knows the token, `store` another origin."""

    def __init__(self, api: Server, store: Server, data: bytes, threshold: int = 2 * PART) -> None:
        self.api, self.store, self.data, self.threshold = api, store, data, threshold
        self.count = -(-len(data) // PART)
        self.parts: dict[int, bytes] = {}
        self.uploads = 0
        self.signed: list[int] = []
        self.lock = threading.Lock()
        self.whole = b""
        self.completed: dict[str, Any] | None = None
        self.before_part: Handler | None = None
        self.etag: Callable[[bytes], str] = lambda data: hashlib.md5(data).hexdigest()
        self.most_at_once = self.at_once = 0
        api.routes.update(
            {
                "/artifacts/presign": self.presign,
                "/artifacts/complete": self.complete,
                "/artifacts/multipart/init": self.init,
                "/artifacts/multipart/presign-part": self.presign_part,
                "/artifacts/multipart/complete": self.complete_parts,
            }
        )
        for number in range(1, self.count + 1):
            store.routes[f"/bucket/part/{number}"] = self.put_part
        store.routes["/bucket/whole"] = self.put_whole

    def presign(self, it: Exchange) -> None:
        self.uploads += 1
        rules = {"threshold_bytes": self.threshold, "part_size_bytes": PART}
        url = f"{self.store.url}/bucket/whole?X-Amz-Signature=s{self.uploads}"
        signed = {"x-amz-checksum-sha256": "abc="}
        upload = f"u{self.uploads}"
        it.reply({"method": "PUT", "url": url, "headers": signed, "multipart": rules, "upload_id": upload})

    def init(self, it: Exchange) -> None:
        there = [
            {"part_number": n, "size_bytes": len(b), "etag": f'"{self.etag(b)}"'}
            for n, b in sorted(self.parts.items())
        ]
        it.reply({"upload_id": "m", "storage_key": "k", "part_size_bytes": PART, "part_count": self.count,
                  "expires_at": "", "duplicate": False, "parts": there})  # fmt: skip

    def presign_part(self, it: Exchange) -> None:
        asked = json.loads(it.body)
        self.signed += asked["part_numbers"]
        made = [
            {"method": "PUT", "url": f"{self.store.url}/bucket/part/{n}?sig=%2Fx", "headers": {"X-Amz-Meta": "1"},
             "part_number": n, "size_bytes": PART, "expires_at": ""}
            for n in asked["part_numbers"]
        ]  # fmt: skip
        it.reply({"parts": made})

    def put_part(self, it: Exchange) -> None:
        number = int(it.path.split("?")[0].rsplit("/", 1)[1])
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.before_part is not None:
                self.before_part(it)
                if it.close_connection:
                    return
        finally:
            with self.lock:
                self.at_once -= 1
        self.parts[number] = it.body
        it.reply(b"", ETag=f'"{self.etag(it.body)}"')

    def put_whole(self, it: Exchange) -> None:
        self.whole = it.body
        it.reply(b"", ETag='"e"')

    def complete(self, it: Exchange) -> None:
        self.completed = json.loads(it.body)
        assert self.whole == self.data
        it.reply(DONE)

    def complete_parts(self, it: Exchange) -> None:
        self.completed = json.loads(it.body)
        named = self.completed["parts"]
        assert [part["part_number"] for part in named] == list(range(1, self.count + 1))
        assert all(part["etag"].strip('"') == self.etag(self.parts[part["part_number"]]) for part in named)
        if b"".join(self.parts[n] for n in sorted(self.parts)) != self.data:
            self.parts.clear()
            it.reply({"code": "digest_mismatch", "message": "other bytes"}, 400)
        else:
            it.reply(DONE)


class Seen(Watch):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.troubles: list[str] = []
        self.had: tuple[int, int] | None = None

    def advance(self, done: int, total: int) -> None:
        self.steps.append(done)

    def resumed(self, arrived: int, count: int) -> None:
        self.had = (arrived, count)

    def trouble(self, error: AetherError) -> None:
        self.troubles.append(error.message)


DATA = os.urandom(9 * PART + 12_345)


@pytest.fixture
def registry() -> Iterator[Registry]:
    with serving() as api, serving() as store:
        yield Registry(api, store, DATA)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "app.tar.gz"
    path.write_bytes(DATA)
    return path


def send(registry: Registry, file: Path, watch: Watch | None = None, **more: Any) -> Sent:
    announced = Announced("shop", hashlib.sha256(DATA).hexdigest(), len(DATA), runtime="node22", **more)
    with Api(Transport(registry.api.url, "secret")) as api:
        return transfer(api, announced, str(file), watch or Watch())


def test_parts_go_side_by_side_and_are_all_named(registry: Registry, file: Path) -> None:
    everybody_is_there = threading.Barrier(lanes.LANES)

    def together(it: Exchange) -> None:
        if len(registry.parts) == 0 and it.path.split("?")[0].rsplit("/", 1)[1] in "1234":
            with contextlib.suppress(threading.BrokenBarrierError):
                everybody_is_there.wait(10)

    registry.before_part = together
    watch = Seen()
    sent = send(registry, file, watch, signature="ab" * 64, content_digest="c" * 64)
    assert sent.bytes_sent == len(DATA)
    assert sent.completed == DONE
    assert registry.most_at_once == lanes.LANES
    assert registry.completed is not None
    assert registry.completed["idempotency_key"] == registry.completed["upload_id"] == "m"
    assert registry.completed["signature"] == "ab" * 64
    assert registry.completed["put_duration_ms"] >= 0
    assert watch.steps[-1] == len(DATA)
    assert sorted(registry.signed) == list(range(1, 11)), "each part is signed once when nothing breaks"


def test_the_store_gets_what_was_signed_and_no_token(registry: Registry, file: Path) -> None:
    send(registry, file)
    assert all(seen.headers["Authorization"] == "Bearer secret" for seen in registry.api.seen)
    for seen in registry.store.seen:
        assert seen.headers["Authorization"] is None
        assert seen.headers["traceparent"] is None
        assert seen.headers.get_all("X-Amz-Meta") == ["1"]
        assert seen.headers.get_all("Content-Length") == [str(len(seen.body))]
        assert seen.path.endswith("?sig=%2Fx"), "the query is sent as it was signed"
    assert len({seen.client_address for seen in registry.store.seen}) == lanes.LANES, "a connection for each lane"


def test_below_the_threshold_it_is_one_put(registry: Registry, file: Path) -> None:
    registry.threshold = len(DATA) + 1
    watch = Seen()
    assert send(registry, file, watch).bytes_sent == len(DATA)
    assert [seen.headers["x-amz-checksum-sha256"] for seen in registry.store.seen] == ["abc="]
    assert watch.steps[0] == 0
    assert watch.steps[-1] == len(DATA)
    registry.threshold = len(DATA)
    send(registry, file)
    assert len(registry.parts) == registry.count, "from the threshold on it is parts"


def test_a_server_that_knows_no_parts_gets_one_put(registry: Registry, file: Path) -> None:
    def presign(it: Exchange) -> None:
        it.reply({"method": "PUT", "url": f"{registry.store.url}/bucket/whole", "headers": {}, "upload_id": "u"})

    registry.api.routes["/artifacts/presign"] = presign
    assert send(registry, file).bytes_sent == len(DATA)
    assert not registry.parts


def test_what_the_registry_has_is_not_sent_but_a_signature_is(registry: Registry, file: Path) -> None:
    registry.api.routes["/artifacts/presign"] = lambda it: it.reply(
        {"method": "NONE", "url": None, "headers": {}, "upload_id": None, "duplicate": True}
    )
    registry.api.routes["/artifacts/complete"] = lambda it: it.reply(DONE)
    assert send(registry, file).bytes_sent == 0
    assert registry.api.paths() == ["/artifacts/presign"]
    assert send(registry, file, signature="ab" * 64).completed == DONE
    said = json.loads(registry.api.seen[-1].body)
    assert "upload_id" not in said
    assert said["signature"] == "ab" * 64
    assert not registry.store.seen


def test_broken_parts_and_refusals_of_every_passing_kind_are_sent_again(registry: Registry, file: Path) -> None:
    def trouble(it: Exchange) -> None:
        number = it.path.split("?")[0].rsplit("/", 1)[1]
        if it.number > 1:
            return
        if number == "2":
            it.cut()
        elif number in "3456":
            status, body = {
                "3": (503, b"<Error><Code>SlowDown</Code></Error>"), "4": (403, EXPIRED),
                "5": (400, b"<Error><Code>RequestTimeout</Code><Message>idle</Message></Error>"), "6": (500, b""),
            }[number]  # fmt: skip
            it.reply(body, status, Connection="close")
            it.close_connection = True

    registry.before_part = trouble
    watch = Seen()
    assert send(registry, file, watch).bytes_sent == len(DATA)
    assert len(watch.troubles) == 5
    assert any("Request has expired" in said for said in watch.troubles)
    assert sorted(registry.signed) == sorted([*range(1, 11), 2, 3, 4, 5, 6]), "what failed was signed anew"


def test_a_store_whose_machine_vanishes_is_noticed(
    registry: Registry, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is gone without a word while its answer is awaited, and knows of no connection when it is back."""
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        except PermissionError:
            pytest.skip("unsupported: without CAP_NET_ADMIN a connection cannot be taken away silently")
    monkeypatch.setattr(dial, "KEEPALIVE_S", 1)

    def vanish_once(it: Exchange) -> None:
        if it.number == 1 and "/part/2" in it.path:
            it.connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            os.close(it.connection.detach())
            it.close_connection = True

    registry.before_part = vanish_once
    watch = Seen()
    assert send(registry, file, watch).bytes_sent == len(DATA)
    assert len(watch.troubles) == 1


def test_a_store_that_refuses_fresh_urls_is_believed(registry: Registry, file: Path) -> None:
    def refuse(it: Exchange) -> None:
        it.reply(EXPIRED, 403, Connection="close")
        it.close_connection = True

    registry.before_part = refuse
    with pytest.raises(Forbidden, match="Request has expired"):
        send(registry, file)
    registry.threshold = 0
    registry.store.routes["/bucket/whole"] = refuse
    with pytest.raises((Forbidden, NetworkError)):
        send(registry, file)
    assert 3 <= registry.uploads <= 6


def test_one_put_is_sent_again_and_with_another_url_after_it_expired(registry: Registry, file: Path) -> None:
    registry.threshold = 0

    def put(it: Exchange) -> None:
        if it.number == 1:
            it.cut()
        elif "s1" in it.path:
            it.reply(EXPIRED, 403)
        else:
            registry.put_whole(it)

    registry.store.routes["/bucket/whole"] = put
    assert send(registry, file).bytes_sent == len(DATA)
    assert [seen.path.rsplit("=")[1] for seen in registry.store.seen] == ["s1", "s1", "s2"]
    assert registry.completed is not None
    assert registry.completed["upload_id"] == "u2"


def test_calls_of_the_api_outlive_an_outage(registry: Registry, file: Path) -> None:
    for path in ("presign", "multipart/init", "multipart/presign-part", "multipart/complete"):
        works = registry.api.routes[f"/artifacts/{path}"]

        def away(it: Exchange, works: Handler = works) -> None:
            if it.number == 1:
                it.reply({"code": "service_unavailable", "message": "the object store cannot answer"}, 503)
            elif it.number == 2:
                it.cut()
            else:
                works(it)

        registry.api.routes[f"/artifacts/{path}"] = away
    watch = Seen()
    assert send(registry, file, watch).bytes_sent == len(DATA)
    assert watch.troubles.count("the object store cannot answer") == 4


def test_what_has_arrived_is_checked_and_not_sent_again(registry: Registry, file: Path) -> None:
    registry.parts = {n: DATA[(n - 1) * PART : n * PART] for n in (1, 2, 5)}
    registry.parts[5] = bytes(PART)
    watch = Seen()
    assert send(registry, file, watch).bytes_sent == len(DATA) - 2 * PART
    assert watch.had == (2, 10)
    assert watch.steps[0] == 2 * PART
    assert sorted({int(seen.path.split("?")[0].rsplit("/", 1)[1]) for seen in registry.store.seen}) == [
        3,
        *range(4, 11),
    ]


def test_parts_that_were_cut_off_and_are_listed_all_the_same_are_sent_again(registry: Registry, file: Path) -> None:
    """No etag is right: the one of a part that was just sent shows that this store's are MD5s."""
    registry.parts = {2: bytes(PART), 3: bytes(PART)}
    watch = Seen()
    assert send(registry, file, watch).bytes_sent == len(DATA)
    assert watch.had is None
    assert watch.troubles == []


def test_where_etags_are_no_md5s_what_has_arrived_is_kept(registry: Registry, file: Path) -> None:
    registry.etag = lambda data: hashlib.md5(b"encrypted" + data).hexdigest()
    registry.parts = {n: DATA[(n - 1) * PART : n * PART] for n in (1, 2)}
    watch = Seen()
    assert send(registry, file, watch).bytes_sent == len(DATA) - 2 * PART
    assert watch.had == (2, 10)


def test_parts_of_an_earlier_run_that_turn_out_wrong_are_begun_anew(registry: Registry, file: Path) -> None:
    """Where no etag is an MD5 nothing says that a part is wrong, until the registry has hashed the whole."""
    registry.etag = lambda data: hashlib.md5(b"encrypted" + data).hexdigest()
    registry.parts = {3: bytes(PART)}
    watch = Seen()
    assert send(registry, file, watch).bytes_sent == 2 * len(DATA) - PART
    assert watch.troubles == ["other bytes"]


def test_a_digest_that_is_wrong_is_said_at_once(registry: Registry, file: Path) -> None:
    registry.api.routes["/artifacts/multipart/complete"] = lambda it: it.reply(
        {"code": "digest_mismatch", "message": "other bytes"}, 400
    )
    with pytest.raises(DigestMismatch):
        send(registry, file)
    assert registry.api.paths().count("/artifacts/multipart/init") == 1


def test_an_upload_that_is_gone_is_begun_anew(registry: Registry, file: Path) -> None:
    def gone(it: Exchange) -> None:
        if it.number == 1 and "part/7" in it.path:
            it.reply(b"<Error><Code>NoSuchUpload</Code></Error>", 404, Connection="close")
            it.close_connection = True

    registry.before_part = gone
    watch = Seen()
    assert send(registry, file, watch).completed == DONE
    assert registry.api.paths().count("/artifacts/multipart/init") == 2
    assert any("NoSuchUpload" in said for said in watch.troubles)


def test_a_file_that_changes_or_is_missing(registry: Registry, file: Path, tmp_path: Path) -> None:
    with pytest.raises(LocalIOError, match="cannot read"):
        send(registry, tmp_path / "missing")

    def shorten(it: Exchange) -> None:
        os.truncate(file, PART)

    registry.before_part = shorten
    with pytest.raises(LocalIOError, match="changed while"):
        send(registry, file)
    with pytest.raises(LocalIOError, match="it has changed"):
        send(registry, file)


def test_an_upload_that_is_refused_early_says_why(registry: Registry, file: Path) -> None:
    def refuse(it: Exchange) -> None:
        it.reply({"code": "payload_too_large", "message": "at most 1 MB"}, 413, Connection="close")
        it.close_connection = True

    registry.threshold = 0
    registry.store.routes["/early"] = refuse
    registry.api.routes["/artifacts/presign"] = lambda it: it.reply(
        {"method": "PUT", "url": f"{registry.store.url}/early", "headers": {}, "upload_id": "u"}
    )
    registry.api.routes["/artifacts/complete"] = lambda it: it.reply(DONE)
    with pytest.raises(PayloadTooLarge):
        send(registry, file)


def test_tls_is_not_left_for_a_store_elsewhere() -> None:
    class Body:
        size = 0

        def read(self, size: int = -1, /) -> bytes:
            raise AssertionError("nothing may be sent")

    with (
        Transport("https://api.example.com", "secret") as transport,
        pytest.raises(NetworkError, match=r"http://store\.example\.com without TLS: refused"),
    ):
        transport.put("http://store.example.com/x", Body())


def test_a_server_behind_a_socket_can_have_its_store_elsewhere(
    registry: Registry, file: Path, tmp_path: Path
) -> None:
    with Transport(f"unix://{tmp_path}/nobody.sock", "secret") as transport, SourceFile(str(file)) as source:
        url = f"{registry.store.url}/bucket/whole?X-Amz-Signature=s"
        assert transport.put(url, source.part(0, len(DATA), lambda _: None)).status == 200
    assert registry.whole == DATA
    assert registry.store.seen[0].headers["Authorization"] is None


PROGRAM = """
import hashlib, sys
from aether.client.api import Api
from aether.client.transfer import Announced, Watch, transfer
from aether.client.transport import Transport
data = open(sys.argv[2], 'rb').read()
with Api(Transport(sys.argv[1], 'secret')) as api:
    transfer(api, Announced('shop', hashlib.sha256(data).hexdigest(), len(data)), sys.argv[2], Watch())
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_ends_it_at_once_and_the_next_run_goes_on(registry: Registry, file: Path, how: int) -> None:
    stuck, stop = threading.Event(), threading.Event()

    def hang(it: Exchange) -> None:
        if len(registry.parts) >= 4:
            stuck.set()
            stop.wait(30)
            it.cut()

    registry.before_part = hang
    run = subprocess.Popen([sys.executable, "-c", PROGRAM, registry.api.url, str(file)], stderr=subprocess.PIPE)
    try:
        assert stuck.wait(30)
        began = time.monotonic()
        run.send_signal(how)
        assert run.wait(20) != 0
        assert time.monotonic() - began < 5
        assert run.stderr is not None
        said = run.stderr.read()
        assert how == signal.SIGKILL or said.count(b"Traceback") == 1, said.decode()
    finally:
        stop.set()
        run.kill()
        run.wait()
        run.stderr.close() if run.stderr else None
    registry.before_part = None
    arrived = dict(registry.parts)
    watch = Seen()
    assert send(registry, file, watch).bytes_sent == len(DATA) - sum(len(data) for data in arrived.values())
    assert watch.had == (len(arrived), 10)
