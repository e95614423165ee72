"""The way to other nodes. A hint is all that goes over it: whatever is lost on it, the store still has, and the sweep finds."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Literal, Protocol

from relay.wire.envelope import Envelope

Event = Literal["receipt", "read", "typing", "presence", "keys"]


class Bus(Protocol):
    """What a node tells others. Nothing here waits or raises for a Redis that is away, unless it says so."""

    @property
    def tells(self) -> bool:
        """Whether what is told goes out, and who is where can be asked. It promises nothing about hearing others: what needs no
        answer of theirs goes by this."""

    @property
    def shared(self) -> bool:
        """As ``tells``, and this node hears what others tell: their confirmations come."""

    @property
    def problem(self) -> str | None:
        """What does not work, for people; None when all does."""

    def expect(self, users: Iterable[str]) -> None:
        """Messages for these users are being committed, and may have to be delivered in a moment."""

    def deliver(self, envelope: Envelope, keys: list[str]) -> None:
        """A committed message for mailboxes that no connection of this node serves."""

    def release(self, doc_id: str, key: str) -> None:
        """The document is not awaited by this mailbox any more, which no connection of this node serves."""

    def tell(self, event: Event, users: list[str], frame: str, but: str | None) -> None:
        """A live frame for all devices of these users on other nodes, but the one with the key ``but``."""

    def tell_device(self, key: str, frame: str) -> None:
        """A live frame for one device, on whatever other node it is."""

    async def enter(self, user: str, device: str) -> int:
        """A device connects: its former connection, on whatever node, is replaced, and what comes for it is sent here. Waits
        for Redis a second at most. Returns the number of the connection: a later one's is higher."""

    def leave(self, user: str, device: str, serial: int) -> None:
        """The connection with this number has ended."""

    def silent(self, user: str, device: str, serial: int, silent: bool) -> None:
        """The connection was not heard from for a heartbeat, or is again."""

    def confirm(self, node: str, numbers: list[int]) -> None:
        """What that node has told of, by these numbers, is believed here no more."""

    async def invalidate(
        self, others: Collection[str], conversations: list[str], users: list[str], seconds: float
    ) -> bool:
        """Tells all nodes what has changed. True when these ``others``, one or more, have confirmed, within at most so long."""

    def seen(self, user: str, moment: int) -> None:
        """Whether this user is online may have changed; ``moment`` (ms) is when they were last heard here, or 0."""

    def recheck(self, users: list[str]) -> None:
        """Who may see these people, or whom they may see, has changed."""

    def quiet(self, user: str, quiet: bool, moment: int) -> None:
        """Whether others shall be told what this user receives has changed at ``moment`` (ms)."""

    def ended(self, key: str) -> None:
        """The tokens of the device with this key are not good any more, here or elsewhere."""

    async def online(self, users: Collection[str]) -> dict[str, set[str]] | None:
        """Which devices of these users are online at other nodes, by user; None while Redis is away and nobody knows."""


class Alone:
    """The bus of a node without Redis."""

    tells = False
    shared = False
    problem = None

    def __init__(self) -> None:
        self._serials = itertools.count(1)

    def expect(self, users: Iterable[str]) -> None:
        """There is nobody."""

    def deliver(self, envelope: Envelope, keys: list[str]) -> None:
        """There is nobody."""

    def release(self, doc_id: str, key: str) -> None:
        """There is nobody."""

    def tell(self, event: Event, users: list[str], frame: str, but: str | None) -> None:
        """There is nobody."""

    def tell_device(self, key: str, frame: str) -> None:
        """There is nobody."""

    async def enter(self, user: str, device: str) -> int:
        """A number."""
        return next(self._serials)

    def leave(self, user: str, device: str, serial: int) -> None:
        """There is nobody."""

    def silent(self, user: str, device: str, serial: int, silent: bool) -> None:
        """There is nobody."""

    def confirm(self, node: str, numbers: list[int]) -> None:
        """There is nobody."""

    async def invalidate(
        self, others: Collection[str], conversations: list[str], users: list[str], seconds: float
    ) -> bool:
        """They cannot be told."""
        return False

    def seen(self, user: str, moment: int) -> None:
        """There is nobody."""

    def recheck(self, users: list[str]) -> None:
        """There is nobody."""

    def quiet(self, user: str, quiet: bool, moment: int) -> None:
        """There is nobody."""

    def ended(self, key: str) -> None:
        """There is nobody."""

    async def online(self, users: Collection[str]) -> dict[str, set[str]] | None:
        """There is nobody."""
        return {}
