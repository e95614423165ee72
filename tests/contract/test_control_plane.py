"""The stores of accounts and conversations: one suite, in memory and on a real mongod."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from beanie import init_beanie
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.accounts import Device, User
from models.conversations import Conversation, Membership
from relay.store.accounts import Accounts
from relay.store.conversations import Conversations, ConversationView
from relay.store.embedded import EmbeddedMongo
from relay.store.mongo import CONTROL, Mongo
from relay.wire.errors import RelayError
from tests.support.memory import start_in_memory

INACTIVE = timedelta(days=30)


@pytest.fixture(scope="module", params=["memory", "mongod"])
async def backend(request: pytest.FixtureRequest, mongod: EmbeddedMongo) -> AsyncIterator[str]:
    name = f"c{uuid.uuid4().hex[:20]}"
    if request.param == "memory":
        await start_in_memory(name)
        yield "memory"
        return
    mongo = Mongo(mongod.uri, name)
    await init_beanie(database=mongo.database, document_models=list(CONTROL))
    yield "mongod"
    await mongo.client.drop_database(name)
    mongo.close()


async def clear() -> None:
    for document in (User, Device, Conversation, Membership):
        await document.get_motor_collection().delete_many({})


@pytest.fixture
async def accounts(backend: str) -> Accounts:
    await clear()
    return Accounts(inactive=INACTIVE)


@pytest.fixture
def conversations(accounts: Accounts) -> Conversations:
    return Conversations(accounts)


async def direct(conversations: Conversations, user: str, other: str) -> tuple[ConversationView, bool]:
    return await conversations.create(user, "direct", [other], name=None, ref=None)


async def group(
    conversations: Conversations, user: str, *others: str, ref: str | None = None, name: str | None = "group"
) -> tuple[ConversationView, bool]:
    return await conversations.create(user, "group", list(others), name=name, ref=ref)


async def last_seen(key: str, moment: datetime | None) -> None:
    """Sets when a device was last seen; None: never connected yet."""
    change: dict[str, Any] = (
        {"$unset": {"lastSeen": ""}} if moment is None else {"$set": {"lastSeen": moment}}
    )
    await Device.get_motor_collection().update_one({"_id": key}, change)


async def refused(call: Awaitable[object]) -> str:
    with pytest.raises(RelayError) as caught:
        await call
    return caught.value.code


# Accounts


async def test_users_are_added_once_however_often_and_by_how_many(accounts: Accounts) -> None:
    assert not await accounts.exists("ann")
    await asyncio.gather(*(accounts.add_users(["ann", "bob", "ann"]) for _ in range(10)))
    await accounts.add_users([])
    assert await accounts.exists("ann")
    assert await User.get_motor_collection().count_documents({}) == 2
    assert await accounts.missing_users(["cleo", "ann", "dan", "bob"]) == ["cleo", "dan"]
    assert await accounts.missing_users([]) == []


async def test_an_added_user_keeps_the_time_of_the_first_addition(accounts: Accounts) -> None:
    await accounts.add_users(["ann"])
    before = await User.get_motor_collection().find_one({"_id": "ann"})
    await accounts.add_users(["ann"])
    assert await User.get_motor_collection().find_one({"_id": "ann"}) == before


async def test_an_unknown_device_arrives_only_when_it_may_be_created(accounts: Accounts) -> None:
    assert await accounts.arrive("ann", "phone", provision=False) is None
    assert not await accounts.exists("ann")
    arrival = await accounts.arrive("ann", "phone", provision=True)
    assert arrival is not None
    assert (arrival.changed, arrival.gap_since, arrival.gap_why) == (True, None, None)
    assert await accounts.exists("ann")
    assert await accounts.active_devices(["ann"]) == {"ann": ["ann/phone"]}


async def test_a_known_device_arrives_unchanged_and_is_seen(accounts: Accounts) -> None:
    await accounts.arrive("ann", "phone", provision=True)
    await last_seen("ann/phone", datetime.now(UTC) - INACTIVE + timedelta(minutes=1))
    before = datetime.now(UTC) - timedelta(seconds=1)
    arrival = await accounts.arrive("ann", "phone", provision=False)
    assert arrival is not None
    assert (arrival.changed, arrival.gap_since) == (False, None)
    found = await Device.get_motor_collection().find_one({"_id": "ann/phone"})
    assert found is not None
    assert found["lastSeen"] >= before


async def test_one_device_that_arrives_many_times_at_once_is_one_device(accounts: Accounts) -> None:
    found = await asyncio.gather(*(accounts.arrive("ann", "phone", provision=True) for _ in range(10)))
    assert all(arrival is not None and arrival.gap_since is None for arrival in found)
    assert await Device.get_motor_collection().count_documents({}) == 1


async def test_a_device_back_from_inactivity_learns_since_when_it_missed_messages(accounts: Accounts) -> None:
    await accounts.arrive("ann", "phone", provision=True)
    away = datetime.now(UTC) - INACTIVE - timedelta(days=5)
    await last_seen("ann/phone", away)
    arrival = await accounts.arrive("ann", "phone", provision=True)
    assert arrival is not None
    assert arrival.changed
    assert arrival.gap_why == "inactive"
    assert arrival.gap_since is not None
    assert abs(arrival.gap_since - (away + INACTIVE).timestamp() * 1000) <= 1


async def test_a_gap_is_told_until_the_device_has_drained(accounts: Accounts) -> None:
    await accounts.arrive("ann", "phone", provision=True)
    await last_seen("ann/phone", datetime.now(UTC) - INACTIVE - timedelta(days=5))
    first = await accounts.arrive("ann", "phone", provision=True)
    second = await accounts.arrive("ann", "phone", provision=True)
    assert first is not None
    assert second is not None
    assert (second.changed, second.gap_since, second.gap_why) == (False, first.gap_since, "inactive")
    await accounts.close_gap("ann", "phone")
    third = await accounts.arrive("ann", "phone", provision=True)
    assert third is not None
    assert third.gap_since is None


async def test_of_two_gaps_the_older_is_told(accounts: Accounts) -> None:
    await accounts.arrive("ann", "phone", provision=True)
    await last_seen("ann/phone", datetime.now(UTC) - 3 * INACTIVE)
    first = await accounts.arrive("ann", "phone", provision=True)
    await last_seen("ann/phone", datetime.now(UTC) - 2 * INACTIVE)
    second = await accounts.arrive("ann", "phone", provision=True)
    assert first is not None
    assert second is not None
    assert second.changed
    assert second.gap_since == first.gap_since


@pytest.mark.parametrize(
    ("away", "active"),
    [
        (timedelta(0), True),
        (INACTIVE - timedelta(minutes=1), True),
        (INACTIVE + timedelta(minutes=1), False),
        (None, True),
    ],
)
async def test_a_device_is_active_for_thirty_days_and_before_its_first_connection(
    accounts: Accounts, away: timedelta | None, active: bool
) -> None:
    await accounts.arrive("ann", "phone", provision=True)
    await last_seen("ann/phone", None if away is None else datetime.now(UTC) - away)
    assert await accounts.active_devices(["ann"]) == ({"ann": ["ann/phone"]} if active else {})


async def test_devices_are_told_by_user(accounts: Accounts) -> None:
    for user, device in (("ann", "phone"), ("ann", "tablet"), ("bob", "phone"), ("cleo", "phone")):
        await accounts.arrive(user, device, provision=True)
    found = await accounts.active_devices(["ann", "bob", "dan"])
    assert {user: set(keys) for user, keys in found.items()} == {
        "ann": {"ann/phone", "ann/tablet"},
        "bob": {"bob/phone"},
    }
    assert await accounts.active_devices([]) == {}


async def test_seen_moves_forward_only_and_touches_nobody_else(accounts: Accounts) -> None:
    future = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    long_ago = future - timedelta(days=9)
    for device, moment in (("a", long_ago), ("b", future), ("c", long_ago)):
        await accounts.arrive("ann", device, provision=True)
        await last_seen(f"ann/{device}", moment)
    await accounts.seen(["ann/a", "ann/b", "ann/unknown"])
    found = {one["_id"]: one["lastSeen"] async for one in Device.get_motor_collection().find({})}
    assert found["ann/a"] > long_ago
    assert found["ann/b"] == future
    assert found["ann/c"] == long_ago
    assert set(found) == {"ann/a", "ann/b", "ann/c"}


# Conversations


async def test_a_new_conversation_has_its_members_and_their_roles(conversations: Conversations) -> None:
    pair, new = await direct(conversations, "bob", "ann")
    assert new
    assert (pair.type, pair.name) == ("direct", None)
    assert [(one.user, one.role) for one in pair.members] == [("ann", "member"), ("bob", "member")]
    many, new = await group(conversations, "bob", "cleo", "ann", "cleo", name="trip")
    assert new
    assert (many.type, many.name) == ("group", "trip")
    assert [(one.user, one.role) for one in many.members] == [
        ("ann", "member"),
        ("bob", "admin"),
        ("cleo", "member"),
    ]
    assert abs(many.created_at - datetime.now(UTC).timestamp() * 1000) < 60_000
    assert await conversations.get(many.id, "cleo") == many


async def test_of_twenty_who_make_the_same_direct_conversation_at_once_one_does(
    conversations: Conversations,
) -> None:
    found = await asyncio.gather(
        *(direct(conversations, *(("ann", "bob") if number % 2 else ("bob", "ann"))) for number in range(20))
    )
    assert len({view.id for view, _ in found}) == 1
    assert [new for _, new in found].count(True) == 1
    for view, _ in found:
        assert [one.user for one in view.members] == ["ann", "bob"]
    assert await Conversation.get_motor_collection().count_documents({}) == 1
    assert await Membership.get_motor_collection().count_documents({}) == 2
    assert await Conversation.get_motor_collection().count_documents({"forming": {"$exists": True}}) == 0


async def test_people_of_similar_names_do_not_share_a_direct_conversation(
    conversations: Conversations,
) -> None:
    pairs = [("a", "b"), ("a", "b.c"), ("a.b", "c"), ("a", "B"), ("a", "a")]
    found = [(await direct(conversations, *pair))[0].id for pair in pairs]
    assert len(set(found)) == len(pairs)


async def test_a_repeated_ref_finds_the_first_group(conversations: Conversations) -> None:
    ref = str(uuid.uuid4())
    first, new = await group(conversations, "ann", "bob", ref=ref, name="trip")
    again, repeated = await group(conversations, "ann", "cleo", ref=ref, name="other")
    assert (new, repeated) == (True, False)
    assert again == first
    other, new = await group(conversations, "bob", "ann", ref=ref)
    assert new
    assert other.id != first.id


async def test_of_ten_who_use_one_ref_at_once_one_makes_the_group(conversations: Conversations) -> None:
    ref = str(uuid.uuid4())
    found = await asyncio.gather(*(group(conversations, "ann", "bob", "cleo", ref=ref) for _ in range(10)))
    assert len({view.id for view, _ in found}) == 1
    assert [new for _, new in found].count(True) == 1
    assert {len(view.members) for view, _ in found} == {3}


async def test_groups_without_a_ref_are_different_groups(conversations: Conversations) -> None:
    first, _ = await group(conversations, "ann", "bob")
    second, new = await group(conversations, "ann", "bob")
    assert new
    assert first.id != second.id


async def killed_half_way(written: list[str]) -> str:
    """A creation that died after it had written these memberships: ann's direct conversation with bob."""
    name, moment = str(uuid.uuid4()), datetime.now(UTC)
    await Conversation.get_motor_collection().insert_one(
        {
            "_id": name,
            "type": "direct",
            "createdBy": "ann",
            "createdAt": moment,
            "unique": "direct ann bob",
            "forming": ["ann", "bob"],
        }
    )
    for user in written:
        await Membership.get_motor_collection().insert_one(
            {
                "_id": f"{name} {user}",
                "conversationId": name,
                "user": user,
                "role": "member",
                "joinedAt": moment,
                "updatedAt": moment,
            }
        )
    return name


