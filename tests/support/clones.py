"""Functions that tell what a clone might have in common with another one, and snapshots to damage."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from aether.model.function_instance import StartKind
from aether.runtimes.microvm.qemu import QemuRuntime
from aether.runtimes.microvm.snapshots import SnapshotStore, new_memory

NODE = """
const fs = require('fs'), crypto = require('crypto');
const read = (path) => fs.readFileSync(path, 'utf8');
require('http').createServer((request, response) => {
  if (request.url === '/fill') fs.writeFileSync('/tmp/mark', Buffer.alloc(16 << 20, 'private'));
  response.end(JSON.stringify({
    own: {
      math: Math.random(), uuid: crypto.randomUUID(), bytes: crypto.randomBytes(16).toString('hex'),
      context: require('vm').runInNewContext('Math.random()'),
      key: crypto.generateKeyPairSync('ed25519').publicKey.export({format: 'der', type: 'spki'}).toString('hex'),
      kernel: fs.readSync(fs.openSync('/dev/urandom'), Buffer.alloc(8)) && read('/proc/sys/kernel/random/uuid'),
      boot: read('/proc/sys/kernel/random/boot_id'), name: process.env.NAME,
      stack: /.*\\[stack\\]/.exec(read('/proc/self/maps'))[0],
    },
    env: Object.keys(process.env), now: Date.now(), command: read('/proc/cmdline'), files: fs.readdirSync('/tmp'),
  }));
}).listen(process.env.PORT);
"""

PYTHON = """
import http.server, json, os, random, secrets, time, uuid

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        own = {
            "hash": hash("x"), "random": random.random(), "urandom": os.urandom(16).hex(), "uuid": str(uuid.uuid4()),
            "token": secrets.token_hex(), "name": os.environ["NAME"],
        }
        body = json.dumps({"own": own, "now": time.time() * 1000, "command": open("/proc/cmdline").read()}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

http.server.HTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"""


async def ask(runtime: QemuRuntime, instance_id: str, path: str = "/") -> Any:
    loop = asyncio.get_running_loop()
    with await runtime.connect(instance_id) as sock:
        await loop.sock_sendall(sock, f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = b""
        while data := await loop.sock_recv(sock, 65536):
            answer += data
    return json.loads(answer.partition(b"\r\n\r\n")[2])


async def kind(runtime: QemuRuntime, instance_id: str) -> StartKind:
    return (await runtime.status(instance_id)).start


def flip(data: Path, name: str, folder: str = "snapshots") -> None:
    (file,) = (data / folder).glob(f"*/{name}")
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte[0] ^ 1]))


def another_state(data: Path, folder: str = "snapshots") -> None:
    """What has its digest and is none the less nothing that a monitor can read."""
    (note,) = (data / folder).glob("*/note.json")
    (note.parent / "state").write_bytes(b"QEVM" + bytes(1000))
    told = json.loads(note.read_bytes())
    note.write_text(json.dumps({**told, "state": hashlib.sha256(b"QEVM" + bytes(1000)).hexdigest()}))


async def keep(store: SnapshotStore, key: str, *, mb: int = 4, to_take: bool = False) -> bytes:
    """A snapshot whose memory begins and ends with something and is empty between."""
    memory, state = new_memory(mb << 20), os.memfd_create("state")
    try:
        mark = os.urandom(4096)
        os.pwrite(memory, mark, 0)
        os.pwrite(memory, mark, (mb << 20) - 4096)
        os.write(state, b"state of " + key.encode())
        store.lock(key)
        await store.keep(key, memory, state, to_take=to_take)
    finally:
        os.close(memory)
        os.close(state)
    return mark
