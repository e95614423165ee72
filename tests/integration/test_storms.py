"""Many devices that come back at the same moment: few calls, nobody lost, and one that is in trouble harms no other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.arriving import make_known
from tests.support.device import Closed, WireDevice
from tests.support.failpoints import failing
from tests.support.node import Node, NodeFactory
from tests.support.on_cluster import ON_CLUSTER
from tests.support.valkey import open_valkey

COMMANDS = ("find", "update", "insert", "findAndModify", "aggregate", "delete", "getMore")
MANY = 200
one_mongod = pytest.mark.skipif(ON_CLUSTER, reason="needs transactions, or a server's own counters")


@pytest.fixture(autouse=True)
async def http(nodes: NodeFactory) -> None:
    """A client that opens more than a hundred sockets to one node."""
    await nodes._http.close()
    nodes._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


def people(many: int = MANY) -> list[str]:
    return [f"u{number:03}" for number in range(many)]


async def comes(node: Node, user: str) -> WireDevice:
    """Connects, drains, and acknowledges what comes."""
    device = await node.connect(user, welcome=False)
    device.welcome = await device.expect("welcome", seconds=30)
    return device


async def drains(device: WireDevice, seconds: float = 30) -> list[str]:
    """Takes and acknowledges what waits; the bodies."""
    found: list[str] = []
    while True:
        operation = await device.next(seconds)
        if operation["t"] == "msg":
            found.append(operation["body"])
            await device.ack(operation["conv"], operation["id"], durable=False)
        elif operation["t"] == "drained":
            return found


async def come(node: Node, users: Sequence[str]) -> list[WireDevice | BaseException]:
    return await asyncio.gather(*(comes(node, user) for user in users), return_exceptions=True)


async def come_back(node: Node, user: str, seconds: float = 30) -> WireDevice:
    """Connects, again when it is told to try later."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                return await comes(node, user)
            except Closed as closed:
                if closed.code != 1012:
                    raise
                await asyncio.sleep(0.2)


@asynccontextmanager
async def counting(node: Node) -> AsyncIterator[dict[str, int]]:
    """What this mongod was asked while this lasts, by command."""

    async def counts() -> dict[str, int]:
        found = (await node.db.client.admin.command("serverStatus"))["metrics"]["commands"]
        return {name: int(found[name]["total"]) for name in COMMANDS}

    counted: dict[str, int] = {}
    before = await counts()
    yield counted
    after = await counts()
    counted.update({name: after[name] - before[name] for name in COMMANDS})


@one_mongod
@pytest.mark.parametrize("new", [False, True])
async def test_two_hundred_devices_at_once_take_about_a_call_each(node: Node, new: bool) -> None:
    if not new:
        await make_known(node, people())
    async with counting(node) as counted:
        found = await come(node, people())
        assert all(isinstance(one, WireDevice) for one in found)
        await asyncio.gather(*(drains(one) for one in found if isinstance(one, WireDevice)))
        # What they missed live is asked for after they have drained.
        while node.relay.context.live.catching_up._tasks:
            await asyncio.sleep(0.01)
    # The node's own jobs ask, too; and on a busy machine some come late enough to be asked for by themselves.
    assert sum(counted.values()) < 1.5 * MANY, counted


async def test_messages_that_wait_reach_each_of_many_once_and_drained_counts_them(node: Node) -> None:
    users = people(60)
    await make_known(node, [*users, "ann"])
    ann = await comes(node, "ann")
    wanted: dict[str, list[str]] = {}
    for number, user in enumerate(users):
        if number % 3:
            continue
        conv = await node.direct("ann", user)
        wanted[user] = [f"{user} {count}" for count in range(1 + number % 5)]
        for body in wanted[user]:
            await ann.sent(conv, body)
    devices = [one for one in await come(node, users) if isinstance(one, WireDevice)]
    assert len(devices) == len(users)
    got = await asyncio.gather(*map(drains, devices))
    assert {one.user: its for one, its in zip(devices, got, strict=True) if its} == wanted


async def test_what_is_sent_while_all_come_is_delivered_once(node: Node) -> None:
    users = people(60)
    await make_known(node, [*users, "ann"])
    ann = await comes(node, "ann")
    conv = await node.group("ann", users)
    coming = asyncio.ensure_future(come(node, users))
    sent = 0
    while not coming.done():
        await ann.sent(conv, f"{sent}")
        sent += 1
    devices = [one for one in coming.result() if isinstance(one, WireDevice)]
    assert len(devices) == len(users)

    async def all_of(device: WireDevice) -> list[str]:
        found: list[str] = []
        while len(found) < sent:
            message = await device.expect("msg", seconds=30)
            found.append(message["body"])
            await device.ack(conv, message["id"], durable=False)
        await device.nothing("msg", 0.2)
        return found

    for found in await asyncio.gather(*map(all_of, devices)):
        assert sorted(found, key=int) == [str(number) for number in range(sent)]


async def test_devices_revoked_in_the_middle_of_a_storm_are_refused_within_five_seconds(node: Node) -> None:
    users = people(100)
    await make_known(node, users)
    revoked = set(users[::5])
    coming = asyncio.ensure_future(come(node, users))
    await asyncio.sleep(0.05)
    now = datetime.now(UTC)
    ended = {"removedAt": now, "endedAt": now + timedelta(seconds=2)}
    await node.db.devices.update_many(
        {"_id": {"$in": [f"{user}/phone" for user in revoked]}}, {"$set": ended}
    )
    began = time.monotonic()
    found = dict(zip(users, await coming, strict=True))
    for user in revoked:
        one = found[user]
        code = await one.closed(12) if isinstance(one, WireDevice) else getattr(one, "code", one)
        assert code == 4401, user
    # Of which a loaded machine takes some.
    assert time.monotonic() - began < 10
    assert all(isinstance(found[user], WireDevice) for user in users if user not in revoked)


