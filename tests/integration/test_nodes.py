"""Two nodes with a Redis between them: messages, live events and changes reach devices wherever they are connected. The
sweep, which would find messages too, does not run here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay import duties
from tests.support.device import WireDevice
from tests.support.node import Node, NodeFactory
from tests.support.valkey import Valkey, open_valkey
from tests.support.valkey_cluster import valkey_cluster
from tests.support.waiting import exactly, until


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Valkey]:
    async with open_valkey(tmp_path_factory.mktemp("valkey")) as running:
        yield running


@pytest.fixture(scope="module")
async def clustered(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[Valkey]]:
    async with valkey_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(params=["one server", "cluster"])
async def redis_url(request: pytest.FixtureRequest, server: Valkey, clustered: list[Valkey]) -> str:
    if request.param == "cluster":
        return clustered[1].url.replace("redis://", "redis+cluster://")
    return server.url


async def start(nodes: NodeFactory, url: str, **settings: Any) -> Node:
    return await nodes.start(redis_url=url, sweep_seconds=3600, leases=True, **settings)


@pytest.fixture
async def two(nodes: NodeFactory, redis_url: str) -> tuple[Node, Node]:
    return await start(nodes, redis_url), await start(nodes, redis_url)


async def test_a_message_reaches_devices_of_another_node_and_its_receipt_comes_back(
    two: tuple[Node, Node],
) -> None:
    one, other = two
    ann, bob = await one.connect("ann"), await other.connect("bob")
    laptop = await other.connect("ann", "laptop")
    conv = await one.direct("ann", "bob")
    sent = await ann.sent(conv, {"text": "over there"})
    arrived = await bob.expect("msg", id=sent["id"])
    assert (arrived["seq"], arrived["body"]) == (sent["seq"], {"text": "over there"})
    assert (await laptop.expect("msg", id=sent["id"]))["from"]["device"] == "phone"
    await bob.ack(conv, sent["id"])
    for device in (ann, laptop):
        receipt = await device.expect("receipt")
        assert (receipt["ids"], receipt["by"]["user"]) == ([sent["id"]], "bob")
    await laptop.ack(conv, sent["id"])
    await until(lambda: _empty(one), 5, "nothing waits")


async def _empty(node: Node) -> bool:
    return bool(await node.db.messages.count_documents({}) == 0)


async def test_messages_of_many_arrive_in_their_order_and_each_once(two: tuple[Node, Node]) -> None:
    one, other = two
    ann, bob = await one.connect("ann"), await other.connect("bob")
    conv = await one.direct("ann", "bob")
    sent = [await ann.sent(conv, str(n)) for n in range(100)]
    arrived = await exactly(bob, "msg", 100)
    assert [message["id"] for message in arrived] == [message["id"] for message in sent]
    assert [message["seq"] for message in arrived] == sorted(message["seq"] for message in sent)


async def test_a_large_group_is_reached_over_both_nodes(nodes: NodeFactory, redis_url: str) -> None:
    one, other = [await start(nodes, redis_url, inline_recipients=4) for _ in range(2)]
    users = [f"u{n}" for n in range(20)]
    devices = [await (one, other)[n % 2].connect(user) for n, user in enumerate(users)]
    conv = await one.group("u0", users[1:])
    sent = await devices[0].sent(conv, "to all")
    for device in devices[1:]:
        assert (await device.expect("msg", id=sent["id"]))["seq"] == sent["seq"]
        await device.ack(conv, sent["id"])
    await until(lambda: _empty(one), 5, "nothing waits")


async def test_a_device_gets_its_own_ciphertext_from_another_node_and_no_other(
    two: tuple[Node, Node],
) -> None:
    one, other = two
    ann, bob = await one.connect("ann"), await other.connect("bob")
    cleo = await other.connect("cleo")
    conv = await one.group("ann", ["bob", "cleo"])
    sealed = {"bob/phone": "Zm9yIGJvYg==", "cleo/phone": "Zm9yIGNsZW8="}
    sent = await ann.sent(conv, None, sealed=sealed)
    assert (await bob.expect("msg", id=sent["id"]))["sealed"] == sealed["bob/phone"]
    assert (await cleo.expect("msg", id=sent["id"]))["sealed"] == sealed["cleo/phone"]


async def test_the_second_connection_of_a_device_replaces_the_first_on_the_other_node(
    two: tuple[Node, Node],
) -> None:
    one, other = two
    first = await one.connect("bob")
    second = await other.connect("bob")
    assert await first.closed(10) == 4409
    ann = await one.connect("ann")
    conv = await one.direct("ann", "bob")
    sent = await ann.sent(conv)
    await second.expect("msg", id=sent["id"])
    third = await one.connect("bob")
    assert await second.closed(10) == 4409
    await third.expect("msg", id=sent["id"])
    again = await ann.sent(conv)
    await third.expect("msg", id=again["id"])


async def test_what_goes_into_the_connection_that_a_device_had_before_reaches_it_where_it_is(
    two: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = two
    conv = await here.direct("ann", "bob")
    ann, old = await here.connect("ann"), await here.connect("bob")
    bus: Any = there.relay.context.bus
    publisher = bus._publisher
    turn, held = publisher._turn, asyncio.Event()

    async def late() -> None:
        await held.wait()
        await turn()

    monkeypatch.setattr(publisher, "_turn", late)
    new = await there.connect("bob")
    await new.expect("drained")
    # `here` does not know yet that bob's phone is elsewhere.
    stored = await ann.sent(conv)
    assert (await old.expect("msg"))["id"] == stored["id"]
    held.set()
    async with asyncio.timeout(3):
        assert (await new.expect("msg"))["id"] == stored["id"]
    assert await old.closed() == 4409


async def test_of_ten_connections_of_a_device_at_once_one_stays_and_gets_messages(
    two: tuple[Node, Node],
) -> None:
    one, other = two
    ann = await one.connect("ann")
    conv = await one.direct("ann", "bob")
    devices = await asyncio.gather(*((one, other)[n % 2].connect("bob", welcome=False) for n in range(10)))
    hubs = [node.relay.context.hub for node in two]

    async def one_left() -> bool:
        return sum(hub.get("bob/phone") is not None for hub in hubs) == 1

    await until(one_left, 10, "one connection is left")
    sent = await ann.sent(conv)
    found = await asyncio.gather(
        *(device.expect("msg", 5, id=sent["id"]) for device in devices), return_exceptions=True
    )
    # One that is just being replaced may get it too; the last one gets it always.
    assert {one["seq"] for one in found if isinstance(one, dict)} == {sent["seq"]}
    await until(one_left, 10, "one connection is left")


async def test_credit_comes_back_for_what_is_acknowledged_through_another_node(
    nodes: NodeFactory, redis_url: str
) -> None:
    one, other = [await start(nodes, redis_url, window=4) for _ in range(2)]
    ann, bob = await one.connect("ann"), await other.connect("bob")
    conv = await one.direct("ann", "bob")
    sent = [await ann.sent(conv, str(n)) for n in range(6)]
    first = [await bob.expect("msg") for _ in range(4)]
    body = {"acks": [{"conv": conv, "ids": [message["id"] for message in first]}]}
    assert (await one.request("POST", "/v1/acks", "bob", "phone", body))[0] == 200
    rest = [await bob.expect("msg") for _ in range(2)]
    assert [message["id"] for message in first + rest] == [message["id"] for message in sent]


async def test_typing_reads_and_presence_are_told_at_the_other_node(two: tuple[Node, Node]) -> None:
    one, other = two
    ann, bob = await one.connect("ann"), await other.connect("bob")
    conv = await one.direct("ann", "bob")
    await ann.put({"t": "typing", "conv": conv, "on": True})
    assert (await bob.expect("typing"))["user"] == "ann"
    await ann.put({"t": "read", "conv": conv, "upTo": 7})
    assert (await bob.expect("read"))["upTo"] == 7
    await ann.put({"t": "presence", "users": ["bob"]})
    assert (await ann.expect("presence", user="bob"))["online"] is True
    await bob.close()
    gone = await ann.expect("presence", 10, user="bob")
    assert gone["online"] is False and gone["lastSeen"] > 0
    await one.connect("bob")
    assert (await ann.expect("presence", 10, user="bob"))["online"] is True


async def test_who_is_online_anywhere_is_listed(two: tuple[Node, Node]) -> None:
    one, other = two
    await one.connect("ann")
    await other.connect("ann", "laptop")
    await other.connect("bob")
    await one.direct("ann", "bob")
    assert (await one.request("POST", "/v1/contacts", "ann", "phone", {"user": "bob"}))[0] == 201
    status, found = await one.request("GET", "/v1/contacts/online", "ann", "phone")
    assert status == 200 and [item["user"] for item in found["items"]] == ["bob"]


async def test_a_removal_is_confirmed_by_the_other_node_in_milliseconds(two: tuple[Node, Node]) -> None:
    one, other = two
    await one.connect("ann")
    bob, cleo = await other.connect("bob"), await other.connect("cleo")
    conv = await one.group("ann", ["bob", "cleo"])
    warm = await bob.sent(conv, "the other node knows the members")
    await cleo.expect("msg", id=warm["id"])
    began = time.monotonic()
    path = f"/v1/conversations/{conv}/members/cleo"
    assert (await one.request("DELETE", path, "ann", "phone"))[0] == 200
    took = time.monotonic() - began
    assert took < one.relay.context.invalidation.lease, "nobody waited for the lease"
    after = await bob.sent(conv, "without her")
    document = await one.db.messages.find_one({"id": after["id"]})
    assert document is not None and sorted(document["awaiting"]) == ["ann/phone"]


async def test_a_block_is_confirmed_by_the_other_node_in_milliseconds(two: tuple[Node, Node]) -> None:
    one, other = two
    bob = await other.connect("bob")
    conv = await one.direct("ann", "bob")
    ann = await one.connect("ann")
    await ann.expect("msg", id=(await bob.sent(conv, "the other node knows that it is welcome"))["id"])
    assert (await one.request("POST", "/v1/contacts", "ann", "phone", {"user": "bob"}))[0] == 201
    for blocked, awaiting in ((True, ["ann/!"]), (False, ["ann/phone"])):
        began = time.monotonic()
        changed = await one.request("PATCH", "/v1/contacts/bob", "ann", "phone", {"blocked": blocked})
        assert changed[0] == 200
        took = time.monotonic() - began
        assert took < one.relay.context.invalidation.lease, "nobody waited for the lease"
        after = await bob.sent(conv, f"blocked: {blocked}")
        document = await one.db.messages.find_one({"id": after["id"]})
        assert document is not None and document["awaiting"] == awaiting
    assert (await ann.expect("msg"))["id"] == after["id"]


async def test_the_other_node_addresses_nothing_to_a_device_that_was_revoked(two: tuple[Node, Node]) -> None:
    one, other = two
    bob = await other.connect("bob")
    conv = await one.direct("ann", "bob")
    for device in ("phone", "tablet"):
        await one.connect("ann", device)
    warm = await bob.sent(conv, "the other node knows both")
    found = await one.db.messages.find_one({"id": warm["id"]})
    assert sorted(found["awaiting"]) == ["ann/phone", "ann/tablet"]
    began = time.monotonic()
    assert (await one.request("DELETE", "/v1/auth/devices/tablet", "ann", "phone"))[0] == 200
    took = time.monotonic() - began
    assert took < one.relay.context.invalidation.lease, "nobody waited for the lease"
    after = await bob.sent(conv, "for the phone alone")
    document = await one.db.messages.find_one({"id": after["id"]})
    assert document is not None and document["awaiting"] == ["ann/phone"]


async def test_a_conversation_has_one_order_though_the_clocks_of_its_nodes_are_an_hour_apart(
    two: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, ahead = two
    clock = ahead.relay.context.clock
    wall = clock.now
    monkeypatch.setattr(clock, "_now", lambda: int(time.time() * 1000) + 3_600_000)
    assert clock.now() - one.relay.context.clock.now() > 3_000_000 and wall() > 0
    ann, bob = await one.connect("ann"), await ahead.connect("bob")
    conv = await one.direct("ann", "bob")
    said: list[str] = []
    seen = 0
    for n in range(6):
        sender, reader = (bob, ann) if n % 2 == 0 else (ann, bob)
        sent = await sender.sent(conv, str(n), after=seen)
        assert sent["seq"] > seen, "a reply sorts behind what its sender had received"
        arrived = await reader.expect("msg", id=sent["id"])
        seen = arrived["seq"]
        said.append(sent["id"])
        await reader.ack(conv, sent["id"])
    tablet = await one.connect("ann", "tablet")
    unread = await bob.sent(conv, "for the tablet too")
    assert (await tablet.expect("msg", id=unread["id"]))["seq"] == unread["seq"]
    assert await one.db.messages.count_documents({}) == 1


async def test_while_redis_is_away_everything_goes_on_here_and_resumes_there(
    nodes: NodeFactory, tmp_path: Path
) -> None:
    async with open_valkey(tmp_path) as server:
        one = await nodes.start(redis_url=server.url, sweep_seconds=2)
        other = await nodes.start(redis_url=server.url, sweep_seconds=2)
        ann, tom, bob = await one.connect("ann"), await one.connect("tom"), await other.connect("bob")
        conv = await one.group("ann", ["bob", "tom"])
        await server.kill()
        sent = await ann.sent(conv, "while Redis is away")
        await tom.expect("msg", id=sent["id"])
        late = await bob.expect("msg", 15, id=sent["id"])
        assert late["seq"] == sent["seq"]

        async def degraded() -> bool:
            async with one.http.get(one.url + "/readyz") as response:
                return response.status == 200 and "bus" in (await response.json()).get("problems", {})

        await until(degraded, 10, "readyz names it")
        moved = await one.connect("bob")
        ending = asyncio.create_task(bob.closed(30))
        await server.start()

        async def back() -> bool:
            return all(node.relay.context.bus.shared for node in (one, other))

        await until(back, 20, "both nodes use Redis again")
        assert await ending == 4409, "the connection made meanwhile is the younger"
        again = await ann.sent(conv, "and again")
        await moved.expect("msg", id=again["id"])


async def pair(nodes: NodeFactory, url: str) -> tuple[Node, WireDevice, WireDevice, str]:
    """Ann's node, she and bob at two of them, and their conversation."""
    one, other = await start(nodes, url), await start(nodes, url)
    ann, bob = await one.connect("ann"), await other.connect("bob")
    return one, ann, bob, await one.direct("ann", "bob")


