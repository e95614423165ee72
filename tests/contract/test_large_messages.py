"""Messages to many devices, stored in parts, on a real mongod: every crash point, resends, acknowledgements, ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest
from pymongo.hello import Hello

from relay.store.audience import Audience, Roster
from relay.store.commits import Commits
from relay.store.mongo import PyMongoError
from relay.store.submissions import Stored, Submission
from relay.wire.envelope import Envelope
from relay.wire.errors import RelayError
from relay.wire.ids import PARTS_KEY, is_part, new_id
from tests.support.store import Store, open_another

INLINE = 3
PEOPLE = [f"p{number}" for number in range(10)]
KEYS = [f"{user}/phone" for user in PEOPLE]


@pytest.fixture
async def other(store: Store) -> AsyncIterator[Store]:
    """Another node, whose clock lies a second behind."""
    async with open_another(store, behind_ms=1000) as found:
        yield found


class Crash(PyMongoError):
    """The writer dies here."""


def large(
    store: Store, keys: list[str] | None = None, *, again: bool = False, **fields: Any
) -> tuple[Submission, asyncio.Future[Stored | RelayError]]:
    envelope = store.envelope(KEYS if keys is None else keys, **fields)
    return store.submission(envelope, again=again, inline=INLINE)


async def documents(store: Store) -> list[dict[str, Any]]:
    return [document async for document in store.mongo.messages.find().sort("_id", 1)]


async def sent(
    store: Store, keys: list[str] | None = None, *, again: bool = False, **fields: Any
) -> Envelope:
    one, outcome = large(store, keys, again=again, **fields)
    await store.large.commit([one])
    assert isinstance(await outcome, Stored)
    return one.envelope


async def drained(store: Store, key: str) -> list[Envelope]:
    page = await store.messages.waiting((key,), store.clock.now(), limit=100, max_bytes=1 << 20)
    return page.envelopes


async def ack_all(store: Store, keys: list[str], doc_id: str) -> None:
    assert all(await asyncio.gather(*(store.ack(key, doc_id) for key in keys)))


def crashing(store: Store, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The next writer dies before, or after, it claims, writes parts, or makes heads."""
    when, _, what = step.partition(" ")
    method = {"claim": "_claim", "parts": "_write_parts", "heads": "_make_heads"}[what]
    before = getattr(type(store.large), method)

    async def dies(self: Commits, batch: list[Submission], *rest: Any) -> Any:
        if when == "after":
            await before(self, batch, *rest)
        raise Crash

    monkeypatch.setattr(type(store.large), method, dies)


@asynccontextmanager
async def failing_inserts(store: Store, *, skip: int) -> AsyncIterator[None]:
    """The server refuses every insertion of messages but the first ``skip``."""
    admin = store.mongo.client.admin
    data = {
        "failCommands": ["insert"],
        "errorCode": 8,
        "namespace": f"{store.mongo.database.name}.messages",
    }
    await admin.command("configureFailPoint", "failCommand", mode={"skip": skip}, data=data)
    try:
        yield
    finally:
        await admin.command("configureFailPoint", "failCommand", mode="off")


async def crashed(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: str, keys: list[str] | None = None
) -> Envelope:
    """A message whose writer, a node of its own, died at this step."""
    with monkeypatch.context() as patch:
        if step in PARTS_MADE:
            # A large group's parts go in several batches anyway: by number of documents, or by bytes.
            patch.setattr(Hello, "max_write_batch_size", 1)
        async with open_another(store) as writer:
            one, _ = large(writer, keys)
            if step in PARTS_MADE:
                # The claim comes through, and so many of the parts.
                async with failing_inserts(store, skip=1 + PARTS_MADE[step]):
                    with pytest.raises(PyMongoError):
                        await writer.large._attempt([one], 0)
            else:
                crashing(writer, patch, step)
                with pytest.raises(Crash):
                    await writer.large._attempt([one], 0)
    return one.envelope


PARTS_MADE = {"after the first part": 1, "after the second part": 2}
STEPS = ["before claim", "before parts", *PARTS_MADE, "before heads"]
LEFT = {
    "before claim": 0,
    "before parts": 1,
    "after the first part": 2,
    "after the second part": 3,
    "before heads": 4,
}
"""How many documents a writer of a message in a head and three parts leaves that died there."""


