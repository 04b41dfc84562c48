"""What isolation this machine offers: the static findings and the words for operators."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from aether.runtimes.process import seccomp
from aether.runtimes.process.cgroups import Cgroups
from aether.runtimes.process.egress import PUBLIC, Egress
from aether.runtimes.process.sandbox import Tools
from aether.runtimes.process.shim.plan import NONE

_TUN = Path("/dev/net/tun")


@dataclass(frozen=True, slots=True)
class SandboxReport:
    """Result of trying the sandbox. `remedy`: what to do when it is not usable; `limits`: what enforces each."""

    kind: str
    usable: bool
    reason: str
    remedy: str
    limits: dict[str, str]
    egress: str

    def lines(self) -> list[str]:
        """The report for people."""
        found = [f"sandbox: {self.kind} ({'usable' if self.usable else 'not usable'})"]
        if self.reason:
            found.append(f"reason: {self.reason}")
        if self.remedy:
            found.append(f"remedy: {self.remedy}")
        found += [f"{name} limit: {how}" for name, how in self.limits.items()]
        return [*found, f"egress: {self.egress}"]


@dataclass(frozen=True, slots=True)
class Findings:
    """Programs and kernel facilities found, before anything is tried."""

    tools: Tools | None
    slirp: str
    missing: str
    remedy: str


def look() -> Findings:
    """Find the programs on this machine."""
    bwrap, setpriv = shutil.which("bwrap"), shutil.which("setpriv")
    slirp = shutil.which("slirp4netns") or ""
    if slirp and not os.access(_TUN, os.R_OK | os.W_OK):
        slirp = ""
    missing, remedy = "", ""
    if bwrap is None:
        missing, remedy = "bubblewrap is not installed", "install the package 'bubblewrap'"
    elif setpriv is None and os.geteuid() == 0:
        missing, remedy = "setpriv is not installed", "install the package 'util-linux'"
    elif not seccomp.supported(os.uname().machine):
        missing = f"no syscall filter is known for {os.uname().machine}"
        remedy = "use an x86_64 or aarch64 machine"
    tools = Tools(bwrap, setpriv or "", shutil.which("setsid") or "") if bwrap is not None and not missing else None
    return Findings(tools, slirp, missing, remedy)


def limits(groups: Cgroups, kind: str) -> dict[str, str]:
    """How each limit is enforced, in words."""
    memory = "not enforced" if kind == NONE else "rlimit: data size of each process, not of all together"
    pids = "not enforced" if kind == NONE else "rlimit: processes of the sandbox's user"
    return {
        "memory": groups.how("memory") or memory,
        "cpu": groups.how("cpu") or "not enforced: no cpu cgroup can be made; run as root or delegate a cgroup",
        "pids": groups.how("pids") or pids,
    }


def egress(kind: str, slirp: str, policy: Egress) -> str:
    """What outgoing connections an instance has, in words."""
    if kind == NONE:
        return "the machine's own network, unrestricted"
    if not policy.open:
        return "none, loopback only: AETHER_APP_EGRESS=none"
    if slirp:
        private = ", private ranges" if policy.policy == PUBLIC else ""
        but = f" but for {', '.join(map(str, policy.allowed))}" if policy.allowed else ""
        return f"slirp4netns (the machine's own addresses, link-local ones{private} are out of reach{but})"
    if shutil.which("slirp4netns"):
        return f"none, loopback only: {_TUN} cannot be used; give this user access to it (modprobe tun)"
    return "none, loopback only: install the package 'slirp4netns'"


def remedy_for(reason: str) -> str:
    """What an operator can do about a sandbox that failed with `reason`."""
    if os.geteuid() != 0:
        return (
            "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0), or run the server as root"
        )
    if "cgroup" in reason:
        return "make the cgroup folders writable for the server"
    return (
        "let the server create namespaces (in a container: run it privileged), or set AETHER_SANDBOX=none on loopback"
    )
