"""Which networks are refused, and what a network is to the shim."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.runtimes.process.egress import POLICIES, Egress, parse
from aether.runtimes.process.shim import routes

networks = st.builds(
    lambda number, bits: IPv4Network((number >> (32 - bits) << (32 - bits), bits)),
    st.integers(0, 2**32 - 1),
    st.integers(1, 32),
)
addresses = st.one_of(
    st.integers(0, 2**32 - 1).map(IPv4Address),
    st.sampled_from(["127.0.0.1", "169.254.169.254", "10.1.2.3", "192.168.1.1", "224.0.0.251", "8.8.8.8"]).map(
        IPv4Address
    ),
)


@given(st.sampled_from(POLICIES), st.lists(networks, max_size=4), addresses)
def test_what_is_allowed_is_not_refused_and_nothing_else_changes(
    policy: str, allowed: list[IPv4Network], address: IPv4Address
) -> None:
    refused_before = any(address in network for network in Egress(policy).refused())
    refused = any(address in network for network in Egress(policy, tuple(allowed)).refused())
    assert refused == (refused_before and not any(address in network for network in allowed))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "169.254.169.254", "224.0.0.251", "255.255.255.255"])
def test_no_policy_lets_these_out(policy: str, address: str) -> None:
    assert any(IPv4Address(address) in network for network in Egress(policy).refused())


def test_words_that_are_wrong_are_named() -> None:
    wrong: list[tuple[str, list[str], str]] = [("some", [], "some"), ("all", ["10.0.0.1/8"], "10.0.0.1/8")]
    for policy, allowed, word in [*wrong, ("all", ["::1"], "::1")]:
        with pytest.raises(ValueError, match=re.escape(word)):
            parse(policy, allowed)
    assert parse("public", ["10.0.0.0/8", "192.0.2.1"]).allowed[1] == IPv4Network("192.0.2.1/32")


@given(networks, networks)
def test_the_shim_reads_networks_as_they_are(inner: IPv4Network, outer: IPv4Network) -> None:
    one, other = routes.parse(str(inner).encode()), routes.parse(str(outer).encode())
    assert one == (inner.network_address.packed, inner.prefixlen)
    assert routes.within(one, other) == inner.subnet_of(outer)
