"""Deleting several messages at once.

On a replica set that is one statement. On a sharded cluster it is one for each conversation: MongoDB lets a statement that names
many documents on several shards pass without looking at the routing table's version, and such a statement misses what is moving
from one shard to another. A statement that names one value of the shard key goes to one shard, and is tried again when it came to
the wrong one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pymongo import DeleteMany

from relay.store.mongo import Mongo
from relay.wire.ids import conversation_of


async def delete_messages(
    mongo: Mongo, wanted: Iterable[tuple[str, int | None]], awaited: Mapping[str, int] | None = None
) -> int:
    """Deletes documents of ``messages`` by ``_id``, and by ``seq`` where it is given (of all of them or of none); with ``awaited``
    (of all of them) only those that wait for so many mailboxes. Returns how many there were. The caller sets the time limit.
    Raises PyMongoError."""
    by_conversation: dict[str, list[tuple[str, int | None]]] = {}
    for stored_id, seq in wanted:
        by_conversation.setdefault(conversation_of(stored_id), []).append((stored_id, seq))
    if not by_conversation:
        return 0
    if not mongo.is_sharded:
        everything = [one for some in by_conversation.values() for one in some]
        result = await mongo.messages.delete_many(_query(list(by_conversation), everything, awaited))
    else:
        statements = [DeleteMany(_query([name], some, awaited)) for name, some in by_conversation.items()]
        result = await mongo.messages.bulk_write(statements, ordered=False)
    return int(result.deleted_count)


def _query(
    conversations: list[str], wanted: list[tuple[str, int | None]], awaited: Mapping[str, int] | None
) -> Mapping[str, Any]:
    query: dict[str, Any] = {
        "_id": {"$in": [stored_id for stored_id, _ in wanted]},
        "conversationId": {"$in": conversations} if len(conversations) > 1 else conversations[0],
    }
    seqs = {seq for _, seq in wanted if seq is not None}
    if seqs:
        query["seq"] = {"$in": list(seqs)}
    if awaited:
        by_number: dict[int, list[str]] = {}
        for stored_id, _ in wanted:
            by_number.setdefault(awaited[stored_id], []).append(stored_id)
        if len(by_number) == 1:
            query["awaiting"] = {"$size": next(iter(by_number))}
        else:
            query["$or"] = [
                {"_id": {"$in": some}, "awaiting": {"$size": number}} for number, some in by_number.items()
            ]
    return query