@pytest.mark.parametrize("written", [[], ["ann"], ["bob"], ["ann", "bob"]])
async def test_a_creation_that_died_half_way_is_finished_by_repair(
    conversations: Conversations, written: list[str]
) -> None:
    name = await killed_half_way(written)
    assert await conversations.repair() == 1
    for user in ("ann", "bob"):
        view = await conversations.get(name, user)
        assert [one.user for one in view.members] == ["ann", "bob"]
        assert [one.id for one in (await conversations.page(user, limit=5, cursor=None))[0]] == [name]
    assert await conversations.repair() == 0


@pytest.mark.parametrize("written", [[], ["ann"], ["ann", "bob"]])
async def test_a_creation_that_died_half_way_is_finished_by_its_repetition(
    conversations: Conversations, written: list[str]
) -> None:
    name = await killed_half_way(written)
    view, new = await direct(conversations, "bob", "ann")
    assert (view.id, new) == (name, False)
    assert [one.user for one in view.members] == ["ann", "bob"]
    assert await conversations.repair() == 0


async def test_repair_changes_nothing_that_is_whole(conversations: Conversations) -> None:
    view, _ = await group(conversations, "ann", "bob")
    await Membership.get_motor_collection().delete_one({"_id": f"{view.id} bob"})
    assert await conversations.repair() == 0
    assert [one.user for one in (await conversations.get(view.id, "ann")).members] == ["ann"]


