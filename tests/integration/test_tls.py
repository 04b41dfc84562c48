"""TLS on a whole server: the local authority, files that change, certificates of hosts, the plain port beside it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import http.client
import json
import os
import socket
import ssl
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from aether.model.errors import ConfigError
from aether.settings import load
from aether.topology.tls import open_tls
from support.certificates import self_signed
from support.product import AETHER, Product, free_port, node_app
from support.server import wait_for

ECHO = """
const http = require('http');
http.createServer((request, response) => {
  response.end(JSON.stringify({url: request.url, headers: request.headers}));
}).listen(process.env.PORT);
process.on('SIGTERM', () => process.exit(0));
"""

CHAT = """
const http = require('http');
const server = http.createServer((request, response) => response.end('plain\\n'));
server.on('upgrade', (request, socket) => {
  const key = request.headers['sec-websocket-key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11';
  const accept = require('crypto').createHash('sha1').update(key).digest('base64');
  socket.write('HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\n' +
    'Sec-WebSocket-Accept: ' + accept + '\\r\\n\\r\\n');
  socket.on('data', (frame) => {
    const said = frame.subarray(6).map((byte, at) => byte ^ frame[2 + at % 4]);
    socket.write(Buffer.concat([Buffer.from([0x81, said.length]), said]));
  });
  socket.on('error', () => socket.destroy());
});
server.listen(process.env.PORT);
process.on('SIGTERM', () => process.exit(0));
"""


class World(Product):
    """A product that speaks TLS with its local authority, with a plain port beside it."""

    plain: int = 0

    @property
    def env(self) -> dict[str, str]:
        return super().env | {"AETHER_API_BASE": f"https://127.0.0.1:{self.port}"}

    @property
    def ca(self) -> Path:
        return self.data / "ca" / "ca.pem"

    def trusting(self, ca: Path | None = None) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(ca or self.ca))

    def shown(self, name: str, ca: Path | None = None) -> x509.Certificate:
        """The certificate of a handshake that a client who checks everything accepts."""
        with (
            socket.create_connection(("127.0.0.1", self.port), 10) as raw,
            self.trusting(ca).wrap_socket(raw, server_hostname=name) as wrapped,
        ):
            return x509.load_der_x509_certificate(wrapped.getpeercert(True) or b"")

    def fetch(
        self, host: str, path: str = "/", method: str = "GET", *, secure: bool = True, ca: Path | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        raw = socket.create_connection(("127.0.0.1", self.port if secure else self.plain), 10)
        connection = http.client.HTTPConnection(host, timeout=10)
        connection.sock = self.trusting(ca).wrap_socket(raw, server_hostname=host) if secure else raw
        try:
            shown = f"{host}:{self.port if secure else self.plain}"
            connection.request(method, path, headers={"Host": shown})
            answer = connection.getresponse()
            return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    it = World(tmp_path_factory.mktemp("tls"), extra_env={"AETHER_STOP_GRACE_SECS": "1"})
    it.plain = free_port()
    try:
        it.start("--tls", "--http-port", str(it.plain))
        it.run("login")
        project = it.home / "echo"
        project.mkdir()
        (project / "server.js").write_text(ECHO)
        (project / "package.json").write_text('{"name": "echo", "scripts": {"start": "node server.js"}}')
        it.run("deploy", str(project))
        yield it
    finally:
        it.close()


def test_the_command_line_trusts_the_local_authority_by_itself(world: World) -> None:
    assert any("let browsers and curl trust" in line for line in world.printed)
    listed = world.run("list", "--format", "json")
    assert listed.json["items"][0]["url"] == f"https://echo.localhost:{world.port}/"
    lost = world.run("list", check=False, env={"XDG_CACHE_HOME": str(world.home / "other"), "AETHER_TOKEN": "x"})
    assert lost.code == 40
    assert "--ca-file" in lost.stderr
    trusted = {"XDG_CACHE_HOME": str(world.home / "other"), "AETHER_TOKEN": "x", "AETHER_CA_FILE": str(world.ca)}
    assert world.run("list", check=False, env=trusted).code == 10, "the server was reached and refused the token"
    assert world.run("list", check=False, env={**trusted, "AETHER_CA_FILE": "/none"}).code == 10


def test_keys_are_private_and_the_authority_is_bounded(world: World) -> None:
    key = world.data / "ca" / "ca-key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    ca = x509.load_pem_x509_certificate(world.ca.read_bytes())
    constraints = ca.extensions.get_extension_for_class(x509.NameConstraints)
    assert constraints.critical
    names = {str(name.value) for name in constraints.value.permitted_subtrees or ()}
    assert names == {"localhost", "test", "127.0.0.0/8", "127.0.0.1/32", "::1/128"}
    assert not list((world.data / "run").glob("leaf-*")), "no key of a leaf stays behind"


def test_each_name_gets_a_certificate_that_a_strict_client_accepts(world: World) -> None:
    for name in ("localhost", "echo.localhost", "other.localhost", "127.0.0.1"):
        found = world.shown(name)
        assert (found.not_valid_after_utc - dt.datetime.now(dt.UTC)).days <= 30
    with pytest.raises(ssl.SSLCertVerificationError):
        world.shown("bank.example.com")


def test_the_app_is_told_the_truth_about_the_connection(world: World) -> None:
    status, body, _ = world.fetch("echo.localhost", "/x?y=1")
    assert status == 200
    assert b'"x-forwarded-proto":"https"' in body
    assert f'"x-forwarded-host":"echo.localhost:{world.port}"'.encode() in body
    assert b'"x-forwarded-for":"127.0.0.1"' in body


def test_curl_and_openssl_agree(world: World) -> None:
    url = f"https://echo.localhost:{world.port}/"
    curl = ["curl", "-sS", "--cacert", str(world.ca), "--resolve", f"echo.localhost:{world.port}:127.0.0.1", url]
    assert '"url":"/"' in subprocess.run(curl, capture_output=True, text=True, timeout=20, check=True).stdout
    base = ["openssl", "s_client", "-connect", f"127.0.0.1:{world.port}", "-servername", "echo.localhost"]
    said = subprocess.run(
        [*base, "-alpn", "h2,http/1.1", "-CAfile", str(world.ca)],
        input="", capture_output=True, text=True, timeout=20, check=False,
    ).stdout  # fmt: skip
    assert "ALPN protocol: http/1.1" in said
    assert "Verify return code: 0 (ok)" in said
    old = subprocess.run(
        [*base, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"],
        input="", capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert old.returncode != 0


def test_sessions_are_resumed(world: World) -> None:
    context = world.trusting()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    session = None
    for reused in (False, True):
        with (
            socket.create_connection(("127.0.0.1", world.port), 10) as raw,
            context.wrap_socket(raw, server_hostname="echo.localhost", session=session) as wrapped,
        ):
            session = wrapped.session
            assert wrapped.session_reused is reused


def test_the_plain_port_sends_everything_on(world: World) -> None:
    for host in ("echo.localhost", "localhost", "127.0.0.1"):
        status, _, fields = world.fetch(host, "/a?b=c", "POST", secure=False)
        assert (status, fields["location"]) == (308, f"https://{host}:{world.port}/a?b=c")
    assert world.fetch("unknown.example.com", secure=False)[0] == 404


def test_a_host_shows_the_certificate_it_was_given(world: World) -> None:
    run = world.run
    run("hosts", "add", "shop.test", "--app", "echo", "--hsts")
    assert world.fetch("shop.test")[0] == 200, "the local authority speaks for .test"
    chain, key = self_signed(world.home, "given", "shop.test", "*.shop.test")
    wrong = run(
        "hosts", "cert", "shop.test", "--app", "echo", "--cert", str(chain), "--key", str(world.ca), check=False
    )
    assert wrong.code == 2
    assert "private key" in wrong.stderr
    run("hosts", "cert", "shop.test", "--app", "echo", "--cert", str(chain), "--key", str(key))
    assert world.shown("shop.test", chain).subject.rfc4514_string() == "CN=given"
    kept = world.data / "tls" / "shop.test.pem"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    fields = world.fetch("shop.test", ca=chain)[2]
    assert fields["strict-transport-security"] == "max-age=31536000"
    assert "strict-transport-security" not in world.fetch("echo.localhost")[2]
    assert world.fetch("shop.test", secure=False)[0] == 308
    shown = run("hosts", "list", "--app", "echo", "--format", "json").json["items"]
    assert (shown[0]["certificate"]["source"], shown[0]["hsts_secs"]) == ("given", 31536000)

    other = run("hosts", "add", "else.test", "--app", "echo", "--allow-http")
    assert other.code == 0
    refused = run("hosts", "cert", "else.test", "--app", "echo", "--cert", str(chain), "--key", str(key), check=False)
    assert (refused.code, "not for else.test" in refused.stderr) == (2, True)
    assert world.fetch("else.test", secure=False)[0] == 200

    world.kill9()
    world.start("--tls", "--http-port", str(world.plain))
    assert world.shown("shop.test", chain).subject.rfc4514_string() == "CN=given"
    run("hosts", "remove", "shop.test", "--app", "echo")
    assert not kept.exists()
    with pytest.raises(ssl.SSLCertVerificationError):
        world.shown("shop.test", chain)


def test_a_websocket_over_tls_outlives_changes_of_certificates(world: World) -> None:
    world.run("deploy", str(node_app(world.home / "chat", CHAT)))
    host, key = "chat.localhost", "dGhlIHNhbXBsZSBub25jZQ=="
    with (
        socket.create_connection(("127.0.0.1", world.port), 10) as raw,
        world.trusting().wrap_socket(raw, server_hostname=host) as wrapped,
        wrapped.makefile("rwb") as talk,
    ):
        fields = [
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
        ]
        talk.write("\r\n".join([f"GET /ws HTTP/1.1\r\nHost: {host}:{world.port}", *fields, "", ""]).encode())
        talk.flush()
        head = [line.decode().strip().lower() for line in iter(talk.readline, b"\r\n")]
        assert head[0] == "http/1.1 101 switching protocols"
        assert "sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in head, "the answer of RFC 6455, section 1.3"
        chain, private = self_signed(world.home, "later", "chat.test")
        for said in (b"before", b"after"):
            mask = os.urandom(4)
            masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(said))
            talk.write(bytes([0x81, 0x80 | len(said)]) + mask + masked)
            talk.flush()
            assert talk.read(2 + len(said)) == bytes([0x81, len(said)]) + said
            if said == b"before":
                world.run("hosts", "add", "chat.test", "--app", "chat")
                world.run("hosts", "cert", "chat.test", "--app", "chat", "--cert", str(chain), "--key", str(private))
                assert world.shown("chat.test", chain).subject.rfc4514_string() == "CN=later"


def test_access_lines_go_to_stdout_where_they_are_wanted(tmp_path: Path) -> None:
    """Every line of standard output after the greeting is JSON, and no file is written."""
    home = tmp_path / "home"
    it = World(home, extra_env={"AETHER_STOP_GRACE_SECS": "1"})
    shown = tmp_path / "stdout"
    with shown.open("wb") as out:
        server = subprocess.Popen(
            [AETHER, "up", "--port", str(it.port), "--tls", "--access-log", "stdout"],
            env=it.env, stdout=out, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: b"aether login" in shown.read_bytes())
        assert it.fetch("nobody.localhost", "/seen?secret=1")[0] == 404
        lines = wait_for(lambda: [line for line in shown.read_text().splitlines() if '"/seen"' in line])
        told = json.loads(lines[0])
        assert (told["method"], told["path"], told["status"], told["app"]) == ("GET", "/seen", 404, None)
        assert "secret" not in shown.read_text()
        assert not (it.data / "logs" / "access.log").exists()
    finally:
        server.terminate()
        assert server.wait(60) == 0


def test_answers_of_the_edge_itself_keep_browsers_on_https_too(world: World) -> None:
    world.run("apps", "create", "empty")
    world.run("hosts", "add", "strict.test", "--app", "empty", "--hsts")
    world.run("hosts", "add", "www.strict.test", "--app", "empty", "--hsts", "--redirect-to", "strict.test")
    world.run("hosts", "add", "loose.test", "--app", "empty")
    for host, expected in (("strict.test", 503), ("www.strict.test", 308)):
        for method in ("GET", "HEAD"):
            status, _, fields = world.fetch(host, "/a", method)
            assert (status, fields["strict-transport-security"]) == (expected, "max-age=31536000")
        status, _, fields = world.fetch(host, "/a", secure=False)
        assert (status, "strict-transport-security" in fields) == (308, False), "over plain HTTP it means nothing"
    status, body, fields = world.fetch("loose.test")
    assert (status, "strict-transport-security" in fields) == (503, False)
    assert json.loads(body)["code"] == "service_unavailable"


def test_a_thousand_silent_clients_do_no_harm(world: World) -> None:
    silent: list[socket.socket] = []
    try:
        for _ in range(1000):
            silent.append(socket.create_connection(("127.0.0.1", world.port), 10))
        for _ in range(20):
            assert world.fetch("echo.localhost")[0] == 200
        # and those that speak, but not TLS
        silent[0].sendall(b"GET / HTTP/1.1\r\nHost: echo.localhost\r\n\r\n")
        silent[0].settimeout(10)
        assert not silent[0].recv(100).startswith(b"HTTP")
        # their time is bounded: the server closes them by itself
        silent[1].settimeout(20)
        assert silent[1].recv(1) == b""
    finally:
        for sock in silent:
            sock.close()


def test_large_answers_wait_for_a_slow_client(world: World, tmp_path: Path) -> None:
    server = """
const http = require('http');
http.createServer((q, r) => { r.end(Buffer.alloc(64 * 1024 * 1024, 'x')); }).listen(process.env.PORT);
process.on('SIGTERM', () => process.exit(0));
"""
    project = tmp_path / "large"
    project.mkdir()
    (project / "server.js").write_text(server)
    (project / "package.json").write_text('{"name": "large", "scripts": {"start": "node server.js"}}')
    world.run("deploy", str(project))
    assert world.process is not None
    statm = Path(f"/proc/{world.process.pid}/statm")
    before = int(statm.read_text().split()[1])
    raw = socket.create_connection(("127.0.0.1", world.port), 10)
    with world.trusting().wrap_socket(raw, server_hostname="large.localhost") as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: large.localhost\r\nConnection: close\r\n\r\n")
        assert slow.recv(1000).startswith(b"HTTP/1.1 200")
        grown = (int(statm.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE")
        assert grown < 24 * 1024 * 1024, "what the client does not read stays with the app"
        size = 0
        while part := slow.recv(1 << 20):
            size += len(part)
        assert size > 64 * 1024 * 1024 - 1000


async def test_certificate_files_are_shown_anew_without_a_dropped_connection(tmp_path: Path) -> None:
    chain, key = self_signed(tmp_path, "first", "localhost", "files.localhost")
    first = chain.read_bytes()
    it = World(tmp_path / "home", extra_env={"AETHER_STOP_GRACE_SECS": "1"})
    try:
        await asyncio.to_thread(it.start, "--tls-cert", str(chain), "--tls-key", str(key))
        trusted = tmp_path / "trusted.pem"
        trusted.write_bytes(first)
        context = it.trusting(trusted)
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port, ssl=context, server_hostname="localhost")

        async def ask() -> bytes:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            return head.split(b"\r\n")[0] + await reader.readexactly(size)

        assert b" 200 " in await ask()
        again, secret = self_signed(tmp_path, "second", "localhost")
        chain.write_bytes(b"-----BEGIN CERTIFICATE-----\nhalf of it")
        assert it.process is not None
        it.process.send_signal(1)
        await asyncio.sleep(0.3)
        assert (await asyncio.to_thread(it.shown, "localhost", trusted)).subject.rfc4514_string() == "CN=first"
        key.write_bytes(secret.read_bytes())
        chain.write_bytes(again.read_bytes())
        it.process.send_signal(1)

        def renewed() -> bool:
            with contextlib.suppress(ssl.SSLError):
                return it.shown("localhost", again).subject.rfc4514_string() == "CN=second"
            return False

        await asyncio.to_thread(wait_for, renewed, 10)
        assert b" 200 " in await ask(), "the connection from before goes on"
        writer.close()
    finally:
        await asyncio.to_thread(it.close)


def test_what_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    chain, key = self_signed(tmp_path, "one", "localhost")
    _, other = self_signed(tmp_path, "two", "localhost")
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "ec", "-in", str(key), "-aes256", "-passout", "pass:x", "-out", str(locked)],
        check=True, capture_output=True,
    )  # fmt: skip
    for given, said in (
        ({"tls_cert": str(chain)}, "belong together"),
        ({"tls_cert": str(chain), "tls_key": str(other)}, "does not belong to the certificate"),
        ({"tls_cert": str(tmp_path / "none"), "tls_key": str(key)}, "No such file"),
        ({"tls_cert": str(key), "tls_key": str(key)}, "not in PEM form"),
        ({"tls_cert": str(chain), "tls_key": str(locked)}, "protected by a password"),
        ({"tls": True, "tls_cert": str(chain), "tls_key": str(key)}, "give either"),
        ({"http_port": 8080}, "beside TLS"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_tls(load({}, data_dir=tmp_path / "d", **given), "127.0.0.1")
