"""The four outcomes of an insert, brought about on a real MongoDB: one final answer each, and never a guess."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
from pymongo import AsyncMongoClient

from relay.store import commits
from tests.support.device import Closed, WireDevice, new_id
from tests.support.failpoints import MAJORITY_TIMEOUT, failing
from tests.support.node import Node, NodeFactory
from tests.support.process import Mongods, ledger_of, metric
from tests.support.waiting import arriving, until

RETRIES = 'relay_commit_retries_total{queue="send"}'


async def final_answers(
    device: WireDevice, message: str, *, first: float = 5, more: float = 0.5
) -> list[dict[str, Any]]:
    """Every ``stored`` and ``error`` for this message: the first within ``first`` seconds, further ones within
    ``more``."""
    found: list[dict[str, Any]] = []
    while True:
        try:
            frame = await device.next(more if found else first)
        except (TimeoutError, Closed):
            return found
        if frame.get("id") == message and frame["t"] in ("stored", "error"):
            found.append(frame)


async def settled(node: Node, accepted: int) -> None:
    """Nothing waits any more, and the ledger says that ``accepted`` deliveries were accepted and acknowledged."""

    async def gone() -> bool:
        return not await node.db.messages.count_documents({})

    await until(gone, 5, "nothing is left in messages")

    async def booked() -> bool:
        return (await ledger_of(node))["waiting"] == 0

    await until(booked, 6, "the ledger is settled")
    ledger = await ledger_of(node)
    assert (ledger["accepted"], ledger["acknowledged"], ledger["waiting"]) == (accepted, accepted, 0)


@pytest.fixture
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries leave time between two fail points: one that came through would find out that the message is written."""
    monkeypatch.setattr(commits, "_FIRST_DELAY", 1.0)


UNKNOWN: dict[str, dict[str, Any]] = {
    "majority time-out": {"writeConcernError": MAJORITY_TIMEOUT, "times": 2},
    "connection closed": {"closeConnection": True, "times": 4},
    "hangs for 3 s": {"blockConnection": True, "blockTimeMS": 3000, "times": 1},
    "not the primary": {"errorCode": 10107, "times": 4},
    "interrupted by a step-down": {"errorCode": 11602, "times": 4},
    "unnamed error": {"errorCode": 8, "times": 2},
}


@pytest.mark.parametrize("how", UNKNOWN.values(), ids=UNKNOWN.keys())
async def test_a_message_of_unknown_outcome_is_retried_until_it_is_stored_once(
    nodes: NodeFactory, how: dict[str, Any]
) -> None:
    node = await nodes.start(commit_timeout_seconds=0.7)
    conv = await node.group("ann", ["bob", "cleo"])
    ann, bob, cleo = await node.connect("ann"), await node.connect("bob"), await node.connect("cleo")
    await ann.sent(conv, "before")
    await ann.sent(conv, "before, too")
    message = new_id()
    async with failing(node, "insert", **how):
        await ann.send(conv, "hello", id=message)
        answers = await final_answers(ann, message)
        # The driver itself tries again after these: what it brings to an end is known to the relay.
        assert await metric(node, RETRIES) >= (0 if how.get("errorCode") in (10107, 11602) else 1)
    assert [answer["t"] for answer in answers] == ["stored"]
    documents = [document async for document in node.db.messages.find({"id": message})]
    assert [document["seq"] for document in documents] == [answers[0]["seq"]]
    for device in (bob, cleo):
        held = await device.expect("msg", id=message)
        assert held["seq"] == answers[0]["seq"]
        await device.ack(conv, *[document["id"] async for document in node.db.messages.find({})])
    await settled(node, 6)


async def test_a_group_in_which_only_some_are_unknown_answers_the_others_at_once(nodes: NodeFactory) -> None:
    node = await nodes.start()
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    taken = await ann.sent(conv, "first")
    await node.db.command(
        "collMod", "messages", validator={"body": {"$ne": "poison"}}, validationLevel="strict"
    )
    ids = [new_id() for _ in range(3)]
    bodies = ["fine", "poison", "fine, too"]
    operations = [
        {"t": "send", "id": message, "conv": conv, "kind": "text", "body": body}
        for message, body in zip(ids, bodies, strict=True)
    ]
    operations.append({"t": "send", "id": taken["id"], "conv": conv, "kind": "text", "body": "first"})
    await ann.put(*operations)
    found: dict[str, list[dict[str, Any]]] = {}
    for frame in [*await arriving(ann, "stored", 0.7), *await arriving(ann, "error", 0.2)]:
        found.setdefault(frame["id"], []).append(frame)
    assert [frame["t"] for frame in found[ids[0]]] == ["stored"]
    assert [frame["t"] for frame in found[ids[2]]] == ["stored"]
    assert [(frame["t"], frame.get("code"), frame.get("retry")) for frame in found[ids[1]]] == [
        ("error", "bad_request", False)
    ]
    assert [frame["seq"] for frame in found[taken["id"]]] == [taken["seq"]]
    received = [await bob.expect("msg") for _ in range(3)]
    assert {message["id"] for message in received} == {taken["id"], ids[0], ids[2]}
    await bob.nothing("msg")
    await bob.ack(conv, *(message["id"] for message in received))
    await settled(node, 3)


