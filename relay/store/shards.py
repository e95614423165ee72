"""The shards of a cluster: which of them a conversation lies on, and which of them do not answer.

While a shard is down, queries that go to all shards leave its conversations out, instead of failing for everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Final

import structlog

from models.messages import FATES, MESSAGES
from relay.store.chunks import WHOLE, WHOLE_MAP, ChunkMap, chunk_map
from relay.store.mongo import Mongo, MongoUnavailable, PyMongoError, brief, time_limit
from relay.wire.clock import wall_seconds

CHECK_SECONDS: Final = 1.0
PROBE: Final = "relay probe"
"""The comment of the queries that only ask whether a shard answers."""
_MAP_SECONDS: Final = 10.0
_PROBE_SECONDS: Final = 2.0
# A node may have followed an outdated map for a while, and clocks differ.
_MARGIN_SECONDS: Final = 3600
_LOADS: Final = 3
_SHARDED: Final = "messages sharded"
_EVERYTHING: Final[Mapping[str, Any]] = {}

log = structlog.get_logger(__name__)


class ShardDown(PyMongoError):
    """What is asked for lies on a shard that is known not to answer. Saves the wait for it."""


class Shards:
    """Of a replica set: one lane, ``"0"``, that is never down. ``fate_seconds`` is how long fates are kept. ``returned`` is called
    when a shard answers again."""

    def __init__(self, mongo: Mongo, *, fate_seconds: int) -> None:
        self._mongo = mongo
        self._settings: Any = mongo.database["settings"]
        self._window = fate_seconds + _MARGIN_SECONDS
        self._map = WHOLE_MAP
        self._version: object = None
        self._read_at = 0.0
        self._fates_by_lane = False
        # Until it is known otherwise: what is overlooked would be stored a second time.
        self._single_fates = True
        self._told: str | None = None
        self.down: frozenset[str] = frozenset()
        self.returned: Callable[[], None] = _nothing

    @property
    def names(self) -> list[str]:
        """The lanes: shards that own conversations."""
        return self._map.shards

    @property
    def problem(self) -> str | None:
        """What is not as it should be, for people."""
        if not self.down:
            return None
        return f"no answer from {', '.join(sorted(self.down))}; conversations there cannot be used"

    def lane_of(self, conversation: str) -> str:
        """The shard that a conversation lies on, as far as is known."""
        chunks = self._map.chunks
        return chunks[0].shard if len(chunks) == 1 else self._map.chunk_of(conversation).shard

    def lanes_of_fates(self, conversation: str) -> tuple[str, ...] | None:
        """The lanes in which fates of a conversation's messages may be; None: in any."""
        chunk = self._map.chunk_of(conversation)
        if not self._fates_by_lane or chunk.shard == WHOLE or chunk.since > wall_seconds() - self._window:
            return None
        if self._single_fates:
            return (chunk.shard, WHOLE)
        return (chunk.shard,)

    def is_down(self, conversation: str) -> bool:
        """Whether the shard of a conversation does not answer."""
        return bool(self.down) and self.lane_of(conversation) in self.down

    @property
    def reachable(self) -> Mapping[str, Any]:
        """A condition for queries that go to all shards: empty, or what leaves out the shards that are down. Raises ShardDown
        when all are."""
        if not self.down:
            return _EVERYTHING
        condition = self._map.without(self.down)
        if condition is None:
            raise ShardDown
        return condition

    async def load(self) -> None:
        """Reads the routing table, for a start. Raises MongoUnavailable when it cannot be read: a node without it would record fates
        where others do not look for them."""
        if not self._mongo.is_sharded:
            return
        for _ in range(_LOADS):
            if await self._follow():
                break
        else:
            raise MongoUnavailable(
                f"the cluster's routing table cannot be read ({self._told}); the relay's user needs to read database config"
            )
        await self._probe_all()

    async def run(self) -> None:
        """One look: does every shard answer; and now and then: has the routing table changed."""
        if not self._mongo.is_sharded:
            return
        if monotonic() - self._read_at >= _MAP_SECONDS:
            await asyncio.gather(self._follow(), self._probe_all())
        else:
            await self._probe_all()

    async def _follow(self) -> bool:
        """Whether the routing table was read, understood or not."""
        self._read_at = monotonic()
        try:
            with time_limit(_PROBE_SECONDS):
                await self._read_map()
        except PyMongoError as error:
            self._tell(f"the routing table cannot be read: {brief(error)}")
            return False
        except (ValueError, KeyError, TypeError, IndexError) as error:
            # Without a map everything is one lane: right, but no shard is spared another's outage.
            self._use(WHOLE_MAP, None)
            self._tell(str(error) if isinstance(error, ValueError) else "the routing table is not understood")
        else:
            self._told = None
        if self._fates_by_lane:
            await self._look_for_single_fates()
        return True

    async def _look_for_single_fates(self) -> None:
        """Is there anything left of what the relay wrote before it was moved to a cluster?"""
        with contextlib.suppress(PyMongoError), time_limit(_PROBE_SECONDS):
            self._single_fates = await self._mongo.fates.find_one({"lane": WHOLE}, {"_id": 1}) is not None

    async def _read_map(self) -> None:
        config = self._mongo.client.config
        names = {name: f"{self._mongo.database.name}.{name}" for name in (MESSAGES, FATES)}
        entries = await config.collections.find({"_id": {"$in": list(names.values())}}).to_list(None)
        found = {entry["_id"]: entry for entry in entries}
        about, fates = found.get(names[MESSAGES]), found.get(names[FATES])
        if about is None:
            raise ValueError("messages is not sharded; see scripts/shard setup")
        self._fates_by_lane = fates is not None and dict(fates["key"]) == {"lane": 1}
        # A row changes whenever a chunk moves, splits or merges.
        query = {"uuid": about["uuid"]}
        newest = await config.chunks.find(query, {"lastmod": 1}).sort("lastmod", -1).limit(1).to_list(1)
        version = (about["uuid"], about.get("timestamp"), newest[0]["lastmod"] if newest else None)
        if version != self._version:
            rows = await config.chunks.find(query).sort("min", 1).to_list(None)
            self._use(chunk_map(about, rows, always=await self._made_anew(about)), version)

    def _use(self, chunks: ChunkMap, version: object) -> None:
        self._map, self._version = chunks, version
        self._note(self.down.intersection(chunks.shards))

    async def _made_anew(self, about: Mapping[str, Any]) -> int:
        """Since when (s) the collection is sharded as it is now, when it was sharded otherwise before: messages may have moved then
        without any chunk that says so (resharding, a backup restored elsewhere). 0 when it has always been so."""
        made = str(about.get("timestamp"))
        known: dict[str, Any] | None = await self._settings.find_one({"_id": _SHARDED})
        if known is None:
            await self._settings.update_one(
                {"_id": _SHARDED}, {"$setOnInsert": {"value": {"made": made, "since": 0}}}, upsert=True
            )
            known = await self._settings.find_one({"_id": _SHARDED}) or {"value": {"made": made, "since": 0}}
        if known["value"]["made"] != made:
            known = {"value": {"made": made, "since": int(wall_seconds())}}
            await self._settings.update_one({"_id": _SHARDED}, {"$set": known})
        return int(known["value"]["since"])

    def _tell(self, problem: str) -> None:
        if problem != self._told:
            log.warning("shards are not told apart", problem=problem)
        self._told = problem

    async def _probe_all(self) -> None:
        first = {chunk.shard: chunk.low for chunk in reversed(self._map.chunks)}
        if len(first) < 2:
            self._note(frozenset())
            return
        names = list(first)
        answers = await asyncio.gather(*(self._answers(first[name]) for name in names))
        silent = frozenset(name for name, answer in zip(names, answers, strict=True) if not answer)
        # When none answers the cause is nearer than the shards: the router, or this node.
        if len(silent) < len(names):
            self._note(silent.intersection(self._map.shards))

    async def _answers(self, conversation: str) -> bool:
        query = {"_id": f"{conversation} ", "conversationId": conversation}
        try:
            with time_limit(_PROBE_SECONDS):
                await self._mongo.messages.find_one(query, {"_id": 1}, comment=PROBE)
        except PyMongoError:
            return False
        return True

    def _note(self, down: frozenset[str]) -> None:
        before, self.down = self.down, down
        for name in sorted(down - before):
            log.warning("a shard does not answer; its conversations cannot be used", shard=name)
        for name in sorted(before - down):
            log.info("a shard answers again", shard=name)
        if before - down:
            self.returned()


def _nothing() -> None:
    return None