async def test_a_large_message_is_a_head_and_parts_of_at_most_so_many_recipients(store: Store) -> None:
    envelope = await sent(store)
    found = await documents(store)
    assert [is_part(one["_id"]) for one in found] == [False, True, True, True]
    assert {(one["id"], one["seq"], one["body"], one["parts"]) for one in found} == {
        (envelope.id, envelope.seq, "hello", 4)
    }
    assert [key for one in found for key in one["awaiting"] if key != PARTS_KEY] == KEYS
    assert max(len(one["awaiting"]) for one in found[1:]) == INLINE
    assert store.ledger.count("accepted") == len(KEYS) == await store.waiting_deliveries()
    assert [piece.stored_id for piece in store.committed] == [one["_id"] for one in found]


async def test_every_recipient_drains_it_once_and_it_is_gone_with_the_last_acknowledgement(
    store: Store,
) -> None:
    envelope = await sent(store)
    for key in KEYS:
        (found,) = await drained(store, key)
        assert (found.doc_id, found.seq, found.body) == (envelope.doc_id, envelope.seq, "hello")
        await store.ack(key, found.stored_id)
        assert await drained(store, key) == []
    assert await documents(store) == []
    assert store.ledger.count("acknowledged") == len(KEYS)
    assert store.ledger.waiting == 0
    gone = await store.fates.find([envelope.doc_id])
    assert gone[envelope.doc_id].fate == "delivered"


@pytest.mark.parametrize("order", ["forward", "backward", "at once"])
async def test_it_is_gone_in_whatever_order_its_parts_end(store: Store, order: str) -> None:
    envelope = await sent(store)
    if order == "at once":
        await ack_all(store, KEYS, envelope.doc_id)
    else:
        for key in KEYS if order == "forward" else KEYS[::-1]:
            await ack_all(store, [key], envelope.doc_id)
    assert await documents(store) == []
    assert store.ledger.count("acknowledged") == len(KEYS)


async def test_a_device_that_knows_only_the_message_id_acknowledges_its_part(store: Store) -> None:
    envelope = await sent(store)
    assert await store.ack(KEYS[-1], envelope.doc_id)
    assert KEYS[-1] not in {key for one in await documents(store) for key in one["awaiting"]}
    assert store.ledger.count("acknowledged") == 1
    # Who is no recipient changes nothing.
    assert await store.ack("mallory/phone", envelope.doc_id)
    assert store.ledger.count("acknowledged") == 1


async def test_the_head_stays_while_a_part_waits(store: Store) -> None:
    envelope = await sent(store)
    await ack_all(store, KEYS[:-1], envelope.doc_id)
    found = await documents(store)
    assert [one["awaiting"] for one in found] == [[PARTS_KEY], [KEYS[-1]]]
    one, outcome = large(store, id=envelope.id, again=True)
    await store.large.commit([one])
    assert await outcome == Stored(envelope.seq, envelope.at, fresh=False)


