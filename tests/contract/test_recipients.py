"""Recipients that change while a message is being committed, on a real mongod."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from time import monotonic

import pytest

from relay.store.audience import LEASE_SECONDS, Audience, Roster
from relay.store.mongo import PyMongoError
from relay.store.submissions import Stored, Submission
from relay.wire.errors import RelayError
from tests.support.stand_in import StandIn
from tests.support.store import Store


class Recipients:
    """Stands where recipients are resolved: what a conversation's are now. ``fault``: nobody can say."""

    def __init__(self, members: dict[str, list[str]]) -> None:
        self.members = members
        self.full: frozenset[str] = frozenset()
        self.fault: Exception | None = None
        self.asked = 0

    async def resolve_all(self, conversations: Iterable[str]) -> dict[str, Audience]:
        self.asked += 1
        if self.fault is not None:
            raise self.fault
        return {name: Audience(name, Roster(self.members, full=self.full)) for name in conversations}


@pytest.fixture
def recipients(store: Store, monkeypatch: pytest.MonkeyPatch) -> Recipients:
    found = Recipients({"ann": ["ann/phone"], "bob": ["bob/phone"], "cleo": ["cleo/phone"]})
    monkeypatch.setattr(store.audiences, "resolve_all", found.resolve_all)
    return found


def submission(
    store: Store, recipients: Recipients, *, sealed: bool = False
) -> tuple[Submission, asyncio.Future[Stored | RelayError]]:
    """A message of ann's phone to everybody, resolved now."""
    audience = Audience("talk", Roster(dict(recipients.members)))
    outcome: asyncio.Future[Stored | RelayError] = asyncio.get_running_loop().create_future()

    def check(now: Audience) -> None:
        if now.devices_rev != audience.devices_rev:
            raise RelayError("device_mismatch", "the recipient devices have changed")

    found = Submission(
        store.envelope(audience.awaiting("ann/phone")),
        audience,
        "ann/phone",
        again=False,
        deadline=monotonic() + 10,
        done=outcome.set_result,
        check=check if sealed else None,
    )
    return found, outcome


