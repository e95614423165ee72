"""Which shard owns which conversations, as the cluster's routing table says.

It is a hint: a chunk may move at any time, and the router decides where a statement goes. It shares work out into lanes, and says
which ranges can be asked while a shard is down.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from bson import MinKey
from bson.timestamp import Timestamp

WHOLE: Final = "0"
"""The one lane of a replica set."""
_UNKNOWN: Final = 1 << 62
_LAST: Final = "\U0010ffff"


class Chunk(NamedTuple):
    """Conversations from ``low`` up to the next chunk's. ``since`` (s) is when they came to the shard, 0 when they were always
    there."""

    low: str
    shard: str
    since: int


@dataclass(frozen=True, slots=True)
class ChunkMap:
    """The chunks of ``messages``, in order; the first begins with ``""``."""

    chunks: Sequence[Chunk]
    _lows: Sequence[str]

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> ChunkMap:
        """Raises ValueError when there is none, or the first does not begin where conversations begin."""
        if not chunks or chunks[0].low:
            raise ValueError("the chunks do not cover all conversations")
        return cls(chunks, [chunk.low for chunk in chunks[1:]])

    @property
    def shards(self) -> list[str]:
        """The shards that own anything."""
        return sorted({chunk.shard for chunk in self.chunks})

    def chunk_of(self, conversation: str) -> Chunk:
        """The chunk that a conversation lies in."""
        return self.chunks[bisect_right(self._lows, conversation)]

    def without(self, shards: Collection[str]) -> Mapping[str, Any] | None:
        """A condition that only conversations of other shards meet, and that a router answers without asking these shards; None
        when there are no others."""
        ranges: list[Mapping[str, Any]] = []
        start: str | None = None
        for number, chunk in enumerate(self.chunks):
            if chunk.shard in shards:
                continue
            if start is None:
                start = chunk.low
            following = self.chunks[number + 1] if number + 1 < len(self.chunks) else None
            if following is None or following.shard in shards:
                ranges.append(_range(start, None if following is None else following.low))
                start = None
        return {"$or": ranges} if ranges else None


WHOLE_MAP: Final = ChunkMap.of([Chunk("", WHOLE, 0)])


def chunk_map(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, always: int = 0) -> ChunkMap:
    """The map from an entry of ``config.collections`` and its chunks in order; ``always`` (s) is since when a conversation is where
    it is if its chunk has not moved. Raises ValueError, in words for people, when
    ``messages`` is not sharded as the relay needs it."""
    if dict(about["key"]) != {"conversationId": 1}:
        raise ValueError("messages is not sharded by ranges of conversationId")
    made = _seconds(about.get("timestamp"))
    chunks: list[Chunk] = []
    for row in rows:
        low = row["min"]["conversationId"]
        if not isinstance(low, MinKey | str):
            raise ValueError("a chunk of messages begins with what is no conversation")
        since = _seconds(row["history"][0]["validAfter"]) if row.get("history") else _UNKNOWN
        chunks.append(
            Chunk("" if isinstance(low, MinKey) else low, row["shard"], since if since > made else always)
        )
    return ChunkMap.of(chunks)


def _range(low: str, high: str | None) -> Mapping[str, Any]:
    """Between these bounds, in words that stay within them: for "less than" a router asks the next chunk, too."""
    bounds: dict[str, Any] = {"$gte": low}
    if high is not None:
        bounds["$lte"] = f"{high[:-1]}{chr(ord(high[-1]) - 1)}{_LAST}" if high[-1] > "\0" else high[:-1]
    return {"conversationId": bounds}


def _seconds(moment: Any) -> int:
    if isinstance(moment, Timestamp):
        return int(moment.time)
    return int(moment.timestamp()) if isinstance(moment, datetime) else 0
