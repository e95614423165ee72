"""When a revision that could not be carried out is tried again, and what of it need not be done again.

The wait doubles with every attempt, up to five minutes, and is never the same for two: what is stuck, for example because the shard
of its conversation does not answer, must not hold up what is not. While a shard is known to be down its conversations are left out.
What is due is claimed, so that of several nodes one tries it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from pymongo import ReturnDocument

from models.conversations import Conversation
from relay.store.mongo import PyMongoError
from relay.wire.clock import utc_now

_FIRST_SECONDS: Final = 5.0
_LONGEST_SECONDS: Final = 300.0
_SPREAD: Final = (0.75, 1.25)
# Longer than carrying out takes; who claimed it and died is followed by somebody else.
_AT_WORK: Final = timedelta(seconds=60)
_EVERYTHING: Final[Mapping[str, Any]] = {}

Reachable = Callable[[], Mapping[str, Any]]


def everything() -> Mapping[str, Any]:
    """A condition that every conversation meets."""
    return _EVERYTHING


class Attempts:
    """Part of ``conversations.pending``: ``tries`` so far in vain, not ``dueAt`` before, and ``applied``. ``reachable`` is a condition
    for conversations (``conversationId``) of shards that answer; it raises PyMongoError when none does."""

    def __init__(self, reachable: Reachable = everything) -> None:
        self._reachable = reachable

    def due(self, begun_before: datetime) -> Mapping[str, Any] | None:
        """What meets this may be tried now; None when nothing can be."""
        where = self._where()
        if where is None:
            return None
        # What was not tried in vain yet is due, and comes first.
        return {"pending.at": {"$lt": begun_before}, "pending.dueAt": {"$not": {"$gt": utc_now()}}, **where}

    async def claim(self, conversation: str, revision: str, due: datetime | None) -> Mapping[str, Any] | None:
        """The conversation, if this revision is still pending, nobody has tried it since it was found ``due`` and its shard answers:
        for a minute it is this node's to try."""
        where = self._where()
        if where is None:
            return None
        found: Mapping[str, Any] | None = await Conversation.get_motor_collection().find_one_and_update(
            {"_id": conversation, "pending.id": revision, "pending.dueAt": due, **where},
            {"$set": {"pending.dueAt": utc_now() + _AT_WORK}},
            return_document=ReturnDocument.AFTER,
        )
        return found

    async def failed(self, conversation: str, revision: str, tries: int, *, applied: bool) -> None:
        """It was tried so many times, and could not be carried out. ``applied``: what is left is to tell its members."""
        change: dict[str, Any] = {"pending.tries": tries, "pending.dueAt": utc_now() + wait(tries)}
        if applied:
            change["pending.applied"] = True
        await Conversation.get_motor_collection().update_one(
            {"_id": conversation, "pending.id": revision}, {"$set": change}
        )

    def _where(self) -> Mapping[str, Any] | None:
        try:
            reachable = self._reachable()
        except PyMongoError:
            return None
        ranges = [{"_id": one["conversationId"]} for one in reachable.get("$or", ())]
        return {"$or": ranges} if ranges else {}


def wait(tries: int) -> timedelta:
    """How long after so many attempts the next one is due."""
    # The exponent is bounded: floats are not.
    seconds = min(_LONGEST_SECONDS, _FIRST_SECONDS * 2 ** min(tries - 1, 16))
    return timedelta(seconds=seconds * random.uniform(*_SPREAD))