async def changes_during_the_insert(store: Store, one: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipients become stale while MongoDB writes."""
    insert = store.commits._collection.insert_many

    async def slow(*args: object, **options: object) -> object:
        one.audience.stale = True
        return await insert(*args, **options)

    monkeypatch.setattr(store.commits, "_collection", StandIn(store.commits._collection, "insert_many", slow))


async def awaiting(store: Store, one: Submission) -> list[str] | None:
    found = await store.document(one.envelope.doc_id)
    return None if found is None else list(found["awaiting"])


async def test_what_waited_longer_than_the_lease_is_resolved_again_before_it_is_committed(
    store: Store, recipients: Recipients
) -> None:
    one, outcome = submission(store, recipients)
    one.audience.resolved -= LEASE_SECONDS
    recipients.members = {"ann": ["ann/phone"], "cleo": ["cleo/phone"], "dan": ["dan/phone"]}
    await store.commits.commit([one])
    assert isinstance(await outcome, Stored)
    assert await awaiting(store, one) == ["cleo/phone", "dan/phone"]


async def test_what_is_fresh_is_not_resolved_again(store: Store, recipients: Recipients) -> None:
    one, outcome = submission(store, recipients)
    await store.commits.commit([one])
    assert isinstance(await outcome, Stored)
    assert recipients.asked == 0


async def test_who_was_removed_during_the_insert_is_not_pushed_to_and_awaited_no_longer(
    store: Store, recipients: Recipients, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, outcome = submission(store, recipients)
    recipients.members = {"ann": ["ann/phone"], "cleo": ["cleo/phone"]}
    await changes_during_the_insert(store, one, monkeypatch)
    await store.commits.commit([one])
    assert isinstance(await outcome, Stored)
    assert [envelope.awaiting for envelope in store.committed] == [["cleo/phone"]]
    for _ in range(100):
        if store.ledger.count("released") == 1:
            break
        await asyncio.sleep(0.02)
    assert store.ledger.count("released") == 1
    assert await awaiting(store, one) == ["cleo/phone"]
    assert store.ledger.waiting == 1


async def test_a_message_whose_every_recipient_was_removed_meanwhile_is_released_not_delivered(
    store: Store, recipients: Recipients, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = submission(store, recipients)
    recipients.members = {"ann": ["ann/phone"]}
    await changes_during_the_insert(store, one, monkeypatch)
    await store.commits.commit([one])
    assert store.committed == [], "nobody is pushed to, and it is not discarded as delivered"
    for _ in range(100):
        if await awaiting(store, one) is None:
            break
        await asyncio.sleep(0.02)
    gone = (await store.fates.find([one.envelope.doc_id]))[one.envelope.doc_id]
    assert gone.fate == "released"
    assert store.ledger.waiting == 0


async def test_when_nobody_can_say_who_receives_a_stored_message_it_waits_for_all(
    store: Store, recipients: Recipients, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(store.commits, "_found", found.extend)
    one, outcome = submission(store, recipients)
    recipients.fault = PyMongoError("no primary")
    await changes_during_the_insert(store, one, monkeypatch)
    await store.commits.commit([one])
    assert isinstance(await outcome, Stored)
    assert store.committed == []
    assert await awaiting(store, one) == ["bob/phone", "cleo/phone"]
    assert found == ["bob/phone", "cleo/phone"], "their connections look into the store"
    assert store.ledger.waiting == 2


async def test_a_sealed_message_whose_devices_changed_while_it_was_queued_is_refused(
    store: Store, recipients: Recipients
) -> None:
    one, outcome = submission(store, recipients, sealed=True)
    one.audience.stale = True
    recipients.members = {**recipients.members, "bob": ["bob/phone", "bob/tablet"]}
    await store.commits.commit([one])
    refusal = await outcome
    assert isinstance(refusal, RelayError)
    assert refusal.code == "device_mismatch"
    assert await awaiting(store, one) is None
    assert store.ledger.count("accepted") == 0


async def test_a_sealed_message_that_is_tried_again_is_for_nobody_who_came_meanwhile(
    store: Store, recipients: Recipients, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, outcome = submission(store, recipients, sealed=True)
    one.envelope.awaiting.append("dan/*")
    one.encode()
    insert = store.commits._collection.insert_many
    tries = 0

    async def lost(*args: object, **options: object) -> object:
        nonlocal tries
        tries += 1
        if tries > 1:
            return await insert(*args, **options)
        one.audience.stale = True
        recipients.members = {
            "ann": ["ann/phone"],
            "bob": ["bob/phone", "bob/tablet"],
            "dan": ["dan/laptop"],
        }
        raise PyMongoError("no answer")

    monkeypatch.setattr(store.commits, "_collection", StandIn(store.commits._collection, "insert_many", lost))
    await store.commits.commit([one])
    assert isinstance(await outcome, Stored)
    # It has no ciphertext for the tablet; cleo has left; dan's first device drains what waits for any.
    assert await awaiting(store, one) == ["bob/phone", "dan/*"]


async def test_who_became_full_meanwhile_is_left_out_and_booked(store: Store, recipients: Recipients) -> None:
    one, outcome = submission(store, recipients)
    one.audience.stale = True
    recipients.full = frozenset({"bob/phone"})
    await store.commits.commit([one])
    assert isinstance(await outcome, Stored)
    document = await store.document(one.envelope.doc_id)
    assert document is not None
    assert (document["awaiting"], document["trimmed"]) == (["cleo/phone"], 1)
    assert one.envelope.shared, "its end is read from its document"
    assert (store.ledger.count("accepted"), store.ledger.count("trimmed"), store.ledger.waiting) == (2, 1, 1)


async def test_who_has_room_again_meanwhile_gets_it(store: Store, recipients: Recipients) -> None:
    recipients.full = frozenset({"bob/phone"})
    one, outcome = submission(store, recipients)
    one.envelope.trimmed = ["bob/phone"]
    one.audience.stale = True
    recipients.full = frozenset()
    await store.commits.commit([one])
    assert isinstance(await outcome, Stored)
    document = await store.document(one.envelope.doc_id)
    assert document is not None
    assert document["awaiting"] == ["bob/phone", "cleo/phone"]
    assert "trimmed" not in document
    assert (store.ledger.count("trimmed"), store.ledger.waiting) == (0, 2)
