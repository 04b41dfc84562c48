"""The monitor's API: its calls with their bodies, in the order in which they have to come, and who makes them.

HTTP/1.1 with JSON over a unix socket, one call at a time on one connection. Only what machines here need is typed.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from dataclasses import dataclass
from typing import Any

from aether.model.errors import ServiceUnavailable
from aether.runtimes.firecracker import jail
from aether.runtimes.microvm.network import GUEST_MAC, METADATA_ADDRESS, TAP

INTERFACE = "eth0"
CALL_SECS = 10.0
SNAPSHOT_SECS = 120.0
"""All memory is written in one call."""
_MAX_HEAD, _MAX_BODY = 16 * 1024, 1024 * 1024
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2}) ")
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]{1,8})\r\n", re.IGNORECASE)

Body = dict[str, object]


@dataclass(frozen=True, slots=True)
class Call:
    method: str
    path: str
    body: Body | None = None
    secs: float = CALL_SECS

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def boot_calls(*, memory_mb: int, vcpus: int, arguments: str, document: Body | None) -> list[Call]:
    """From a fresh monitor to a running guest. Without a `document` the guest has neither drives nor metadata."""
    calls = [
        Call("PUT", "/machine-config", {"vcpu_count": vcpus, "mem_size_mib": memory_mb, "smt": False}),
        Call(
            "PUT",
            "/boot-source",
            {
                "kernel_image_path": f"/{jail.KERNEL}",
                "initrd_path": f"/{jail.INITRAMFS}",
                "boot_args": arguments,
            },
        ),
    ]
    if document is not None:
        calls += [
            # the first becomes /dev/vda; neither is called the root device, or the monitor adds to the arguments
            *(_drive(name) for name in (jail.ROOTFS, jail.CODE)),
            Call(
                "PUT",
                f"/network-interfaces/{INTERFACE}",
                {"iface_id": INTERFACE, "guest_mac": GUEST_MAC, "host_dev_name": TAP},
            ),
            Call(
                "PUT",
                "/mmds/config",
                {"version": "V2", "ipv4_address": METADATA_ADDRESS, "network_interfaces": [INTERFACE]},
            ),
            put_metadata(document),
        ]
    return [*calls, Call("PUT", "/actions", {"action_type": "InstanceStart"})]


def load_calls(document: Body) -> list[Call]:
    """From a fresh monitor to the guest of a snapshot that lies in the jail. Metadata are no part of snapshots."""
    return [
        Call(
            "PUT",
            "/snapshot/load",
            {
                "snapshot_path": f"/{jail.STATE}",
                "mem_backend": {"backend_type": "File", "backend_path": f"/{jail.MEMORY}"},
                "resume_vm": False,
            },
            SNAPSHOT_SECS,
        ),
        put_metadata(document),
        RESUME,
    ]


def put_metadata(document: Body) -> Call:
    return Call("PUT", "/mmds", document)


PAUSE = Call("PATCH", "/vm", {"state": "Paused"})
RESUME = Call("PATCH", "/vm", {"state": "Resumed"})
SNAPSHOT = Call(
    "PUT",
    "/snapshot/create",
    {"snapshot_type": "Full", "snapshot_path": f"/{jail.TAKEN_STATE}", "mem_file_path": f"/{jail.TAKEN_MEMORY}"},
    SNAPSHOT_SECS,
)


def _drive(name: str) -> Call:
    return Call(
        "PUT",
        f"/drives/{name}",
        {"drive_id": name, "path_on_host": f"/{name}", "is_root_device": False, "is_read_only": True},
    )


class Api:
    """Makes calls on a connected socket, which it owns."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()

    @classmethod
    async def over(cls, connected: socket.socket) -> Api:
        return cls(*await asyncio.open_unix_connection(sock=connected, limit=_MAX_HEAD))

    def close(self) -> None:
        self._writer.close()

    async def make(self, call: Call) -> Any:
        """Make `call` and return what was answered, decoded, or None for nothing.

        Raises ServiceUnavailable with the monitor's own words when it refuses, and when it ends, is too slow or
        cannot be understood; it can then not be called any more, nor after a call was cancelled.
        """
        async with self._turn:
            try:
                async with asyncio.timeout(call.secs):
                    status, answer = await self._exchange(call)
            except TimeoutError as error:
                self.close()
                raise ServiceUnavailable(f"Firecracker did not answer {call} within {call.secs:g} seconds") from error
            except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
                self.close()
                raise ServiceUnavailable(f"Firecracker ended or hung up at {call}") from error
            except BaseException:
                self.close()
                raise
        if not 200 <= status < 300:
            raise ServiceUnavailable(f"Firecracker refuses {call}: {_fault(answer) or status}")
        return answer

    async def _exchange(self, call: Call) -> tuple[int, Any]:
        body = b"" if call.body is None else json.dumps(call.body).encode()
        self._writer.write(
            f"{call.method} {call.path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await self._writer.drain()
        head = await self._reader.readuntil(b"\r\n\r\n")
        if (found := _STATUS.match(head)) is None:
            raise ValueError("the answer has no status")
        length = _LENGTH.search(head[:-2])
        size = 0 if length is None else int(length[1])
        if size > _MAX_BODY:
            raise ValueError("the answer is too large")
        answer = await self._reader.readexactly(size)
        return int(found[1]), json.loads(answer) if answer.strip() else None


def _fault(answer: object) -> str:
    """What the monitor says is wrong, in one line and not without end."""
    match answer:
        case {"fault_message": str(text)}:
            return " ".join(text.split())[:500]
        case _:
            return ""
