"""What waits in the mailboxes of many devices that ask at the same moment, with one query, and another for what is not hot.

Of whom much waits nothing is said, and of nobody while a shard is down: they ask for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from models.messages import WAITING_INDEX
from relay.store.messages import Messages, Page, is_place
from relay.store.mongo import Mongo, time_limit
from relay.store.shards import Shards
from relay.wire.envelope import Envelope

# Documents that are looked at for a whole group.
_MOST: Final = 500
# Of one device: more is as well read page by page.
_FEW: Final = 64
_CHUNK: Final = 64
_MOST_BYTES: Final = 8 << 20


class Asked(NamedTuple):
    """As for ``Messages.waiting``: the mailboxes, the time (ms), and how much may come."""

    keys: Sequence[str]
    now: int
    limit: int
    max_bytes: int


class Backlogs:
    """``timeout`` (s) is the time limit of one query."""

    def __init__(self, mongo: Mongo, shards: Shards, messages: Messages, *, timeout: float) -> None:
        self._collection = mongo.messages
        self._shards = shards
        self._messages = messages
        self._timeout = timeout

    async def pages(self, asked: Sequence[Asked]) -> list[Page | None]:
        """The first page of each, as ``Messages.waiting`` would answer it; None for who should ask for themselves. Raises
        PyMongoError."""
        if self._shards.reachable:
            return [None] * len(asked)
        keys = {key for one in asked for key in one.keys}
        rows = await self._rows(keys, max(one.now for one in asked))
        if len(rows) == _MOST:
            return [None] * len(asked)
        boxes = _by_mailbox(rows, keys)
        waiting = [_in_order(one, boxes) for one in asked]
        known = await self._contents([row for rows in waiting if rows is not None for row in rows])
        gone = await self._messages.ended(one for one in known.values() if one is not None)
        return [
            None if rows is None else _page(one, rows, known, gone)
            for one, rows in zip(asked, waiting, strict=True)
        ]

    async def _rows(self, keys: set[str], now: int) -> list[Mapping[str, Any]]:
        fields = {"awaiting": 1, "seq": 1}
        with time_limit(self._timeout):
            # Not by the index of the time to live, however few mailboxes are asked for.
            query = self._messages.awaited_by(keys, now)
            cursor = self._collection.find(query, fields, batch_size=_MOST, hint=WAITING_INDEX)
            return list(await cursor.limit(_MOST).to_list(_MOST))

    async def _contents(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Envelope | None]:
        """By stored id, None for what is no message any more. What is missing was not read: it would be too much at once."""
        unique = list({row["_id"]: row for row in rows}.values())
        found: dict[str, Envelope | None] = {}
        size = hits = 0
        for start in range(0, len(unique), _CHUNK):
            if size > _MOST_BYTES:
                break
            chunk = unique[start : start + _CHUNK]
            with time_limit(self._timeout):
                known, hot = await self._messages.contents(chunk)
            found.update((row["_id"], known.get(row["_id"])) for row in chunk)
            size += sum(envelope.size for envelope in known.values())
            hits += hot
        self._messages.hot.asked(hits, len(found))
        return found


def _by_mailbox(rows: Sequence[Mapping[str, Any]], keys: set[str]) -> dict[str, list[Mapping[str, Any]]]:
    boxes: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        # What is not a message at all matches, too.
        awaiting = row["awaiting"] if isinstance(row["awaiting"], list) else [row["awaiting"]]
        for key in awaiting:
            if isinstance(key, str) and key in keys:
                boxes.setdefault(key, []).append(row)
    return boxes


def _in_order(asked: Asked, boxes: Mapping[str, list[Mapping[str, Any]]]) -> list[Mapping[str, Any]] | None:
    """What waits for one device; None when that is much, or no message is among it."""
    found = [row for key in asked.keys for row in boxes.get(key, ())]
    if len(found) > _FEW or not all(is_place(row) for row in found):
        return None
    return sorted({row["_id"]: row for row in found}.values(), key=lambda row: (row["seq"], row["_id"]))


def _page(
    asked: Asked, rows: Sequence[Mapping[str, Any]], known: Mapping[str, Envelope | None], gone: set[str]
) -> Page | None:
    found: list[Envelope] = []
    size = 0
    for row in rows:
        stored_id = row["_id"]
        if stored_id in gone or stored_id not in known:
            return None
        envelope = known[stored_id]
        if envelope is None:
            continue
        size += envelope.size
        if found and (size > asked.max_bytes or len(found) == asked.limit):
            return Page(found, exhausted=False)
        found.append(envelope)
    return Page(found, exhausted=True)