async def test_what_stays_unknown_is_unavailable_at_the_deadline_and_a_resend_succeeds(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(send_deadline_seconds=1, commit_timeout_seconds=0.5)
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    message = new_id()
    async with failing(node, "insert", errorCode=8):
        await ann.send(conv, "hello", id=message)
        answers = await final_answers(ann, message)
    assert [(answer["t"], answer["code"], answer["retry"]) for answer in answers] == [
        ("error", "unavailable", True)
    ]
    assert await node.db.messages.count_documents({}) == 0
    stored = await ann.sent(conv, "hello", id=message, again=True)
    assert (await bob.expect("msg", id=message))["seq"] == stored["seq"]
    await bob.ack(conv, message)
    await settled(node, 1)


@pytest.mark.usefixtures("_unhurried")
async def test_what_was_written_unnoticed_and_refused_as_unavailable_is_accounted_when_it_is_sent_again(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(send_deadline_seconds=1)
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    written = await _unavailable_though_written(node, ann, conv)
    stored = await ann.sent(conv, "hello", id=written["id"], again=True)
    assert stored["seq"] == written["seq"]
    bob = await node.connect("bob")
    assert (await bob.expect("msg"))["seq"] == stored["seq"]
    await bob.ack(conv, stored["id"])
    await settled(node, 1)


@pytest.mark.usefixtures("_unhurried")
async def test_what_was_written_unnoticed_and_never_sent_again_is_delivered_and_accounted(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(send_deadline_seconds=1)
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    written = await _unavailable_though_written(node, ann, conv)
    bob = await node.connect("bob")
    assert (await bob.expect("msg"))["seq"] == written["seq"]
    await bob.ack(conv, written["id"])
    await settled(node, 1)


@pytest.mark.usefixtures("_unhurried")
async def test_a_resend_of_what_was_written_unnoticed_reaches_a_connected_device_at_once(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(send_deadline_seconds=1)
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await bob.expect("drained")
    written = await _unavailable_though_written(node, ann, conv)
    stored = await ann.sent(conv, "hello", id=written["id"], again=True)
    assert (await bob.expect("msg", 3))["seq"] == stored["seq"]


@pytest.mark.faults
async def test_nothing_is_stored_before_a_majority_has_it(mongods: Mongods, nodes: NodeFactory) -> None:
    uri = await mongods.start_set(2)
    node = await nodes.start(mongo_uri=uri, send_deadline_seconds=1.5, commit_timeout_seconds=0.4)
    async with AsyncMongoClient[dict[str, Any]](uri, tz_aware=True) as client:
        node.db = client[node.relay.settings.mongo_database]
        conv = await node.direct("ann", "bob")
        await (await node.connect("bob")).close()
        ann = await node.connect("ann")
        message = new_id()
        # One of two members stands still: written by the primary, but not by a majority.
        mongods.signal(1, signal.SIGSTOP)
        try:
            await ann.send(conv, "hello", id=message)
            answers = await final_answers(ann, message)
            assert await node.db.messages.count_documents({"id": message}) == 1, "the primary has it"
        finally:
            mongods.signal(1, signal.SIGCONT)
        assert [(answer["t"], answer.get("code"), answer.get("retry")) for answer in answers] == [
            ("error", "unavailable", True)
        ]
        stored = await ann.sent(conv, "hello", id=message, again=True)
        documents = [document async for document in node.db.messages.find({"id": message})]
        assert [document["seq"] for document in documents] == [stored["seq"]]
        bob = await node.connect("bob")
        assert (await bob.expect("msg"))["seq"] == stored["seq"]
        await bob.ack(conv, message)
        assert not await node.db.messages.count_documents({})
        await nodes.stop(node)


@pytest.mark.usefixtures("_unhurried")
async def test_a_message_acknowledged_by_one_device_before_its_outcome_is_known_is_accounted_in_full(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(send_deadline_seconds=8)
    conv = await node.group("ann", ["bob", "cleo"])
    for name in ("bob", "cleo"):
        await (await node.connect(name)).close()
    ann = await node.connect("ann")
    message = new_id()
    await _written_but_unanswered(node, ann, conv, message)
    async with failing(node, "insert", errorCode=8):
        bob = await node.connect("bob")
        assert (await bob.expect("msg"))["id"] == message
        await bob.ack(conv, message)
    answers = await final_answers(ann, message)
    assert [answer["t"] for answer in answers] == ["stored"]
    cleo = await node.connect("cleo")
    assert (await cleo.expect("msg"))["seq"] == answers[0]["seq"]
    await cleo.ack(conv, message)
    await settled(node, 2)


@pytest.mark.usefixtures("_unhurried")
async def test_a_message_acknowledged_and_gone_before_its_outcome_is_known_is_stored_and_accounted(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(send_deadline_seconds=8)
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    message = new_id()
    await _written_but_unanswered(node, ann, conv, message)
    async with failing(node, "insert", errorCode=8):
        bob = await node.connect("bob")
        held = await bob.expect("msg", id=message)
        await bob.ack(conv, message)
    answers = await final_answers(ann, message)
    assert [(answer["t"], answer["seq"]) for answer in answers] == [("stored", held["seq"])]
    await bob.nothing("msg")
    await settled(node, 1)


async def _written_but_unanswered(node: Node, sender: WireDevice, conv: str, message: str) -> None:
    """Sends a message that is written, but whose first attempt ends in a majority time-out."""
    async with failing(node, "insert", writeConcernError=MAJORITY_TIMEOUT, times=1):
        await sender.send(conv, "hello", id=message)
        async with asyncio.timeout(3):
            while not await node.db.messages.find_one({"id": message}, {"_id": 1}):
                await asyncio.sleep(0)


async def _unavailable_though_written(node: Node, sender: WireDevice, conv: str) -> dict[str, Any]:
    """A message that is in the store although its sender heard ``unavailable``; its document."""
    message = new_id()
    await _written_but_unanswered(node, sender, conv, message)
    async with failing(node, "insert", errorCode=8):
        answers = await final_answers(sender, message)
    assert [(answer["t"], answer.get("code")) for answer in answers] == [("error", "unavailable")]
    found: dict[str, Any] = await node.db.messages.find_one({"id": message})
    return found
