"""What the server asks the keeper to run, as bytes on the keeper's stdin.

The text is a sequence of NUL-separated `key=value` items, because a JSON parser would add a megabyte to every keeper.
Secrets travel here and nowhere else: they reach neither a command line nor the disk.
"""

from __future__ import annotations

BUBBLEWRAP = "bubblewrap"
NONE = "none"
PIPES, TERMINAL = "pipes", "terminal"
"""How somebody is attached to an instance: to its three standard streams, or to a terminal that is all of them."""

ARGS_FD, SECCOMP_FD, STATUS_FD, SCRIPT_FD = 3, 4, 5, 9
"""Descriptors the started program finds: sandbox arguments, syscall filter, sandbox status, shell script."""


class Plan:
    """One instance to run. Byte strings are paths or arguments exactly as the kernel takes them.

    `console` is empty, PIPES or TERMINAL; `expires_ms` ends the instance after that time, 0 never; `owner` is the uid
    that may open the standard streams again by name (/dev/stdout), -1 for the keeper's own; `log_rate` is how many
    bytes are taken for the log in a second, 0 for all that come; `tell_listening` asks for a word when `port` is
    listened on.
    `refused` are networks without a way out; the machine's own addresses join them unless in one of `allowed`.
    """

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
        refused: list[bytes],
        allowed: list[bytes],
        console: str = "",
        expires_ms: int = 0,
        owner: int = -1,
        log_rate: int = 0,
        tell_listening: bool = False,
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
        self.console = console
        self.expires_ms = expires_ms
        self.owner = owner
        self.log_rate = log_rate
        self.tell_listening = tell_listening
        self.refused = refused
        self.allowed = allowed

    def encode(self) -> bytes:
        items: list[bytes] = [b"kind=" + self.kind.encode()]
        items += [b"argv=" + item for item in self.argv]
        items += [b"option=" + item for item in self.options]
        items += [b"cgroup=" + item for item in self.cgroups]
        items += [b"refused=" + item for item in self.refused]
        items += [b"allowed=" + item for item in self.allowed]
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
            b"console=" + self.console.encode(),
            b"expires_ms=%d" % self.expires_ms,
            b"owner=%d" % self.owner,
            b"log_rate=%d" % self.log_rate,
            b"tell_listening=%d" % self.tell_listening,
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
            console=one(b"console").decode(),
            expires_ms=int(one(b"expires_ms")),
            owner=int(one(b"owner")),
            log_rate=int(one(b"log_rate")),
            tell_listening=one(b"tell_listening") == b"1",
            refused=found.get(b"refused", []),
            allowed=found.get(b"allowed", []),
        )
