"""Who is connected here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from relay.routing import hub as hub_module
from relay.routing.hub import Hub
from tests.support.backlog import LocalConnection, MemoryBacklog, turns

Connect = Callable[..., LocalConnection]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        def make(user: str = "bob", device: str = "phone") -> LocalConnection:
            found = LocalConnection(MemoryBacklog(), user, device)
            stack.push_async_callback(found.close)
            return found

        yield make


async def test_a_connection_is_found_by_its_device_and_by_its_user(connect: Connect) -> None:
    hub = Hub()
    phone, laptop, ann = connect(), connect("bob", "laptop"), connect("ann")
    for one in (phone, laptop, ann):
        assert hub.add(one) is None
    assert hub.get("bob/phone") is phone
    assert hub.get("bob/tablet") is None
    assert hub.of_user("bob") == [phone, laptop]
    assert hub.of_user("cleo") == []
    assert len(hub) == 3
    assert list(hub) == [phone, laptop, ann]


async def test_a_second_connection_of_a_device_takes_over(connect: Connect) -> None:
    hub = Hub()
    first, second = connect(), connect()
    hub.add(first)
    assert hub.add(second) is first
    assert hub.get("bob/phone") is second
    assert hub.of_user("bob") == [second]
    assert len(hub) == 1


async def test_the_replaced_connection_cannot_remove_its_successor(connect: Connect) -> None:
    hub = Hub()
    first, second = connect(), connect()
    hub.add(first)
    hub.add(second)
    hub.remove(first)
    assert hub.get("bob/phone") is second
    assert hub.left == {}
    hub.remove(second)
    assert hub.get("bob/phone") is None
    assert hub.left == {"bob/phone": second.heard}
    hub.remove(second)
    assert len(hub) == 0


async def test_a_user_is_forgotten_with_the_last_device(connect: Connect) -> None:
    hub = Hub()
    phone, laptop = connect(), connect("bob", "laptop")
    hub.add(phone)
    hub.add(laptop)
    hub.remove(phone)
    assert hub.of_user("bob") == [laptop]
    hub.remove(laptop)
    assert hub.of_user("bob") == []


async def test_connections_may_leave_while_all_are_looked_at(connect: Connect) -> None:
    hub = Hub()
    for device in ("a", "b", "c"):
        hub.add(connect("bob", device))
    for connection in hub:
        hub.remove(connection)
    assert len(hub) == 0


async def test_one_can_wait_until_everybody_has_left(connect: Connect) -> None:
    hub = Hub()
    await asyncio.wait_for(hub.empty(), 1)
    phone, laptop = connect(), connect("bob", "laptop")
    hub.add(phone)
    hub.add(laptop)
    waiter = asyncio.ensure_future(hub.empty())
    await turns()
    hub.remove(phone)
    await turns()
    assert not waiter.done()
    hub.remove(laptop)
    await asyncio.wait_for(waiter, 1)


async def test_who_is_about_to_connect_learns_of_a_changed_preference(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    phone = connect("bob", "phone")
    hub.add(phone)
    hub.set_quiet("bob", True, 1)
    assert phone.quiet
    tablet, ann = connect("bob", "tablet"), connect("ann", "phone")
    hub.add(tablet)
    hub.add(ann)
    assert tablet.quiet
    assert not ann.quiet
    monkeypatch.setattr(hub_module, "monotonic", lambda: time.monotonic() + 60)
    watch = connect("bob", "watch")
    hub.add(watch)
    assert not watch.quiet, "by then it has read what is"


async def test_an_older_change_of_a_preference_that_is_heard_late_changes_nothing(connect: Connect) -> None:
    hub = Hub()
    phone = connect("bob", "phone")
    hub.add(phone)
    hub.set_quiet("bob", True, 2)
    hub.set_quiet("bob", False, 1)
    assert phone.quiet
    hub.set_quiet("bob", False, 3)
    assert not phone.quiet
