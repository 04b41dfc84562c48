"""Certificates from a real ACME authority (Pebble): ordered, shown, refused, taken up again after kill -9."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.client
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509

from support.certificates import self_signed
from support.dns import Resolver
from support.product import HELLO, Product, free_port, node_app
from support.server import wait_for


def find_pebble() -> str | None:
    cache = os.environ.get("AETHER_DEV_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "aether-dev"
    )
    return shutil.which("pebble") or shutil.which("pebble", path=os.path.join(cache, "go", "bin"))


@dataclass
class Pebble:
    directory: str
    ca_file: Path
    """Trusted for its own address."""
    root: bytes
    """What its certificates lead to."""


@contextlib.contextmanager
def pebble(folder: Path, http_port: int, resolver: Resolver, validity_secs: int = 0) -> Iterator[Pebble]:
    """Certificates are valid for `validity_secs`, 0: for 90 days."""
    program = find_pebble()
    if program is None:
        pytest.skip("component: pebble")
    folder.mkdir()
    chain, key = self_signed(folder, "pebble", "localhost")
    port, management = free_port(), free_port()
    config = {
        "listenAddress": f"127.0.0.1:{port}",
        "managementListenAddress": f"127.0.0.1:{management}",
        "certificate": str(chain),
        "privateKey": str(key),
        "httpPort": http_port,
        "tlsPort": free_port(),
        "ocspResponderURL": "",
        "profiles": {"default": {"description": "as it is", "validityPeriod": validity_secs}},
    }
    (folder / "config.json").write_text(json.dumps({"pebble": config}))
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [program, "-config", str(folder / "config.json"), "-dnsserver", f"127.0.0.1:{resolver.port}"],
        env={**os.environ, "PEBBLE_VA_NOSLEEP": "1"},
        stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    log.close()
    try:
        trusting = ssl.create_default_context(cafile=str(chain))

        def fetch(url: str) -> bytes:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, context=trusting, timeout=5) as answer:
                return answer.read()
            return b""

        root = wait_for(lambda: fetch(f"https://localhost:{management}/roots/0"))
        yield Pebble(f"https://localhost:{port}/dir", chain, root)
    finally:
        process.kill()
        process.wait(10)


FIRST_SECS = 150
"""The authority refuses nonces at random; an order that meets that twice running is made again after a minute."""


class Secure(Product):
    @property
    def env(self) -> dict[str, str]:
        return super().env | {"AETHER_API_BASE": f"https://127.0.0.1:{self.port}"}

    def shown(self, name: str, root: Path) -> x509.Certificate | None:
        """The certificate of a handshake in which `root` is trusted; None when it is not from there."""
        context = ssl.create_default_context(cafile=str(root))
        with (
            contextlib.suppress(ssl.SSLError),
            socket.create_connection(("127.0.0.1", self.port), 10) as raw,
            context.wrap_socket(raw, server_hostname=name) as wrapped,
        ):
            return x509.load_der_x509_certificate(wrapped.getpeercert(True) or b"")
        return None

    @contextlib.contextmanager
    def connected(self, name: str, root: Path) -> Iterator[tuple[http.client.HTTPConnection, x509.Certificate]]:
        """A connection over which requests for `name` can be sent, and the certificate that it was shown."""
        context = ssl.create_default_context(cafile=str(root))
        with (
            socket.create_connection(("127.0.0.1", self.port), 10) as raw,
            context.wrap_socket(raw, server_hostname=name) as wrapped,
        ):
            connection = http.client.HTTPConnection(name)
            connection.sock = wrapped
            yield connection, x509.load_der_x509_certificate(wrapped.getpeercert(True) or b"")

    def certificate(self, host: str) -> dict[str, str]:
        found = self.run("hosts", "list", "--app", "shop", "--format", "json").json["items"]
        return next(item["certificate"] for item in found if item["host"] == host) or {}


@pytest.mark.timeout(300)
def test_hosts_get_certificates_of_an_authority(tmp_path: Path) -> None:
    plain = free_port()
    with Resolver() as resolver, pebble(tmp_path / "pebble", plain, resolver) as authority:
        root = tmp_path / "root.pem"
        root.write_bytes(authority.root)
        for host in ("www.example.com", "second.example.com"):
            resolver.records[host, "A"] = ["127.0.0.1"]
        flags = (
            "--tls", "--http-port", str(plain), "--acme-email", "dev@example.com",
            "--acme-directory", authority.directory, "--acme-ca-file", str(authority.ca_file),
        )  # fmt: skip
        it = Secure(tmp_path / "home", extra_env={"AETHER_STOP_GRACE_SECS": "1"})
        try:
            it.start(*flags)
            it.run("login")
            it.run("apps", "create", "shop")
            it.run("hosts", "add", "www.example.com", "--app", "shop", "--verified-by-admin")
            made = wait_for(lambda: it.shown("www.example.com", root), FIRST_SECS)
            assert "Pebble" in made.issuer.rfc4514_string()
            assert it.certificate("www.example.com")["source"] == "acme"
            for kept in (it.data / "tls" / "www.example.com.pem", it.data / "acme" / "account-key.pem"):
                assert stat.S_IMODE(kept.stat().st_mode) == 0o600

            # a host that leads elsewhere is refused, and the next attempt waits
            it.run("hosts", "add", "nowhere.example.com", "--app", "shop", "--verified-by-admin")
            wait_for(lambda: "could not see" in it.certificate("nowhere.example.com").get("problem", ""), 60)
            assert it.shown("nowhere.example.com", root) is None

            # an order that the server did not live to see the end of
            it.run("hosts", "add", "second.example.com", "--app", "shop", "--verified-by-admin")
            it.kill9()
            it.start(*flags)
            first = it.shown("www.example.com", root)
            assert first is not None, "what was there before is shown again, and not ordered again"
            assert first.serial_number == made.serial_number
            # the attempt was recorded before it began, so the next one comes after its pause of a minute
            assert wait_for(lambda: it.shown("second.example.com", root), 90)

            it.run("hosts", "remove", "www.example.com", "--app", "shop")
            assert it.shown("www.example.com", root) is None
            assert not (it.data / "tls" / "www.example.com.pem").exists()
        finally:
            it.close()


def ask(connection: http.client.HTTPConnection) -> tuple[int, bytes]:
    connection.request("GET", "/")
    answer = connection.getresponse()
    return answer.status, answer.read()


def other_than(known: x509.Certificate, shown: x509.Certificate | None) -> x509.Certificate | None:
    return shown if shown is not None and shown.serial_number != known.serial_number else None


@pytest.mark.timeout(300)
def test_a_certificate_is_renewed_in_time_and_open_connections_go_on(tmp_path: Path) -> None:
    plain, host = free_port(), "www.example.com"
    with Resolver() as resolver, pebble(tmp_path / "pebble", plain, resolver, validity_secs=15) as authority:
        root = tmp_path / "root.pem"
        root.write_bytes(authority.root)
        resolver.records[host, "A"] = ["127.0.0.1"]
        it = Secure(tmp_path / "home", extra_env={"AETHER_STOP_GRACE_SECS": "1"})
        flags = (
            "--tls", "--http-port", str(plain), "--acme-email", "dev@example.com",
            "--acme-directory", authority.directory, "--acme-ca-file", str(authority.ca_file),
        )  # fmt: skip
        try:
            it.start(*flags)
            it.run("login")
            it.deploy(node_app(tmp_path / "shop", HELLO % "hello"))
            it.run("hosts", "add", host, "--app", "shop", "--verified-by-admin")
            wait_for(lambda: it.shown(host, root), FIRST_SECS)
            with it.connected(host, root) as (connection, first):
                life = first.not_valid_after_utc - first.not_valid_before_utc
                assert life.total_seconds() < 15
                assert ask(connection) == (200, b"hello\n")
                tunnel = connection.sock

                def renewed() -> x509.Certificate | None:
                    assert ask(connection) == (200, b"hello\n")
                    return other_than(first, it.shown(host, root))

                second = wait_for(renewed, 40)
                begun = second.not_valid_before_utc - first.not_valid_before_utc
                assert life * 0.5 < begun < life, "after two thirds of its life and before its end"
                assert ask(connection) == (200, b"hello\n")
                assert connection.sock is tunnel, "the connection is still the one that was shown the first"
            # renewed again and again, each time before the end: a client that trusts the authority sees no gap
            third = wait_for(lambda: other_than(second, it.shown(host, root)), 40)
            assert third.not_valid_before_utc < second.not_valid_after_utc
            assert it.certificate(host)["problem"] is None

            # whoever switches work in the background off switches renewal off
            it.stop()
            it.extra_env["AETHER_DISABLE_BACKGROUND"] = "1"
            it.start(*flags)
            wait_for(lambda: dt.datetime.now(dt.UTC) > third.not_valid_after_utc, 40)
            assert it.shown(host, root) is None, "it has run out"
            assert it.certificate(host)["problem"] is None, "and nobody tried to get another"
        finally:
            it.close()
