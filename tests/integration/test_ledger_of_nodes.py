"""The books of several nodes: whoever accepts, acknowledges, comes, leaves or dies, their sum is what waits in the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from models.housekeeping import Balance, Setting
from relay import app
from relay.jobs.books import BookKeeper
from relay.jobs.recount import Recount
from relay.store.balances import Balances, Pace
from relay.store.ledger import OUTCOMES, Ledger
from relay.store.place import runs, this_place
from tests.support.failpoints import failing
from tests.support.node import Node, NodeFactory
from tests.support.store import TTL_SECONDS, Store
from tests.support.waiting import until

# Long enough that a busy machine takes nobody for dead who is not.
PATIENT = Pace(beat=0.1, alive=20)
HASTY = Pace(beat=0.05, alive=1)


def booked(*nodes: Node) -> int:
    return sum(node.relay.context.ledger.waiting for node in nodes)


def counters(ledger: Ledger) -> dict[str, int]:
    return {name: ledger.count(name) for name in OUTCOMES}


async def waiting(node: Node) -> int:
    return sum([len(found["awaiting"]) async for found in node.db.messages.find({}, {"awaiting": 1})])


async def balanced(*nodes: Node, seconds: float = 10) -> None:
    """The sum of the books becomes what waits."""

    async def holds() -> bool:
        return booked(*nodes) == await waiting(nodes[0])

    await until(holds, seconds, "the books balance")


# -- whole nodes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_PACE", PATIENT)


@pytest.mark.usefixtures("fast")
async def test_what_one_node_accepts_and_another_acknowledges_is_balanced_by_their_sum(
    nodes: NodeFactory,
) -> None:
    one, other = await nodes.start(), await nodes.start()
    ann, bob = await one.connect("ann"), await other.connect("bob")
    conv = await one.direct("ann", "bob")
    sent = [await ann.sent(conv, str(n)) for n in range(3)]
    await bob.ack(conv, sent[0]["id"], sent[1]["id"])
    assert (booked(one), booked(other)) == (3, -2)
    assert booked(one, other) == await waiting(one) == 1


@pytest.mark.usefixtures("fast")
async def test_a_node_that_joins_while_messages_wait_counts_none_of_them_again(nodes: NodeFactory) -> None:
    one = await nodes.start()
    conv = await one.group("ann", ["bob", "cleo"])
    for name in ("bob", "cleo"):
        await (await one.connect(name)).close()
    ann = await one.connect("ann")
    for n in range(4):
        await ann.sent(conv, str(n))
    other = await nodes.start()
    assert (booked(one), booked(other)) == (8, 0)
    assert booked(one, other) == await waiting(one)


@pytest.mark.usefixtures("fast")
async def test_nodes_that_start_at_once_count_what_waits_once(nodes: NodeFactory) -> None:
    first = await nodes.start()
    conv = await first.direct("ann", "bob")
    ann = await first.connect("ann")
    await (await first.connect("bob")).close()
    for n in range(5):
        await ann.sent(conv, str(n))
    await nodes.stop(first)
    several = await asyncio.gather(*(nodes.start() for _ in range(3)))
    assert sorted(booked(node) for node in several) == [0, 0, 5]


@pytest.mark.usefixtures("fast")
async def test_books_that_their_node_mistrusts_are_recounted(nodes: NodeFactory) -> None:
    one, other = await nodes.start(), await nodes.start()
    conv = await one.direct("ann", "bob")
    await (await one.connect("bob")).close()
    await (await one.connect("ann")).sent(conv)
    wrong = other.relay.context.ledger
    wrong.add("acknowledged", 1)
    assert (booked(one, other), await waiting(one)) == (0, 1)
    wrong.mistrusted = True
    await balanced(one, other)
    assert not wrong.mistrusted


@pytest.mark.usefixtures("fast")
async def test_a_rolling_restart_keeps_the_sum(nodes: NodeFactory) -> None:
    living = [await nodes.start(), await nodes.start()]
    conv = await living[0].direct("ann", "bob")
    await (await living[0].connect("bob")).close()
    for turn in range(4):
        old, staying = living
        ann = await old.connect("ann")
        for n in range(3):
            await ann.sent(conv, f"{turn} {n}")
        bob = await staying.connect("bob")
        await bob.ack(conv, (await bob.expect("msg"))["id"])
        await bob.close()
        before = counters(staying.relay.context.ledger)
        await nodes.stop(old)
        await balanced(staying)
        after = counters(staying.relay.context.ledger)
        assert all(after[name] >= before[name] for name in before), "a counter went down"
        living = [staying, await nodes.start()]
        assert booked(*living) == await waiting(staying) == 2 * (turn + 1)
    assert await Setting.get_motor_collection().find_one({"_id": "ledger recount"}) is None


@pytest.mark.usefixtures("fast")
async def test_the_last_node_of_all_leaves_nothing_that_the_next_first_one_counts(nodes: NodeFactory) -> None:
    one, other = await nodes.start(), await nodes.start()
    conv = await one.direct("ann", "bob")
    await (await one.connect("bob")).close()
    await (await one.connect("ann")).sent(conv)
    await nodes.stop(one)
    await nodes.stop(other)
    again = await nodes.start()
    assert booked(again) == 1
    assert await Balance.get_motor_collection().count_documents({}) == 1
    await asyncio.sleep(5 * PATIENT.beat)
    assert booked(again) == 1


async def test_while_an_outcome_is_not_known_nothing_is_settled(nodes: NodeFactory) -> None:
    node = await nodes.start()
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    first = await ann.sent(conv)
    sends, endings = node.relay.context.sends, node.relay.context.endings
    assert sends.settled and endings.settled
    slow: dict[str, Any] = {"blockConnection": True, "blockTimeMS": 700, "times": 1}
    async with failing(node, "insert", **slow):
        await ann.send(conv, "slow")
        await until(lambda: _is(not sends.settled), 5, "it is being committed")
        await ann.expect("stored")
        await until(lambda: _is(sends.settled), 5, "it is committed")
    async with failing(node, "insert", "fates", **slow):
        await bob.ack(conv, first["id"], durable=False)
        await until(lambda: _is(not endings.settled), 5, "it is being ended")
        await until(lambda: _is(endings.settled), 5, "it has ended")


async def _is(value: bool) -> bool:
    return value


# -- the books alone ---------------------------------------------------------------------------------------------------------


class Member:
    """A node's books, of which a test runs every beat."""

    def __init__(self, store: Store, pace: Pace) -> None:
        self.ledger = Ledger()
        self.settled = True
        self.balances = Balances(pace)
        self.keeper = BookKeeper(
            self.ledger, store.messages, store.shards, self.balances, settled=lambda: self.settled
        )
        self.recount = Recount(
            self.ledger, store.messages, store.shards, self.balances, own=lambda: self.keeper.id
        )


