"""Who types where: told as it changes, kept nowhere but here, and over by itself."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Final

from relay.routing.announcer import Announcer
from relay.routing.hub import Connected
from relay.store.audience import Audience
from relay.wire import replies
from relay.wire.errors import RelayError
from relay.wire.frames import MAX_LIVE_MEMBERS
from relay.wire.limits import Limit

LASTS_SECONDS: Final = 10.0
MOST_OF_CONNECTION: Final = 16
MOST: Final = 20_000

_Place = tuple[str, str]
_Entry = tuple[Connected, str]


class Typing:
    """A member types in a conversation as long as one of their connections does. At most ``MOST`` connections and
    conversations on this node, ``MOST_OF_CONNECTION`` conversations of one connection."""

    def __init__(self, out: Announcer, *, lasts: float = LASTS_SECONDS) -> None:
        self._out = out
        self._lasts = lasts
        # Connection and conversation, to when it is over. Each lasts equally long, so the first is over first.
        self._until: OrderedDict[_Entry, float] = OrderedDict()
        self._of: dict[Connected, set[str]] = {}
        # Conversation and user: how many of their connections type, and who was told.
        self._told: dict[_Place, tuple[int, tuple[str, ...]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._until)

    def begin(self, connection: Connected, audience: Audience) -> None:
        """The user types, or still does. Nobody is told who has blocked them or whom they have blocked, and nobody at all in
        a large conversation. Raises RelayError ``rate_limited`` when they type in too many places."""
        if len(audience.members) > MAX_LIVE_MEMBERS:
            return
        loop = asyncio.get_running_loop()
        entry = (connection, audience.conversation)
        if entry in self._until:
            self._until[entry] = loop.time() + self._lasts
            self._until.move_to_end(entry)
            return
        places = self._of.get(connection, ())
        if len(places) >= MOST_OF_CONNECTION or len(self._until) >= MOST:
            raise RelayError(
                "rate_limited",
                "typing in too many conversations at once",
                retry_after=1000,
                limit=Limit.TYPING_RATE,
            )
        self._of.setdefault(connection, set()).add(audience.conversation)
        self._until[entry] = loop.time() + self._lasts
        self._await_first()
        user = connection.user
        place = (audience.conversation, user)
        count, told = self._told.get(place, (0, ()))
        if not count:
            told = tuple(one for one in audience.members if one != user and not audience.apart(one, user))
            self._out.tell(told, replies.typing(audience.conversation, user, True))
        self._told[place] = (count + 1, told)

    def end(self, connection: Connected, conversation: str) -> None:
        """The user has stopped here, or has sent a message. Those who were told that they typed are told."""
        if self._until.pop((connection, conversation), None) is None:
            return
        places = self._of[connection]
        places.discard(conversation)
        if not places:
            del self._of[connection]
        place = (conversation, connection.user)
        count, told = self._told[place]
        if count > 1:
            self._told[place] = (count - 1, told)
            return
        del self._told[place]
        self._out.tell(told, replies.typing(conversation, connection.user, False))

    def left(self, connection: Connected) -> None:
        """The connection has ended."""
        for conversation in list(self._of.get(connection, ())):
            self.end(connection, conversation)

    def close(self) -> None:
        """Ends without telling anybody: every connection of this node ends."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._until.clear()
        self._of.clear()
        self._told.clear()

    def _await_first(self) -> None:
        if self._timer is None and self._until:
            first = next(iter(self._until.values()))
            self._timer = asyncio.get_running_loop().call_at(first, self._end_due)

    def _end_due(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._until:
            (connection, conversation), until = next(iter(self._until.items()))
            if until > now:
                break
            self.end(connection, conversation)
        self._await_first()