async def test_what_is_lost_with_a_flushed_redis_comes_back_within_seconds(
    nodes: NodeFactory, tmp_path: Path
) -> None:
    async with open_valkey(tmp_path) as server:
        _, ann, bob, conv = await pair(nodes, server.url)
        for _ in range(2):
            await server.command("FLUSHALL")
            # Not yet entered again; what nobody tells the other node of is looked for when it is.
            lost = await ann.sent(conv)
            await bob.expect("msg", 15, id=lost["id"])
            sent = await ann.sent(conv)
            await bob.expect("msg", id=sent["id"])


async def test_a_redis_that_takes_no_writes_still_carries_what_nodes_tell(
    nodes: NodeFactory, tmp_path: Path
) -> None:
    async with open_valkey(tmp_path) as server:
        one, ann, bob, conv = await pair(nodes, server.url)
        await server.command("CONFIG", "SET", "maxmemory", "1")
        entered: list[object] = []
        one.relay.context.bus._came_back = lambda: entered.append(1)  # type: ignore[attr-defined]
        await asyncio.sleep(3)
        sent = await ann.sent(conv)
        await bob.expect("msg", id=sent["id"])
        assert one.relay.context.bus.shared
        assert not entered


async def test_a_revocation_closes_the_device_s_socket_at_another_node_at_once(
    nodes: NodeFactory, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The hint, not the look into the store that finds it when that is lost.
    monkeypatch.setattr(duties, "_REVOCATIONS_SECONDS", 3600.0)
    one, other = await start(nodes, redis_url), await start(nodes, redis_url)
    await one.connect("ann")
    tablet, laptop = await other.connect("ann", "tablet"), await other.connect("ann", "laptop")
    assert (await one.request("DELETE", "/v1/auth/devices/tablet", "ann", "phone"))[0] == 200
    assert await tablet.closed(5) == 4401
    await laptop.put({"t": "ping"})
    await laptop.expect("pong")


async def test_an_erasure_closes_the_person_s_sockets_at_another_node_at_once(
    nodes: NodeFactory, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duties, "_REVOCATIONS_SECONDS", 3600.0)
    monkeypatch.setattr(duties, "_ERASURES_SECONDS", 3600.0)
    one, other = await start(nodes, redis_url), await start(nodes, redis_url)
    await one.connect("ann")
    tablet, bob = await other.connect("ann", "tablet"), await other.connect("bob")
    assert (await one.request("DELETE", "/v1/me", "ann", "phone"))[0] in (200, 202, 204)
    assert await tablet.closed(5) == 4401
    await bob.put({"t": "ping"})
    await bob.expect("pong")


async def test_the_device_whose_keys_run_low_is_told_at_another_node_and_no_other(
    two: tuple[Node, Node],
) -> None:
    one, other = two
    bob = await one.connect("bob")
    phone, tablet = await other.connect("ann"), await other.connect("ann", "tablet")
    keys = [{"id": number, "key": "a2V5"} for number in range(20)]
    signed = {"id": 1, "key": "a2V5", "signature": "c2ln"}
    body = {"identityKey": "aWQ=", "registrationId": 7, "signedPreKey": signed, "oneTimePreKeys": keys}
    assert (await other.request("PUT", "/v1/keys", "ann", "phone", body))[0] == 200
    for left in (19, 18):
        assert (await one.request("POST", "/v1/keys/claim", "bob", "phone", {"devices": ["ann/phone"]}))[
            0
        ] == 200
        assert await phone.expect("keys") == {"t": "keys", "oneTime": left}
    for device in (bob, tablet):
        await device.nothing("keys")
