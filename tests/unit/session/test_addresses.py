"""Whose request it is, with and without proxies in front."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from relay.session.addresses import Addresses


def address(trusted: str, peer: str, *forwarded: str) -> str:
    """What counts as the address of a request from this peer with these ``X-Forwarded-For`` headers."""
    headers = CIMultiDict([("X-Forwarded-For", value) for value in forwarded])
    return Addresses(trusted).of(make_mocked_request("GET", "/", headers=headers).clone(remote=peer))


@pytest.mark.parametrize(
    ("peer", "found"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", "local"),
    ],
)
def test_the_peer_counts_by_itself_and_an_ipv6_one_with_its_household(peer: str, found: str) -> None:
    assert address("", peer) == found


def test_nobody_can_forward_for_others_unless_trusted() -> None:
    assert address("", "192.0.2.7", "198.51.100.1") == "192.0.2.7"
    assert address("10.0.0.0/8", "192.0.2.7", "198.51.100.1") == "192.0.2.7"


@pytest.mark.parametrize(
    ("forwarded", "found"),
    [
        (["198.51.100.1"], "198.51.100.1"),
        (["203.0.113.9, 198.51.100.1"], "198.51.100.1"),
        (["203.0.113.9, 198.51.100.1, 10.1.1.1"], "198.51.100.1"),
        (["203.0.113.9", "198.51.100.1", "10.1.1.1"], "198.51.100.1"),
        (["198.51.100.1:4711"], "198.51.100.1"),
        (["[2001:db8::1]:4711"], "2001:db8::/64"),
        (["2001:db8::1"], "2001:db8::/64"),
        (["::ffff:198.51.100.1"], "198.51.100.1"),
        ([], "10.0.0.1"),
        ([""], "10.0.0.1"),
        (["nonsense"], "10.0.0.1"),
        (["198.51.100.1, nonsense, 10.1.1.1"], "10.1.1.1"),
        (["10.2.2.2, 10.1.1.1"], "10.2.2.2"),
        (["198.51.100.1, "], "10.0.0.1"),
    ],
)
def test_behind_a_trusted_proxy_the_nearest_address_that_is_no_proxy_counts(
    forwarded: list[str], found: str
) -> None:
    assert address("10.0.0.0/8, 172.16.0.1", "10.0.0.1", *forwarded) == found


def test_an_ipv6_proxy_is_known_by_its_whole_address() -> None:
    assert address("2001:db8::1", "2001:db8::1", "198.51.100.1") == "198.51.100.1"
    assert address("2001:db8::1", "2001:db8::2", "198.51.100.1") == "2001:db8::/64"


@pytest.mark.parametrize("trusted", ["10.0.0.0/33", "proxy", "10.0.0.0/8 10.1.0.0/16"])
def test_what_is_no_network_is_refused(trusted: str) -> None:
    with pytest.raises(ValueError, match=r"address|network|appear"):
        Addresses(trusted)
