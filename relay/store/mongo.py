"""The connection to MongoDB: the only module that imports Motor.

Durability is pinned here, whatever the URI says: every write is ``w: majority, j: true``. Reads go to the primary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog
from beanie import init_beanie
from bson import DatetimeMS
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.timestamp import Timestamp
from pymongo import IndexModel, ReadPreference
from pymongo import timeout as time_limit
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DuplicateKeyError,
    InvalidURI,
    OperationFailure,
    PyMongoError,
)
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from models.accounts import Device, User
from models.audit import AuditEntry, AuditHead
from models.contacts import Contact, Report
from models.conversations import Conversation, Membership
from models.housekeeping import Balance, Erasure, Node, Release, Setting, Tombstone
from models.keys import PreKey, PublicKeys
from models.messages import FATES, MESSAGES, fate_indexes, message_indexes, ttl_indexes
from relay.store.timekeeping import Reading
from relay.wire.clock import steady_ns
from relay.wire.stamps import STAMPS

# Motor runs each call in a thread of one pool; calls that hang must not starve the others, so there are more threads
# than calls the relay ever has under way. It is read at import.
os.environ.setdefault("MOTOR_MAX_WORKERS", "256")

from motor.motor_asyncio import (
    AsyncIOMotorClient,
    AsyncIOMotorDatabase,
)

__all__ = [
    "BulkWriteError",
    "DuplicateKeyError",
    "Mongo",
    "MongoUnavailable",
    "OperationFailure",
    "PyMongoError",
    "brief",
    "time_limit",
]

DURABLE: Final = WriteConcern(w="majority", j=True)
# Dates stay integers on the message path: building datetime objects costs more than the rest of decoding.
MESSAGE_CODEC: Final[CodecOptions[dict[str, Any]]] = CodecOptions(
    datetime_conversion=DatetimeConversion.DATETIME_MS, unicode_decode_error_handler="replace"
)
_ROUTER: Final = "isdbgrid"
_CALL_MS: Final = 10_000
_CHECK_SECONDS: Final = 3.0
NO_LIMIT: Final = 0
"""For ``time_limit``: as long as it takes. None would leave the client's own limit (pymongo.timeout)."""
_TIME_SECONDS: Final = 1.0
CONTROL: Final = (
    User,
    Device,
    Contact,
    Report,
    Conversation,
    Membership,
    PublicKeys,
    PreKey,
    AuditEntry,
    AuditHead,
    Release,
    Erasure,
    Node,
    Balance,
    Tombstone,
    Setting,
)


log = structlog.get_logger(__name__)


class MongoUnavailable(Exception):
    """MongoDB cannot be reached or used; one line for people, without the URI's password."""


