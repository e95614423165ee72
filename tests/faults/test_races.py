"""Last acknowledgements, resends and withdrawals that race: on one node, and on two nodes over one database."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.device import WireDevice, new_id
from tests.support.node import Node, NodeFactory
from tests.support.process import ledger_of
from tests.support.waiting import arriving, until

ROUNDS = 40


async def gone(node: Node, seconds: float = 3) -> None:
    async def empty() -> bool:
        return not await node.db.messages.count_documents({})

    await until(empty, seconds, "nothing is left in messages")


async def acknowledge(device: WireDevice, conv: str, message: str) -> None:
    await device.expect("msg", id=message)
    await device.ack(conv, message)


async def test_two_last_acknowledgements_at_once_leave_nothing_behind(nodes: NodeFactory) -> None:
    node = await nodes.start(sweep_seconds=600)
    conv = await node.group("ann", ["bob", "cleo"])
    ann, bob, cleo = await node.connect("ann"), await node.connect("bob"), await node.connect("cleo")
    for _ in range(ROUNDS):
        message = await ann.send(conv)
        await asyncio.gather(acknowledge(bob, conv, message), acknowledge(cleo, conv, message))
    await gone(node)
    ledger = await ledger_of(node)
    assert (ledger["accepted"], ledger["acknowledged"], ledger["waiting"]) == (2 * ROUNDS, 2 * ROUNDS, 0)


async def test_two_last_acknowledgements_on_two_nodes_at_once_leave_nothing_behind(
    nodes: NodeFactory,
) -> None:
    # The sweep of neither node may help.
    one, other = await nodes.start(sweep_seconds=600), await nodes.start(sweep_seconds=600)
    conv = await one.group("ann", ["bob", "cleo"])
    for name in ("bob", "cleo"):
        await (await one.connect(name)).close()
    ann = await one.connect("ann")
    sent = [(await ann.sent(conv))["id"] for _ in range(ROUNDS)]
    bob, cleo = await one.connect("bob"), await other.connect("cleo")
    for message in sent:
        await asyncio.gather(bob.expect("msg", id=message), cleo.expect("msg", id=message))
    for message in sent:
        await asyncio.gather(bob.ack(conv, message), cleo.ack(conv, message))
    await gone(one)
    first, second = await ledger_of(one), await ledger_of(other)
    assert first["acknowledged"] + second["acknowledged"] == 2 * ROUNDS
    assert first["accepted"] + second["accepted"] == 2 * ROUNDS


async def test_devices_of_a_member_without_any_who_acknowledge_on_two_nodes_count_once(
    nodes: NodeFactory,
) -> None:
    one, other = await nodes.start(sweep_seconds=600), await nodes.start(sweep_seconds=600)
    conv = await one.direct("ann", "bob")
    ann = await one.connect("ann")
    sent = [(await ann.sent(conv))["id"] for _ in range(10)]
    phone, tablet = await one.connect("bob", "phone"), await other.connect("bob", "tablet")
    for message in sent:
        await asyncio.gather(phone.expect("msg", id=message), tablet.expect("msg", id=message))
    for message in sent:
        await asyncio.gather(phone.ack(conv, message), tablet.ack(conv, message))
    await gone(one)
    first, second = await ledger_of(one), await ledger_of(other)
    assert first["acknowledged"] + second["acknowledged"] == len(sent)


async def test_the_same_message_sent_many_times_at_once_is_stored_once(nodes: NodeFactory) -> None:
    node = await nodes.start()
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    for again in (False, True):
        message = new_id()
        operation = {"t": "send", "id": message, "conv": conv, "kind": "text", "body": "once", "again": again}
        await ann.put(*[operation] * 20)
        for _ in range(10):
            await ann.put(operation)
        answers = [await ann.expect("stored", id=message) for _ in range(30)]
        assert len({(answer["seq"], answer["at"]) for answer in answers}) == 1
        assert (await bob.expect("msg"))["seq"] == answers[0]["seq"]
        await bob.nothing("msg", 0.2)
        await bob.ack(conv, message)
    await gone(node)
    ledger = await ledger_of(node)
    assert (ledger["accepted"], ledger["acknowledged"], ledger["waiting"]) == (2, 2, 0)


async def test_a_resend_that_races_with_the_last_acknowledgement_gets_the_first_seq_and_nothing_comes_back(
    nodes: NodeFactory,
) -> None:
    one, other = await nodes.start(), await nodes.start(sweep_seconds=600)
    conv = await one.direct("ann", "bob")
    ann, bob, elsewhere = await one.connect("ann"), await one.connect("bob"), await other.connect("ann")
    for _ in range(ROUNDS):
        first = await ann.sent(conv)
        await bob.expect("msg", id=first["id"])
        _, again = await asyncio.gather(
            bob.ack(conv, first["id"]), elsewhere.sent(conv, id=first["id"], again=True)
        )
        assert again["seq"] == first["seq"]
    await bob.nothing("msg", 0.2)
    await gone(one)


async def test_a_withdrawal_that_races_with_the_acknowledgement_counts_each_delivery_once(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start()
    conv = await node.group("ann", ["bob", "cleo"])
    ann, bob, cleo = await node.connect("ann"), await node.connect("bob"), await node.connect("cleo")
    for _ in range(ROUNDS):
        message = (await ann.sent(conv))["id"]
        await bob.expect("msg", id=message)
        withdrawal = new_id()
        await asyncio.gather(
            bob.ack(conv, message),
            ann.send(conv, None, id=withdrawal, kind="withdrawn", replyTo=message),
        )
        for device in (bob, cleo):
            await acknowledge(device, conv, withdrawal)
        await cleo.ack(conv, message)
    await gone(node)
    ledger = await ledger_of(node)
    assert ledger["accepted"] == 4 * ROUNDS
    assert ledger["acknowledged"] + ledger["withdrawn"] == 4 * ROUNDS
    assert ledger["waiting"] == 0


async def test_a_device_that_changes_its_connection_while_it_acknowledges_loses_nothing(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start()
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    held: set[str] = set()
    sent: set[str] = set()
    for number in range(ROUNDS):
        sent.add(await ann.send(conv))
        if number % 4 == 3:
            bob = await node.connect("bob")
        try:
            message: dict[str, Any] = await bob.expect("msg", 0.2)
        except TimeoutError:
            continue
        held.add(message["id"])
        # Its answer is not awaited: the next connection may replace this one first.
        await bob.ack(conv, message["id"], durable=False)
    for message in await arriving(bob, "msg"):
        held.add(message["id"])
        await bob.ack(conv, message["id"], durable=False)
    assert held == sent
    await gone(node)

    async def booked() -> bool:
        return (await ledger_of(node))["waiting"] == 0

    await until(booked, 2, "the last group is booked")
    ledger = await ledger_of(node)
    assert (ledger["accepted"], ledger["acknowledged"], ledger["waiting"]) == (ROUNDS, ROUNDS, 0)
