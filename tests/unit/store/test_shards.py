"""Where fates are looked for, and what is taken for a shard that is down."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import pytest

from relay.store.chunks import WHOLE_MAP, Chunk, ChunkMap
from relay.store.shards import ShardDown, Shards

HOUR = 3600
HERE, THERE = "1", "9"


class NoMongo:
    """A cluster of which nothing is asked."""

    is_sharded = True
    database: ClassVar[dict[str, Any]] = {"settings": None}


def shards(*, moved: int = 0, single: bool = False) -> Shards:
    found = Shards(NoMongo(), fate_seconds=72 * HOUR)  # type: ignore[arg-type]
    found._map = ChunkMap.of([Chunk("", "s1", 0), Chunk("8", "s2", moved)])
    found._fates_by_lane = True
    found._single_fates = single
    return found


def test_fates_are_looked_for_where_their_messages_lie() -> None:
    found = shards()
    assert (found.lane_of(HERE), found.lane_of(THERE)) == ("s1", "s2")
    assert (found.lanes_of_fates(HERE), found.lanes_of_fates(THERE)) == (("s1",), ("s2",))


def test_what_moved_while_fates_are_kept_is_looked_for_everywhere() -> None:
    assert shards(moved=int(time.time()) - 72 * HOUR).lanes_of_fates(THERE) is None
    assert shards(moved=int(time.time()) - 74 * HOUR).lanes_of_fates(THERE) == ("s2",)
    assert shards(moved=int(time.time())).lanes_of_fates(HERE) == ("s1",)


def test_what_was_written_before_there_were_shards_is_looked_for_until_it_is_known_that_there_is_none() -> (
    None
):
    assert shards(single=True).lanes_of_fates(HERE) == ("s1", "0")
    fresh = Shards(NoMongo(), fate_seconds=1)  # type: ignore[arg-type]
    fresh._map, fresh._fates_by_lane = shards()._map, True
    assert fresh.lanes_of_fates(HERE) == ("s1", "0")


def test_without_a_map_fates_are_looked_for_everywhere() -> None:
    found = shards()
    found._use(WHOLE_MAP, None)
    assert found.lane_of(THERE) == "0"
    assert found.lanes_of_fates(THERE) is None


def test_a_shard_that_is_no_part_of_the_map_any_more_has_returned() -> None:
    found = shards()
    told: list[bool] = []
    found.returned = lambda: told.append(True)
    found._note(frozenset({"s2"}))
    assert (found.is_down(THERE), found.is_down(HERE)) == (True, False)
    found._use(WHOLE_MAP, None)
    assert told == [True]
    assert not found.is_down(THERE)


async def test_when_no_shard_answers_at_once_the_cause_is_not_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shards()
    silent = {"", "8"}

    async def answers(low: str) -> bool:
        return low not in silent

    monkeypatch.setattr(found, "_answers", answers)
    await found._probe_all()
    assert found.down == frozenset()
    silent.remove("")
    await found._probe_all()
    assert found.down == {"s2"}
    silent.add("")
    await found._probe_all()
    assert found.down == {"s2"}
    assert found.reachable == {"$or": [{"conversationId": {"$gte": "", "$lte": "7\U0010ffff"}}]}


def test_when_all_are_down_nothing_is_asked() -> None:
    found = shards()
    found._note(frozenset({"s1", "s2"}))
    with pytest.raises(ShardDown):
        _ = found.reachable