class Mongo:
    """The relay's database. ``messages`` and ``fates`` read and write plain dictionaries with integer dates."""

    def __init__(self, uri: str, database: str, *, select_seconds: float = 5) -> None:
        try:
            self.client: Any = AsyncIOMotorClient(
                uri,
                appname="relay",
                tz_aware=True,
                serverSelectionTimeoutMS=int(select_seconds * 1000),
                connectTimeoutMS=5000,
                # Every call ends: a connection that hangs must not hold its caller for ever. The message path has
                # shorter limits of its own.
                timeoutMS=_CALL_MS,
                maxPoolSize=100,
                # The message path finds unknown outcomes out by itself; the server would write a record for each call.
                retryWrites=False,
            )
        except (ConfigurationError, InvalidURI, ValueError) as error:
            raise MongoUnavailable(f"RELAY_MONGO_URI cannot be used: {error}") from None
        self.database: AsyncIOMotorDatabase[Any] = self.client.get_database(
            database,
            write_concern=DURABLE,
            read_preference=ReadPreference.PRIMARY,
            read_concern=ReadConcern("local"),
        )
        self.is_sharded = False
        """Whether it is a sharded cluster; known once ``prepare`` is done."""
        self.messages: Any = self._plain(MESSAGES)
        self.fates: Any = self._plain(FATES)
        self.committed_messages: Any = self.messages.with_options(read_concern=ReadConcern("majority"))

    def _plain(self, name: str) -> Any:
        return self.database.get_collection(name, codec_options=MESSAGE_CODEC)

    async def prepare(self, ttl_seconds: int, fate_seconds: int) -> None:
        """Makes collections and indexes; changes the times to live of existing ones. Raises MongoUnavailable."""
        try:
            hello = await self.client.admin.command("hello")
            self.is_sharded = hello.get("msg") == _ROUTER
            if "setName" not in hello and not self.is_sharded:
                raise MongoUnavailable(
                    "MongoDB runs standalone, which can lose acknowledged writes on a crash; "
                    "make it a replica set (of one member, if need be)"
                )
            # Building an index over a large collection takes its time.
            with time_limit(NO_LIMIT):
                await self._ensure(MESSAGES, message_indexes(ttl_seconds))
                await self._ensure(FATES, fate_indexes(fate_seconds))
                await init_beanie(database=self.database, document_models=list(CONTROL))
        except ConnectionFailure as error:
            reason = str(error).partition(" (configured")[0].partition(", Timeout")[0][:200]
            raise MongoUnavailable(f"MongoDB cannot be reached: {reason}; see RELAY_MONGO_URI") from None
        except OperationFailure as error:
            raise MongoUnavailable(
                f"MongoDB refused to prepare the collections: {str(error)[:200]}"
            ) from None

    async def _ensure(self, name: str, indexes: Sequence[IndexModel]) -> None:
        known = await self.database[name].index_information()
        missing: list[IndexModel] = []
        for index in indexes:
            there = known.get(index.document["name"])
            seconds = index.document.get("expireAfterSeconds")
            if there is None or list(there["key"]) != list(index.document["key"].items()):
                missing.append(index)
            elif seconds is not None and there.get("expireAfterSeconds") != seconds:
                await self._set_life(name, index.document["name"], int(seconds))
        if missing:
            await self.database[name].create_indexes(missing)
        elif self.is_sharded:
            # One shard was asked what there is. Another may lack it; but a node must start while one is down.
            try:
                with time_limit(_CHECK_SECONDS):
                    await self.database[name].create_indexes(list(indexes))
            except PyMongoError as error:
                log.warning(
                    "not every shard's indexes could be looked at", collection=name, error=brief(error)
                )

    async def set_ttl(self, name: str, seconds: int) -> None:
        """Changes the time to live of ``messages`` or ``fates`` at run time."""
        await self._set_life(name, ttl_indexes[name], seconds)

    async def _set_life(self, name: str, index: str, seconds: int) -> None:
        await self.database.command("collMod", name, index={"name": index, "expireAfterSeconds": seconds})

    async def message_ttl(self) -> int | None:
        """The time to live in force, in seconds, as the index says; None when there is no such index."""
        found: Mapping[str, Any] = await self.messages.index_information()
        index = found.get(ttl_indexes[MESSAGES])
        return None if index is None else int(index["expireAfterSeconds"])

    async def ping(self, seconds: float = 2, *, told: Callable[[Reading], object] | None = None) -> bool:
        """Whether the primary answers within ``seconds``. When it tells its time, too, ``told`` is called; cluster time is noted
        (relay.wire.stamps)."""
        asked = steady_ns()
        try:
            with time_limit(seconds):
                hello = await self.client.admin.command("hello", codec_options=MESSAGE_CODEC)
        except PyMongoError:
            return False
        answered = steady_ns()
        is_primary = bool(hello.get("isWritablePrimary"))
        if is_primary and isinstance(cluster := hello.get("$clusterTime", {}).get("clusterTime"), Timestamp):
            STAMPS.hear(cluster.time * 1000)
        if told is not None and is_primary:
            is_router = hello.get("msg") == _ROUTER
            reading = await self._time_of_shard() if is_router else _reading(hello, asked, answered)
            if reading is not None:
                told(reading)
        return is_primary

    async def _time_of_shard(self) -> Reading | None:
        """A router tells its own time, which is often this very machine's, and another one's for the next call. An unsharded
        collection's statistics come from where it lies."""
        nodes = self._plain(Node.Settings.name)
        asked = steady_ns()
        try:
            with time_limit(_TIME_SECONDS):
                found = await nodes.aggregate([{"$collStats": {}}]).to_list(1)
        except PyMongoError:
            return None
        return _reading(found[0] if found else {}, asked, steady_ns())

    async def readings(self, count: int) -> list[Reading]:
        """MongoDB's time, asked ``count`` times; fewer when it does not answer."""
        found: list[Reading] = []
        for _ in range(count):
            if not await self.ping(told=found.append):
                break
        return found

    def close(self) -> None:
        """Closes every connection."""
        self.client.close()


def _reading(answer: Mapping[str, Any], asked: int, answered: int) -> Reading | None:
    at = answer.get("localTime")
    return Reading.of(int(at), asked, answered) if isinstance(at, DatetimeMS) else None


def brief(error: BaseException) -> str:
    """An error's kind and code, for the log. Never its message: MongoDB's quote documents."""
    code = getattr(error, "code", None)
    return type(error).__name__ if code is None else f"{type(error).__name__} {code}"
