"""Delivery to one connection: window, live and behind, redelivery, and the honest ``drained``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.wire.envelope import Envelope
from tests.support.backlog import LocalConnection, MemoryBacklog, message, turns

Connect = Callable[..., LocalConnection]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        def make(backlog: MemoryBacklog, **options: Any) -> LocalConnection:
            found = LocalConnection(backlog, **options)
            stack.push_async_callback(found.close)
            found.delivery.start()
            return found

        yield make


async def until(condition: Callable[[], bool], seconds: float = 3) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def commit(backlog: MemoryBacklog, bob: LocalConnection, envelope: Envelope) -> None:
    """Stores a live message and hands it to the connection, as the router does."""
    backlog.add(envelope)
    bob.delivery.push(envelope)


def settle(backlog: MemoryBacklog, bob: LocalConnection, *numbers: int) -> None:
    """The acknowledgements of these messages have become durable."""
    for number in numbers:
        doc_id = message(number).doc_id
        backlog.remove(doc_id)
        bob.delivery.release(doc_id)


async def test_nothing_waiting_is_told_at_once_and_the_connection_is_live(connect: Connect) -> None:
    bob = connect(MemoryBacklog())
    await turns()
    assert bob.operations == [{"t": "drained", "count": 0}]
    assert bob.drained == 1
    assert not bob.delivery.behind
    assert bob.behind == 0


async def test_what_waits_is_delivered_in_order_and_then_live_messages(connect: Connect) -> None:
    backlog = MemoryBacklog(message(3), message(1), message(2, "bob/*"), message(9, "cleo/phone"))
    bob = connect(backlog)
    await turns()
    assert bob.bodies() == [1, 2, 3]
    assert not bob.delivery.behind
    queries = backlog.queries
    commit(backlog, bob, message(4))
    await turns()
    assert bob.bodies() == [1, 2, 3, 4]
    assert backlog.queries == queries


async def test_drained_comes_when_the_last_acknowledgement_is_durable(connect: Connect) -> None:
    backlog = MemoryBacklog(*(message(number) for number in range(1, 4)))
    bob = connect(backlog)
    await turns()
    settle(backlog, bob, 1, 3)
    await turns()
    assert bob.got("drained") == []
    settle(backlog, bob, 2)
    await turns()
    assert bob.got("drained") == [{"t": "drained", "count": 3}]
    assert bob.drained == 1


async def test_drained_is_told_once(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1))
    bob = connect(backlog)
    await turns()
    settle(backlog, bob, 1)
    for number in (2, 3):
        commit(backlog, bob, message(number))
        await turns()
        settle(backlog, bob, number)
        bob.delivery.fall_behind()
        await turns()
    assert bob.got("drained") == [{"t": "drained", "count": 1}]
    assert bob.drained == 1


async def test_drained_is_told_under_steady_traffic_and_counts_only_what_waited(connect: Connect) -> None:
    backlog = MemoryBacklog(*(message(number) for number in range(1, 21)))
    bob = connect(backlog, window=8)
    await turns()
    latest = 20
    seen = 0

    async def step() -> None:
        nonlocal latest, seen
        # For every acknowledged message two new ones come: the connection never catches up.
        for _ in range(2):
            latest += 1
            commit(backlog, bob, message(latest))
        await asyncio.sleep(0)
        fresh = bob.bodies()[seen:]
        seen += len(fresh)
        settle(backlog, bob, *fresh)

    async with asyncio.timeout(3):
        while not bob.drained:
            await step()
            await asyncio.sleep(0.001)
    assert not any(message(number).doc_id in backlog.stored for number in range(1, 21))
    await turns()
    assert bob.got("drained") == [{"t": "drained", "count": 20}]
    assert backlog.stored


async def test_drained_does_not_wait_for_messages_that_vanished_before_they_were_read(
    connect: Connect,
) -> None:
    backlog = MemoryBacklog(message(1), message(2))
    bob = connect(backlog, window=1)
    await turns()
    assert bob.bodies() == [1]
    backlog.remove(message(2).doc_id)
    settle(backlog, bob, 1)
    await until(lambda: bool(bob.got("drained")))
    assert bob.got("drained") == [{"t": "drained", "count": 1}]


async def test_what_waits_is_asked_for_once_when_one_page_holds_it(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1), message(2))
    connect(backlog)
    await turns()
    assert (backlog.queries, backlog.marks) == (1, 0)
    connect(backlog, window=1)
    await turns()
    assert backlog.marks == 1


async def test_drained_does_not_wait_for_messages_that_vanished_in_flight(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1), message(2))
    bob = connect(backlog)
    await turns()
    settle(backlog, bob, 1)
    # Expired, withdrawn, or acknowledged by another path: the settlement releases it all the same.
    settle(backlog, bob, 2)
    await turns()
    assert bob.drained == 1


async def test_a_message_that_came_while_the_backlog_was_read_does_not_count_as_waiting(
    connect: Connect,
) -> None:
    backlog = MemoryBacklog(message(1))
    bob = connect(backlog)
    await turns(1)
    commit(backlog, bob, message(2))
    await until(lambda: bob.bodies() == [1, 2])
    settle(backlog, bob, 1)
    await turns()
    assert bob.got("drained") == [{"t": "drained", "count": 1}]


async def test_the_window_bounds_the_messages_in_flight(connect: Connect) -> None:
    backlog = MemoryBacklog(*(message(number) for number in range(1, 11)))
    bob = connect(backlog, window=4)
    await turns()
    assert bob.bodies() == [1, 2, 3, 4]
    assert bob.delivery.behind
    settle(backlog, bob, 2, 3)
    await until(lambda: bob.bodies() == [1, 2, 3, 4, 5, 6])
    assert len(bob.delivery.in_flight) == 4
    settle(backlog, bob, 1, 4, 5, 6)
    await until(lambda: bob.bodies() == list(range(1, 11)))
    assert bob.drained == 0
    settle(backlog, bob, 7, 8, 9, 10)
    await until(lambda: bob.drained == 1)


async def test_the_window_bounds_the_bytes_in_flight(connect: Connect) -> None:
    backlog = MemoryBacklog(*(message(number, size=400) for number in range(1, 6)))
    bob = connect(backlog, window_bytes=1000)
    await turns()
    assert bob.bodies() == [1, 2]
    settle(backlog, bob, 1)
    await until(lambda: bob.bodies() == [1, 2, 3])
    await turns()
    assert sum(one.size for one in bob.delivery.in_flight.values()) == 800
    settle(backlog, bob, 2, 3)
    await until(lambda: bob.bodies() == [1, 2, 3, 4, 5])


async def test_a_message_larger_than_the_window_is_delivered_alone(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1, size=400), message(2, size=5000), message(3, size=400))
    bob = connect(backlog, window_bytes=1000)
    await turns()
    assert bob.bodies() == [1]
    settle(backlog, bob, 1)
    await until(lambda: bob.bodies() == [1, 2])
    await turns()
    settle(backlog, bob, 2)
    await until(lambda: bob.bodies() == [1, 2, 3])


async def test_without_credit_a_live_message_is_fetched_later_and_not_queued(connect: Connect) -> None:
    backlog = MemoryBacklog()
    bob = connect(backlog, window=2)
    await turns()
    for number in range(1, 6):
        commit(backlog, bob, message(number))
    await turns()
    assert bob.bodies() == [1, 2]
    assert bob.delivery.behind
    assert bob.behind == 1
    settle(backlog, bob, 1, 2)
    await until(lambda: bob.bodies() == [1, 2, 3, 4])
    settle(backlog, bob, 3, 4)
    await until(lambda: bob.bodies() == [1, 2, 3, 4, 5])
    settle(backlog, bob, 5)
    await until(lambda: not bob.delivery.behind)
    assert bob.behind == 0


async def test_a_live_message_larger_than_the_credit_left_is_fetched_later(connect: Connect) -> None:
    backlog = MemoryBacklog()
    bob = connect(backlog, window_bytes=1000)
    await turns()
    commit(backlog, bob, message(1, size=600))
    commit(backlog, bob, message(2, size=600))
    await turns()
    assert bob.bodies() == [1]
    settle(backlog, bob, 1)
    await until(lambda: bob.bodies() == [1, 2])


async def test_a_slow_socket_falls_behind_instead_of_filling_memory(connect: Connect) -> None:
    backlog = MemoryBacklog()
    bob = connect(backlog, outbox_bytes=600)
    await turns()
    bob.flowing.clear()
    for number in range(1, 50):
        commit(backlog, bob, message(number))
        await asyncio.sleep(0)
    assert bob.delivery.behind
    assert bob.outbox.size < 1200
    bob.flowing.set()
    async with asyncio.timeout(3):
        while len(bob.bodies()) < 49:
            settle(backlog, bob, *bob.bodies())
            await asyncio.sleep(0.002)
    assert bob.bodies() == list(range(1, 50))


async def test_a_message_that_comes_during_the_last_query_is_not_missed(connect: Connect) -> None:
    backlog = MemoryBacklog()
    backlog.gate.clear()
    bob = connect(backlog)
    await turns()
    # The answer that nothing waits is already read; this message came after it.
    commit(backlog, bob, message(1))
    backlog.gate.set()
    await until(lambda: bob.bodies() == [1])
    backlog.gate.clear()
    bob.delivery.fall_behind()
    await turns()
    commit(backlog, bob, message(2))
    assert bob.delivery.behind
    backlog.gate.set()
    await until(lambda: bob.bodies() == [1, 2])
    await until(lambda: not bob.delivery.behind)


async def test_a_lower_seq_that_another_node_commits_late_is_delivered(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1), message(2), message(3), message(4))
    bob = connect(backlog, window=2)
    await turns()
    assert bob.bodies() == [1, 2]
    backlog.add(message(99, seq=0))
    settle(backlog, bob, 1, 2)
    await until(lambda: bob.bodies() == [1, 2, 99, 3])


async def test_a_message_is_not_delivered_again_while_it_is_in_flight(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1))
    bob = connect(backlog)
    await turns()
    bob.delivery.push(message(1))
    bob.delivery.fall_behind()
    await until(lambda: not bob.delivery.behind)
    bob.delivery.push(message(1))
    await turns()
    assert bob.bodies() == [1]


async def test_what_was_not_acknowledged_durably_comes_again_on_the_same_connection(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1), message(2))
    bob = connect(backlog)
    await turns()
    bob.delivery.redeliver([message(1).doc_id, "talk unknown"])
    await until(lambda: bob.bodies() == [1, 2, 1])
    assert bob.drained == 0
    settle(backlog, bob, 2)
    await turns()
    assert bob.drained == 0
    settle(backlog, bob, 1)
    await until(lambda: bob.drained == 1)


async def test_a_message_that_had_to_be_delivered_twice_counts_once_in_drained(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1))
    bob = connect(backlog)
    await turns()
    bob.delivery.redeliver([message(1).doc_id])
    await until(lambda: bob.bodies() == [1, 1])
    settle(backlog, bob, 1)
    await until(lambda: bob.drained == 1)
    await turns()
    assert bob.got("drained") == [{"t": "drained", "count": 1}]


async def test_drained_is_not_told_by_a_query_that_left_out_what_must_come_again(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1))
    bob = connect(backlog)
    await until(lambda: not bob.delivery.behind)
    backlog.gate.clear()
    bob.delivery.fall_behind()
    await turns()
    # The query under way leaves out message 1, which was in flight when it was asked.
    bob.delivery.redeliver([message(1).doc_id])
    backlog.gate.set()
    await until(lambda: bob.bodies() == [1, 1])
    assert bob.drained == 0
    settle(backlog, bob, 1)
    await until(lambda: bob.drained == 1)


async def test_credit_that_comes_back_by_another_path_goes_on_with_the_backlog(connect: Connect) -> None:
    backlog = MemoryBacklog(*(message(number) for number in range(1, 4)))
    bob = connect(backlog, window=1)
    await turns()
    assert bob.bodies() == [1]
    # Acknowledged over HTTP, or withdrawn: no frame of this connection says so.
    settle(backlog, bob, 1)
    await until(lambda: bob.bodies() == [1, 2])
    settle(backlog, bob, 2)
    await until(lambda: bob.bodies() == [1, 2, 3])


async def test_releasing_what_is_not_in_flight_changes_nothing(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1))
    bob = connect(backlog, window_bytes=1000)
    await turns()
    bob.delivery.release("talk unknown")
    settle(backlog, bob, 1)
    bob.delivery.release(message(1).doc_id)
    commit(backlog, bob, message(2, size=900))
    commit(backlog, bob, message(3, size=900))
    await turns()
    assert bob.bodies() == [1, 2]


async def test_only_a_message_that_nobody_else_awaits_may_be_deleted_unread(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1), message(2, "bob/phone", "ann/tablet"))
    bob = connect(backlog)
    await turns()
    sole = bob.delivery.in_flight[message(1).doc_id].sole
    assert sole is not None
    assert (sole.seq, sole.user, sole.device, sole.at) == (1, "ann", "phone", 1001)
    assert bob.delivery.in_flight[message(2).doc_id].sole is None


async def test_a_store_that_does_not_answer_is_asked_again(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1))
    backlog.failures = 2
    bob = connect(backlog)
    await until(lambda: bob.bodies() == [1])
    assert backlog.failures == 0
    settle(backlog, bob, 1)
    await until(lambda: bob.drained == 1)


async def test_while_a_part_of_the_store_is_away_the_rest_is_drained_and_drained_waits(
    connect: Connect,
) -> None:
    backlog = MemoryBacklog(message(1), message(2), message(3))
    backlog.away = {message(2).doc_id}
    bob = connect(backlog)
    await turns()
    assert bob.bodies() == [1, 3]
    settle(backlog, bob, 1, 3)
    await turns()
    assert not bob.delivery.behind, "what else is committed is pushed"
    commit(backlog, bob, message(4))
    await turns()
    assert bob.bodies() == [1, 3, 4]
    assert bob.got("drained") == []
    backlog.away = set()
    bob.delivery.complete()
    await turns()
    assert bob.bodies() == [1, 3, 4, 2]
    settle(backlog, bob, 4, 2)
    await turns()
    assert bob.got("drained") == [{"t": "drained", "count": 3}]


async def test_a_part_that_returns_while_an_incomplete_page_is_read_is_looked_at(connect: Connect) -> None:
    backlog = MemoryBacklog(message(1))
    backlog.away = {message(1).doc_id}
    backlog.gate.clear()
    bob = connect(backlog)
    await asyncio.wait_for(backlog.asked.wait(), 3)
    backlog.away = set()
    bob.delivery.complete()
    backlog.gate.set()
    await until(lambda: bob.bodies() == [1])


async def test_drained_waits_for_what_was_read_before_the_part_returned_and_must_come_again(
    connect: Connect,
) -> None:
    backlog = MemoryBacklog(message(100))
    backlog.away = {message(50).doc_id}
    bob = connect(backlog)
    await turns()
    assert bob.bodies() == [100]
    backlog.away = set()
    bob.delivery.complete()
    await turns()
    bob.delivery.redeliver([message(100).doc_id])
    await turns()
    assert bob.bodies() == [100, 100]
    assert bob.got("drained") == []
    settle(backlog, bob, 100)
    await turns()
    assert bob.got("drained") == [{"t": "drained", "count": 1}]


async def test_closing_ends_the_drain_and_forgets_what_is_in_flight(connect: Connect) -> None:
    backlog = MemoryBacklog(*(message(number) for number in range(1, 10)))
    bob = connect(backlog, window=2)
    await turns()
    assert bob.behind == 1
    await bob.delivery.close()
    assert bob.behind == 0
    assert not bob.delivery.in_flight
    queries = backlog.queries
    bob.delivery.fall_behind()
    bob.delivery.release(message(1).doc_id)
    await turns()
    assert backlog.queries == queries
    assert set(backlog.stored) == {message(number).doc_id for number in range(1, 10)}


actions = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "commit",
                "commit",
                "commit low",
                "lost hint",
                "ack",
                "ack",
                "vanish",
                "redeliver",
                "slow",
                "flow",
                "wait",
            ]
        ),
        st.integers(0, 30),
    ),
    max_size=50,
)


@settings(max_examples=60)
@given(
    waiting=st.integers(0, 12), window=st.integers(1, 6), window_bytes=st.integers(1024, 4000), todo=actions
)
async def test_every_message_arrives_within_the_window_and_drained_is_true(
    waiting: int, window: int, window_bytes: int, todo: list[tuple[str, int]]
) -> None:
    backlog = MemoryBacklog(*(message(1000 + n, size=200 + 137 * n) for n in range(waiting)))
    initial = set(backlog.stored)
    bob = LocalConnection(backlog, window=window, window_bytes=window_bytes)
    lies: list[set[str]] = []
    tell = bob._drained

    def drained() -> None:
        lies.append(initial & set(backlog.stored))
        tell()

    bob.delivery._drained = drained
    made = set(initial)
    again = 0
    number = 1000 + waiting

    def check() -> None:
        flying = bob.delivery.in_flight
        assert len(flying) <= window
        assert len(flying) == 1 or sum(one.size for one in flying.values()) <= window_bytes
        assert bob.behind == int(bob.delivery.behind)

    try:
        bob.delivery.start()
        for what, pick in todo:
            flying = list(bob.delivery.in_flight)
            chosen = flying[pick % len(flying)] if flying else None
            if what in ("commit", "commit low", "lost hint"):
                number += 1
                envelope = message(number, size=100 + pick * 50, seq=pick if what == "commit low" else None)
                made.add(envelope.doc_id)
                backlog.add(envelope)
                if what == "lost hint":
                    bob.delivery.fall_behind()
                else:
                    bob.delivery.push(envelope)
            elif what == "slow":
                backlog.gate.clear()
            elif what == "flow":
                backlog.gate.set()
            elif what == "wait":
                await turns(pick)
            elif chosen is not None and what in ("ack", "vanish"):
                backlog.remove(chosen)
                bob.delivery.release(chosen)
            elif chosen is not None:
                again += 1
                bob.delivery.redeliver([chosen])
            check()
            await asyncio.sleep(0)
            check()
        backlog.gate.set()
        async with asyncio.timeout(5):
            while backlog.stored:
                for doc_id in list(bob.delivery.in_flight):
                    backlog.remove(doc_id)
                    bob.delivery.release(doc_id)
                await asyncio.sleep(0)
                check()
            while bob.delivery.behind or not bob.drained:
                await asyncio.sleep(0)
        await turns()
        delivered = [f"talk {one['id']}" for one in bob.got("msg")]
        assert set(delivered) == made
        assert len(delivered) <= len(made) + again
        assert lies == [set()]
        assert len(bob.got("drained")) == 1
    finally:
        await bob.close()
    assert bob.behind == 0
