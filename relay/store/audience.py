"""Who receives a message of a conversation: its members' active devices, cached under a short lease.

A change made on this node drops the cached entry at once and marks it stale, so that what was resolved with it and is not
yet handed to MongoDB is resolved again. What another node changes is seen when the lease runs out.

Where messages flow a lease is renewed before it runs out, so that none of them waits for that, each at a moment of its own:
conversations that began to talk together would wait together, again and again.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from relay.wire import ids
from relay.wire.clock import lease_time
from relay.wire.errors import Code, RelayError
from relay.wire.limits import Limit

LEASE_SECONDS: Final = 5.0
# Of the lease; what is left of it covers the gathering, and the query.
_RENEWED: Final = (0.7, 0.9)
# Used so often in one lease; for who writes less often it would mostly be read in vain.
_FLOWS: Final = 4
_GATHER_SECONDS: Final = 0.25
FULL_RETRY_MS: Final = 30_000
_MAX_CACHED: Final = 50_000
# Recipients in the lists that one audience keeps, over all senders.
_MAX_LISTED: Final = 50_000
_MOMENT: Final = re.compile(r"[0-9a-z]{1,11}")

_NOBODY: Final[frozenset[tuple[str, str]]] = frozenset()
_NONE: Final[frozenset[str]] = frozenset()
_UNTRIMMED: Final[list[str]] = []
Refusal = tuple[Code, str]


def refusal_error(refusal: Refusal) -> RelayError:
    """What a member who may not send is told."""
    if refusal[0] == "mailbox_full":
        return RelayError(*refusal, retry_after=FULL_RETRY_MS, limit=Limit.MAILBOX)
    return RelayError(*refusal)


@dataclass(frozen=True, slots=True)
class Roster:
    """What the store knows of a conversation's recipients.

    ``members`` maps users to their active device keys; ``relinked`` device keys to when (ms) their keys became another
    installation's; ``blocks`` are pairs of a member and another whom they blocked; ``refusals`` says who of the members may
    not send, and why; ``full`` are the mailboxes, placeholders too, that take no more messages now.
    """

    members: Mapping[str, list[str]]
    relinked: Mapping[str, int] = field(default_factory=dict)
    blocks: frozenset[tuple[str, str]] = _NOBODY
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    full: frozenset[str] = _NONE


EMPTY: Final = Roster({})
Loader = Callable[[list[str]], Awaitable[Mapping[str, Roster]]]
Hold = Callable[[], Awaitable[None]]


async def _alone() -> None:
    return None


class Audience:
    """The members of one conversation and their mailboxes, as of one moment.

    ``keys`` holds a device key for every active device and ``user/*`` for each member without any.
    """

    __slots__ = (
        "_awaiting",
        "_blocks",
        "_relinked",
        "_rev",
        "_trimmed",
        "conversation",
        "full",
        "keys",
        "members",
        "refusals",
        "renewal",
        "resolved",
        "stale",
        "uses",
    )

    def __init__(self, conversation: str, roster: Roster, asked: float | None = None) -> None:
        """``asked`` is when the store was asked (``lease_time``), not when it answered: the lease counts from there."""
        members = roster.members
        self.conversation = conversation
        self.members = frozenset(members)
        self.refusals = roster.refusals
        self.full = sorted(roster.full)
        self._blocks = roster.blocks
        self._relinked = roster.relinked
        self.keys: tuple[str, ...] = tuple(
            key
            for user, keys in sorted(members.items())
            for key in (sorted(keys) or [ids.any_device_key(user)])
        )
        self.stale = False
        self._awaiting: dict[str, list[str]] = {}
        self._trimmed: dict[str, list[str]] = {}
        self._rev: str | None = None
        self.lease(lease_time() if asked is None else asked)

    def lease(self, asked: float) -> None:
        """The store, which was asked then (``lease_time``), says that it is so."""
        self.resolved = asked
        self.uses = 0
        # Or they would be kept for everybody who has ever written here.
        self._awaiting.clear()
        self._trimmed.clear()
        self.renewal = asked + LEASE_SECONDS * random.uniform(*_RENEWED)

    def agrees(self, other: Audience) -> bool:
        """Whether the store said the same both times."""
        return (
            self.keys == other.keys
            and self.members == other.members
            and self.refusals == other.refusals
            and self.full == other.full
            and self._blocks == other._blocks
            and self._relinked == other._relinked
        )

    @property
    def fresh(self) -> bool:
        """Whether this may still be used for a new message."""
        return not self.stale and lease_time() - self.resolved < LEASE_SECONDS

    def awaiting(self, sender_key: str) -> list[str]:
        """Everybody's mailboxes that have room, but the sending device's own. The list is shared: do not change it."""
        found = self._awaiting.get(sender_key)
        if found is None:
            if len(self._awaiting) * len(self.keys) > _MAX_LISTED:
                self._awaiting.clear()
                self._trimmed.clear()
            found = self._without_blockers(sender_key, self.others(sender_key))
            if self.full:
                full = set(self.full)
                self._trimmed[sender_key] = [key for key in found if key in full]
                found = [key for key in found if key not in full]
            self._awaiting[sender_key] = found
        return found

    def trimmed(self, sender_key: str) -> list[str]:
        """The mailboxes that would get this sender's messages, were they not full. The list is shared: do not change it."""
        if not self.full:
            return _UNTRIMMED
        self.awaiting(sender_key)
        return self._trimmed[sender_key]

    def apart(self, user: str, other: str) -> bool:
        """Whether one of these two has blocked the other."""
        return (user, other) in self._blocks or (other, user) in self._blocks

    def others(self, sender_key: str) -> list[str]:
        """Everybody's mailboxes but the sending device's own, as the sender sees them: who has blocked them looks like
        anybody else."""
        own = {sender_key, ids.any_device_key(ids.user_of(sender_key))}
        return [key for key in self.keys if key not in own]

    def _without_blockers(self, sender_key: str, keys: list[str]) -> list[str]:
        if not self._blocks:
            return keys
        sender = ids.user_of(sender_key)
        found = dict.fromkeys(
            ids.blocked_key(ids.user_of(key)) if (ids.user_of(key), sender) in self._blocks else key
            for key in keys
        )
        return list(found)

    def relinked_since(self, rev: str) -> list[str]:
        """The devices whose keys have become another installation's since ``rev`` was told."""
        _, _, moment = rev.rpartition(".")
        known = int(moment, 36) if _MOMENT.fullmatch(moment) else 0
        return sorted(key for key, at in self._relinked.items() if at > known)

    @property
    def devices_rev(self) -> str:
        """A short name for this set of devices, and for the newest re-link among them (base 36, ms): it changes when a
        device comes, goes, or is installed anew."""
        if self._rev is None:
            keys = [key for key in self.keys if not ids.is_placeholder(key)]
            text = "\n".join(f"{key} {self._relinked.get(key, 0)}" for key in keys)
            newest = max((self._relinked.get(key, 0) for key in keys), default=0)
            self._rev = f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.{_base36(newest)}"
        return self._rev


class Audiences:
    """The cache. ``load`` answers a whole list of conversations with one round of queries; conversations that do not
    exist are absent from its answer and are remembered as empty for the lease. Await ``hold`` before anything is committed: it returns
    when other nodes wait for this one's leases, and raises PyMongoError."""

    def __init__(self, load: Loader, *, hold: Hold = _alone) -> None:
        self._load = load
        self.hold = hold
        self._cached: OrderedDict[str, Audience] = OrderedDict()
        self._of_user: dict[str, set[str]] = {}
        self._wanted: dict[str, list[asyncio.Future[Audience]]] = {}
        self._loading: asyncio.Task[None] | None = None
        self._renewals: set[str] = set()
        self._gathering: asyncio.TimerHandle | None = None
        self._asked: set[str] = set()
        self._outrun: set[str] = set()
        self._outrun_users: set[str] = set()

    def get(self, conversation: str) -> Audience | None:
        """The audience when it is known and fresh, without waiting."""
        found = self._cached.get(conversation)
        if found is None or not found.fresh:
            return None
        found.uses += 1
        if found.uses >= _FLOWS and lease_time() >= found.renewal:
            self._renew(found)
        return found

    async def resolve(self, conversation: str) -> Audience:
        """The audience, from the cache or the store. Everybody who asks during one query shares the next."""
        found = self.get(conversation)
        if found is not None:
            return found
        waiter: asyncio.Future[Audience] = asyncio.get_running_loop().create_future()
        self._wanted.setdefault(conversation, []).append(waiter)
        self._start()
        return await waiter

    async def resolve_all(self, conversations: Iterable[str]) -> dict[str, Audience]:
        """Several at once."""
        wanted = list(dict.fromkeys(conversations))
        found = await asyncio.gather(*(self.resolve(name) for name in wanted))
        return dict(zip(wanted, found, strict=True))

    def changed(self, *, conversation: str | None = None, user: str | None = None) -> None:
        """Forgets what a change of a conversation's members or of a user's devices has made untrue. What is being read
        at this moment may have been read before the change: it is handed out as stale."""
        if conversation is not None:
            self._outrun.update(self._asked & {conversation})
            self._drop(conversation)
        if user is not None:
            if self._asked:
                self._outrun_users.add(user)
            for name in list(self._of_user.get(user, ())):
                self._drop(name)

    def forget(self) -> None:
        """Believes nothing any more: others may not have waited for this node's leases."""
        self._outrun.update(self._asked)
        for name in list(self._cached):
            self._drop(name)

    def _renew(self, audience: Audience) -> None:
        """Once a lease: should it fail, who asks when the lease has run out is told."""
        audience.renewal = math.inf
        self._renewals.add(audience.conversation)
        if self._gathering is None:
            loop = asyncio.get_running_loop()
            self._gathering = loop.call_later(_GATHER_SECONDS, self._renew_gathered)

    def _renew_gathered(self) -> None:
        self._gathering = None
        if self._renewals:
            self._start()

    def _start(self) -> None:
        if self._loading is None:
            self._loading = asyncio.create_task(self._load_wanted(), name="audiences")

    async def _load_wanted(self) -> None:
        try:
            while self._wanted or (self._renewals and self._gathering is None):
                wanted, self._wanted = self._wanted, {}
                for name in self._renewals:
                    wanted.setdefault(name, [])
                self._renewals.clear()
                self._asked, self._outrun, self._outrun_users = set(wanted), set(), set()
                asked = lease_time()
                try:
                    loaded = await self._load(list(wanted))
                except Exception as error:  # noqa: BLE001 - every waiter is told; the next one asks again
                    for waiters in wanted.values():
                        for waiter in waiters:
                            if not waiter.done():
                                waiter.set_exception(error)
                    continue
                for name, waiters in wanted.items():
                    audience = self._remember(Audience(name, loaded.get(name, EMPTY), asked))
                    for waiter in waiters:
                        if not waiter.done():
                            waiter.set_result(audience)
        finally:
            self._loading = None
            self._asked = set()

    def _remember(self, audience: Audience) -> Audience:
        """The one that is cached, with a new lease, when nothing has changed: what was resolved with it need not be resolved again."""
        name = audience.conversation
        audience.stale = name in self._outrun or not audience.members.isdisjoint(self._outrun_users)
        known = self._cached.get(name)
        # One whose lease has run out is never believed again: who was resolved with it may be getting another just now.
        if known is not None and known.fresh:
            if audience.stale:
                # A change that concerns what is known would have dropped it.
                known.renewal = lease_time()
                return audience
            if known.agrees(audience):
                known.lease(audience.resolved)
                self._cached.move_to_end(name)
                return known
        self._drop(name)
        self._cached[name] = audience
        for user in audience.members:
            self._of_user.setdefault(user, set()).add(audience.conversation)
        if len(self._cached) > _MAX_CACHED:
            self._drop(next(iter(self._cached)))
        return audience

    def _drop(self, conversation: str) -> None:
        """What leaves the cache hears of no further change, so what was resolved with it is resolved again."""
        found = self._cached.pop(conversation, None)
        if found is None:
            return
        found.stale = True
        for user in found.members:
            names = self._of_user.get(user)
            if names is not None:
                names.discard(conversation)
                if not names:
                    del self._of_user[user]


def _base36(number: int) -> str:
    digits = ""
    while True:
        number, rest = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[rest] + digits
        if not number:
            return digits