@pytest.mark.parametrize("step", STEPS)
async def test_what_a_crash_leaves_before_the_head_is_nobodys_message(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    envelope = await crashed(store, monkeypatch, step)
    assert len(await documents(store)) == LEFT[step]
    for key in KEYS:
        assert await drained(store, key) == []
    assert await store.messages.read([envelope.doc_id]) == {}
    assert await store.waiting_deliveries() == 0
    assert store.ledger.count("accepted") == 0
    await store.messages.heads.clear_claims(store.clock.now() + 1)
    assert await documents(store) == []


@pytest.mark.parametrize("step", STEPS)
async def test_a_resend_after_a_crash_reaches_everybody_who_is_there_then_with_one_seq(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    first = await crashed(store, monkeypatch, step, KEYS[:10])
    for key in KEYS:
        # A node that met the parts before their head was there must find them after.
        assert await drained(store, key) == []
    # With members who joined in between.
    one, outcome = large(other, KEYS, id=first.id, again=True)
    assert one.envelope.seq < first.seq
    await other.large.commit([one])
    answer = await outcome
    assert answer == Stored(one.envelope.seq, one.envelope.at, fresh=True)
    for node in (store, other):
        found = {key: [(each.id, each.seq) for each in await drained(node, key)] for key in KEYS}
        assert found == {key: [(first.id, one.envelope.seq)] for key in KEYS}
    # The sender's device has come back to a node of before, and asks again: its answer was lost, too.
    again, outcome = large(store, KEYS, id=first.id, again=True)
    await store.large.commit([again])
    assert await outcome == Stored(one.envelope.seq, one.envelope.at, fresh=False)
    await ack_all(store, KEYS[::2], first.doc_id)
    await ack_all(other, KEYS[1::2], first.doc_id)
    assert await documents(store) == []
    books = [node.ledger for node in (store, other)]
    for outcome_name in ("accepted", "acknowledged"):
        assert sum(ledger.count(outcome_name) for ledger in books) == len(KEYS)
    gone, outcome = large(other, KEYS, id=first.id, again=True)
    await other.large.commit([gone])
    assert await outcome == Stored(one.envelope.seq, one.envelope.at, fresh=False)


async def test_a_crash_after_the_head_was_made_is_a_stored_message(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    envelope = await crashed(store, monkeypatch, "after heads", KEYS[:8])
    one, outcome = large(other, id=envelope.id, again=True)
    await other.large.commit([one])
    assert await outcome == Stored(envelope.seq, envelope.at, fresh=False)
    found = [(key, each.seq) for key in KEYS for each in await drained(store, key)]
    assert found == [(key, envelope.seq) for key in KEYS[:8]], "who joined later was no recipient"


@pytest.mark.parametrize("step", ["before parts", "before heads"])
async def test_a_writer_that_was_overtaken_while_it_was_held_up_answers_with_the_others_seq(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    slow, outcome = large(store, KEYS[:7])
    method = {"parts": "_write_parts", "heads": "_make_heads"}[step.partition(" ")[2]]
    before = getattr(type(store.large), method)
    overtakers: list[Envelope] = []

    async def held_up(self: Commits, batch: list[Submission]) -> Any:
        if self is store.large:
            overtakers.append(await sent(other, KEYS, id=slow.envelope.id, again=True))
        return await before(self, batch)

    monkeypatch.setattr(type(store.large), method, held_up)
    await store.large.commit([slow])
    (winner,) = overtakers
    assert winner.seq < slow.envelope.seq
    assert await outcome == Stored(winner.seq, winner.at, fresh=False)
    found = [one for key in KEYS for one in await drained(store, key)]
    assert {one.seq for one in found} == {winner.seq}
    assert len(found) == len(KEYS)
    await ack_all(store, KEYS, winner.doc_id)
    assert await documents(store) == [], "nothing of the slow writer is left"


async def test_a_message_given_up_in_doubt_is_found_and_booked_when_it_was_stored(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, outcome = large(store)
    one.deadline = monotonic()
    with monkeypatch.context() as patch:
        crashing(store, patch, "after heads")
        patch.setattr(store.large, "_succeed", _never)
        await store.large.commit([one])
    refused = await outcome
    assert isinstance(refused, RelayError)
    assert refused.code == "unavailable"
    patch_since(store, one.envelope.doc_id)
    await store.large.settle_given_up()
    assert store.ledger.count("accepted") == len(KEYS)
    await ack_all(store, KEYS, one.envelope.doc_id)
    assert store.ledger.waiting == 0


async def _never(*_: Any) -> None:
    return None


def patch_since(store: Store, doc_id: str) -> None:
    given_up = store.large._given_up[doc_id]
    store.large._given_up[doc_id] = given_up._replace(since=given_up.since - 60)


async def test_a_retry_for_other_recipients_replaces_what_the_first_attempt_wrote(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {user: [f"{user}/phone"] for user in ["ann", *PEOPLE]}
    envelope = store.envelope(KEYS)
    one, outcome = store.submission(envelope, inline=INLINE)
    one.audience = Audience("talk", Roster(members))
    with monkeypatch.context() as patch:
        crashing(store, patch, "before heads")
        with pytest.raises(Crash):
            await store.large._attempt([one], 0)
    one.audience.stale = True
    less = {user: keys for user, keys in members.items() if user != "p9"}

    async def resolve_all(names: Any) -> dict[str, Audience]:
        return {name: Audience(name, Roster(less)) for name in names}

    monkeypatch.setattr(store.audiences, "resolve_all", resolve_all)
    await store.large._attempt([one], 1)
    assert isinstance(await outcome, Stored)
    assert {key for doc in await documents(store) for key in doc["awaiting"]} == {*KEYS[:-1], PARTS_KEY}
    assert await drained(store, KEYS[-1]) == []


async def test_withdrawing_ends_every_part(store: Store) -> None:
    envelope = await sent(store)
    await ack_all(store, KEYS[:2], envelope.doc_id)
    store.endings.discard(envelope.doc_id, "withdrawn", deadline=monotonic() + 5)
    await store.endings.remove([new_doc()], "expired", deadline=monotonic() + 5)
    for _ in range(100):
        if not await documents(store):
            break
        await asyncio.sleep(0.02)
    assert await documents(store) == []
    assert store.ledger.count("withdrawn") == len(KEYS) - 2
    assert store.ledger.waiting == 0


def new_doc() -> str:
    return f"talk {new_id()}"


async def test_removing_members_releases_their_parts_and_the_last_one_ends_the_message(store: Store) -> None:
    envelope = await sent(store)
    await ack_all(store, KEYS[:7], envelope.doc_id)
    waiting, _ = await store.messages.awaited(KEYS[7:], limit=100)
    assert await store.endings.release(waiting, KEYS[7:], deadline=monotonic() + 5)
    assert await documents(store) == []
    assert store.ledger.count("released") == 3
    assert store.ledger.waiting == 0


@pytest.mark.parametrize("how", ["released", "expired"])
async def test_the_end_of_what_never_became_a_message_is_not_booked(
    store: Store, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    await crashed(store, monkeypatch, "before heads")
    parts = [one["_id"] for one in await documents(store) if is_part(one["_id"])]
    if how == "released":
        assert await store.endings.release(parts, KEYS, deadline=monotonic() + 5)
    else:
        assert await store.endings.remove(parts, "expired", deadline=monotonic() + 5)
    assert store.ledger.count("released") == store.ledger.count("expired") == 0
    await store.messages.heads.clear_claims(store.clock.now() + 1)
    assert await documents(store) == []


async def test_a_crash_between_the_last_part_and_the_head_is_healed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    envelope = await sent(store)
    with monkeypatch.context() as patch:
        patch.setattr(store.acks, "_end_heads", _never)
        await ack_all(store, KEYS, envelope.doc_id)
    store.acks._headless.clear()
    assert [one["awaiting"] for one in await documents(store)] == [[PARTS_KEY]]
    heads, after = await store.messages.heads.waiting_for_parts(10, 0)
    assert list(heads) == [envelope.doc_id]
    assert after == 0
    await store.acks.end_heads(heads)
    assert await documents(store) == []


async def test_small_messages_of_the_id_of_a_dead_claim_get_through(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = await crashed(store, monkeypatch, "before heads")
    (answer,) = await store.send(store.envelope(KEYS[:1], id=dead.id), again=True)
    assert isinstance(answer, Stored)
    assert [one["awaiting"] for one in await documents(store)] == [[KEYS[0]]]


async def test_another_senders_message_of_the_same_id_is_a_conflict(store: Store) -> None:
    envelope = await sent(store)
    one, outcome = large(store, id=envelope.id, user="mallory")
    await store.large.commit([one])
    refused = await outcome
    assert isinstance(refused, RelayError)
    assert refused.code == "id_conflict"
    assert len(await documents(store)) == 4


async def test_a_resend_of_a_large_message_that_is_gone_is_answered_and_leaves_nothing(store: Store) -> None:
    envelope = await sent(store)
    await ack_all(store, KEYS, envelope.doc_id)
    one, outcome = large(store, id=envelope.id, again=True)
    await store.large.commit([one])
    assert await outcome == Stored(envelope.seq, envelope.at, fresh=False)
    assert await documents(store) == []


async def test_each_part_holds_the_ciphertexts_of_its_own_recipients_only(store: Store) -> None:
    await sent(store, body=None, sealed={key: f"c{number}" for number, key in enumerate(KEYS)})
    for document in await documents(store):
        own = [key for key in document["awaiting"] if key != PARTS_KEY]
        assert [entry["device"] for entry in document["sealed"]] == own
    (found,) = await drained(store, KEYS[9])
    assert '"sealed":"c9"' in found.frame_for(KEYS[9])
