"""What other nodes tell of a device's connections."""

from __future__ import annotations

from typing import Any

from relay.metrics import Metrics
from relay.routing.announcer import Announcer
from relay.routing.elsewhere import Elsewhere
from relay.routing.hints import Back, Replaced
from relay.routing.hub import Hub
from relay.routing.receipts import Receipts
from relay.routing.redis_bus import RedisBus
from relay.routing.router import Router
from relay.wire import errors
from tests.support.backlog import LocalConnection, MemoryBacklog


async def test_nothing_is_pushed_into_a_replaced_connection_while_it_closes() -> None:
    hub, metrics = Hub(), Metrics()
    router = Router(hub, metrics, Receipts(Announcer(hub, metrics, "receipt"), max_frame=262_144))
    nobody: Any = None
    elsewhere = Elsewhere(
        hub, metrics, router, nobody, nobody, own="here", confirmed=lambda *_: None, ended=lambda _: None
    )
    old = LocalConnection(MemoryBacklog(), "bob", "phone")
    old.serial = 7
    hub.add(old)
    elsewhere.take("there", [Replaced("bob/phone", 6)])
    assert hub.serving("bob/phone") == [old] and old.closes == []
    elsewhere.take("there", [Replaced("bob/phone", 7)])
    assert hub.serving("bob/phone") == [] and old.closes == [errors.REPLACED]
    await old.close()


async def test_a_connection_that_is_replaced_elsewhere_before_it_is_registered_does_not_stay() -> None:
    hub, metrics = Hub(), Metrics()
    router = Router(hub, metrics, Receipts(Announcer(hub, metrics, "receipt"), max_frame=262_144))
    nobody: Any = None
    elsewhere = Elsewhere(
        hub, metrics, router, nobody, nobody, own="here", confirmed=lambda *_: None, ended=lambda _: None
    )
    elsewhere.take("there", [Replaced("bob/phone", 7)])
    assert not hub.is_replaced("ann/phone", 5)
    assert hub.is_replaced("bob/phone", 7)
    elsewhere.take("there", [Replaced("bob/phone", 7)])
    assert not hub.is_replaced("bob/phone", 8), "the device has come back since"
    young = LocalConnection(MemoryBacklog(), "bob", "phone")
    young.serial = 9
    hub.add(young)
    assert hub.is_replaced("bob/phone", 8), "another connection of it was faster"
    assert not hub.is_replaced("bob/phone", 10)
    await young.close()


async def test_that_another_node_is_back_is_passed_on_and_that_this_one_is_not() -> None:
    hub, metrics = Hub(), Metrics()
    router = Router(hub, metrics, Receipts(Announcer(hub, metrics, "receipt"), max_frame=262_144))
    nobody: Any = None
    back: list[str] = []
    elsewhere = Elsewhere(
        hub,
        metrics,
        router,
        nobody,
        nobody,
        own="here",
        confirmed=lambda *_: None,
        ended=lambda _: None,
        back=lambda: back.append("back"),
    )
    elsewhere.take("here", [Back()])
    assert back == []
    elsewhere.take("there", [Back()])
    assert back == ["back"]


async def test_the_later_connection_has_the_higher_number_whichever_node_started_first() -> None:
    first, second = (
        RedisBus("redis://127.0.0.1:1", Hub(), Metrics(), node=node, prefix="relay:test")
        for node in ("first", "second")
    )
    numbers = []
    for bus in (first, second, first, second):
        # Nothing listens: it waits a second at most.
        numbers.append(await bus.enter("bob", "phone"))
    assert numbers == sorted(set(numbers))
    for bus in (first, second):
        await bus.close()
