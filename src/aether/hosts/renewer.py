"""Keeps every verified host in a certificate: asks `plan` what is due, orders it, records and shows what came.

An order runs in a thread of its own that ends with the process, because its library cannot be interrupted.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

import structlog

from aether.hosts.certificates import Certificates
from aether.hosts.pair import read_pair
from aether.hosts.plan import pause_us, plan
from aether.hosts.service import HostRow, Hosts
from aether.model.errors import AetherError
from aether.model.times import now_us

_AT_ONCE = 2
_LONGEST_WAIT_SECS = 3600.0
_T = TypeVar("_T")
_log = structlog.stdlib.get_logger("aether.certificates")


class Issuer(Protocol):
    def issue(self, host: str, answer: Callable[[str, str | None], None]) -> tuple[bytes, bytes]:
        """Chain and key; blocks. Raises an exception whose `limited` says that the authority wants fewer orders."""
        ...


class Renewer:
    def __init__(self, hosts: Hosts, certificates: Certificates, issuer: Issuer) -> None:
        self._hosts = hosts
        self._certificates = certificates
        self._issuer = issuer
        self._changed = asyncio.Event()
        self._orders: dict[str, asyncio.Task[None]] = {}

    def look_again(self) -> None:
        """Hosts have come or gone."""
        self._changed.set()

    async def run(self) -> None:
        """Never returns."""
        try:
            while True:
                self._changed.clear()
                wait = await self._begin_due()
                try:
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
                except TimeoutError:
                    continue
        finally:
            for task in self._orders.values():
                task.cancel()
            await asyncio.gather(*self._orders.values(), return_exceptions=True)

    async def _begin_due(self) -> float:
        """Begin what is due; returns how long to wait for more."""
        verified = {row.host: row for row in await self._hosts.verified()}
        known = {row.host: row for row in await self._certificates.list()}
        now = now_us()
        # an order under way is due by no rule: its record says that it failed and pauses
        found = plan([host for host in verified if host not in self._orders], known, now)
        for host in found.due:
            if len(self._orders) >= _AT_ONCE:
                break
            failures = known[host].failures if host in known else 0
            self._orders[host] = task = asyncio.create_task(self._order(verified[host], failures + 1))
            task.add_done_callback(lambda _, host=host: self._ended(host))
        waits = [_LONGEST_WAIT_SECS] if found.next_at is None else [(found.next_at - now) / 1e6, _LONGEST_WAIT_SECS]
        return min(waits)

    def _ended(self, host: str) -> None:
        task = self._orders.pop(host)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("an order for a certificate ended badly", host=host, exc_info=error)
        self._changed.set()

    async def _order(self, row: HostRow, attempt: int) -> None:
        await self._certificates.record(
            row, source="acme", failures=attempt, next_attempt_at=now_us() + pause_us(attempt),
            problem="an order was begun and has not ended",
        )  # fmt: skip
        loop = asyncio.get_running_loop()

        def answer(path: str, text: str | None) -> None:
            told = threading.Event()

            def tell() -> None:
                self._hosts.answer(row.host, path, text)
                told.set()

            loop.call_soon_threadsafe(tell)
            told.wait(10)

        try:
            chain, key = await _in_thread(lambda: self._issuer.issue(row.host, answer))
            pair = read_pair(chain, key)
        except Exception as error:  # noqa: BLE001 - whatever an authority or its library comes up with is recorded
            limited = bool(getattr(error, "limited", False))
            _log.warning("no certificate", host=row.host, attempt=attempt, problem=str(error))
            await self._certificates.record(
                row, problem=str(error)[:1000], next_attempt_at=now_us() + pause_us(attempt, limited=limited)
            )
            return
        try:
            await self._certificates.keep(row, pair, "acme")
        except AetherError as error:
            _log.warning("a certificate came and could not be kept", host=row.host, problem=error.message)


async def _in_thread(work: Callable[[], _T]) -> _T:
    loop = asyncio.get_running_loop()
    came: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: Exception | None) -> None:
        if not came.done():
            if error is not None:
                came.set_exception(error)
            else:
                came.set_result(result)  # pyright: ignore[reportArgumentType]

    def run() -> None:
        result, problem = None, None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - carried over to the loop
            problem = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, problem)

    threading.Thread(target=run, name="acme order", daemon=True).start()
    return await came