@one_mongod
async def test_a_device_that_somebody_holds_holds_up_its_group_for_a_moment_only(node: Node) -> None:
    users = people(60)
    await make_known(node, users)
    async with node.db.client.start_session() as session:
        await session.start_transaction()
        await node.db.devices.update_one({"_id": "u007/phone"}, {"$set": {"name": "held"}}, session=session)
        held, others = "u007", [user for user in users if user != "u007"]
        tasks = {user: asyncio.ensure_future(comes(node, user)) for user in users}
        began = time.monotonic()
        found = await asyncio.gather(*(tasks[user] for user in others), return_exceptions=True)
        took = time.monotonic() - began
        assert all(isinstance(one, WireDevice) for one in found)
        # As long as the store would hold the whole group.
        assert took < 9
        assert not tasks[held].done()
        await session.abort_transaction()
    await asyncio.gather(tasks[held], return_exceptions=True)
    await come_back(node, held)


@one_mongod
async def test_one_device_that_is_stored_as_nonsense_harms_no_other(node: Node) -> None:
    users = people(60)
    await make_known(node, users)
    await node.db.devices.update_one({"_id": "u007/phone"}, {"$set": {"gap": {"why": "no since"}}})
    found = dict(zip(users, await come(node, users), strict=True))
    assert [user for user, one in found.items() if not isinstance(one, WireDevice)] == ["u007"]


@one_mongod
@pytest.mark.parametrize(
    "how", [{"closeConnection": True}, {"errorCode": 189}, {"errorCode": 50}], ids=["cut", "primary", "slow"]
)
async def test_while_the_store_fails_devices_are_told_to_come_again_and_do(
    node: Node, how: dict[str, Any]
) -> None:
    users = people(60)
    await make_known(node, users)
    async with failing(node, "update", "devices", **how), failing(node, "findAndModify", "devices", **how):
        found = await come(node, users)
    codes = {one.code for one in found if isinstance(one, Closed)}
    assert codes <= {1012}, found
    back = await asyncio.gather(*(come_back(node, user) for user in users))
    assert [await drains(one) for one in back] == [[]] * len(users)


async def test_clients_that_hang_up_while_they_wait_harm_no_other(node: Node) -> None:
    users = people(80)
    await make_known(node, users)
    tasks = {user: asyncio.ensure_future(comes(node, user)) for user in users}
    await asyncio.sleep(0.02)
    for user in users[::4]:
        tasks[user].cancel()
    found = dict(zip(users, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
    stayed = [one for user, one in found.items() if user not in users[::4]]
    assert all(isinstance(one, WireDevice) for one in stayed)
    again = await asyncio.gather(*(come_back(node, user) for user in users[::4]))
    assert [await drains(one) for one in again] == [[]] * len(again)


async def test_new_devices_are_recipients_at_every_node_before_they_are_welcome(nodes: NodeFactory) -> None:
    one, other = [await nodes.start(leases=True, sweep_seconds=1) for _ in range(2)]
    users = people(40)
    await make_known(one, ["ann"])
    conv = await one.group("ann", users)
    sender = await other.connect("ann")
    # The other node believes that nobody of them has a device.
    await sender.sent(conv, "before")
    began = time.monotonic()
    found = [device for device in await come(one, users) if isinstance(device, WireDevice)]
    took = time.monotonic() - began
    assert len(found) == len(users)
    assert took >= 5, "without Redis the leases of the other node must run out"
    assert took < 20, "all at once, not one after the other"
    await sender.sent(conv, "after")
    for device in found:
        bodies: set[str] = set()
        while bodies != {"before", "after"}:
            bodies.add((await device.expect("msg", seconds=40))["body"])


async def test_requests_of_many_connections_at_once_are_all_answered_whatever_their_size(node: Node) -> None:
    users = people(100)
    await make_known(node, users)

    async def asks(number: int, user: str) -> int:
        # More than is held back until it is one's turn.
        body = {"t": "x" * (200_000 if number % 10 == 0 else 10)}
        status, _ = await node.request("POST", "/v1/messages", user, "phone", body)
        return status

    found = await asyncio.gather(*(asks(number, user) for number, user in enumerate(users)))
    assert set(found) == {400}, "each is read to its end, and refused for what it says"


async def test_new_devices_are_confirmed_by_the_other_node_together(
    nodes: NodeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_valkey(tmp_path) as valkey:
        one, other = [
            await nodes.start(leases=True, sweep_seconds=3600, redis_url=valkey.url) for _ in range(2)
        ]
        users = people(60)
        await make_known(one, ["ann"])
        conv = await one.group("ann", users)
        sender = await other.connect("ann")
        # The other node believes that nobody of them has a device.
        await sender.sent(conv, "before")
        told = 0
        invalidate = one.relay.context.bus.invalidate

        async def counted(*given: Any) -> bool:
            nonlocal told
            told += 1
            return await invalidate(*given)

        monkeypatch.setattr(one.relay.context.bus, "invalidate", counted)
        found = [device for device in await come(one, users) if isinstance(device, WireDevice)]
        assert len(found) == len(users)
        assert told < len(users) / 2, "changes that come together are told together"
        await sender.sent(conv, "after")
        for device in found:
            await device.expect("msg", seconds=30, body="after")
        for node in (one, other):
            await nodes.stop(node)
