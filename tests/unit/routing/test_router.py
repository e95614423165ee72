"""From the store to the connections: messages, credit and receipts reach whom they concern and nobody else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import pytest

from relay.metrics import Metrics
from relay.routing.announcer import Announcer
from relay.routing.bus import Alone, Event
from relay.routing.hub import Hub
from relay.routing.receipts import Receipts
from relay.routing.router import Router
from relay.store.endings import Acknowledged, Settlement
from relay.wire.envelope import Envelope
from tests.support.backlog import LocalConnection, MemoryBacklog, message, turns

PEOPLE = [("ann", "phone"), ("ann", "tablet"), ("bob", "phone"), ("bob", "laptop"), ("cleo", "watch")]


class House:
    """Five live connections of three people."""

    def __init__(self) -> None:
        self.hub = Hub()
        self.metrics = Metrics()
        receipts = Receipts(Announcer(self.hub, self.metrics, "receipt"), max_frame=262_144)
        self.router = Router(self.hub, self.metrics, receipts)
        self.backlog = MemoryBacklog()
        self.all = {
            f"{user}/{device}": LocalConnection(self.backlog, user, device) for user, device in PEOPLE
        }

    async def start(self) -> None:
        for one in self.all.values():
            self.hub.add(one)
            one.delivery.start()
        await turns()
        assert not any(one.delivery.behind for one in self.all.values())

    def who(self, name: str) -> set[str]:
        return {key for key, one in self.all.items() if one.got(name)}


@pytest.fixture
async def house() -> AsyncIterator[House]:
    found = House()
    await found.start()
    yield found
    for one in found.all.values():
        await one.close()


def acknowledged(doc_id: str, by: str, *, sender: str = "ann/phone", at: int = 2000) -> Acknowledged:
    user, _, device = sender.partition("/")
    by_user, _, by_device = by.partition("/")
    return Acknowledged(doc_id, user, device, by_user, by_device, at, 1000)


async def test_a_message_goes_to_the_devices_that_await_it_and_to_no_others(house: House) -> None:
    house.router.committed([message(1, "bob/phone", "ann/tablet", "dan/phone")])
    await turns()
    assert house.who("msg") == {"bob/phone", "ann/tablet"}


async def test_what_waits_for_any_device_of_a_person_goes_to_all_their_connected_ones(house: House) -> None:
    house.router.committed([message(1, "bob/*", "dan/*")])
    await turns()
    assert house.who("msg") == {"bob/phone", "bob/laptop"}


async def test_a_committed_group_leaves_as_one_frame_in_its_order(house: House) -> None:
    house.router.committed([message(number, "bob/phone") for number in range(1, 6)])
    await turns()
    bob = house.all["bob/phone"]
    assert bob.bodies() == [1, 2, 3, 4, 5]
    assert len([frame for frame in bob.frames if '"msg"' in frame]) == 1


async def test_credit_comes_back_to_the_device_that_acknowledged(house: House) -> None:
    one = message(1, "bob/phone", "ann/tablet")
    house.router.committed([one])
    house.router.settled(Settlement([], [(one.doc_id, "bob/phone"), (one.doc_id, "dan/phone")]))
    assert not house.all["bob/phone"].delivery.in_flight
    assert set(house.all["ann/tablet"].delivery.in_flight) == {one.doc_id}


async def test_credit_for_any_device_comes_back_to_all_devices_of_the_person(house: House) -> None:
    one = message(1, "bob/*")
    house.router.committed([one])
    house.router.settled(Settlement([], [(one.doc_id, "bob/*")]))
    assert not house.all["bob/phone"].delivery.in_flight
    assert not house.all["bob/laptop"].delivery.in_flight


async def test_receipts_go_to_every_device_of_the_sender_and_to_nobody_else(house: House) -> None:
    one = message(1, "bob/phone")
    house.router.settled(Settlement([acknowledged(one.doc_id, "bob/phone")], []))
    await turns()
    assert house.who("receipt") == {"ann/phone", "ann/tablet"}
    assert house.all["ann/phone"].got("receipt") == [
        {
            "t": "receipt",
            "conv": "talk",
            "ids": [one.id],
            "by": {"user": "bob", "device": "phone"},
            "at": 2000,
        }
    ]


async def test_receipts_of_one_device_in_one_conversation_are_one_operation(house: House) -> None:
    items = [acknowledged(message(number).doc_id, "bob/phone") for number in (1, 2, 3)]
    items.append(acknowledged(message(1).doc_id, "bob/laptop"))
    items.append(acknowledged("other m", "bob/phone"))
    house.router.settled(Settlement(items, []))
    await turns()
    assert [
        (one["conv"], one["by"]["device"], len(one["ids"])) for one in house.all["ann/phone"].got("receipt")
    ] == [
        ("talk", "phone", 3),
        ("talk", "laptop", 1),
        ("other", "phone", 1),
    ]


async def test_a_device_gets_no_receipt_of_its_own_acknowledgement(house: House) -> None:
    house.router.settled(Settlement([acknowledged(message(1).doc_id, "ann/tablet")], []))
    await turns()
    assert house.who("receipt") == {"ann/phone"}


async def test_a_slow_socket_goes_without_receipts(house: House) -> None:
    slow = house.all["ann/phone"]
    slow.flowing.clear()
    slow.outbox.put("{}")
    await turns()
    while not slow.outbox.full:
        slow.outbox.put('{"t":"filler","x":"' + "x" * 100_000 + '"}')
    size = slow.outbox.size
    house.router.settled(Settlement([acknowledged(message(1).doc_id, "bob/phone")], []))
    await turns()
    assert slow.outbox.size == size
    assert house.who("receipt") == {"ann/tablet"}


async def test_the_time_to_the_acknowledgement_is_measured(house: House) -> None:
    house.router.settled(
        Settlement(
            [
                acknowledged(message(1).doc_id, "bob/phone", at=3500),
                acknowledged(message(2).doc_id, "bob/phone", at=500),
            ],
            [],
        )
    )
    sample = house.metrics.registry.get_sample_value
    assert sample("relay_delivery_seconds_count") == 2
    assert sample("relay_delivery_seconds_sum") == 2.5


class Deaf(Alone):
    """A bus on which others are told, and none of them is heard."""

    tells = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[object] = []

    def expect(self, users: Iterable[str]) -> None:
        self.told.append(("expect", *users))

    def deliver(self, envelope: Envelope, keys: list[str]) -> None:
        self.told.append(("deliver", *keys))

    def release(self, doc_id: str, key: str) -> None:
        self.told.append(("release", key))

    def tell(self, event: Event, users: list[str], frame: str, but: str | None) -> None:
        self.told.append((event, *users))


@pytest.mark.parametrize("tells", [True, False])
async def test_a_node_tells_others_as_long_as_that_goes_out_though_it_hears_none_of_them(tells: bool) -> None:
    bus = Deaf()
    bus.tells = tells
    assert not bus.shared
    hub, metrics = Hub(), Metrics()
    announcer = Announcer(hub, metrics, "typing", bus)
    router = Router(hub, metrics, Receipts(Announcer(hub, metrics, "receipt"), max_frame=262_144), bus)
    one = message(1, "bob/phone")
    router.expected([one])
    router.committed([one])
    router.settled(Settlement([], [(one.doc_id, "bob/phone")]))
    announcer.tell(["bob"], "{}")
    assert announcer.reaches("bob") is tells
    told = [("expect", "bob"), ("deliver", "bob/phone"), ("release", "bob/phone"), ("typing", "bob")]
    assert bus.told == (told if tells else [])
