"""Typing is told as it changes, to whom it concerns, and is over by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from relay.metrics import Metrics
from relay.routing import typing as module
from relay.routing.announcer import Announcer
from relay.routing.hub import Hub
from relay.routing.typing import MOST_OF_CONNECTION, Typing
from relay.store.audience import Audience, Roster
from relay.wire.errors import RelayError
from tests.support.backlog import LocalConnection, MemoryBacklog, turns

LASTS = 0.3
MEMBERS = {"ann": ["x"], "bob": ["x"], "cleo": ["x"], "dan": ["x"]}


def audience(conv: str = "talk", *blocks: tuple[str, str], more: int = 0) -> Audience:
    others = {f"u{number}": ["x"] for number in range(more)}
    return Audience(conv, Roster({**MEMBERS, **others}, blocks=frozenset(blocks)))


class House:
    def __init__(self) -> None:
        hub, backlog = Hub(), MemoryBacklog()
        keys = ("ann/phone", "ann/tablet", "bob/phone", "cleo/phone", "dan/phone", "eve/phone")
        self.all = {key: LocalConnection(backlog, *key.split("/")) for key in keys}
        for one in self.all.values():
            hub.add(one)
        self.typing = Typing(Announcer(hub, Metrics(), "typing"), lasts=LASTS)
        self.ann = self.all["ann/phone"]

    async def told(self, key: str) -> list[tuple[str, str, bool]]:
        await turns()
        return [(one["conv"], one["user"], one["on"]) for one in self.all[key].got("typing")]


@pytest.fixture
async def house() -> AsyncIterator[House]:
    found = House()
    yield found
    found.typing.close()
    for one in found.all.values():
        await one.close()


async def test_the_other_members_are_told_and_nobody_else(house: House) -> None:
    house.typing.begin(house.ann, audience())
    for key in ("bob/phone", "cleo/phone", "dan/phone"):
        assert await house.told(key) == [("talk", "ann", True)]
    for key in ("ann/phone", "ann/tablet", "eve/phone"):
        assert await house.told(key) == []


async def test_only_changes_are_told(house: House) -> None:
    for _ in range(5):
        house.typing.begin(house.ann, audience())
    house.typing.end(house.ann, "talk")
    house.typing.end(house.ann, "talk")
    assert await house.told("bob/phone") == [("talk", "ann", True), ("talk", "ann", False)]


async def test_a_person_types_as_long_as_one_of_their_devices_does(house: House) -> None:
    house.typing.begin(house.ann, audience())
    house.typing.begin(house.all["ann/tablet"], audience())
    house.typing.end(house.ann, "talk")
    assert await house.told("bob/phone") == [("talk", "ann", True)]
    house.typing.left(house.all["ann/tablet"])
    assert await house.told("bob/phone") == [("talk", "ann", True), ("talk", "ann", False)]


async def test_it_is_over_by_itself_unless_it_is_renewed(house: House) -> None:
    house.typing.begin(house.ann, audience())
    house.typing.begin(house.all["cleo/phone"], audience())
    await asyncio.sleep(LASTS * 0.6)
    house.typing.begin(house.ann, audience())
    await asyncio.sleep(LASTS * 0.6)
    told = await house.told("bob/phone")
    assert ("talk", "cleo", False) in told
    assert ("talk", "ann", False) not in told
    await asyncio.sleep(LASTS * 0.7)
    assert ("talk", "ann", False) in await house.told("bob/phone")
    assert len(house.typing) == 0
    assert house.typing._timer is None
    assert house.typing._of == {}
    assert house.typing._told == {}


async def test_a_connection_that_ends_types_nowhere(house: House) -> None:
    house.typing.begin(house.ann, audience("one"))
    house.typing.begin(house.ann, audience("two"))
    house.typing.left(house.ann)
    assert {one for one in await house.told("bob/phone") if not one[2]} == {
        ("one", "ann", False),
        ("two", "ann", False),
    }


async def test_nobody_is_told_of_those_they_blocked_or_who_blocked_them(house: House) -> None:
    house.typing.begin(house.ann, audience("talk", ("bob", "ann"), ("ann", "cleo"), ("bob", "dan")))
    house.typing.end(house.ann, "talk")
    assert await house.told("bob/phone") == []
    assert await house.told("cleo/phone") == []
    assert len(await house.told("dan/phone")) == 2


async def test_nobody_is_told_in_a_large_conversation(house: House) -> None:
    house.typing.begin(house.ann, audience(more=253))
    assert await house.told("bob/phone") == []
    house.typing.begin(house.ann, audience(more=252))
    assert len(await house.told("bob/phone")) == 1


async def test_what_is_kept_is_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(MOST_OF_CONNECTION):
        house.typing.begin(house.ann, audience(f"c{number}"))
    with pytest.raises(RelayError) as caught:
        house.typing.begin(house.ann, audience("more"))
    assert caught.value.code == "rate_limited"
    monkeypatch.setattr(module, "MOST", MOST_OF_CONNECTION)
    with pytest.raises(RelayError):
        house.typing.begin(house.all["bob/phone"], audience())
    assert house.all["bob/phone"] not in house.typing._of
