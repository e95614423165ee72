"""Which of many mailboxes anything waits in, asked with one query."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from relay.store.mongo import Mongo, time_limit
from relay.store.shards import Shards

_MOST: Final = 500


class Backlogs:
    """``timeout`` (s) is the time limit of one answer."""

    def __init__(self, mongo: Mongo, shards: Shards, *, timeout: float) -> None:
        self._collection = mongo.messages
        self._shards = shards
        self._timeout = timeout

    async def empty(self, keys: Collection[str]) -> set[str]:
        """Those of these mailboxes in which nothing waited when this was asked. Of the others nothing is said: that something
        waits in them, or, where so much waits that not all was looked at, nothing at all; and of all of them nothing while a shard is down. Raises PyMongoError."""
        if self._shards.reachable:
            return set()
        query = {"awaiting": {"$in": list(keys)}}
        found = 0
        left = set(keys)
        with time_limit(self._timeout):
            async for row in self._collection.find(query, {"awaiting": 1}, batch_size=_MOST).limit(_MOST):
                found += 1
                # What is not a message at all matches, too.
                awaiting = row["awaiting"] if isinstance(row["awaiting"], list) else [row["awaiting"]]
                left.difference_update(key for key in awaiting if isinstance(key, str))
        return left if found < _MOST else set()
