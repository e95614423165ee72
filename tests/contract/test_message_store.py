"""The message store below the wire, on a real mongod: group commit, reading, acknowledgements, fates, the books."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.store.documents import decode, encode
from relay.store.endings import Ack, Ending, Removal, Sole
from relay.store.ledger import Fate
from relay.store.mongo import PyMongoError
from relay.store.submissions import Stored
from relay.wire.envelope import Envelope
from relay.wire.errors import RelayError
from relay.wire.ids import device_key
from tests.support.backlog import LocalConnection
from tests.support.stand_in import StandIn
from tests.support.store import TTL_SECONDS, Store

BYTES = 1 << 20


@asynccontextmanager
async def failing(store: Store, times: int, **data: Any) -> AsyncIterator[None]:
    """The next commands of these kinds fail on the server."""
    admin = store.mongo.client.admin
    await admin.command("configureFailPoint", "failCommand", mode={"times": times}, data=data)
    try:
        yield
    finally:
        await admin.command("configureFailPoint", "failCommand", mode="off")


def code(outcome: Stored | RelayError) -> str:
    return outcome.code if isinstance(outcome, RelayError) else f"stored fresh={outcome.fresh}"


async def balance(store: Store) -> None:
    """Accepted is acknowledged, ended and what really waits in the database."""
    assert store.ledger.waiting == await store.waiting_deliveries()


async def page(store: Store, *keys: str, **options: Any) -> list[str]:
    values: dict[str, Any] = {"limit": 100, "max_bytes": BYTES, **options}
    return [one.id for one in (await store.messages.waiting(keys, store.clock.now(), **values)).envelopes]


# Commits


async def test_a_message_comes_out_of_the_store_as_it_went_in(store: Store) -> None:
    sent = store.envelope(
        ["bob/phone", "cleo/*"],
        body='{"a":1}',
        structured=True,
        reply_to="6f9619ff-8b86-4d01-b42d-00cf4fc964ff",
        media=["m1", "m2"],
        sealed={"bob/phone": "AAAA", "ann/tablet": "BBBB"},
        expires=store.clock.now() + 60_000,
    )
    plain = store.envelope(["bob/phone"], body="\0 \U0001f600 \u2028")
    await store.send(sent, plain)
    found = {
        one.id: one
        for one in (
            await store.messages.waiting(["bob/phone"], store.clock.now(), limit=9, max_bytes=BYTES)
        ).envelopes
    }
    for one in (sent, plain):
        for name in set(Envelope.__slots__) - {"_frame", "size"}:
            assert getattr(found[one.id], name) == getattr(one, name), name
        assert found[one.id].frame_for("bob/phone") == one.frame_for("bob/phone")


async def test_one_refused_document_fails_alone(store: Store) -> None:
    rule = {"$or": [{"body": {"$ne": "poison"}}]}
    await store.mongo.database.command("collMod", "messages", validator=rule)
    try:
        batch = [store.envelope(["bob/phone"], body=body) for body in ("a", "poison", "b")]
        outcomes = await store.send(*batch)
    finally:
        await store.mongo.database.command("collMod", "messages", validator={})
    assert [code(outcome) for outcome in outcomes] == [
        "stored fresh=True",
        "bad_request",
        "stored fresh=True",
    ]
    assert [one.body for one in store.committed] == ["a", "b"]
    assert await page(store, "bob/phone") == [batch[0].id, batch[2].id]
    await balance(store)


async def test_a_resend_is_answered_with_the_first_seq_while_the_message_waits(store: Store) -> None:
    first = await store.put(["bob/phone"], body="first")
    again = store.envelope(["bob/phone"], id=first.id, body="second")
    outcome = (await store.send(again))[0]
    assert outcome == Stored(first.seq, first.at, fresh=False)
    assert store.committed == [first]
    assert await store.waiting_deliveries() == 1
    await balance(store)


async def test_a_resend_in_the_same_group_is_stored_once(store: Store) -> None:
    first = store.envelope(["bob/phone"])
    second = store.envelope(["bob/phone"], id=first.id)
    outcomes = await store.send(first, second)
    assert [outcome.seq for outcome in outcomes if isinstance(outcome, Stored)] == [first.seq, first.seq]
    assert [code(outcome) for outcome in outcomes] == ["stored fresh=True", "stored fresh=False"]
    await balance(store)


@pytest.mark.parametrize("other", [{"user": "bob"}, {"device": "tablet"}])
async def test_an_id_of_somebody_elses_message_is_a_conflict(store: Store, other: dict[str, Any]) -> None:
    first = await store.put(["cleo/phone"])
    assert code((await store.send(store.envelope(["cleo/phone"], id=first.id, **other)))[0]) == "id_conflict"
    await store.ack("cleo/phone", first.doc_id)
    late = store.envelope(["cleo/phone"], id=first.id, **other)
    assert code((await store.send(late, again=True))[0]) == "id_conflict"
    assert await store.waiting_deliveries() == 0
    await balance(store)


async def test_the_same_id_in_another_conversation_is_another_message(store: Store) -> None:
    first = await store.put(["bob/phone"])
    outcome = (await store.send(store.envelope(["bob/phone"], id=first.id, conv="other")))[0]
    assert code(outcome) == "stored fresh=True"
    assert await store.waiting_deliveries() == 2


async def test_a_resend_of_a_message_long_gone_is_recognised(store: Store) -> None:
    first = await store.put(["bob/phone"])
    await store.ack("bob/phone", first.doc_id)
    outcome = (await store.send(store.envelope(["bob/phone"], id=first.id), again=True))[0]
    assert outcome == Stored(first.seq, first.at, fresh=False)
    assert await store.waiting_deliveries() == 0
    assert store.committed == [first]
    await balance(store)


@pytest.mark.parametrize(
    "error", [{"closeConnection": True}, {"errorCode": 6}, {"errorCode": 50}, {"errorCode": 133}]
)
async def test_a_commit_of_unknown_outcome_is_tried_until_it_is_known(
    store: Store, error: dict[str, Any]
) -> None:
    batch = [store.envelope(["bob/phone"]) for _ in range(3)]
    async with failing(store, 3, failCommands=["insert"], **error):
        outcomes = await store.send(*batch)
    assert outcomes == [Stored(one.seq, one.at, fresh=True) for one in batch]
    assert await page(store, "bob/phone") == [one.id for one in batch]
    assert store.committed == batch
    await balance(store)


async def test_a_majority_time_out_is_not_taken_for_success_and_the_message_is_accepted_once(
    store: Store,
) -> None:
    one = store.envelope(["bob/phone"])
    concern = {"code": 64, "codeName": "WriteConcernFailed", "errmsg": "waiting for replication timed out"}
    async with failing(store, 1, failCommands=["insert"], writeConcernError=concern):
        outcome = (await store.send(one))[0]
    assert outcome == Stored(one.seq, one.at, fresh=True)
    assert store.committed == [one]
    assert store.ledger.count("accepted") == 1
    await balance(store)


async def test_what_stays_unknown_is_unavailable_after_its_deadline(store: Store) -> None:
    one = store.envelope(["bob/phone"])
    async with failing(store, 1000, failCommands=["insert"], closeConnection=True):
        outcome = (await store.send(one, seconds=0.3))[0]
    assert isinstance(outcome, RelayError)
    assert outcome.code == "unavailable"
    assert outcome.retry
    assert store.committed == []
    await balance(store)


async def test_a_resend_is_given_up_in_time_though_the_fates_cannot_be_read(store: Store) -> None:
    one = store.envelope(["bob/phone"])
    started = monotonic()
    async with failing(store, 1, failCommands=["aggregate"], blockConnection=True, blockTimeMS=6000):
        outcome = (await store.send(one, again=True, seconds=0.5))[0]
        taken = monotonic() - started
    # One call of the message path ends after two seconds. (Taking the fail point away waits for who is held up in it.)
    assert taken < 4
    assert code(outcome) == "unavailable"
    assert await store.document(one.doc_id) is None


# Reading


async def test_what_waits_comes_in_order_of_seq_and_id_for_any_of_the_keys(store: Store) -> None:
    made = [await store.put([key]) for key in ("bob/phone", "bob/*", "cleo/phone", "bob/phone")]
    tie = store.envelope(["bob/phone"])
    tie.seq = made[0].seq
    await store.send(tie)
    expected = sorted([made[0], made[1], made[3], tie], key=lambda one: (one.seq, one.doc_id))
    assert await page(store, "bob/phone", "bob/*") == [one.id for one in expected]


async def test_pages_leave_out_what_is_in_flight_and_say_when_they_are_the_last(store: Store) -> None:
    made = [await store.put(["bob/phone"]) for _ in range(5)]
    now = store.clock.now()
    found = await store.messages.waiting(
        ["bob/phone"], now, limit=2, max_bytes=BYTES, exclude=[made[0].doc_id]
    )
    assert [one.id for one in found.envelopes] == [made[1].id, made[2].id]
    assert not found.exhausted
    rest = await store.messages.waiting(
        ["bob/phone"], now, limit=3, max_bytes=BYTES, exclude=[one.doc_id for one in made[:3]]
    )
    assert [one.id for one in rest.envelopes] == [made[3].id, made[4].id]
    assert rest.exhausted


async def test_a_page_is_bounded_by_bytes_but_never_empty(store: Store) -> None:
    made = [await store.put(["bob/phone"], body="x" * 10_000) for _ in range(3)]
    now = store.clock.now()
    one = await store.messages.waiting(["bob/phone"], now, limit=10, max_bytes=1)
    assert [found.id for found in one.envelopes] == [made[0].id]
    assert not one.exhausted
    two = await store.messages.waiting(["bob/phone"], now, limit=10, max_bytes=25_000)
    assert [found.id for found in two.envelopes] == [made[0].id, made[1].id]
    assert not two.exhausted


async def test_paging_by_place_is_complete(store: Store) -> None:
    batch = [store.envelope(["bob/phone"]) for _ in range(9)]
    for one in batch:
        one.seq = batch[0].seq + (one.seq - batch[0].seq) // 3
    await store.send(*batch)
    found: list[Envelope] = []
    while True:
        after = (found[-1].seq, found[-1].doc_id) if found else None
        part = await store.messages.waiting(
            ["bob/phone"], store.clock.now(), limit=2, max_bytes=BYTES, conversation="talk", after=after
        )
        found += part.envelopes
        if part.exhausted:
            break
    assert [one.id for one in found] == [
        one.id for one in sorted(batch, key=lambda one: (one.seq, one.doc_id))
    ]


async def test_a_due_message_is_as_good_as_gone(store: Store) -> None:
    now = store.clock.now()
    due = await store.put(["bob/phone"], expires=now - 1)
    old = await store.put(["bob/phone"], at=now - TTL_SECONDS * 1000)
    fresh = await store.put(["bob/phone"], expires=now + 60_000)
    assert await page(store, "bob/phone") == [fresh.id]
    assert set(await store.messages.due(now, 10)) == {due.doc_id, old.doc_id}
    documents = await store.messages.read([due.doc_id, old.doc_id, fresh.doc_id])
    assert {name: store.messages.is_due(one, now) for name, one in documents.items()} == {
        due.doc_id: True,
        old.doc_id: True,
        fresh.doc_id: False,
    }


async def test_the_highest_waiting_seq_is_found_over_all_keys(store: Store) -> None:
    assert await store.messages.last_waiting(["bob/phone", "bob/*"]) is None
    await store.put(["bob/phone"])
    last = await store.put(["bob/*"])
    await store.put(["cleo/phone"])
    assert await store.messages.last_waiting(["bob/phone", "bob/*"]) == last.seq


async def test_what_somebody_else_has_already_is_not_deleted_unread(store: Store) -> None:
    one = await store.put(["bob/phone", "cleo/phone"])
    await store.ack("cleo/phone", one.doc_id)
    found = await store.messages.waiting(["bob/phone"], store.clock.now(), limit=1, max_bytes=BYTES)
    assert found.envelopes[0].awaiting == ["bob/phone"]
    assert found.envelopes[0].shared


@pytest.mark.parametrize("count", [1, 4, 9])
async def test_unreadable_documents_do_not_hide_the_messages_behind_them(store: Store, count: int) -> None:
    bad = [await store.put(["bob/phone"]) for _ in range(count)]
    good = await store.put(["bob/phone"])
    for one in bad:
        await store.mongo.messages.update_one({"_id": one.doc_id}, {"$unset": {"sender": ""}})
    # The window has as many places as there are unreadable documents, or fewer.
    bob = LocalConnection(store.messages, window=min(count, 4))
    bob.delivery.start()
    try:
        async with asyncio.timeout(2):
            while not bob.got("msg"):
                await asyncio.sleep(0.01)
        assert [one["id"] for one in bob.got("msg")] == [good.id]
    finally:
        await bob.close()


async def test_what_is_stored_can_be_encoded_and_read_again(store: Store) -> None:
    one = store.envelope(["bob/phone"], body="x" * 1000)
    raw = encode(one)
    assert one.size == len(raw.raw) > 1000
    assert decode({**raw, "sender": dict(raw["sender"])}).body == one.body


# Acknowledgements


async def test_a_message_is_deleted_only_after_the_last_device_acknowledges(store: Store) -> None:
    one = await store.put(["bob/phone", "bob/laptop", "ann/tablet"])
    assert await store.ack("bob/phone", one.doc_id)
    document = await store.document(one.doc_id)
    assert document is not None
    assert set(document["awaiting"]) == {"bob/laptop", "ann/tablet"}
    assert [(entry["user"], entry["device"]) for entry in document["deliveredTo"]] == [("bob", "phone")]
    assert await store.ack("ann/tablet", one.doc_id)
    assert await store.document(one.doc_id) is not None
    assert await store.ack("bob/laptop", one.doc_id)
    assert await store.document(one.doc_id) is None
    gone = (await store.fates.find([one.doc_id]))[one.doc_id]
    assert (gone.user, gone.device, gone.seq, gone.at) == ("ann", "phone", one.seq, one.at)
    assert (gone.fate, gone.delivered) == ("delivered", ["bob"])
    assert store.ledger.count("acknowledged") == 3
    await balance(store)


async def test_acknowledging_by_two_at_once_deletes_and_counts_both(store: Store) -> None:
    made = [await store.put(["bob/phone", "cleo/phone"]) for _ in range(10)]
    names = [one.doc_id for one in made]
    await asyncio.gather(*(store.ack(key, name) for name in names for key in ("bob/phone", "cleo/phone")))
    assert await store.messages.read(names) == {}
    assert store.ledger.count("acknowledged") == 20
    assert {tuple(one.delivered) for one in (await store.fates.find(names)).values()} == {("bob", "cleo")}
    await balance(store)


async def test_two_nodes_that_take_the_last_two_acknowledgements_delete_the_message(store: Store) -> None:
    one = await store.put(["bob/phone", "cleo/phone", "dan/phone"])

    async def other_node(key: str) -> None:
        user, _, device = key.partition("/")
        batch: list[Ending] = [
            Ack(user, device, {one.doc_id: None}, at=5, deadline=1e12, done=lambda _: None)
        ]
        await store.acks.commit(batch)

    await asyncio.gather(*(other_node(key) for key in one.awaiting))
    assert await store.document(one.doc_id) is None
    gone = (await store.fates.find([one.doc_id]))[one.doc_id]
    assert gone.delivered == ["bob", "cleo", "dan"]
    assert store.ledger.count("acknowledged") == 3
    await balance(store)


async def test_a_later_incarnation_of_an_id_survives_the_acknowledgement_of_an_earlier_one(
    store: Store,
) -> None:
    first = store.envelope(["bob/phone"])
    sole = Sole(first.seq, "ann", "phone", first.at)
    later = await store.put(["bob/phone"], id=first.id)
    assert await store.ack("bob/phone", first.doc_id, known={first.doc_id: sole})
    assert await store.document(later.doc_id) is not None
    await balance(store)


@pytest.mark.parametrize("commands", [["insert"], ["update"], ["delete"], ["find"]])
async def test_an_acknowledgement_of_unknown_outcome_counts_once(store: Store, commands: list[str]) -> None:
    shrunk = await store.put(["bob/phone", "cleo/phone"])
    last = await store.put(["bob/phone"])
    async with failing(store, 2, failCommands=commands, closeConnection=True):
        assert await store.ack("bob/phone", shrunk.doc_id, last.doc_id)
    document = await store.document(shrunk.doc_id)
    assert document is not None
    assert document["awaiting"] == ["cleo/phone"]
    assert len(document["deliveredTo"]) == 1
    assert await store.document(last.doc_id) is None
    assert store.ledger.count("acknowledged") == 2
    await balance(store)


@pytest.mark.parametrize("commands", [["insert"], ["update"], ["delete"]])
async def test_an_acknowledgement_that_took_effect_unheard_counts_once(
    store: Store, commands: list[str]
) -> None:
    shrunk = await store.put(["bob/phone", "cleo/phone"])
    last = await store.put(["bob/phone"])
    sole = await store.put(["bob/phone"])
    concern = {"code": 64, "codeName": "WriteConcernFailed", "errmsg": "waiting for replication timed out"}
    known = {sole.doc_id: Sole(sole.seq, "ann", "phone", sole.at)}
    async with failing(store, 1, failCommands=commands, writeConcernError=concern):
        assert await store.ack("bob/phone", shrunk.doc_id, last.doc_id, sole.doc_id, known=known)
    document = await store.document(shrunk.doc_id)
    assert document is not None
    assert document["awaiting"] == ["cleo/phone"]
    assert len(document["deliveredTo"]) == 1
    assert store.ledger.count("acknowledged") == 3
    assert await store.waiting_deliveries() == 1
    await balance(store)


async def test_an_acknowledgement_that_stays_unknown_is_told_so_and_the_message_waits(store: Store) -> None:
    one = await store.put(["bob/phone"])
    told: list[bool] = []
    batch: list[Ending] = [Ack("bob", "phone", {one.doc_id: None}, at=5, deadline=0, done=told.append)]
    async with failing(store, 1000, failCommands=["find", "insert"], closeConnection=True):
        await store.acks.commit(batch)
    assert told == [False]
    assert await page(store, "bob/phone") == [one.id]
    assert store.settlements == []
    await balance(store)


@pytest.mark.parametrize("fate", ["expired", "withdrawn", "released", "trimmed"])
async def test_a_removal_ends_a_message_for_all_who_still_await_it(store: Store, fate: Any) -> None:
    one = await store.put(["bob/phone", "cleo/*", "dan/phone"])
    await store.ack("dan/phone", one.doc_id)
    assert await store.endings.remove([one.doc_id, "talk unknown"], fate, deadline=1e12)
    assert await store.document(one.doc_id) is None
    gone = (await store.fates.find([one.doc_id]))[one.doc_id]
    assert (gone.fate, gone.delivered) == (fate, ["dan"])
    assert (store.ledger.count("acknowledged"), store.ledger.count(fate)) == (1, 2)
    assert {(one.doc_id, "bob/phone"), (one.doc_id, "cleo/*")} <= set(store.settlements[-1].released)
    await balance(store)


async def test_the_first_fate_stays_true(store: Store) -> None:
    one = await store.put(["bob/phone"])
    await store.endings.remove([one.doc_id], "withdrawn", deadline=1e12)
    await asyncio.sleep(0.002)
    # A device that had it in flight acknowledges what is gone already.
    await store.ack("bob/phone", one.doc_id, known={one.doc_id: Sole(one.seq, "ann", "phone", one.at)})
    assert (await store.fates.find([one.doc_id]))[one.doc_id].fate == "withdrawn"
    assert store.ledger.count("acknowledged") == 0
    await balance(store)


async def test_fates_are_found_for_those_asked_and_for_nobody_else(store: Store) -> None:
    made = [await store.put(["bob/phone"]) for _ in range(3)]
    await store.ack("bob/phone", *(one.doc_id for one in made))
    assert await store.fates.find([]) == {}
    assert set(await store.fates.find([made[1].doc_id, "talk unknown"])) == {made[1].doc_id}
    stored = [one async for one in store.mongo.fates.find({})]
    assert len(stored) == 1
    assert "hello" not in str(stored)


MAILBOXES = ["ann/tablet", "bob/phone", "bob/laptop", "cleo/*", "dan/phone"]
DEVICES = ["ann/tablet", "bob/phone", "bob/laptop", "cleo/watch", "cleo/phone", "dan/phone", "eve/phone"]
COUNT = 4

steps = st.lists(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(DEVICES), st.sets(st.integers(0, COUNT), min_size=1)),
            st.tuples(st.sampled_from(DEVICES), st.sets(st.integers(0, COUNT), min_size=1)),
            st.tuples(st.sampled_from(["expired", "withdrawn"]), st.sets(st.integers(0, COUNT), min_size=1)),
        ),
        min_size=1,
        max_size=4,
    ),
    max_size=8,
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    mailboxes=st.lists(
        st.lists(st.sampled_from(MAILBOXES), unique=True, min_size=1), min_size=COUNT, max_size=COUNT
    ),
    groups=steps,
    together=st.booleans(),
)
async def test_whatever_ends_in_whatever_order_the_store_and_the_books_agree_with_the_model(
    store: Store, mailboxes: list[list[str]], groups: list[list[tuple[str, set[int]]]], together: bool
) -> None:
    await store.clear()
    envelopes = [store.envelope(awaiting) for awaiting in mailboxes]
    await store.send(*envelopes)
    names = [one.doc_id for one in envelopes] + ["talk unknown"]
    awaiting = {one.doc_id: set(one.awaiting) for one in envelopes}
    alive = dict.fromkeys(awaiting, True)
    delivered: dict[str, set[str]] = {name: set() for name in awaiting}
    people: dict[str, set[str]] = {name: set() for name in awaiting}
    fates: dict[str, str] = {}
    counts = {"acknowledged": 0, "expired": 0, "withdrawn": 0}
    told: list[bool] = []

    for group in groups:
        batch: list[Ending] = []
        removed: dict[str, str] = {}
        for who, places in group:
            chosen = [names[place] for place in sorted(places)]
            if who in counts:
                fate: Fate = "expired" if who == "expired" else "withdrawn"
                batch.append(Removal(chosen, fate, deadline=1e12, done=told.append))
                for name in chosen:
                    removed.setdefault(name, who)
                continue
            user, _, device = who.partition("/")
            batch.append(Ack(user, device, dict.fromkeys(chosen), at=7, deadline=1e12, done=told.append))
            for name in chosen:
                taken = awaiting.get(name, set()) & {who, f"{user}/*"}
                if taken:
                    awaiting[name] -= taken
                    counts["acknowledged"] += len(taken)
                    delivered[name].add(device_key(user, device))
                    people[name].add(user)
        for name, mailbox in awaiting.items():
            if not alive[name]:
                continue
            if name in removed:
                counts[removed[name]] += len(mailbox)
                mailbox.clear()
            if not mailbox:
                alive[name] = False
                fates[name] = removed.get(name, "delivered")
        if together:
            await store.acks.commit(batch)
        else:
            # One after the other: acknowledgements of the group before its removals, as within one commit.
            for ending in sorted(batch, key=lambda one: isinstance(one, Removal)):
                await store.acks.commit([ending])

    found = await store.messages.read(names)
    assert set(found) == {name for name, still in alive.items() if still}
    for name, document in found.items():
        assert set(document["awaiting"]) == awaiting[name]
        assert len(document["awaiting"]) == len(awaiting[name])
        entries = [f"{entry['user']}/{entry['device']}" for entry in document.get("deliveredTo", ())]
        assert len(entries) == len(set(entries))
        assert set(entries) == delivered[name]
    gone = await store.fates.find(names)
    assert set(gone) == set(fates)
    for name, one in gone.items():
        assert set(one.delivered) == people[name] - {"ann"}
    if together:
        assert {name: one.fate for name, one in gone.items()} == fates
        assert {name: store.ledger.count(name) for name in ("acknowledged", "expired", "withdrawn")} == counts
    assert all(told)
    assert len(told) == sum(len(group) for group in groups)
    assert store.ledger.count("accepted") == sum(len(one) for one in mailboxes)
    await balance(store)


async def test_what_was_released_before_its_sender_had_an_answer_was_accepted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = store.envelope(["bob/phone", "cleo/phone"])
    collection = store.commits._collection
    tries = 0

    async def lost(*args: object, **options: object) -> object:
        nonlocal tries
        tries += 1
        done = await collection.insert_many(*args, **options)
        assert tries == 1
        assert await store.endings.release([one.doc_id], ["cleo/phone"], deadline=monotonic() + 10)
        raise PyMongoError(f"no answer to {done}")

    monkeypatch.setattr(store.commits, "_collection", StandIn(collection, "insert_many", lost))
    assert await store.send(one) == [Stored(one.seq, one.at, fresh=True)]
    assert (store.ledger.count("accepted"), store.ledger.count("released")) == (2, 1)
    await balance(store)