async def test_absent_and_not_yours_look_the_same(conversations: Conversations) -> None:
    view, _ = await direct(conversations, "ann", "bob")
    assert await refused(conversations.get(view.id, "cleo")) == "not_found"
    assert await refused(conversations.get("none", "ann")) == "not_found"


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 50])
async def test_pages_are_complete_and_last_changed_first(conversations: Conversations, limit: int) -> None:
    made = [(await group(conversations, "ann", "bob"))[0].id for _ in range(7)]
    await group(conversations, "bob", "cleo")
    # Ties are usual: several changes in one millisecond.
    start = datetime.now(UTC).replace(microsecond=0)
    changed = {name: start - timedelta(milliseconds=number // 3) for number, name in enumerate(made)}
    for name, moment in changed.items():
        await Membership.get_motor_collection().update_one(
            {"_id": f"{name} ann"}, {"$set": {"updatedAt": moment}}
        )
    found: list[str] = []
    cursor: str | None = None
    pages = 0
    while True:
        views, cursor = await conversations.page("ann", limit=limit, cursor=cursor)
        found += [view.id for view in views]
        pages += 1
        assert len(views) <= limit
        if cursor is None:
            break
    assert found == sorted(made, key=lambda name: (-changed[name].timestamp(), name))
    assert pages == -(-7 // limit)


async def test_a_page_of_nobody_is_empty(conversations: Conversations) -> None:
    assert await conversations.page("ann", limit=10, cursor=None) == ([], None)


def cursor_of(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


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
        cursor_of([1, 2]),
        cursor_of(["1", "x"]),
        cursor_of([True, "x"]),
        cursor_of([1.5, "x"]),
        cursor_of([1, "x", 2]),
        cursor_of({"a": 1, "b": "x"}),
        cursor_of([1, {"$gt": ""}]),
        cursor_of([{"$gt": 0}, "x"]),
        cursor_of([10**15 * 9, "x"]),
        cursor_of([-(10**15) * 9, "x"]),
        cursor_of([10**30, "x"]),
        base64.urlsafe_b64encode(b"\xff\xfe").decode(),
        base64.urlsafe_b64encode(b'[1,"\\ud800"]').decode(),
        base64.urlsafe_b64encode(b"[NaN]").decode(),
    ],
)
async def test_a_cursor_that_is_none_of_ours_is_a_bad_request(
    conversations: Conversations, cursor: str
) -> None:
    assert await refused(conversations.page("ann", limit=5, cursor=cursor)) == "bad_request"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    cursor=st.text()
    | st.binary().map(lambda raw: base64.urlsafe_b64encode(raw).decode())
    | st.tuples(st.integers() | st.text() | st.floats(), st.text() | st.integers()).map(cursor_of)
)
async def test_any_cursor_is_a_page_or_a_bad_request(conversations: Conversations, cursor: str) -> None:
    code = ""
    try:
        assert await conversations.page("ann", limit=5, cursor=cursor) == ([], None)
    except RelayError as error:
        code = error.code
    assert code in ("", "bad_request")


async def test_an_audience_is_the_members_with_their_active_devices(
    accounts: Accounts, conversations: Conversations
) -> None:
    for user, device in (("ann", "phone"), ("ann", "tablet"), ("bob", "phone"), ("dan", "phone")):
        await accounts.arrive(user, device, provision=True)
    await last_seen("ann/tablet", datetime.now(UTC) - 2 * INACTIVE)
    one, _ = await group(conversations, "ann", "bob", "cleo")
    two, _ = await direct(conversations, "ann", "dan")
    found = await conversations.audiences([one.id, two.id, "none"])
    assert found == {
        one.id: {"ann": ["ann/phone"], "bob": ["bob/phone"], "cleo": []},
        two.id: {"ann": ["ann/phone"], "dan": ["dan/phone"]},
    }


async def test_many_audiences_are_complete(
    conversations: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.store.conversations._LOAD", 3)
    made = [(await group(conversations, "ann", f"u{number}"))[0].id for number in range(8)]
    found = await conversations.audiences(made)
    assert {name: set(members) for name, members in found.items()} == {
        name: {"ann", f"u{number}"} for number, name in enumerate(made)
    }


async def test_both_backends_hold_the_same_documents(
    backend: str, accounts: Accounts, conversations: Conversations
) -> None:
    await accounts.arrive("ann", "phone", provision=True)
    view, _ = await direct(conversations, "ann", "bob")
    stored = await Conversation.get_motor_collection().find_one({"_id": view.id})
    assert stored is not None
    assert set(stored) == {"_id", "type", "createdBy", "createdAt", "unique"}, backend
    member = await Membership.get_motor_collection().find_one({"_id": f"{view.id} bob"})
    assert member is not None
    assert set(member) == {"_id", "conversationId", "user", "role", "joinedAt", "updatedAt"}
    parsed = await Membership.get(f"{view.id} bob")
    assert parsed is not None
    assert parsed.user == "bob"
