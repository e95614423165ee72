"""A store that hangs: not gone, only silent. Senders are told in time, and the process can still be stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from relay.store.embedded import EmbeddedMongo
from tests.faults.conftest import Processes
from tests.faults.test_commit_outcomes import final_answers
from tests.support.device import new_id
from tests.support.failpoints import failing
from tests.support.frozen import freeze
from tests.support.node import NodeFactory
from tests.support.process import Mongods


@pytest.mark.parametrize("again", [False, True], ids=["first attempt", "sent again"])
async def test_a_sender_hears_unavailable_at_the_deadline_while_mongod_stands_still(
    mongod: EmbeddedMongo, nodes: NodeFactory, again: bool
) -> None:
    node = await nodes.start(send_deadline_seconds=0.6, commit_timeout_seconds=0.3)
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await ann.sent(conv, "before")
    message = new_id()
    assert mongod.pid is not None
    freeze(mongod.pid)
    try:
        await ann.send(conv, "hello", id=message, again=again)
        answers = await final_answers(ann, message, first=2.3, more=0.1)
    finally:
        os.kill(mongod.pid, signal.SIGCONT)
    assert [(answer["t"], answer.get("code")) for answer in answers] == [("error", "unavailable")]
    stored = await ann.sent(conv, "hello", id=message, again=True)
    assert (await bob.expect("msg", 10, id=message))["seq"] == stored["seq"]


@pytest.mark.parametrize("collection", ["fates", "memberships", "devices"])
async def test_a_look_up_that_hangs_does_not_hold_a_sender_beyond_the_deadline(
    nodes: NodeFactory, collection: str
) -> None:
    node = await nodes.start(send_deadline_seconds=0.6, commit_timeout_seconds=0.3)
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await ann.sent(conv, "before")
    node.relay.context.audiences.changed(conversation=conv)
    command = "aggregate" if collection == "fates" else "find"
    message = new_id()
    async with failing(node, command, collection, blockConnection=True, blockTimeMS=2500):
        await ann.send(conv, "hello", id=message, again=True)
        started = time.monotonic()
        answers = await final_answers(ann, message, first=2.3, more=0.1)
        took = time.monotonic() - started
    assert [(answer["t"], answer.get("code")) for answer in answers] == [("error", "unavailable")], (
        f"after {took:.1f} s"
    )


async def test_an_acknowledgement_hears_unavailable_at_the_deadline_while_mongod_stands_still(
    mongod: EmbeddedMongo, nodes: NodeFactory
) -> None:
    node = await nodes.start(send_deadline_seconds=0.6, commit_timeout_seconds=0.3)
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    stored = await ann.sent(conv)
    await bob.expect("msg")
    assert mongod.pid is not None
    freeze(mongod.pid)
    try:
        await bob.put({"t": "ack", "conv": conv, "ids": [stored["id"]], "ref": "mine"})
        assert (await bob.expect("error", 4, ref="mine"))["code"] == "unavailable"
    finally:
        os.kill(mongod.pid, signal.SIGCONT)
    await bob.expect("msg", 10, id=stored["id"])
    await bob.ack(conv, stored["id"])


@pytest.mark.faults
async def test_sigterm_ends_the_relay_while_its_mongodb_stands_still(
    mongods: Mongods, processes: Processes
) -> None:
    uri = await mongods.start_set(1)
    relay = processes(mongo_uri=uri)
    await relay.start()
    conv = await relay.direct("ann", "bob")
    ann = await relay.connect("ann")
    await ann.sent(conv, "before")
    mongods.signal(0, signal.SIGSTOP)
    try:
        message = await ann.send(conv, "in doubt")
        await asyncio.sleep(0.3)
        asked = time.monotonic()
        relay.signal(signal.SIGTERM)
        answers = await final_answers(ann, message, first=8, more=0.1)
        code = await relay.wait(25)
        took = time.monotonic() - asked
    finally:
        mongods.signal(0, signal.SIGCONT)
    assert code == 0
    assert took < 10, f"it took {took:.1f} s"
    assert [(answer["t"], answer.get("code")) for answer in answers] == [("error", "unavailable")]
