"""What MongoDB keeps: bytes on disk for a message that waits, for the fate of one that is gone, and bytes of oplog."""

from __future__ import annotations

import base64
import random
from time import time_ns
from typing import Any, Final

import msgspec
from bson.datetime_ms import DatetimeMS
from pymongo import AsyncMongoClient

from models.messages import FATES, MESSAGES, FateEntry
from relay.store.documents import encode
from relay.store.mongo import Mongo
from relay.wire.clock import Clock
from relay.wire.envelope import Envelope
from relay.wire.ids import device_key, new_id, user_of
from scripts.tools.bench.report import Check

_CONVERSATIONS: Final = 5000
_BATCH: Final = 500
# As many as one group of acknowledgements has at a moderate rate.
_FATES: Final = 10
_DAY: Final = 86_400


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes. ``message`` and ``fate``: of one that is kept, with its part of all indexes, compressed as MongoDB does by itself;
    ``document`` is the message alone, uncompressed. ``oplog``: what one message adds from its insertion to its deletion,
    uncompressed."""

    messages: int
    document: float
    message: float
    fate: float
    oplog: float
    checks: list[Check]


async def oplog(uri: str, database: str) -> float:
    """After a load: bytes of oplog for each message that came and went. Raises PyMongoError."""
    async with AsyncMongoClient[dict[str, Any]](uri) as client:
        sizes = {"$group": {"_id": None, "n": {"$sum": {"$size": "$entries"}}}}
        gone = await (await client[database][FATES].aggregate([sizes])).to_list()
        names = {"$in": [f"{database}.{MESSAGES}", f"{database}.{FATES}"]}
        ours = {"$match": {"$or": [{"ns": names}, {"o.applyOps.ns": names}]}}
        whole = {"$group": {"_id": None, "size": {"$sum": {"$bsonSize": "$$ROOT"}}}}
        written = await (await client.local["oplog.rs"].aggregate([ours, whole])).to_list()
    return float(written[0]["size"]) / float(gone[0]["n"]) if written and gone else 0.0


async def waiting(uri: str, database: str, messages: int, size: int) -> tuple[float, float, float]:
    """Stores so many messages for one device each, with bodies of random text that compresses little, and as many fates: bytes of a
    document, and on disk of one message and of one fate with their parts of the indexes. The database is dropped afterwards.
    Raises MongoUnavailable and PyMongoError."""
    mongo = Mongo(uri, database)
    lot = random.Random(messages)
    clock = Clock()
    names = [new_id() for _ in range(_CONVERSATIONS)]
    try:
        await mongo.prepare(30 * _DAY, 3 * _DAY)
        total = 0
        for start in range(0, messages, _BATCH):
            rows, entries = [], []
            for _ in range(min(_BATCH, messages - start)):
                place = lot.randrange(_CONVERSATIONS)
                envelope = Envelope(
                    names[place],
                    new_id(),
                    user=f"{place:032x}",
                    device="phone",
                    seq=clock.next(),
                    at=time_ns() // 1_000_000,
                    kind="text",
                    body=base64.b64encode(lot.randbytes(size)).decode()[:size],
                    awaiting=[device_key(f"{place + _CONVERSATIONS:032x}", "phone")],
                )
                rows.append(encode(envelope))
                total += envelope.size
                entries.append(_fate(envelope))
            await mongo.messages.insert_many(rows, ordered=False)
            documents = [
                {
                    "lane": "0",
                    "at": DatetimeMS(time_ns() // 1_000_000),
                    "entries": entries[first : first + _FATES],
                }
                for first in range(0, len(entries), _FATES)
            ]
            await mongo.fates.insert_many(documents)
        await mongo.client.admin.command("fsync")
        stats = [await mongo.database.command("collStats", name) for name in (MESSAGES, FATES)]
        return total / messages, stats[0]["totalSize"] / messages, stats[1]["totalSize"] / messages
    finally:
        await mongo.client.drop_database(database)
        mongo.close()


def _fate(envelope: Envelope) -> FateEntry:
    return {
        "id": envelope.doc_id,
        "sender": {"user": envelope.user, "device": envelope.device},
        "seq": envelope.seq,
        "at": envelope.at,
        "fate": "delivered",
        "delivered": [user_of(key) for key in envelope.awaiting],
    }
