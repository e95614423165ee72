"""Documents and messages that the relay cannot work with harm nobody else, wherever it meets them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from bson import ObjectId
from bson.datetime_ms import DatetimeMS

from tests.support.device import Closed
from tests.support.node import Node, NodeFactory
from tests.support.process import metric
from tests.support.waiting import until


async def chats(node: Node) -> None:
    """Others chat as if nothing had happened, and the node means to go on."""
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    stored = await ann.sent(conv)
    await bob.expect("msg", id=stored["id"])
    await bob.ack(conv, stored["id"])
    assert not node.relay.stopping.is_set(), "a committer died"


async def commits(node: Node) -> float:
    """How many groups of acknowledgements and removals the node has committed."""
    lanes = range(node.relay.settings.commits_in_flight)
    return sum(
        [await metric(node, f'relay_commit_batch_size_count{{queue="ack-{number}"}}') for number in lanes]
    )


SENDER = {"user": "ann", "device": "phone"}
POISON: list[dict[str, Any]] = [
    {"_id": "c1 nosender", "conversationId": "c1", "seq": 1},
    {"_id": "c1 noseq", "conversationId": "c1", "sender": SENDER},
    {"_id": "c1 sender", "conversationId": "c1", "seq": 1, "sender": "not a document"},
    {"_id": "c1 elsewhere", "conversationId": "c2", "seq": 1, "sender": SENDER},
    {"_id": ObjectId(), "conversationId": "c1", "seq": 1},
]


async def test_poison_documents_that_are_due_do_not_keep_others_from_expiring(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(expiry_seconds=0.2)
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    # Not so long ago that MongoDB's own time to live takes it away.
    just_now = DatetimeMS(int(time.time() * 1000) - 5000)
    await node.db.messages.insert_many(
        [{**document, "awaiting": ["cleo/phone"], "expiresAt": just_now} for document in POISON]
    )
    stored = await ann.sent(conv, ttl=1)
    await asyncio.sleep(1.2)

    async def expired() -> bool:
        await ann.put({"t": "status", "conv": conv, "ids": [stored["id"]]})
        (item,) = (await ann.expect("status"))["items"]
        return not await node.db.messages.count_documents({"id": stored["id"]}) and item["fate"] == "expired"

    await until(expired, 2, "the other message has expired")
    before = await commits(node)
    await asyncio.sleep(1)
    rounds = await commits(node) - before
    assert rounds <= 20, f"the expiry ran in circles, {rounds:.0f} times a second"
    await chats(node)


async def test_poison_documents_among_the_leftovers_do_not_stop_the_sweep(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(sweep_seconds=0.2)
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    await node.db.messages.insert_many(
        [
            {**document, "awaiting": [], "createdAt": DatetimeMS(int(time.time() * 1000))}
            for document in POISON
        ]
    )
    left = await ann.sent(conv)
    await node.db.messages.update_one({"id": left["id"]}, {"$set": {"awaiting": []}})

    async def removed() -> bool:
        return not await node.db.messages.count_documents({"id": left["id"]})

    await until(removed, 2, "the other leftover is removed")
    before = await metric(node, "relay_leftovers_removed_total")
    await asyncio.sleep(1)
    rounds = await metric(node, "relay_leftovers_removed_total") - before
    assert rounds <= 10, f"the sweep ran in circles, {rounds:.0f} times a second"
    await chats(node)


async def test_poison_documents_in_a_mailbox_do_not_keep_the_messages_behind_them(nodes: NodeFactory) -> None:
    node = await nodes.start(window=4)
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    await node.db.messages.insert_many(
        [
            {
                "_id": f"{conv} poison{number}",
                "conversationId": conv,
                "seq": number,
                "createdAt": DatetimeMS(int(time.time() * 1000)),
                "awaiting": ["bob/phone"],
            }
            for number in range(6)
        ]
    )
    stored = await ann.sent(conv)
    bob = await node.connect("bob")
    assert (await bob.expect("msg", 3))["id"] == stored["id"]
    await bob.ack(conv, stored["id"])
    before = await metric(node, "relay_drain_pages_total")
    await asyncio.sleep(1)
    assert await metric(node, "relay_drain_pages_total") - before <= 20, "the drain runs in circles"


async def test_an_acknowledgement_of_a_poison_document_harms_nobody(nodes: NodeFactory) -> None:
    node = await nodes.start()
    conv = await node.direct("ann", "bob")
    bob = await node.connect("bob")
    message = "01234567-89ab-4cde-8f01-23456789abcd"
    await node.db.messages.insert_one(
        {"_id": f"{conv} {message}", "conversationId": conv, "awaiting": ["bob/phone"]}
    )
    await bob.put({"t": "ack", "conv": conv, "ids": [message], "ref": "poison"})
    while (await bob.next()).get("ref") != "poison":
        pass
    await chats(node)


@pytest.mark.faults
async def test_the_last_acknowledgement_of_many_messages_of_a_large_group_is_committed(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(inline_recipients=1024)
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    people = [f"{number:08d}-0000-4000-8000-000000000000" for number in range(1000)]
    now = int(time.time() * 1000)
    delivered = [{"user": user, "device": "phone", "at": DatetimeMS(now)} for user in people]
    ids = [f"{number:08d}-0000-4000-8000-000000000001" for number in range(450)]
    for start in range(0, len(ids), 50):
        await node.db.messages.insert_many(
            [
                {
                    "_id": f"{conv} {message}",
                    "conversationId": conv,
                    "id": message,
                    "sender": {"user": "ann", "device": "phone"},
                    "seq": start + place + 1,
                    "createdAt": DatetimeMS(now),
                    "kind": "text",
                    "body": "hello",
                    "awaiting": ["bob/phone", "bob/tablet"],
                    "deliveredTo": delivered,
                }
                for place, message in enumerate(ids[start : start + 50])
            ]
        )
    async with node.http.post(
        node.url + "/v1/acks",
        headers=node.headers("bob", "tablet"),
        json={"acks": [{"conv": conv, "ids": ids}]},
    ) as response:
        assert response.status == 200
    async with node.http.post(
        node.url + "/v1/acks",
        headers=node.headers("bob", "phone"),
        json={"acks": [{"conv": conv, "ids": ids}]},
    ) as response:
        answer = response.status
    assert answer == 200
    assert await node.db.messages.count_documents({}) == 0
    await chats(node)


async def test_a_message_too_large_for_the_store_is_refused_and_harms_nobody(nodes: NodeFactory) -> None:
    node = await nodes.start(max_frame_bytes=16_777_216, max_body_bytes=1024)
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    room = 16_777_216 - 300
    sealed = {"bob/phone": "A" * (room - room % 4)}
    message = "01234567-89ab-4cde-8f01-23456789abcd"
    await ann.put({"t": "send", "id": message, "conv": conv, "kind": "text", "body": None, "sealed": sealed})
    try:
        answer = await ann.expect("error", 15, id=message)
    except Closed:
        answer = {}
    assert (answer.get("code"), answer.get("retry")) in (("too_large", False), ("bad_request", False))
    await chats(node)
