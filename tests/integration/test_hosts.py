"""Custom hosts on a whole server: proven, routed, redirected, given up; refused where they are somebody else's."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from aether.edge.table import RouteTable
from aether.hosts.plan import DAY_US, MINUTE_US
from aether.hosts.proof import ProofOptions, Prover, Unproven
from aether.hosts.recheck import Rechecker
from aether.hosts.service import HostOptions, Hosts, NewHost
from aether.stores.database.engine import Database
from support.dns import Resolver
from support.edge import Upstream, read_head
from support.product import free_port
from support.served import add_app
from support.server import Server, hello

DOMAIN = ".corp.example.org"


@dataclass
class World:
    up: Server
    resolver: Resolver

    def add(self, app: str, host: str, **how: Any) -> tuple[int, Any]:
        return self.up.api("POST", f"/apps/{app}/hosts", {"host": host, **how})

    def get(self, host: str, path: str = "/", method: str = "GET", body: bytes | None = None) -> tuple[int, str, str]:
        """Status, body and Location."""
        connection = http.client.HTTPConnection("127.0.0.1", self.up.port, timeout=20)
        try:
            connection.request(method, path, body=body, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.getheader("location") or ""
        finally:
            connection.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Resolver() as resolver:
        port = free_port()
        up = Server(
            tmp_path_factory.mktemp("hosts"),
            port,
            {
                "AETHER_STOP_GRACE_SECS": "1",
                "AETHER_DNS_SERVER": f"127.0.0.1:{resolver.port}",
                "AETHER_HOST_PROOF_PORT": str(port),
                "AETHER_HOST_PROOF_PRIVATE": DOMAIN,
                "AETHER_API_HOSTS": "api.corp.example.org",
            },
        )
        try:
            up.start()
            up.deploy("shop", hello("shop"))
            up.api("POST", "/apps", {"name": "rival"})
            yield World(up, resolver)
        finally:
            up.close()


def test_a_txt_record_proves_a_host(world: World) -> None:
    host = "www.example.com"
    status, added = world.add("shop", "WWW.Example.com.")
    assert (status, added["host"], added["status"]) == (201, host, "pending")
    assert "_aether.www.example.com" in added["problem"]
    assert world.get(host)[0] == 404, "what is not proven is not routed"

    world.resolver.records["_aether." + host, "TXT"] = ["v=spf1 -all", "aether-verification=wrong"]
    status, again = world.up.api("POST", f"/apps/shop/hosts/{host}/verify")
    assert (status, again["status"]) == (200, "pending")
    assert "is another" in again["problem"]

    world.resolver.records["_aether." + host, "TXT"].append(added["proof"]["value"])
    status, found = world.up.api("POST", f"/apps/shop/hosts/{host}/verify")
    assert (status, found["status"], found["verified_by"], found["proof"]) == (200, "verified", "dns", None)
    assert world.get(host)[1].startswith("shop ")
    assert world.get(host.upper() + f":{world.up.port}")[1].startswith("shop ")

    # it outlives the proof and the server, even one that is killed
    del world.resolver.records["_aether." + host, "TXT"]
    world.up.kill9()
    world.up.start()
    assert world.get(host)[1].startswith("shop ")

    assert world.add("rival", host)[0] == 409
    assert world.up.api("DELETE", f"/apps/rival/hosts/{host}")[0] == 404
    assert world.up.api("DELETE", f"/apps/shop/hosts/{host}")[0] == 204
    assert world.get(host)[0] == 404


def test_an_address_that_leads_here_proves_a_host(world: World) -> None:
    host = "web.corp.example.org"
    world.resolver.records[host, "A"] = ["127.0.0.1"]
    status, added = world.add("shop", host)
    assert (status, added["status"], added["verified_by"]) == (201, "verified", "http"), added
    assert world.get(host)[1].startswith("shop ")
    assert world.get(host, "/.well-known/aether-challenge/x")[1].startswith("shop "), "only while it is pending"


def test_a_claim_that_is_pending_leaves_the_host_to_whoever_proves_it(world: World) -> None:
    host = "contested.example.com"
    first = world.add("rival", host)[1]
    second = world.add("shop", host)[1]
    assert first["status"] == second["status"] == "pending"
    assert first["proof"]["value"] != second["proof"]["value"]
    world.resolver.records["_aether." + host, "TXT"] = [second["proof"]["value"]]
    assert world.up.api("POST", f"/apps/rival/hosts/{host}/verify")[1]["status"] == "pending"
    assert world.up.api("POST", f"/apps/shop/hosts/{host}/verify")[1]["status"] == "verified"
    world.resolver.records["_aether." + host, "TXT"] = [first["proof"]["value"]]
    assert world.up.api("POST", f"/apps/rival/hosts/{host}/verify")[0] == 409
    assert world.get(host)[1].startswith("shop ")


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "10.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_host_at_a_private_address_is_not_fetched(world: World, address: str) -> None:
    host = f"n{abs(hash(address))}.rebind.example"
    kind = "AAAA" if ":" in address else "A"
    world.resolver.records[host, kind] = [address]
    added = world.add("shop", host)[1]
    assert added["status"] == "pending"
    assert "not a public address" in added["problem"]
    assert world.resolver.asked.count((host, kind)) == 1, "resolved once"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\naether-verification=good", "http"),
        (b"HTTP/1.0 200 OK\r\n\r\naether-verification=good\n", "http"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\naether-verification=good", "answers 302"),
        (b"HTTP/1.1 200 OK\r\n\r\naether-verification=goodness", "answers 200 and not with the proof"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100_000, "answers 200 and not with the proof"),
        (b"220 mail.example ESMTP\r\n", "is not HTTP"),
        (b"", "is not HTTP"),
    ],
)
async def test_only_the_answer_itself_proves(answer: bytes, said: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await read_head(reader)
        assert request.startswith(b"GET /.well-known/aether-challenge/good HTTP/1.0\r\nHost: a.corp.example.org:")
        writer.write(answer)
        await writer.drain()

    with Resolver() as resolver:
        resolver.records["a.corp.example.org", "A"] = ["127.0.0.1"]
        async with Upstream(serve) as upstream:
            prover = Prover(ProofOptions(upstream.port, (DOMAIN,), ("127.0.0.1", resolver.port)))
            try:
                found = await prover.prove("a.corp.example.org", "good")
            except Unproven as error:
                found = str(error)
    assert said in found


@pytest.mark.parametrize(
    "host",
    ["localhost", "api.corp.example.org", "shop.localhost", "x.y.localhost", "127.0.0.1", "*.example.com", "example"],
)
def test_hosts_of_the_server_and_wildcards_are_refused(world: World, host: str) -> None:
    status, error = world.add("shop", host, verified_by_admin=True)
    assert (status, error["code"]) == (400, "bad_request")


def test_a_host_redirects_with_method_path_and_query(world: World) -> None:
    assert world.add("shop", "shop.test")[1]["verified_by"] == "reserved name"
    assert world.add("shop", "www.shop.test", redirect_to="shop.test")[0] == 201
    status, _, location = world.get("www.shop.test", "/a/b?c=d&e=%2F", "POST", b"x" * 1000)
    assert (status, location) == (308, f"http://shop.test:{world.up.port}/a/b?c=d&e=%2F")
    assert world.get("www.shop.test", "*", "OPTIONS")[2] == f"http://shop.test:{world.up.port}/"
    assert world.get("shop.test")[1].startswith("shop ")
    for host, target in (("a.test", "b.test"), ("shop.test", "www.shop.test"), ("c.test", "www.shop.test")):
        assert world.add("shop", host, redirect_to=target)[0] == 400
    assert world.up.api("DELETE", "/apps/shop/hosts/shop.test")[0] == 409
    assert world.add("shop", "www.shop.test")[1]["redirect_to"] is None
    assert world.get("www.shop.test")[1].startswith("shop ")


def test_hosts_are_listed_in_pages(world: World) -> None:
    world.up.api("POST", "/apps", {"name": "many"})
    names = sorted(f"h{number}.many.test" for number in range(5))
    for name in names:
        world.add("many", name)
    found: list[str] = []
    cursor = ""
    while True:
        status, page = world.up.api("GET", f"/apps/many/hosts?limit=2{cursor}")
        assert status == 200
        found += [item["host"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert found == names


def test_deleting_an_app_frees_its_hosts(world: World) -> None:
    world.up.deploy("gone", hello("gone"))
    assert world.add("gone", "free.test")[0] == 201
    assert world.get("free.test")[1].startswith("gone ")
    assert world.up.api("DELETE", "/apps/gone")[0] == 204
    assert world.get("free.test")[0] == 404
    world.up.deploy("gone", hello("again"))
    assert world.get("free.test")[0] == 404, "an app of the same name does not inherit them"
    assert world.add("shop", "free.test")[0] == 201
    assert world.get("free.test")[1].startswith("shop ")


def test_only_an_admin_vouches(world: World) -> None:
    password = "correct horse"
    world.up.api("POST", "/users", {"name": "dev", "role": "deployer", "password": password})
    session = world.up.api("POST", "/auth/login", {"username": "dev", "password": password})[1]
    headers = {"Authorization": f"Bearer {session['token']}"}
    assert world.up.api("POST", "/apps", {"name": "devs"}, headers)[0] == 201
    body = {"host": "vouched.example.com", "verified_by_admin": True}
    assert world.up.api("POST", "/apps/devs/hosts", body, headers)[0] == 403
    status, added = world.up.api("POST", "/apps/devs/hosts", body)
    assert (status, added["status"]) == (201, "verified")
    assert added["verified_by"].startswith("admin ")


def test_a_host_that_is_pending_passes_all_but_its_proof_on(world: World) -> None:
    """Claims of a rival that came before the owner's proof must not touch the owner's traffic."""
    host = "held.example.com"
    claim = world.add("rival", host)[1]
    assert world.add("shop", host, verified_by_admin=True)[0] == 201
    path = claim["proof"]["url"].removeprefix(f"http://{host}")
    assert world.get(host, path)[1] == claim["proof"]["value"]
    assert world.get(host, path, "POST", b"y")[1].startswith("shop ")
    assert world.get(host, "/", "POST", b"y" * 300_000)[1].startswith("shop ")


async def test_pending_hosts_are_looked_at_again_by_themselves(database: Database) -> None:
    """With the clock of the test: the rule says when, the resolver has the record in time."""
    table = RouteTable()
    with Resolver() as resolver:
        prover = Prover(ProofOptions(resolver=("127.0.0.1", resolver.port)))
        hosts = Hosts(database, table, prover, HostOptions("localhost", (), on_loopback=False))
        for app in ("shop", "rival"):
            await add_app(database, app)
        claimed = await hosts.add("shop", NewHost("late.example.com"), "ann")
        other = await hosts.add("rival", NewHost("late.example.com"), "bob")
        assert (claimed.verified_at, other.verified_at) == (None, None)
        rechecker = Rechecker(hosts)
        resolver.records["_aether.late.example.com", "TXT"] = [
            f"aether-verification={row.token}" for row in (claimed, other)
        ]
        checked = claimed.checked_at or 0
        await rechecker.look(checked + MINUTE_US // 2)
        assert not await hosts.verified(), "the pause is not over"
        await rechecker.look(claimed.created_at + 8 * DAY_US)
        found = await hosts.verified()
        assert [(row.host, row.verified_by) for row in found] == [("late.example.com", "dns")]
        assert table.rule(b"late.example.com") is not None, "and the edge knows"
        (left,) = await hosts.pending()
        assert "belongs to another app" in (left.problem or "")
        assert (left.checked_at or 0) > (other.checked_at or 0), "a look in vain counts as one"
