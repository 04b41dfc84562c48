"""The edge with a certificate of its own: what the app is told, tunnels without half-close, plain HTTP refused."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from aether.edge.options import EdgeOptions
from aether.edge.server import Edge
from aether.edge.table import RouteTable
from support.edge import Client, PortInstance, Upstream, echo_handler, read_head


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("component:openssl")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=app.localhost"]
    command += ["-addext", "subjectAltName=DNS:app.localhost"]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


async def test_requests_and_tunnels_over_tls(certificate: tuple[Path, Path]) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n")
        writer.write(await reader.readexactly(5))
        await writer.drain()

    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    table = RouteTable()
    edge = Edge(table)
    async with Upstream(echo_handler()) as echo, Upstream(handle) as raw:
        table.route("app", [table.add("app", PortInstance(echo.port))])
        port = await edge.start(tls=server)
        client = Client(
            *await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname="app.localhost")
        )
        for _ in range(2):
            status, _, body = await client.ask(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
            assert status == 200
            assert b"X-Forwarded-Proto: https\r\n" in body
        table.route("app", [table.add("app", PortInstance(raw.port))])
        await client.send(
            b"GET / HTTP/1.1\r\nHost: app.localhost\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\nhello"
        )
        assert (await read_head(client.reader)).startswith(b"HTTP/1.1 101 ")
        assert await client.rest() == b"hello"
        client.writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        plain = Client(reader, writer)
        await plain.send(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
        assert not (await plain.rest()).startswith(b"HTTP/1.1 200")
        writer.close()
        await edge.close(2)
        assert edge.open_connections == 0


async def test_at_the_limit_of_handshakes_the_oldest_gives_way(certificate: tuple[Path, Path]) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    table = RouteTable()
    edge = Edge(table, EdgeOptions(handshake_timeout_secs=60))
    silent: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    async with Upstream(echo_handler()) as echo:
        table.route("app", [table.add("app", PortInstance(echo.port))])
        port = await edge.start(tls=server)
        try:
            for _ in range(1024):
                silent.append(await asyncio.open_connection("127.0.0.1", port))
            assert edge.counters.handshake_failures == 0, "so many wait at the same time"
            honest = Client(
                *await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname="app.localhost")
            )
            assert (await honest.ask(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n"))[0] == 200
            async with asyncio.timeout(20):
                assert await silent[0][0].read() == b"", "the oldest is gone, long before its time"
            assert edge.counters.handshake_failures == 1
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await silent[1][0].read()
            honest.writer.close()
        finally:
            for _, writer in silent:
                writer.transport.abort()
            await edge.close(2)
