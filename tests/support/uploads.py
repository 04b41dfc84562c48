"""Uploads by the real client to a real server, its store behind a network that breaks, and what holds of all of
them: what a client was told is stored is there, byte for byte; what it was told failed is not.

An error that says that nothing answers, or a 5xx, tells neither: the server may finish what it has begun.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aether.client.api import Api
from aether.client.transfer import Announced, Sent, Watch, transfer, unsure
from aether.client.transport import Transport
from aether.model.errors import AetherError
from support import s3_servers
from support.cutter import Cutter, cutter
from support.s3_servers import S3Server
from support.server import Server, server

MIB = 1 << 20
PART = 5 * MIB
PARTS = {"AETHER_MULTIPART_THRESHOLD_BYTES": str(2 * PART), "AETHER_MULTIPART_PART_SIZE_BYTES": str(PART)}


class Told(Watch):
    """What a person would see."""

    def __init__(self) -> None:
        self.troubles: list[str] = []
        self.had: tuple[int, int] | None = None
        self.seen = threading.Event()

    def resumed(self, arrived: int, count: int) -> None:
        self.had = (arrived, count)

    def trouble(self, error: AetherError) -> None:
        self.troubles.append(error.message)
        self.seen.set()


@dataclass
class World:
    """`network` is between the client and the store (or the server, where that is the store), `inner` between the
    server and an S3 store."""

    up: Server
    folder: Path
    network: Cutter
    inner: Cutter | None = None
    s3: S3Server | None = None
    bucket: str = ""
    stored: dict[str, bytes] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.up.port}" if self.s3 else self.network.url

    def token(self) -> str:
        return (self.up.data / "admin-token").read_text().strip()

    def api(self) -> Api:
        return Api(Transport(self.base, self.token()))

    def file(self, size: int) -> Path:
        path = self.folder / f"{os.urandom(6).hex()}.tar.gz"
        path.write_bytes(os.urandom(size))
        return path

    def send(self, path: Path, watch: Watch | None = None, *, api: Api | None = None, app: str = "shop") -> Sent:
        """Upload, and remember what was said of it."""
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        try:
            with contextlib.nullcontext(api) if api else self.api() as used:
                sent = transfer(used, Announced(app, digest, len(data)), str(path), watch or Told())
        except AetherError as error:
            if not unsure(error):
                self.failed.add(digest)
            raise
        self.stored[digest] = data
        self.failed.discard(digest)
        return sent

    def check(self) -> None:
        """The invariant."""
        for digest, data in self.stored.items():
            status, found = self.up.api("GET", f"/artifacts/{digest}/meta")
            assert status == 200, f"{digest} was said to be stored: {found}"
            with self.api() as api:
                assert api.download(digest) == data, f"the bytes of {digest} are others"
        for digest in self.failed:
            assert self.up.api("HEAD", f"/artifacts/{digest}")[0] == 404, f"{digest} was said to have failed"
        kept = self.final_keys()
        assert not [key for key in kept if any(digest in key for digest in self.failed)]
        for digest in self.stored:
            assert any(digest in key for key in kept)

    def final_keys(self) -> set[str]:
        return {key for key in self.objects() if key.startswith("artifacts/")}

    def objects(self) -> set[str]:
        """Of all objects that are whole."""
        if self.s3 is None:
            root = self.up.data / "objects"
            files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
            return {str(path) for path in files if not path.parts[0].startswith(".")}
        client: Any = self.s3.boto()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        found = {item["Key"] for page in pages for item in page.get("Contents", [])}
        client.close()
        return found


@contextlib.contextmanager
def world(kind: str, folder: Path, **environment: str) -> Iterator[World]:
    """A server with the store of this kind: filesystem, or one of `s3_servers`. It has an app `shop`."""
    with contextlib.ExitStack() as stack:
        if kind == "filesystem":
            up = stack.enter_context(server(folder / "server", **PARTS, **environment))
            made = World(up, folder, stack.enter_context(cutter(("127.0.0.1", up.port))))
        else:
            s3 = s3_servers.running(kind)
            bucket = s3.new_bucket()
            parts = urlsplit(s3.endpoint)
            target = (parts.hostname or "", parts.port or 80)
            network, inner = stack.enter_context(cutter(target)), stack.enter_context(cutter(target))
            settings = {
                **s3.settings(bucket), "AETHER_S3_ENDPOINT_URL": inner.url, "AETHER_S3_BASE_URL": network.url,
            }  # fmt: skip
            up = stack.enter_context(server(folder / "server", **settings, **PARTS, **environment))
            made = World(up, folder, network, inner, s3, bucket)
        status, said = up.api("POST", "/apps", {"name": "shop"})
        assert status == 201, said
        yield made
