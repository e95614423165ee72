"""Processes that die or stop in the middle of work: nothing stored is lost, nothing is stored twice."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.faults.conftest import Processes
from tests.support.frozen import freeze
from tests.support.load import Load
from tests.support.node import NodeFactory
from tests.support.process import ledger_of, running
from tests.support.waiting import until


async def test_after_kill_9_of_the_relay_under_load_everything_stored_arrives_once_settled(
    processes: Processes,
) -> None:
    relay = processes()
    await relay.start()
    load = Load(relay)
    await load.start()
    for _ in range(2):
        await load.stored_since(len(load.stored) + 400, 10)
        left = relay.mongod_pid
        await relay.kill()
        await relay.start()
        assert relay.mongod_pid == left, "the mongod that was left over is taken over"
    assert "took over the MongoDB" in relay.said()
    await load.stored_since(len(load.stored) + 200, 10)
    await load.settle()
    print(await load.verify())
    assert load.reconnections >= 12


async def test_a_resend_is_answered_with_the_first_seq_across_kill_9(processes: Processes) -> None:
    relay = processes()
    await relay.start()
    conv = await relay.direct("ann", "bob")
    ann, bob = await relay.connect("ann"), await relay.connect("bob")
    delivered = await ann.sent(conv, "delivered")
    await bob.expect("msg", id=delivered["id"])
    await bob.ack(conv, delivered["id"])
    await bob.close()
    waiting = await ann.sent(conv, "waiting")
    await relay.kill()
    await relay.start()
    ann = await relay.connect("ann")
    for first in (waiting, delivered):
        answer = await ann.sent(conv, first["id"], id=first["id"], again=True)
        assert (answer["seq"], answer["at"]) == (first["seq"], first["at"])
    bob = await relay.connect("bob")
    assert (await bob.expect("msg"))["id"] == waiting["id"]
    await bob.ack(conv, waiting["id"])
    assert (await bob.expect("drained"))["count"] == 1
    await bob.nothing("msg")
    ledger = await ledger_of(relay)
    assert (ledger["accepted"], ledger["acknowledged"], ledger["waiting"]) == (1, 1, 0)


@pytest.mark.faults
async def test_after_kill_9_of_mongod_under_load_the_relay_goes_on_by_itself(processes: Processes) -> None:
    relay = processes()
    await relay.start()
    load = Load(relay)
    await load.start()
    for _ in range(2):
        await load.stored_since(len(load.stored) + 400, 15)
        killed = relay.note_mongod()
        os.kill(killed, signal.SIGKILL)

        async def replaced(pid: int = killed) -> bool:
            return relay.mongod_pid != pid and running(relay.mongod_pid)

        await until(replaced, 15, "the relay has started another mongod")
        await load.stored_since(len(load.stored), 15)
    relay.note_mongod()
    await load.settle()
    print(await load.verify())


@pytest.mark.faults
async def test_a_mongod_that_stands_still_for_5_s_under_load_costs_time_only(processes: Processes) -> None:
    relay = processes()
    await relay.start()
    load = Load(relay)
    await load.start()
    await load.stored_since(400, 10)
    freeze(relay.mongod_pid)
    try:
        await asyncio.sleep(0.3)
        before = len(load.stored)
        await asyncio.sleep(4.7)
        assert len(load.stored) == before, "nothing can be durable while mongod stands still"
    finally:
        os.kill(relay.mongod_pid, signal.SIGCONT)
    await load.stored_since(before + 200, 15)
    await load.settle()
    print(await load.verify())


async def test_a_step_down_of_the_primary_under_load_costs_time_only(nodes: NodeFactory) -> None:
    node = await nodes.start()
    load = Load(node, pairs=4)
    await load.start()
    for _ in range(2):
        await load.stored_since(len(load.stored) + 200, 10)
        await node.db.client.admin.command(
            {"replSetStepDown": 1, "force": True, "secondaryCatchUpPeriodSecs": 0}
        )
    await load.stored_since(len(load.stored) + 100, 15)
    await load.settle()
    print(await load.verify())
