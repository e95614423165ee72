"""Where a request comes from, as limits and the audit see it."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from aiohttp import web

Address = IPv4Address | IPv6Address

LOCAL: Final = "local"
_HOUSEHOLD_BITS: Final = 64
_MAX_AGENT: Final = 200


class Addresses:
    """Tells who is behind a request. ``trusted`` names the proxies in front of the relay, as addresses or networks between
    commas; only what they write into ``X-Forwarded-For`` is believed. Raises ValueError for what is neither."""

    def __init__(self, trusted: str) -> None:
        self._trusted = [
            ip_network(part.strip(), strict=False) for part in trusted.split(",") if part.strip()
        ]

    def of(self, request: web.BaseRequest) -> str:
        """The client's address: an IPv4 address; for IPv6 the /64 network, which is what one household gets; ``local`` for
        a socket that has no address.

        The header is read from its end, where the nearest proxy wrote: the first address that is no proxy of ours is the
        client's, and what stands before it is the client's own claim. Reading stops at what is no address.
        """
        found = _parse(request.remote or "")
        if found is None:
            return LOCAL
        if self._trusted and self._is_proxy(found):
            for text in _backwards(request.headers.getall("X-Forwarded-For", ())):
                before = _parse(text)
                if before is None:
                    break
                found = before
                if not self._is_proxy(found):
                    break
        return _counted(found)

    def _is_proxy(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def agent_of(request: web.BaseRequest) -> str:
    """What a client calls itself: 200 printable characters at most."""
    text = request.headers.get("User-Agent", "")[: 2 * _MAX_AGENT]
    return "".join(sign for sign in text if sign.isprintable())[:_MAX_AGENT]


def _backwards(values: list[str] | tuple[str, ...]) -> Iterator[str]:
    for value in reversed(values):
        for part in reversed(value.split(",")):
            yield part.strip()


def _parse(text: str) -> Address | None:
    """Some proxies add the port: ``192.0.2.1:4711``, ``[2001:db8::1]:4711``. A zone (``%eth0``) means nothing here."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _counted(address: Address) -> str:
    if isinstance(address, IPv4Address):
        return str(address)
    return str(IPv6Network((int(address), _HOUSEHOLD_BITS), strict=False))
