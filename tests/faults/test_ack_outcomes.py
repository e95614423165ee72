"""Acknowledgements whose writes fail or hang: retried or redelivered, gone in the end, counted once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest
from bson.datetime_ms import DatetimeMS

from tests.support.device import new_id
from tests.support.failpoints import MAJORITY_TIMEOUT, failing
from tests.support.node import Node, NodeFactory
from tests.support.process import ledger_of
from tests.support.waiting import arriving, until


async def settled(node: Node, accepted: int) -> None:
    """Nothing waits any more, and the ledger says that ``accepted`` deliveries were accepted and acknowledged."""

    async def gone() -> bool:
        return not await node.db.messages.count_documents({})

    await until(gone, 5, "nothing is left in messages")

    async def booked() -> bool:
        return (await ledger_of(node))["waiting"] == 0

    with contextlib.suppress(AssertionError):
        await until(booked, 6, "the ledger is settled")
    ledger = await ledger_of(node)
    assert (ledger["accepted"], ledger["acknowledged"], ledger["waiting"]) == (accepted, accepted, 0)


async def fates(node: Node, conv: str, message: str) -> list[str]:
    """What is on record of a message."""
    wanted = f"{conv} {message}"
    found: list[str] = []
    async for document in node.db.fates.find({"entries.id": wanted}).sort("at"):
        found += [entry["fate"] for entry in document["entries"] if entry["id"] == wanted]
    return found


HARM: dict[str, dict[str, Any]] = {
    "fates: connection closed": {
        "command": "insert",
        "collection": "fates",
        "closeConnection": True,
        "times": 3,
    },
    "fates: majority time-out": {
        "command": "insert",
        "collection": "fates",
        "writeConcernError": MAJORITY_TIMEOUT,
        "times": 1,
    },
    "fates: hang": {
        "command": "insert",
        "collection": "fates",
        "blockConnection": True,
        "blockTimeMS": 1000,
        "times": 1,
    },
    "update: connection closed": {"command": "update", "closeConnection": True, "times": 2},
    "update: majority time-out": {"command": "update", "writeConcernError": MAJORITY_TIMEOUT, "times": 1},
    "update: not the primary": {"command": "update", "errorCode": 10107, "times": 2},
    "delete: connection closed": {"command": "delete", "closeConnection": True, "times": 1},
    "delete: majority time-out": {"command": "delete", "writeConcernError": MAJORITY_TIMEOUT, "times": 1},
    "delete: hang": {"command": "delete", "blockConnection": True, "blockTimeMS": 1000, "times": 1},
    "find: connection closed": {"command": "find", "closeConnection": True, "times": 3},
}


@pytest.mark.parametrize("how", HARM.values(), ids=HARM.keys())
async def test_an_acknowledgement_whose_write_fails_at_first_is_retried_and_counted_once(
    nodes: NodeFactory, how: dict[str, Any]
) -> None:
    node = await nodes.start(commit_timeout_seconds=0.7)
    pair, group = await node.direct("ann", "bob"), await node.group("ann", ["bob", "cleo"])
    ann, bob, cleo = await node.connect("ann"), await node.connect("bob"), await node.connect("cleo")
    alone = await ann.sent(pair, "to one device")
    shared = await ann.sent(group, "to two devices")
    for device in (bob, cleo):
        await device.expect("msg", id=shared["id"])
    async with failing(node, **how):
        await bob.put(
            {"t": "ack", "conv": pair, "ids": [alone["id"]], "ref": "alone"},
            {"t": "ack", "conv": group, "ids": [shared["id"]], "ref": "shared"},
        )
        await bob.expect("acked", ref="alone")
        await bob.expect("acked", ref="shared")
        await cleo.ack(group, shared["id"])
    receipts = [await ann.expect("receipt") for _ in range(3)]
    assert sorted(receipt["by"]["user"] for receipt in receipts) == ["bob", "bob", "cleo"]
    await ann.nothing("receipt")
    await settled(node, 3)
    assert set(await fates(node, pair, alone["id"])) == {"delivered"}
    assert set(await fates(node, group, shared["id"])) == {"delivered"}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("command", "collection"), [("insert", "fates"), ("delete", "messages")])
async def test_an_acknowledgement_that_does_not_become_durable_is_told_and_the_message_comes_again(
    nodes: NodeFactory, command: str, collection: str, devices: int
) -> None:
    node = await nodes.start(send_deadline_seconds=0.5)
    conv = await node.group("ann", ["bob", "cleo"][:devices])
    ann, bob = await node.connect("ann"), await node.connect("bob")
    cleo = await node.connect("cleo") if devices == 2 else None
    stored = await ann.sent(conv)
    await bob.expect("msg")
    if cleo is not None:
        await cleo.ack(conv, stored["id"])
    async with failing(node, command, collection, errorCode=8):
        await bob.put({"t": "ack", "conv": conv, "ids": [stored["id"]], "ref": "mine"})
        failure = await bob.expect("error", ref="mine")
        assert (failure["code"], failure["retry"]) == ("unavailable", True)
        assert (await bob.expect("msg"))["seq"] == stored["seq"]
        assert await node.db.messages.count_documents({}) == 1
    await bob.ack(conv, stored["id"])
    await settled(node, devices)


@pytest.mark.parametrize("devices", [1, 2])
async def test_an_acknowledgement_that_took_effect_unnoticed_is_counted_when_it_comes_again(
    nodes: NodeFactory, devices: int
) -> None:
    node = await nodes.start(send_deadline_seconds=0.5)
    conv = await node.group("ann", ["bob", "cleo"][:devices])
    ann, bob = await node.connect("ann"), await node.connect("bob")
    cleo = await node.connect("cleo") if devices == 2 else None
    stored = await ann.sent(conv)
    await bob.expect("msg")
    if cleo is not None:
        await cleo.ack(conv, stored["id"])
    async with failing(node, "delete", writeConcernError=MAJORITY_TIMEOUT):
        # The second attempt looks, and finds that the first had done it.
        await bob.put({"t": "ack", "conv": conv, "ids": [stored["id"]], "ref": "mine"})
        await bob.expect("acked", ref="mine")
    await bob.ack(conv, stored["id"])
    await settled(node, devices)
    assert set(await fates(node, conv, stored["id"])) == {"delivered"}


async def test_an_acknowledgement_whose_update_took_effect_unnoticed_is_counted_when_it_comes_again(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(send_deadline_seconds=0.5)
    conv = await node.group("ann", ["bob", "cleo"])
    ann, bob, cleo = await node.connect("ann"), await node.connect("bob"), await node.connect("cleo")
    stored = await ann.sent(conv)
    await bob.expect("msg")
    async with failing(node, "update", writeConcernError=MAJORITY_TIMEOUT):
        await bob.put({"t": "ack", "conv": conv, "ids": [stored["id"]], "ref": "mine"})
        await bob.expect("acked", ref="mine")
    await bob.ack(conv, stored["id"])
    await cleo.ack(conv, stored["id"])
    await settled(node, 2)


async def test_a_second_acknowledgement_that_must_be_retried_is_not_counted_again(nodes: NodeFactory) -> None:
    node = await nodes.start()
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    stored = await ann.sent(conv)
    await bob.expect("msg")
    ack = {"t": "ack", "conv": conv, "ids": [stored["id"]]}
    # Both are taken while the message is in flight: the first is held up in its first write, the second queues behind it.
    async with failing(node, "insert", "fates", blockConnection=True, blockTimeMS=300, times=1):
        await bob.put({**ack, "ref": "first"})
        await asyncio.sleep(0.1)
        await bob.put({**ack, "ref": "second"})
        await asyncio.sleep(0.05)
        async with failing(node, "delete", skip=1, errorCode=8):
            await bob.expect("acked", ref="first")
            await asyncio.sleep(0.3)
        await bob.expect("acked", ref="second")
    ledger = await ledger_of(node)
    assert (ledger["accepted"], ledger["acknowledged"], ledger["waiting"]) == (1, 1, 0)


async def test_an_acknowledgement_that_arrives_twice_is_counted_and_told_once(nodes: NodeFactory) -> None:
    node = await nodes.start()
    conv, group = await node.direct("ann", "bob"), await node.group("ann", ["bob", "cleo"])
    ann, bob, cleo = await node.connect("ann"), await node.connect("bob"), await node.connect("cleo")
    for number in range(20):
        alone, shared = await ann.sent(conv), await ann.sent(group)
        await bob.expect("msg", id=alone["id"])
        await bob.expect("msg", id=shared["id"])
        acks = [
            {"t": "ack", "conv": conv, "ids": [alone["id"], alone["id"]], "ref": f"a{number}"},
            {"t": "ack", "conv": group, "ids": [shared["id"]], "ref": f"b{number}"},
        ]
        # Once more in one frame, and once more behind it.
        await bob.put(*acks, *acks)
        await bob.put(*acks)
        for _ in range(3):
            await bob.expect("acked", ref=f"a{number}")
            await bob.expect("acked", ref=f"b{number}")
        await cleo.ack(group, shared["id"])
    await settled(node, 60)
    told = [message for receipt in await arriving(ann, "receipt") for message in receipt["ids"]]
    assert len(told) == 60, "each device's acknowledgement is told once"


async def test_an_acknowledgement_of_what_was_not_delivered_yet_counts_for_its_device_only(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(window=1)
    conv = await node.group("ann", ["bob", "cleo"])
    ann, bob, cleo = await node.connect("ann"), await node.connect("bob"), await node.connect("cleo")
    first, second = await ann.sent(conv, "1"), await ann.sent(conv, "2")
    await bob.expect("msg", id=first["id"])
    await bob.nothing("msg", 0.2)
    stranger = await node.connect("dora")
    await stranger.ack(conv, second["id"])
    await ann.ack(conv, second["id"])
    await bob.ack(conv, second["id"], new_id())
    found = await node.db.messages.find_one({"id": second["id"]})
    assert found["awaiting"] == ["cleo/phone"]
    await bob.ack(conv, first["id"])
    await bob.nothing("msg", 0.3)
    await cleo.expect("msg", id=first["id"])
    await cleo.ack(conv, first["id"], second["id"])
    await settled(node, 4)


async def test_the_sweep_removes_what_a_crash_left_between_update_and_delete(nodes: NodeFactory) -> None:
    node = await nodes.start()
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    left, kept = await ann.sent(conv, "left over"), await ann.sent(conv, "kept")
    await node.db.messages.update_one(
        {"id": left["id"]},
        {
            "$set": {
                "awaiting": [],
                "deliveredTo": [{"user": "bob", "device": "phone", "at": DatetimeMS(left["at"])}],
            }
        },
    )
    healing = await nodes.start(sweep_seconds=0.2)

    async def gone() -> bool:
        return not await node.db.messages.count_documents({"id": left["id"]})

    await until(gone, 3, "the leftover is removed")
    assert await node.db.messages.count_documents({"id": kept["id"]}) == 1
    ann = await healing.connect("ann")
    await ann.put({"t": "status", "conv": conv, "ids": [left["id"]]})
    assert (await ann.expect("status"))["items"] == [
        {"id": left["id"], "gone": True, "fate": "delivered", "delivered": ["bob"]}
    ]
    again = await ann.sent(conv, "left over", id=left["id"], again=True)
    assert again["seq"] == left["seq"]


async def test_a_crash_between_fates_and_delete_costs_a_redelivery_only(nodes: NodeFactory) -> None:
    node = await nodes.start()
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    stored = await ann.sent(conv)
    await node.db.fates.insert_one(
        {
            "lane": "0",
            "at": DatetimeMS(int(time.time() * 1000)),
            "entries": [
                {
                    "id": f"{conv} {stored['id']}",
                    "sender": {"user": "ann", "device": "phone"},
                    "seq": stored["seq"],
                    "at": stored["at"],
                    "fate": "delivered",
                    "delivered": ["bob"],
                }
            ],
        }
    )
    await ann.put({"t": "status", "conv": conv, "ids": [stored["id"]]})
    assert (await ann.expect("status"))["items"] == [{"id": stored["id"], "awaiting": 1, "delivered": []}]
    again = await ann.sent(conv, id=stored["id"], again=True)
    assert again["seq"] == stored["seq"]
    assert await node.db.messages.count_documents({}) == 1, "what waits is not deleted by a resend"
    bob = await node.connect("bob")
    assert (await bob.expect("msg"))["id"] == stored["id"]
    await bob.ack(conv, stored["id"])
    await settled(node, 1)
