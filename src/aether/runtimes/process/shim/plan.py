"""What the server asks the keeper to run, as bytes on the keeper's stdin.

The text is a sequence of NUL-separated `key=value` items, because a JSON parser would add a megabyte to every keeper.
Secrets travel here and nowhere else: they reach neither a command line nor the disk.
"""

from __future__ import annotations

BUBBLEWRAP = "bubblewrap"
NONE = "none"

ARGS_FD, SECCOMP_FD, STATUS_FD, SCRIPT_FD = 3, 4, 5, 9
"""Descriptors the started program finds: sandbox arguments, syscall filter, sandbox status, shell script."""


class Plan:
    """One instance to run. Byte strings are paths or arguments exactly as the kernel takes them."""

    def __init__(
        self,
        *,
        kind: str,
        argv: list[bytes],
        options: list[bytes],
        script: bytes,
        filter_hex: str,
        cgroups: list[bytes],
        memory_events: bytes,
        log: bytes,
        log_bytes: int,
        port: int,
        slirp: bytes,
        open_files: int,
        data_bytes: int,
    ) -> None:
        self.kind = kind
        self.argv = argv
        self.options = options
        self.script = script
        self.filter_hex = filter_hex
        self.cgroups = cgroups
        self.memory_events = memory_events
        self.log = log
        self.log_bytes = log_bytes
        self.port = port
        self.slirp = slirp
        self.open_files = open_files
        self.data_bytes = data_bytes

    def encode(self) -> bytes:
        items: list[bytes] = [b"kind=" + self.kind.encode()]
        items += [b"argv=" + item for item in self.argv]
        items += [b"option=" + item for item in self.options]
        items += [b"cgroup=" + item for item in self.cgroups]
        items += [
            b"script=" + self.script,
            b"filter=" + self.filter_hex.encode(),
            b"memory_events=" + self.memory_events,
            b"log=" + self.log,
            b"log_bytes=%d" % self.log_bytes,
            b"port=%d" % self.port,
            b"slirp=" + self.slirp,
            b"open_files=%d" % self.open_files,
            b"data_bytes=%d" % self.data_bytes,
        ]
        if any(b"\0" in item for item in items):
            raise ValueError("a NUL byte can be part of no path, argument or variable")
        return b"\0".join(items)

    @classmethod
    def decode(cls, data: bytes) -> Plan:
        found: dict[bytes, list[bytes]] = {}
        for item in data.split(b"\0"):
            key, _, value = item.partition(b"=")
            found.setdefault(key, []).append(value)

        def one(key: bytes) -> bytes:
            return found[key][0]

        return cls(
            kind=one(b"kind").decode(),
            argv=found[b"argv"],
            options=found.get(b"option", []),
            script=one(b"script"),
            filter_hex=one(b"filter").decode(),
            cgroups=found.get(b"cgroup", []),
            memory_events=one(b"memory_events"),
            log=one(b"log"),
            log_bytes=int(one(b"log_bytes")),
            port=int(one(b"port")),
            slirp=one(b"slirp"),
            open_files=int(one(b"open_files")),
            data_bytes=int(one(b"data_bytes")),
        )
