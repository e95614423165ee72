"""What changed since a cursor: in memory and on a real mongod."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from models.accounts import Device, User
from models.contacts import Contact
from models.conversations import Membership
from relay.store import changes as module
from relay.store.changes import Changes, ChangesPage
from relay.store.conversations import Conversations
from relay.store.embedded import EmbeddedMongo
from relay.store.revisions import Proposal, Revisions
from relay.wire import stamps
from relay.wire.errors import RelayError
from relay.wire.stamps import Stamps
from tests.support.control import (
    BACKENDS,
    always,
    change,
    clear,
    contact,
    create,
    open_control,
    read,
    refused,
)


@pytest.fixture(scope="module", params=BACKENDS)
async def backend(request: pytest.FixtureRequest, mongod: EmbeddedMongo) -> AsyncIterator[str]:
    async with open_control(request.param, mongod.uri) as kind:
        yield kind


@pytest.fixture
async def revisions(backend: str) -> Revisions:
    await clear()
    return Revisions()


@pytest.fixture
def conversations(revisions: Revisions) -> Conversations:
    return Conversations()


@pytest.fixture
def changes(conversations: Conversations) -> Changes:
    # Nothing was heard of cluster time: there is none in memory.
    return Changes(conversations, Stamps())


async def settled() -> None:
    """Everything that was changed so far was changed long ago."""
    for model, field in ((Membership, "updatedAt"), (Membership, "readAt"), (Contact, "updatedAt")):
        rows = model.get_motor_collection()
        async for one in rows.find({field: {"$exists": True}}):
            await rows.update_one({"_id": one["_id"]}, {"$set": {field: one[field] - timedelta(minutes=2)}})


async def pages(changes: Changes, user: str, cursor: str | None = None) -> list[ChangesPage]:
    """Every page from there on."""
    found = [await changes.since(user, cursor)]
    while found[-1].more:
        assert len(found) < 100, "it never ends"
        found.append(await changes.since(user, found[-1].next))
    return found


async def test_from_the_beginning_everything_is_told_once_and_then_nothing(
    changes: Changes, revisions: Revisions
) -> None:
    name, _ = await create(revisions, "ann", ["bob"], name="trip")
    left, _ = await create(revisions, "ann", ["bob"])
    await create(revisions, "cleo", ["dan"])
    await change(revisions, left, "ann", always(Proposal("removed", ["bob"])), ["bob"])
    await contact("bob", "ann", name="Annie", listed=True, updatedAt=datetime.now(UTC))
    await settled()
    page = await changes.since("bob", None)
    assert [(view.id, view.name, view.me.role) for view in page.conversations] == [(name, "trip", "member")]
    assert page.removed == [left]
    assert [(one.user, one.name, one.listed, one.blocked) for one in page.contacts] == [
        ("ann", "Annie", True, False)
    ]
    assert (page.reads, page.more) == ([], False)
    later = await changes.since("bob", page.next)
    assert (later.conversations, later.removed, later.contacts, later.reads) == ([], [], [], [])


async def test_what_was_changed_since_is_told(
    changes: Changes, revisions: Revisions, conversations: Conversations
) -> None:
    made = [(await create(revisions, "ann", ["bob"]))[0] for _ in range(4)]
    await settled()
    cursor = (await changes.since("bob", None)).next
    await change(revisions, made[0], "ann", always(Proposal("changed", fields={"name": "new"})))
    await change(revisions, made[1], "ann", always(Proposal("removed", ["bob"])), ["bob"])
    await conversations.set_own(made[2], "bob", {"pinned": True, "archived": True})
    await conversations.set_own(made[3], "ann", {"pinned": True})
    page = await changes.since("bob", cursor)
    assert {view.id: (view.name, view.me.pinned, view.me.archived) for view in page.conversations} == {
        made[0]: ("new", False, False),
        made[2]: (None, True, True),
    }
    assert page.removed == [made[1]]


async def test_a_dissolved_conversation_is_told_as_removed_to_all(
    changes: Changes, revisions: Revisions
) -> None:
    name, _ = await create(revisions, "ann", ["bob"])
    await settled()
    cursors = {user: (await changes.since(user, None)).next for user in ("ann", "bob")}
    await change(revisions, name, "ann", always(Proposal("dissolved")), everybody=True)
    for user, cursor in cursors.items():
        page = await changes.since(user, cursor)
        assert (page.conversations, page.removed) == ([], [name]), user


async def test_the_number_of_members_is_never_told_late(changes: Changes, revisions: Revisions) -> None:
    """A change may take longer to end than what was changed is told again."""
    name, _ = await create(revisions, "ann", ["bob", "cleo"])
    await settled()
    revision, _ = await revisions.begin(name, "ann", ["cleo"], always(Proposal("removed", ["cleo"])))
    assert revision is not None
    await revisions.apply(revision)
    await settled()
    page = await changes.since("bob", None)
    assert [view.member_count for view in page.conversations] == [2]
    await revisions.finish(revision)
    assert (await changes.since("bob", page.next)).conversations == []


async def test_read_cursors_of_all_members_are_told(
    changes: Changes, revisions: Revisions, conversations: Conversations
) -> None:
    one, _ = await create(revisions, "ann", ["bob", "cleo"])
    two, _ = await create(revisions, "cleo", ["dan"])
    left, _ = await create(revisions, "ann", ["bob", "cleo"])
    await change(revisions, left, "ann", always(Proposal("removed", ["bob"])), ["bob"])
    await settled()
    cursor = (await changes.since("bob", None)).next
    for name, user, up_to in (
        (one, "ann", 7),
        (one, "bob", 8),
        (one, "cleo", 9),
        (two, "cleo", 11),
        (left, "ann", 13),
    ):
        await read(name, user, up_to)
    page = await changes.since("bob", cursor)
    assert sorted((read.conversation, read.user, read.up_to) for read in page.reads) == [
        (one, "ann", 7),
        (one, "bob", 8),
        (one, "cleo", 9),
    ]
    assert all(abs(read.at - datetime.now(UTC).timestamp() * 1000) < 60_000 for read in page.reads)
    assert page.conversations == [], "reading is no change of the conversation"


async def test_contacts_devices_and_the_own_profile_are_told(changes: Changes, revisions: Revisions) -> None:
    old = datetime.now(UTC) - timedelta(minutes=2)
    await User.get_motor_collection().insert_one({"_id": "bob", "createdAt": old})
    await Device.get_motor_collection().insert_many(
        [
            {"_id": "bob/phone", "user": "bob", "createdAt": old, "name": "Phone", "platform": "ios"},
            {"_id": "bob/old", "user": "bob", "createdAt": old},
            {"_id": "ann/phone", "user": "ann", "createdAt": old},
        ]
    )
    await contact("bob", "ann", listed=True, updatedAt=old)
    first = await changes.since("bob", None)
    assert first.me
    assert [
        (one.id, one.name, one.platform, one.removed) for one in sorted(first.devices, key=lambda one: one.id)
    ] == [
        ("old", None, None, False),
        ("phone", "Phone", "ios", False),
    ]
    quiet = await changes.since("bob", first.next)
    assert (quiet.me, quiet.devices, quiet.contacts) == (False, [], [])
    now = datetime.now(UTC)
    await User.get_motor_collection().update_one({"_id": "bob"}, {"$set": {"name": "Bob", "updatedAt": now}})
    await Device.get_motor_collection().update_one(
        {"_id": "bob/old"}, {"$set": {"removedAt": now, "updatedAt": now}}
    )
    await contact("bob", "ann", listed=False, blocked=False, removedAt=now, updatedAt=now)
    await contact("bob", "cleo", blocked=True, updatedAt=now)
    await contact("ann", "bob", blocked=True, updatedAt=now)
    page = await changes.since("bob", quiet.next)
    assert page.me
    assert [(one.id, one.removed) for one in page.devices] == [("old", True)]
    assert [(one.user, one.listed, one.blocked) for one in page.contacts] == [
        ("ann", False, False),
        ("cleo", False, True),
    ]


@pytest.mark.parametrize("fresh", [True, False])
async def test_pages_over_many_changes_are_complete(
    changes: Changes,
    revisions: Revisions,
    conversations: Conversations,
    monkeypatch: pytest.MonkeyPatch,
    fresh: bool,
) -> None:
    for name, bound in (("_PAGE", 4), ("_READS", 3), ("_CHUNK", 2)):
        monkeypatch.setattr(module, name, bound)
    made = [(await create(revisions, "ann", ["bob"]))[0] for _ in range(11)]
    for name in made:
        await read(name, "ann", 5)
        await read(name, "bob", 5)
    for number in range(9):
        await contact("bob", f"u{number}", listed=True, updatedAt=datetime.now(UTC))
    # Ties are usual: several changes in one millisecond.
    now = datetime.now(UTC).replace(microsecond=0)
    for number, name in enumerate(made):
        await Membership.get_motor_collection().update_many(
            {"conversationId": name}, {"$set": {"updatedAt": now - timedelta(milliseconds=number // 5)}}
        )
    await Membership.get_motor_collection().update_many({}, {"$set": {"readAt": now}})
    if not fresh:
        await settled()
    found = await pages(changes, "bob")
    assert len(found) > 3
    assert {view.id for page in found for view in page.conversations} == set(made)
    assert {(read.conversation, read.user) for page in found for read in page.reads} == {
        (name, user) for name in made for user in ("ann", "bob")
    }
    assert {one.user for page in found for one in page.contacts} == {f"u{number}" for number in range(9)}
    again = await pages(changes, "bob", found[-1].next)
    if not fresh:
        assert [page.conversations + page.removed for page in again] == [[]]


async def test_pages_over_five_hundred_conversations_are_complete(
    changes: Changes, revisions: Revisions
) -> None:
    name, _ = await create(revisions, "ann", ["bob"])
    old = datetime.now(UTC) - timedelta(hours=1)
    wanted = [f"c{number:03}" for number in range(520)]
    await Membership.get_motor_collection().insert_many(
        {
            "_id": f"{one} bob",
            "conversationId": one,
            "user": "bob",
            "role": "member",
            "joinedAt": old,
            "updatedAt": old,
            "removedAt": old,
        }
        for one in wanted
    )
    found = await pages(changes, "bob")
    told = [one for page in found for one in page.removed]
    assert sorted(told) == wanted
    assert [view.id for page in found for view in page.conversations] == [name]


async def test_what_becomes_visible_late_is_told_all_the_same(changes: Changes, revisions: Revisions) -> None:
    """A change takes its time between its moment and its being written; the clocks of nodes differ."""
    name, _ = await create(revisions, "ann", ["bob"])
    late, _ = await create(revisions, "ann", ["bob"])
    rows = Membership.get_motor_collection()
    hidden = await rows.find_one_and_delete({"_id": f"{late} bob"})
    page = await changes.since("bob", None)
    assert [view.id for view in page.conversations] == [name]
    moment = datetime.now(UTC) - timedelta(seconds=18)
    await rows.insert_one({**hidden, "updatedAt": moment})
    assert late in {view.id for view in (await changes.since("bob", page.next)).conversations}


async def test_what_becomes_visible_late_is_told_also_behind_full_pages(
    changes: Changes, revisions: Revisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAGE", 3)
    made = [(await create(revisions, "ann", ["bob"]))[0] for _ in range(8)]
    late = made.pop(0)
    rows = Membership.get_motor_collection()
    hidden = await rows.find_one_and_delete({"_id": f"{late} bob"})
    found = await pages(changes, "bob")
    assert {view.id for page in found for view in page.conversations} == set(made)
    # It was written down before all the others, on a node that was slow.
    await rows.insert_one({**hidden, "updatedAt": datetime.now(UTC) - timedelta(seconds=18)})
    again = await pages(changes, "bob", found[-1].next)
    assert late in {view.id for page in again for view in page.conversations}


async def test_repeated_polling_sees_every_change_made_between(
    changes: Changes, revisions: Revisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAGE", 5)
    monkeypatch.setattr(stamps, "MARGIN_SECONDS", 0.3)
    made = [(await create(revisions, "ann", ["bob"], name="0"))[0] for _ in range(12)]
    latest: dict[str, str | None] = dict.fromkeys(made, "0")
    seen: dict[str, str | None] = {}
    done = False

    async def work() -> None:
        nonlocal done
        for number in range(1, 60):
            name = made[number * 7 % len(made)]
            latest[name] = str(number)
            await change(revisions, name, "ann", always(Proposal("changed", fields={"name": str(number)})))
            await asyncio.sleep(0.005)
        done = True

    working = asyncio.ensure_future(work())
    cursor: str | None = None
    while not done or seen != latest:
        ended = done
        for page in await pages(changes, "bob", cursor):
            seen.update({view.id: view.name for view in page.conversations})
            cursor = page.next
        if ended:
            break
        await asyncio.sleep(0.02)
    await working
    assert seen == latest


def cursor_of(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


async def test_a_cursor_older_than_removals_are_kept_must_begin_anew(
    changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    cursor = (await changes.since("bob", None)).next
    assert (await changes.since("bob", cursor)).more is False

    def later(days: float) -> None:
        monkeypatch.setattr(module, "utc_now", lambda: datetime.now(UTC) + timedelta(days=days))

    later(30.001)
    assert await refused(changes.since("bob", cursor)) == "resync"
    later(29.9)
    assert (await changes.since("bob", cursor)).more is False


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "====",
        "é",
        "\ud800",
        "\0",
        cursor_of(None),
        cursor_of([]),
        cursor_of([1]),
        cursor_of({}),
        cursor_of("x" * 10),
        cursor_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        cursor_of([1, 2, 0, "", 0, "", 0, {"$gt": ""}, 0, 0, 0]),
        cursor_of([1, 2, 0, "", {"$gt": 0}, "", 0, "", 0, 0, 0]),
        cursor_of([1, 10**18, 0, "", 0, "", 0, "", 0, 0, 0]),
        cursor_of([1, -1, 0, "", 0, "", 0, "", 0, 0, 0]),
        cursor_of([1, True, 0, "", 0, "", 0, "", 0, 0, 0]),
        cursor_of([99, 2, 0, "", 0, "", 0, "", 0, 0, 0]),
        base64.urlsafe_b64encode(b"\xff\xfe").decode(),
        base64.urlsafe_b64encode(b"[NaN]").decode(),
    ],
)
async def test_a_cursor_that_is_none_of_ours_is_a_bad_request(changes: Changes, cursor: str) -> None:
    assert await refused(changes.since("bob", cursor)) == "bad_request"


async def test_any_place_in_a_cursor_of_ours_is_a_page_or_refused(changes: Changes) -> None:
    real = json.loads(base64.urlsafe_b64decode((await changes.since("bob", None)).next))
    for place, value in enumerate(real):
        for other in (
            [0, 253_402_300_799_999, -1, 10**30, "x", None]
            if type(value) is int
            else ["", "z\0", "\U0010ffff", 1, None]
        ):
            changed = [*real[:place], other, *real[place + 1 :]]
            code = ""
            try:
                await changes.since("bob", cursor_of(changed))
            except RelayError as error:
                code = error.code
            assert code in ("", "bad_request", "resync"), (place, other)
