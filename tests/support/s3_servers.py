"""Real S3 servers on free loopback ports, one of each kind per test process, stopped with it.

radosgw    a Ceph of one monitor, one OSD in memory and one gateway, from Debian's packages
versitygw  an S3 gateway over a folder, built by `./dev.sh`; it checks checksums and pins copies, radosgw does not
external   the server that AETHER_TEST_S3_ENDPOINT names, with the credentials of the environment (MinIO, say)
"""

from __future__ import annotations

import atexit
import functools
import http.client
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config

from support.product import free_port

ACCESS_KEY, SECRET_KEY = "aether-tests", "only-for-tests-on-loopback"
KMS_KEY = "testkey-1"
"""A key that radosgw knows."""
EXTERNAL = "AETHER_TEST_S3_ENDPOINT"
_READY_SECS = 60.0
_DEV_CACHE = Path(
    os.environ.get("AETHER_DEV_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aether-dev"
)


class S3Server:
    """A server that runs; `kill9` and `start` take its HTTP side away and bring it back with all its data."""

    def __init__(self, name: str, endpoint: str, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> None:
        self.name = name
        self.endpoint = endpoint
        self.access_key = access_key
        self.secret_key = secret_key

    def environ(self) -> dict[str, str]:
        """For whoever uses AWS's standard chain of credentials."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def settings(self, bucket: str) -> dict[str, str]:
        """The environment of an Aether server that keeps its artifacts in `bucket`."""
        return {
            **self.environ(),
            "AETHER_STORAGE_MODE": "s3",
            "AETHER_S3_ENDPOINT_URL": self.endpoint,
            "AETHER_ARTIFACT_BUCKET": bucket,
        }

    def boto(self, **config: Any) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                **config,
            ),
        )

    def new_bucket(self) -> str:
        name = f"aether-{secrets.token_hex(6)}"
        client = self.boto()
        client.create_bucket(Bucket=name)
        client.close()
        return name

    def ensure(self) -> None:
        """Start it again if a test left it killed."""
        if not answers(self.endpoint):
            self.start()

    def start(self) -> None:
        raise NotImplementedError

    def kill9(self) -> None:
        raise NotImplementedError


class Processes:
    """Children that end with this process, whatever ends it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def spawn(self, name: str, *command: str, **environ: str) -> None:
        with (self._folder / f"{name}.out").open("ab") as out:
            self.running[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                cwd=self._folder, env={**os.environ, **environ}, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def kill9(self, name: str) -> None:
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait(10)

    def close(self) -> None:
        for name in reversed(list(self.running)):
            self.kill9(name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def said(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in self._folder.glob("*.out"))


class _Local(S3Server):
    def __init__(self, name: str) -> None:
        self.port = free_port()
        super().__init__(name, f"http://127.0.0.1:{self.port}")
        self.folder = Path(tempfile.mkdtemp(prefix=f"aether-{name}-"))
        self.processes = Processes(self.folder)
        atexit.register(self.processes.close)

    def until_ready(self, name: str) -> None:
        end = time.monotonic() + _READY_SECS
        while not answers(self.endpoint):
            ended = self.processes.running[name].poll()
            assert ended is None, f"{name} ended with {ended}\n{self.processes.said()}"
            assert time.monotonic() < end, f"{name} does not answer\n{self.processes.said()}"
            time.sleep(0.02)


class Radosgw(_Local):
    NEEDED = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "setpriv")

    def __init__(self) -> None:
        super().__init__("radosgw")
        self._configure(free_port())
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
        self.processes.spawn("mon", "ceph-mon", "-c", "ceph.conf", "-f", "-i", "a")
        osd = str(uuid.uuid4())
        self._run("ceph", "--connect-timeout", "30", "osd", "new", osd)
        self._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd)
        self.processes.spawn("osd", "ceph-osd", "-c", "ceph.conf", "-f", "-i", "0")
        self.start()
        self._run(
            "radosgw-admin", "user", "create", "--uid=tests", "--display-name=tests",
            f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}",
        )  # fmt: skip

    def start(self) -> None:
        self.processes.spawn("gateway", "radosgw", "-c", "ceph.conf", "-f", "-n", "client.rgw")
        self.until_ready("gateway")

    def kill9(self) -> None:
        self.processes.kill9("gateway")

    def _configure(self, mon_port: int) -> None:
        folder, fsid = self.folder, str(uuid.uuid4())
        (folder / "mon").mkdir()
        (folder / "osd").mkdir()
        (folder / "ceph.conf").write_text(
            f"""[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
run dir = {folder}
admin socket =
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
crash dir = {folder}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
paxos propose interval = 0.02
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{self.port}
rgw crypt require ssl = false
rgw crypt s3 kms backend = testing
rgw crypt s3 kms encryption keys = {KMS_KEY}=YmluCmJvb3N0CmJvb3N0LWJ1aWxkCmNlcGguY29uZgo=
rgw run sync thread = false
rgw num rados handles = 1
rgw thread pool size = 64
"""
        )
        allow = ("mon", "allow *", "osd", "allow *", "mgr", "allow *")
        for number, (name, caps) in enumerate(
            {
                "mon.": ("mon", "allow *"),
                "client.admin": allow,
                "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
                "client.rgw": ("mon", "allow rw", "osd", "allow rwx"),
            }.items()
        ):
            made = ["--create-keyring"] if number == 0 else []
            pairs = [text for at in range(0, len(caps), 2) for text in ("--cap", caps[at], caps[at + 1])]
            self._run("ceph-authtool", "keyring", *made, "--gen-key", "-n", name, *pairs, configured=False)
        monitor = f"[v2:127.0.0.1:{mon_port}]"
        self._run("monmaptool", "--create", "--addv", "a", monitor, "--fsid", fsid, "monmap", configured=False)

    def _run(self, program: str, *arguments: str, configured: bool = True) -> None:
        config = ["-c", "ceph.conf"] if configured else []
        done = subprocess.run(
            [program, *config, *arguments], cwd=self.folder, capture_output=True, timeout=90, check=False
        )
        assert done.returncode == 0, f"{program} {arguments}: {done.stderr.decode()}\n{self.processes.said()}"


class Versitygw(_Local):
    NEEDED = ("versitygw", "setpriv")

    def __init__(self) -> None:
        super().__init__("versitygw")
        (self.folder / "data").mkdir()
        self.start()

    def start(self) -> None:
        address = f"127.0.0.1:{self.port}"
        program = program_of("versitygw")
        assert program is not None
        self.processes.spawn(
            "gateway", program, "--quiet", "--keep-alive", "--port", address, "posix", str(self.folder / "data"),
            ROOT_ACCESS_KEY=ACCESS_KEY, ROOT_SECRET_KEY=SECRET_KEY,
        )  # fmt: skip
        self.until_ready("gateway")

    def kill9(self) -> None:
        self.processes.kill9("gateway")


_KINDS: dict[str, Any] = {"radosgw": Radosgw, "versitygw": Versitygw}


def kinds() -> list[str]:
    """Names of the servers to run tests on; one that is missing here is skipped when it is asked for."""
    return [*_KINDS, *(["external"] if os.environ.get(EXTERNAL) else [])]


@functools.cache
def running(kind: str) -> S3Server:
    """The server of this kind in this process, started now if it is not yet."""
    if kind == "external":
        return S3Server(
            kind, os.environ[EXTERNAL], os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        )
    if any(program_of(program) is None for program in _KINDS[kind].NEEDED):
        pytest.skip(f"component: {kind}")
    return _KINDS[kind]()


def program_of(name: str) -> str | None:
    found: Callable[[str], str | None] = shutil.which
    built = _DEV_CACHE / "go" / "bin" / name
    return found(name) or (str(built) if os.access(built, os.X_OK) else None)


def answers(endpoint: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status < 500
    except OSError:
        return False
    finally:
        connection.close()
