"""Answers that last end when their caller may no longer see them, and the audit log keeps what was never answered."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aether.identity.audit import UNANSWERED
from aether.identity.roles import Role
from support.identity import PASSWORD, add_user
from support.served import served
from support.server import Server, hello, server, wait_for


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("up"), AETHER_STOP_GRACE_SECS="1") as one:
        assert one.api("POST", "/teams", {"name": "web"})[0] == 201
        assert one.api("POST", "/apps", {"name": "shop", "team": "web"})[0] == 201
        one.deploy("shop", hello("shop"))
        yield one


@dataclass
class Follower:
    """Follows the app's logs with a token of its own until the server ends the answer."""

    up: Server
    token: str

    def __post_init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.connection = http.client.HTTPConnection("127.0.0.1", self.up.port, timeout=60)
        self.connection.request(
            "GET", "/apps/shop/logs?follow=true", headers={"Authorization": "Bearer " + self.token}
        )
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        wait_for(lambda: self.lines)

    def _read(self) -> None:
        for line in self.answer:
            if line.strip():
                self.lines.append(json.loads(line))

    def ended(self, secs: float) -> bool:
        self.thread.join(secs)
        return not self.thread.is_alive()

    def close(self) -> None:
        if self.answer.fp is not None and self.connection.sock is not None:
            self.connection.sock.shutdown(2)
        self.thread.join(10)
        self.connection.close()


def add_deployer(up: Server, name: str) -> str:
    assert up.api("POST", "/users", {"name": name, "role": "deployer", "password": PASSWORD})[0] == 201
    assert up.api("PUT", f"/teams/web/members/{name}")[0] == 200
    return up.api("POST", "/auth/login", {"username": name, "password": PASSWORD})[1]["token"]


def disable(up: Server, name: str, _token: str) -> None:
    assert up.api("PATCH", f"/users/{name}", {"disabled": True})[0] == 200


def leave(up: Server, name: str, _token: str) -> None:
    assert up.api("DELETE", f"/teams/web/members/{name}")[0] == 204


def log_out(up: Server, _name: str, token: str) -> None:
    assert up.api("POST", "/auth/logout", headers={"Authorization": "Bearer " + token})[0] == 204


@pytest.mark.parametrize("take_away", [disable, leave, log_out])
def test_a_stream_ends_with_the_right_to_it(up: Server, take_away: Callable[[Server, str, str], None]) -> None:
    name = "user-" + take_away.__name__.replace("_", "-")
    token = add_deployer(up, name)
    follower, bystander = Follower(up, token), Follower(up, (up.data / "admin-token").read_text().strip())
    try:
        assert not follower.ended(0.5)
        began = time.monotonic()
        take_away(up, name, token)
        assert follower.ended(10), "the stream outlived the right to it"
        assert time.monotonic() - began < 8
        assert not bystander.ended(0.5), "somebody else's stream was ended too"
    finally:
        follower.close()
        bystander.close()


def test_a_stream_ends_with_its_machine_token(up: Server) -> None:
    add_deployer(up, "robot")
    status, made = up.api("POST", "/tokens", {"name": "ci", "role": "reader", "user": "robot"})
    assert status == 201, made
    follower = Follower(up, made["token"])
    try:
        assert up.api("DELETE", f"/tokens/{made['id']}")[0] == 204
        assert follower.ended(10)
    finally:
        follower.close()


@pytest.mark.usefixtures("database_url")
async def test_a_change_is_on_record_before_it_is_answered(tmp_path: Path) -> None:
    """As after a kill between a change's commit and its answer."""
    async with served(tmp_path) as api:
        held = asyncio.Event()

        async def never(*_: Any, **__: Any) -> None:
            held.set()
            await asyncio.Event().wait()

        audit = api.services.identity.audit
        keep, audit.record = audit.record, never  # type: ignore[method-assign]
        headers = {"Authorization": "Bearer tok-admin"}
        asked = asyncio.create_task(api.call("POST", "/teams", json={"name": "web"}, headers=headers))
        await held.wait()
        rows = await audit.list()
        assert [(row.actor, row.action, row.target, row.outcome, row.status) for row in rows] == [
            ("ann", "POST /teams", "web", UNANSWERED, 0)
        ]
        asked.cancel()
        audit.record = keep  # type: ignore[method-assign]

        # a refused change leaves one row, though it had begun to write
        assert (await api.call("POST", "/teams", json={"name": "web"}, headers=headers))[0] == 409
        assert (await api.call("POST", "/teams", json={"name": "ops"}, headers=headers))[0] == 201
        rows = await audit.list()
        assert [(row.target, row.outcome, row.status) for row in rows] == [
            ("ops", "ok", 201), ("web", "conflict", 409), ("web", UNANSWERED, 0),
        ]  # fmt: skip


@pytest.mark.usefixtures("database_url")
async def test_old_audit_rows_are_dropped_oldest_first(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        headers = {"Authorization": "Bearer tok-admin"}
        for name in ("one", "two", "three"):
            assert (await api.call("POST", "/teams", json={"name": name}, headers=headers))[0] == 201
        audit = api.services.identity.audit
        newest = (await audit.list())[0]
        assert await audit.prune(newest.time, limit=1) == 1
        assert [row.target for row in await audit.list()] == ["three", "two"]
        assert await audit.prune(newest.time) == 1
        assert [row.target for row in await audit.list()] == ["three"]


@pytest.mark.usefixtures("database_url")
async def test_tokens_guessed_at_login_are_limited_by_address(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        await add_user(api, "ida", Role.READER)
        statuses = [(await api.call("POST", "/auth/login", json={"token": f"no-{n}"}))[0] for n in range(40)]
        assert statuses[:20] == [401] * 20
        assert statuses[-1] == 429
