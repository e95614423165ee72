"""Receipts are gathered: the first at once, then few frames of many ids, never more than a bound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from relay.metrics import Metrics
from relay.routing import receipts as module
from relay.routing.announcer import Announcer
from relay.routing.hub import Hub
from relay.routing.receipts import MOST_IDS, MOST_PENDING, SPACING_SECONDS, Receipts
from relay.store.endings import Acknowledged
from tests.support.backlog import LocalConnection, MemoryBacklog, turns


class House:
    """Two devices of ann, who sent, and one of bob, who acknowledges."""

    def __init__(self, max_frame: int = 262_144) -> None:
        self.hub = Hub()
        self.metrics = Metrics()
        backlog = MemoryBacklog()
        self.ann = LocalConnection(backlog, "ann", "phone")
        self.tablet = LocalConnection(backlog, "ann", "tablet")
        self.bob = LocalConnection(backlog, "bob", "phone")
        for one in (self.ann, self.tablet, self.bob):
            self.hub.add(one)
        self.receipts = Receipts(Announcer(self.hub, self.metrics, "receipt"), max_frame=max_frame)

    def acknowledge(
        self, number: int, *, sender: str = "ann", by: str = "bob", at: int = 1, quiet: bool = False
    ) -> None:
        """``by`` has message ``number``."""
        doc_id = f"talk 00000000-0000-4000-8000-{number:012d}"
        self.receipts.add(Acknowledged(doc_id, sender, "phone", by, "phone", at, 0, quiet))


@pytest.fixture
async def house() -> AsyncIterator[House]:
    found = House()
    yield found
    found.receipts.close()
    for one in (found.ann, found.tablet, found.bob):
        await one.close()


async def test_the_first_after_quiet_leaves_at_once_and_what_follows_waits_for_the_rest(house: House) -> None:
    house.acknowledge(1)
    await turns()
    assert [len(one["ids"]) for one in house.ann.got("receipt")] == [1]
    house.acknowledge(2, at=9)
    await turns()
    house.acknowledge(3, at=7)
    await turns()
    assert len(house.ann.got("receipt")) == 1
    await asyncio.sleep(SPACING_SECONDS * 1.5)
    first, second = house.ann.got("receipt")
    assert [len(first["ids"]), len(second["ids"])] == [1, 2]
    assert second["at"] == 9, "the latest of those it tells of"
    assert house.tablet.got("receipt") == house.ann.got("receipt")


async def test_ten_thousand_acknowledgements_of_one_device_are_a_handful_of_frames(house: House) -> None:
    began = time.monotonic()
    for start in range(0, 10_000, 500):
        for number in range(start, start + 500):
            house.acknowledge(number)
        await asyncio.sleep(0)
    took = time.monotonic() - began
    await asyncio.sleep(SPACING_SECONDS * 1.5)
    told = house.ann.got("receipt")
    assert sum(len(one["ids"]) for one in told) == 10_000
    assert len({message for one in told for message in one["ids"]}) == 10_000
    assert len(told) <= 14 + 2 * took / SPACING_SECONDS
    assert max(len(one["ids"]) for one in told) <= MOST_IDS
    assert len(house.ann.frames) <= 5 + took / SPACING_SECONDS


async def test_what_is_pending_is_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    # However busy the machine is, its time has not come.
    monkeypatch.setattr(module, "SPACING_SECONDS", 60.0)
    house.acknowledge(0)
    await turns()
    for number in range(1, MOST_PENDING):
        house.acknowledge(number)
    await turns()
    assert sum(len(one["ids"]) for one in house.ann.got("receipt")) == 1
    house.acknowledge(MOST_PENDING)
    await turns()
    assert sum(len(one["ids"]) for one in house.ann.got("receipt")) == MOST_PENDING + 1


async def test_a_receipt_fits_a_small_frame() -> None:
    house = House(max_frame=1024)
    for number in range(100):
        house.acknowledge(number)
    await turns()
    frames = house.ann.got("receipt")
    assert sum(len(one["ids"]) for one in frames) == 100
    assert max(len(frame) for frame in house.ann.frames) < 262_144
    assert max(len(one["ids"]) for one in frames) * 39 + 100 < 1024
    for one in (house.ann, house.tablet, house.bob):
        await one.close()


async def test_a_quiet_acknowledgement_is_told_to_own_devices_only(house: House) -> None:
    house.acknowledge(1, quiet=True)
    house.acknowledge(2, sender="ann", by="ann", quiet=True)
    await asyncio.sleep(SPACING_SECONDS * 1.5)
    told = house.tablet.got("receipt")
    assert [one["by"]["user"] for one in told] == ["ann"]
    assert house.ann.got("receipt") == [], "the device that acknowledged knows"


async def test_nothing_is_kept_for_a_sender_without_a_device_here(house: House) -> None:
    house.hub.remove(house.ann)
    house.hub.remove(house.tablet)
    house.acknowledge(1)
    assert house.receipts._pending == {}
    assert house.receipts._timer is None


async def test_closing_tells_what_is_pending_and_leaves_no_timer(house: House) -> None:
    house.acknowledge(1)
    await turns()
    house.acknowledge(2)
    house.receipts.close()
    await turns()
    assert len(house.ann.got("receipt")) == 2
    assert house.receipts._timer is None
    house.acknowledge(3)
    await turns()
    assert len(house.ann.got("receipt")) == 3
    assert house.receipts._timer is None


async def test_what_slow_sockets_went_without_is_counted(house: House) -> None:
    house.ann.flowing.clear()
    house.ann.outbox.put("{}")
    await turns()
    while not house.ann.outbox.full:
        house.ann.outbox.put('{"t":"filler","x":"' + "x" * 100_000 + '"}')
    house.acknowledge(1)
    await turns()
    sample = house.metrics.registry.get_sample_value
    assert sample("relay_live_frames_total", {"event": "receipt"}) == 1
    assert sample("relay_live_frames_dropped_total", {"event": "receipt"}) == 1
