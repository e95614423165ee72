"""Read marks are gathered: of many only the furthest is written, one group after the other, and told when it moved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from relay.metrics import Metrics
from relay.routing import reads as module
from relay.routing.announcer import Announcer
from relay.routing.hub import Hub
from relay.routing.reads import SPACING_SECONDS, Reads
from relay.store.audience import Audiences, Roster
from relay.store.mongo import PyMongoError
from relay.store.reading import Moved, Reader
from relay.wire.errors import RelayError
from tests.support.backlog import LocalConnection, MemoryBacklog, turns

MEMBERS = ["ann", "bob"]


class Cursors:
    """Cursors in memory. ``failures`` writes are errors; a write waits for ``gate``."""

    def __init__(self) -> None:
        self.kept: dict[Reader, int] = {}
        self.writes: list[dict[Reader, int]] = []
        self.private: set[str] = set()
        self.large: set[str] = set()
        self.failures = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def move(self, marks: Mapping[Reader, int]) -> Moved:
        self.writes.append(dict(marks))
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise PyMongoError("no answer")
        members = {reader for reader in marks if reader[1] in MEMBERS}
        moved = {reader for reader in members if marks[reader] > self.kept.get(reader, -1)}
        self.kept.update((reader, marks[reader]) for reader in moved)
        return Moved(frozenset(members), frozenset(moved), frozenset(self.private), 77, frozenset(self.large))


class House:
    """Two devices of ann, one of bob; a large conversation and a usual one."""

    def __init__(self) -> None:
        hub, backlog = Hub(), MemoryBacklog()
        self.cursors = Cursors()
        self.all = {
            key: LocalConnection(backlog, *key.split("/")) for key in ("ann/phone", "ann/tablet", "bob/phone")
        }
        for one in self.all.values():
            hub.add(one)
        self.answers: list[RelayError | None] = []
        self.reads = Reads(self.cursors, Audiences(self._rosters), Announcer(hub, Metrics(), "read"))

    async def _rosters(self, names: list[str]) -> Mapping[str, Roster]:
        others = {f"u{number}": ["x"] for number in range(300)}
        return {
            name: Roster({**{user: ["x"] for user in MEMBERS}, **(others if name == "large" else {})})
            for name in names
        }

    def mark(self, up_to: int, *, conv: str = "talk", user: str = "ann") -> None:
        self.reads.mark(conv, user, up_to, self.answers.append, device=f"{user}/phone")

    def told(self, key: str) -> list[tuple[str, str, int]]:
        return [(one["conv"], one["user"], one["upTo"]) for one in self.all[key].got("read")]


@pytest.fixture
async def house() -> AsyncIterator[House]:
    found = House()
    yield found
    found.cursors.gate.set()
    await found.reads.close(1)
    for one in found.all.values():
        await one.close()


async def quiet() -> None:
    await asyncio.sleep(SPACING_SECONDS * 1.7)


async def test_of_hundreds_of_marks_one_is_written_and_told(house: House) -> None:
    for up_to in (*range(1, 300), 5):
        house.mark(up_to)
    await quiet()
    assert house.cursors.writes == [{("talk", "ann"): 299}]
    assert house.told("bob/phone") == house.told("ann/tablet") == [("talk", "ann", 299)]
    assert house.told("ann/phone") == [], "the device that read knows"
    assert house.answers == [None] * 300


async def test_the_first_mark_is_told_at_once_and_later_ones_after_a_moment(house: House) -> None:
    house.mark(1)
    await turns()
    assert house.told("bob/phone") == [("talk", "ann", 1)]
    house.mark(2)
    house.mark(3)
    await turns()
    assert len(house.cursors.writes) == 1
    await quiet()
    assert house.told("bob/phone") == [("talk", "ann", 1), ("talk", "ann", 3)]


async def test_a_cursor_that_did_not_move_is_not_told(house: House) -> None:
    house.mark(9)
    await quiet()
    house.mark(8)
    house.mark(9)
    await quiet()
    assert house.told("bob/phone") == [("talk", "ann", 9)]
    assert house.answers == [None, None, None]


async def test_one_group_is_written_at_a_time_and_the_next_gathers(house: House) -> None:
    house.cursors.gate.clear()
    house.mark(1)
    await turns()
    house.mark(2)
    house.mark(3, conv="other")
    await asyncio.sleep(SPACING_SECONDS * 1.5)
    assert len(house.cursors.writes) == 1
    house.cursors.gate.set()
    await quiet()
    assert house.cursors.writes[1:] == [{("talk", "ann"): 2, ("other", "ann"): 3}]


async def test_who_is_no_member_is_told_so_and_others_are_not_harmed(house: House) -> None:
    house.mark(5, user="mallory")
    house.mark(6)
    await quiet()
    assert [None if one is None else one.code for one in house.answers] == ["not_member", None]
    assert house.told("bob/phone") == [("talk", "ann", 6)]


async def test_a_store_that_does_not_answer_is_told_and_nothing_is_told_as_read(house: House) -> None:
    house.cursors.failures = 1
    house.mark(5)
    await quiet()
    assert [one.code for one in house.answers if one is not None] == ["unavailable"]
    assert house.told("bob/phone") == []
    house.mark(5)
    await quiet()
    assert house.told("bob/phone") == [("talk", "ann", 5)]


async def test_in_large_conversations_and_of_private_readers_only_own_devices_are_told(house: House) -> None:
    house.mark(5, conv="large")
    await quiet()
    house.cursors.private = {"ann"}
    house.mark(6)
    await quiet()
    assert house.told("bob/phone") == []
    assert house.told("ann/tablet") == [("large", "ann", 5), ("talk", "ann", 6)]


async def test_what_is_pending_is_bounded_for_each_and_for_all(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, bound in (("MOST_OF_USER", 3), ("MOST_PENDING", 5), ("MOST_WAITING", 4)):
        monkeypatch.setattr(module, name, bound)
    house.cursors.gate.clear()
    house.mark(0)
    await turns()
    for number in range(3):
        house.mark(1, conv=f"c{number}")
    with pytest.raises(RelayError) as caught:
        house.mark(1, conv="c3")
    assert caught.value.code == "rate_limited"
    for _ in range(3):
        house.mark(2, conv="c0")
    with pytest.raises(RelayError) as caught:
        house.mark(3, conv="c0")
    assert caught.value.code == "rate_limited"
    house.mark(1, user="bob")
    house.mark(1, user="cleo")
    with pytest.raises(RelayError) as caught:
        house.mark(1, user="dan")
    assert caught.value.code == "unavailable"
    house.cursors.gate.set()
    await quiet()
    assert house.reads._pending == {}
    assert house.reads._of_user == {}


async def test_closing_writes_what_is_pending_and_takes_nothing_more(house: House) -> None:
    house.mark(1)
    await turns()
    house.mark(2)
    await house.reads.close(1)
    assert house.cursors.kept == {("talk", "ann"): 2}
    with pytest.raises(RelayError):
        house.mark(3)


async def test_what_cannot_be_written_in_time_at_the_end_is_told(house: House) -> None:
    house.cursors.gate.clear()
    house.mark(1)
    await turns()
    house.mark(2, conv="other")
    await house.reads.close(0.05)
    assert [one.code for one in house.answers if one is not None] == ["unavailable", "unavailable"]


async def test_who_is_in_a_large_conversation_is_not_even_asked_for(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def rosters(names: list[str]) -> Mapping[str, Roster]:
        asked.extend(names)
        return {}

    monkeypatch.setattr(house.reads, "_audiences", Audiences(rosters))
    house.cursors.large = {"large"}
    house.mark(5, conv="large")
    house.mark(5, conv="small")
    await quiet()
    assert asked == ["small"]
    assert sorted(house.told("ann/tablet")) == [("large", "ann", 5), ("small", "ann", 5)]
