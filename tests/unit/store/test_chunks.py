"""The routing table, as the relay follows it."""

from __future__ import annotations

from typing import Any

import pytest
from bson import MaxKey, MinKey
from bson.timestamp import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from relay.store.chunks import WHOLE_MAP, Chunk, ChunkMap, chunk_map

MADE = Timestamp(1000, 1)
IDS = st.uuids(version=4).map(str)
BOUNDS = st.lists(st.text("0123456789abcdef-", min_size=1, max_size=6), max_size=8, unique=True).map(sorted)


def row(low: Any, high: Any, shard: str, since: Timestamp = MADE) -> dict[str, Any]:
    return {
        "min": {"conversationId": low},
        "max": {"conversationId": high},
        "shard": shard,
        "history": [{"validAfter": since, "shard": shard}, {"validAfter": MADE, "shard": "s1"}],
    }


def about(**key: int) -> dict[str, Any]:
    return {"key": key or {"conversationId": 1}, "timestamp": MADE}


def meets(conversation: str, condition: Any) -> bool:
    ranges = [one["conversationId"] for one in condition["$or"]]
    return any(one["$gte"] <= conversation <= one.get("$lte", conversation) for one in ranges)


def test_a_conversation_lies_on_the_shard_of_its_chunk() -> None:
    rows = [row(MinKey(), "4", "s1"), row("4", "8", "s2", Timestamp(2000, 1)), row("8", MaxKey(), "s3")]
    found = chunk_map(about(), rows)
    assert [found.chunk_of(name).shard for name in ("", "3f", "4", "7f", "8", "f")] == [
        "s1",
        "s1",
        "s2",
        "s2",
        "s3",
        "s3",
    ]
    assert [chunk.since for chunk in found.chunks] == [0, 2000, 0], (
        "when it came, if it has not always been there"
    )
    assert found.shards == ["s1", "s2", "s3"]


def test_a_replica_set_is_one_lane() -> None:
    assert WHOLE_MAP.chunk_of("anything") == Chunk("", "0", 0)


@pytest.mark.parametrize(
    ("entry", "rows", "problem"),
    [
        (about(conversationId="hashed"), [row(MinKey(), MaxKey(), "s1")], "not sharded by ranges"),  # type: ignore[arg-type]
        (about(id=1), [row(MinKey(), MaxKey(), "s1")], "not sharded by ranges"),
        (about(), [row(7, MaxKey(), "s1")], "no conversation"),
        (about(), [row("4", MaxKey(), "s1")], "do not cover"),
        (about(), [], "do not cover"),
    ],
)
def test_what_is_sharded_otherwise_is_refused(entry: Any, rows: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        chunk_map(entry, rows)


@given(BOUNDS, st.data())
def test_the_condition_for_the_living_shards_meets_their_conversations_and_stays_within_their_chunks(
    bounds: list[str], data: st.DataObject
) -> None:
    shards = [data.draw(st.sampled_from(["s1", "s2", "s3"])) for _ in range(len(bounds) + 1)]
    chunks = ChunkMap.of([Chunk(low, shard, 0) for low, shard in zip(["", *bounds], shards, strict=True)])
    down = data.draw(st.sets(st.sampled_from(["s1", "s2", "s3"]), min_size=1))
    condition = chunks.without(down)
    if condition is None:
        assert set(shards) <= down
        return
    for conversation in [data.draw(IDS), *(f"{low}a" for low in bounds)]:
        assert meets(conversation, condition) == (chunks.chunk_of(conversation).shard not in down)
    for one in condition["$or"]:
        ends = one["conversationId"].values()
        assert all(chunks.chunk_of(end).shard not in down for end in ends), "a router asks who has the bounds"
