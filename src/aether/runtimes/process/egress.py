"""What outgoing connections instances may make, from the operator's words to networks. Pure.

The machine's own addresses and link-local ones are never reachable unless allowed by name; the rest is policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network

ALL, PUBLIC, NONE = "all", "public", "none"
POLICIES = (ALL, PUBLIC, NONE)

_NEVER = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")
"""Loopback, because a socket bound to the way out passes by the instance's own, and the machine's would hear it;
link-local, where clouds serve their machines' credentials; multicast, broadcast and reserved addresses."""
_PRIVATE = (
    "10.0.0.0/8",
    "100.64.0.0/10",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
)
"""What is not the public internet: private, shared and benchmarking ranges."""


@dataclass(frozen=True, slots=True)
class Egress:
    """`policy`: all, public (no private ranges) or none; `allowed` are networks that are reachable all the same."""

    policy: str = ALL
    allowed: tuple[IPv4Network, ...] = ()

    @property
    def open(self) -> bool:
        return self.policy != NONE

    def refused(self) -> list[IPv4Network]:
        """Networks to refuse whatever the machine's own addresses are, without those that are allowed."""
        left = [IPv4Network(text) for text in (*_NEVER, *(_PRIVATE if self.policy == PUBLIC else ()))]
        for allowed in self.allowed:
            left = [part for network in left for part in _without(network, allowed)]
        return sorted(left)


def parse(policy: str, allowed: Sequence[str]) -> Egress:
    """Raises ValueError with the word that is wrong."""
    if policy not in POLICIES:
        raise ValueError(f"'{policy}' is none of {', '.join(POLICIES)}")
    networks: list[IPv4Network] = []
    for text in allowed:
        try:
            networks.append(IPv4Network(text))
        except ValueError as error:
            raise ValueError(f"'{text}' is no IPv4 address or network: {error}") from None
    return Egress(policy, tuple(networks))


def _without(network: IPv4Network, hole: IPv4Network) -> list[IPv4Network]:
    if not network.overlaps(hole):
        return [network]
    return [] if network.subnet_of(hole) else list(network.address_exclude(hole))