class Cluster:
    """Members on one database. ``lost`` is what was stored, or ended, and booked by nobody."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._number = 0

    async def member(self, pace: Pace = HASTY) -> Member:
        found = Member(self.store, pace)
        await found.keeper.open()
        return found

    async def wait(self, deliveries: int) -> None:
        """So many deliveries wait in the store from now on."""
        self._number += 1
        keys = [f"u{n}/phone" for n in range(deliveries)]
        row = {"_id": f"c {self._number}", "conversationId": "c", "seq": self._number, "awaiting": keys}
        await self.store.mongo.messages.insert_one(row)

    async def beat(self, *members: Member) -> None:
        """Every member beats until another that does not is taken for dead."""
        ends = time.monotonic() + 2.5 * HASTY.alive
        while time.monotonic() < ends:
            for one in members:
                await one.keeper.run()
            await asyncio.sleep(HASTY.beat)

    async def until(self, holds: Callable[[], bool], *members: Member, seconds: float = 20) -> None:
        """All members beat, and look for recounts, until this holds."""
        running = [asyncio.create_task(_repeat(one.keeper.run)) for one in members]
        running += [asyncio.create_task(_repeat(one.recount.run)) for one in members]

        async def asked() -> bool:
            for task in running:
                if task.done():
                    task.result()
            return holds()

        try:
            await until(asked, seconds, "it holds")
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _repeat(run: Callable[[], Any]) -> None:
    while True:
        await run()
        await asyncio.sleep(HASTY.beat)


def total(*members: Member) -> int:
    return sum(one.ledger.waiting for one in members)


async def is_due() -> bool:
    return await Setting.get_motor_collection().find_one({"_id": "ledger recount"}) is not None


async def accounts() -> int:
    return int(await Balance.get_motor_collection().count_documents({}))


@pytest.fixture
async def cluster(nodes: NodeFactory) -> AsyncIterator[Cluster]:
    store = Store(nodes.uri, nodes.database)
    await store.mongo.prepare(TTL_SECONDS, 72 * 3600)
    yield Cluster(store)
    store.mongo.close()


async def test_the_books_of_a_node_that_vanished_are_carried_on_and_corrected_when_it_is_quiet(
    cluster: Cluster,
) -> None:
    one, other = await cluster.member(), await cluster.member()
    other.ledger.add("accepted", 7)
    await cluster.wait(7)
    await other.keeper.run()
    other.ledger.add("acknowledged", 2)  # never published, nor deleted in the store: the store holds seven
    before = counters(one.ledger)
    await cluster.beat(one)
    assert one.ledger.waiting == 7 and await is_due()
    await cluster.wait(4)  # accepted by the dead node, and counted by nobody
    await cluster.until(lambda: one.ledger.waiting == 11, one)
    assert all(one.ledger.count(name) >= before[name] for name in OUTCOMES)
    assert one.ledger.count("accepted") == 11


async def test_less_in_the_store_than_in_the_books_was_acknowledged(cluster: Cluster) -> None:
    one, other = await cluster.member(), await cluster.member()
    other.ledger.add("accepted", 5)
    await other.keeper.run()
    await cluster.wait(2)  # three were acknowledged through the node that died, and counted by nobody
    await cluster.beat(one)
    await cluster.until(lambda: one.ledger.waiting == 2, one)
    assert (one.ledger.count("accepted"), one.ledger.count("acknowledged")) == (5, 3)


async def test_of_many_survivors_one_carries_on_and_one_corrects(cluster: Cluster) -> None:
    many = [await cluster.member() for _ in range(4)]
    dead = await cluster.member()
    dead.ledger.add("accepted", 6)
    await dead.keeper.run()
    await cluster.wait(10)
    many[1].ledger.add("acknowledged", 1)
    await cluster.until(lambda: total(*many) == 10, *many, seconds=30)
    assert sum(one.ledger.count("accepted") for one in many) == 11
    await asyncio.gather(*(one.keeper.run() for one in many))
    assert total(*many) == 10 and await accounts() == 4


async def test_books_that_were_handed_over_are_taken_once_by_whoever_comes_first(cluster: Cluster) -> None:
    many = [await cluster.member() for _ in range(4)]
    for leaving in range(3):
        for _ in range(2):
            many[leaving].ledger.add("accepted", 3)
        many[leaving].ledger.add("expired", 1)
        await many[leaving].keeper.leave()
        staying = many[leaving + 1 :]
        await asyncio.gather(*(one.keeper.run() for one in staying))
        await asyncio.gather(*(one.keeper.run() for one in staying))
        assert total(*staying) == 5 * (leaving + 1)
        assert await accounts() == len(staying)
    assert not await is_due()


async def test_a_taker_that_dies_before_it_books_leaves_it_to_another_and_a_recount_is_due(
    cluster: Cluster,
) -> None:
    one, taker, gone = [await cluster.member() for _ in range(3)]
    gone.ledger.add("accepted", 9)
    await gone.keeper.leave()
    (left,) = [found for found in await one.balances.all() if found.left]
    assert await taker.balances.claim(left, taker.keeper.id) is not None
    await one.keeper.run()
    assert one.ledger.waiting == 0, "the taker may be at it"
    await cluster.beat(one)
    assert one.ledger.waiting == 9 and await is_due() and await accounts() == 1


async def test_a_taker_that_dies_when_it_has_published_is_not_counted_twice(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, taker, gone = [await cluster.member() for _ in range(3)]
    gone.ledger.add("accepted", 9)
    await gone.keeper.leave()

    async def dies(accounts: Any) -> None:
        if accounts:
            raise ConnectionError

    monkeypatch.setattr(taker.balances, "forget", dies)
    with pytest.raises(ConnectionError):
        await taker.keeper.run()
    assert taker.ledger.waiting == 9 and await accounts() == 3
    await cluster.beat(one)
    assert one.ledger.waiting == 9 and await is_due() and await accounts() == 1


async def test_a_taker_that_leaves_when_it_has_published_is_not_counted_twice(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, taker, gone = [await cluster.member() for _ in range(3)]
    gone.ledger.add("acknowledged", 9)
    await gone.keeper.leave()

    async def too_late(accounts: Any) -> None:
        if accounts:
            raise ConnectionError

    monkeypatch.setattr(taker.balances, "forget", too_late)
    with pytest.raises(ConnectionError):
        await taker.keeper.run()
    await taker.keeper.leave()
    await one.keeper.run()
    await one.keeper.run()
    assert one.ledger.waiting == -9 and await accounts() == 1 and not await is_due()


async def test_a_node_that_was_taken_for_dead_and_comes_back_is_not_counted_twice(cluster: Cluster) -> None:
    one, stopped = await cluster.member(), await cluster.member()
    stopped.ledger.add("accepted", 5)
    await stopped.keeper.run()
    stopped.ledger.add("accepted", 2)
    await cluster.beat(one)
    assert one.ledger.waiting == 5
    await stopped.keeper.run()
    assert total(one, stopped) == 7 and await is_due() and await accounts() == 2
    await stopped.keeper.run()
    await stopped.keeper.leave()
    await one.keeper.run()
    assert one.ledger.waiting == 7 and await accounts() == 1


async def test_after_an_outage_nobody_is_taken_for_dead_who_lives(cluster: Cluster) -> None:
    many = [await cluster.member() for _ in range(3)]
    await cluster.beat(*many)
    await asyncio.sleep(2 * HASTY.alive)
    names = [one.keeper.id for one in many]
    for one in many:
        await one.keeper.run()
    await cluster.beat(*many)
    assert [one.keeper.id for one in many] == names and not await is_due()


async def test_a_recount_waits_for_quiet_and_reads_no_message_before(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await cluster.member(PATIENT), await cluster.member(PATIENT)
    counts = 0
    counting = cluster.store.messages.count_waiting

    async def counted(**options: Any) -> int:
        nonlocal counts
        counts += 1
        return await counting(**options)

    monkeypatch.setattr(cluster.store.messages, "count_waiting", counted)
    await one.balances.note_recount()
    await cluster.wait(3)
    for _ in range(20):
        other.ledger.add("accepted", 1)
        other.ledger.add("acknowledged", 1)
        for member in (one, other):
            await member.keeper.run()
            await member.recount.run()
    other.settled = False
    for _ in range(20):
        for member in (one, other):
            await member.keeper.run()
            await member.recount.run()
    assert counts == 0 and total(one, other) == 0 and await is_due()
    other.settled = True
    await cluster.until(lambda: total(one, other) == 3, one, other)
    assert counts == 1
    await cluster.until(lambda: True, one, other)
    assert total(one, other) == 3


async def test_what_moves_while_a_recount_counts_corrects_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await cluster.member(PATIENT), await cluster.member(PATIENT)
    counting = cluster.store.messages.count_waiting
    tries = 0

    async def moving(**options: Any) -> int:
        nonlocal tries
        tries += 1
        if tries < 3:
            # Stored and booked while the messages are being read: the books say so at their next beat.
            await cluster.wait(1)
            found = await counting(**options)
            other.ledger.add("accepted", 1)
            return found
        return await counting(**options)

    monkeypatch.setattr(cluster.store.messages, "count_waiting", moving)
    await one.balances.note_recount()

    await cluster.until(lambda: tries == 3, one, other)
    await cluster.until(lambda: True, one, other)
    assert total(one, other) == 2 == other.ledger.count("accepted")


async def test_while_a_shard_is_down_nothing_is_recounted(cluster: Cluster) -> None:
    one = await cluster.member(PATIENT)
    await one.balances.note_recount()
    await cluster.wait(2)
    cluster.store.shards.down = frozenset({"elsewhere"})
    for _ in range(10):
        await one.keeper.run()
        await one.recount.run()
    assert one.ledger.waiting == 0 and await is_due()
    cluster.store.shards.down = frozenset()
    await cluster.until(lambda: one.ledger.waiting == 2, one)


async def test_a_first_node_that_starts_while_a_shard_is_down_recounts_later(cluster: Cluster) -> None:
    cluster.store.shards.down = frozenset({"elsewhere"})
    one = await cluster.member(PATIENT)
    assert await is_due()
    await cluster.wait(2)
    cluster.store.shards.down = frozenset()
    await cluster.until(lambda: one.ledger.waiting == 2, one)


async def test_of_a_node_that_died_while_it_opened_another_takes_the_turn(cluster: Cluster) -> None:
    patient = Balances(PATIENT)
    # A process of this machine that does not exist.
    patient.place = f"{this_place().split()[0]} {2**22 + 1} 1"
    await patient.take_turn("who died")
    await cluster.wait(3)
    began = time.monotonic()
    first = await cluster.member(PATIENT)
    assert first.ledger.waiting == 3 and time.monotonic() - began < PATIENT.alive / 2
    elsewhere = Balances(HASTY)
    elsewhere.place = "another machine 1 1"
    await elsewhere.take_turn("who died there")
    beating = asyncio.create_task(_repeat(first.keeper.run))
    try:
        assert (await cluster.member(HASTY)).ledger.waiting == 0
    finally:
        beating.cancel()


async def test_a_turn_that_nobody_ends_keeps_no_recount_from_being_done(cluster: Cluster) -> None:
    one = await cluster.member()
    await cluster.wait(2)
    await one.balances.take_turn("who died")
    await one.balances.note_recount()
    await cluster.until(lambda: one.ledger.waiting == 2, one)


async def test_a_node_that_was_killed_a_moment_ago_is_no_company(cluster: Cluster) -> None:
    """Started again on its machine it opens at once with all that waits; on another, when the former does not beat."""
    dead = await cluster.member(PATIENT)
    await cluster.wait(3)
    rows = Balance.get_motor_collection()
    await rows.update_one({"_id": dead.keeper.id}, {"$set": {"place": f"{dead.balances.place}0"}})
    again = await cluster.member(PATIENT)
    assert again.ledger.waiting == 3 and await accounts() == 1
    await rows.update_one({"_id": again.keeper.id}, {"$set": {"place": "another machine"}})
    third = await cluster.member(PATIENT)
    assert third.ledger.waiting == 3 and await accounts() == 1
    await rows.update_one({"_id": third.keeper.id}, {"$set": {"place": "another machine"}})
    beating = asyncio.create_task(_repeat(third.keeper.run))
    try:
        assert (await cluster.member(PATIENT)).ledger.waiting == 0
    finally:
        beating.cancel()


async def test_a_place_tells_whether_its_process_runs() -> None:
    place = this_place()
    machine, pid, begun = place.split()
    assert runs(place) is True
    assert runs(f"{machine} {pid} {int(begun) + 1}") is False
    assert runs(f"{machine} {2**22 + 1} {begun}") is False
    assert runs(f"elsewhere {pid} {begun}") is None
    assert runs("") is None and runs(machine) is None
    child = await asyncio.create_subprocess_exec("true")
    await child.wait()
    assert runs(f"{machine} {child.pid} 1") is False
