"""The stores of accounts and conversations: one suite, in memory and on a real mongod."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.accounts import Device, User
from models.conversations import Conversation, Membership
from relay.security.pseudonyms import Pseudonyms
from relay.store.accounts import Accounts
from relay.store.conversations import Conversations
from relay.store.embedded import EmbeddedMongo
from relay.store.revisions import Proposal, Revisions
from relay.wire.errors import RelayError
from tests.support.arriving import arrive
from tests.support.control import (
    BACKENDS,
    always,
    change,
    clear,
    create,
    document,
    open_control,
    read,
    refused,
    row,
)

INACTIVE = timedelta(days=30)
BASE = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module", params=BACKENDS)
async def backend(request: pytest.FixtureRequest, mongod: EmbeddedMongo) -> AsyncIterator[str]:
    async with open_control(request.param, mongod.uri) as kind:
        yield kind


@pytest.fixture
async def accounts(backend: str) -> Accounts:
    await clear()
    return Accounts(inactive=INACTIVE, pseudonyms=Pseudonyms(b"a key for tests only, of 32 bytes."))


@pytest.fixture
def conversations(accounts: Accounts) -> Conversations:
    return Conversations()


@pytest.fixture
def revisions(accounts: Accounts) -> Revisions:
    return Revisions()


async def last_seen(key: str, moment: datetime | None) -> None:
    """Sets when a device was last seen; None: never connected yet."""
    change: dict[str, Any] = (
        {"$unset": {"lastSeen": ""}} if moment is None else {"$set": {"lastSeen": moment}}
    )
    await Device.get_motor_collection().update_one({"_id": key}, change)


async def came(key: str, seconds: float) -> None:
    """Sets when a device came, so many seconds ago."""
    moment = datetime.now(UTC) - timedelta(seconds=seconds)
    await Device.get_motor_collection().update_one(
        {"_id": key}, {"$set": {"createdAt": moment, "backAt": moment}}
    )


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
    assert await arrive(accounts, "ann", "phone", provision=False) is None
    assert not await accounts.exists("ann")
    arrival = await arrive(accounts, "ann", "phone", provision=True)
    assert arrival is not None
    assert (arrival.changed, arrival.gap_since, arrival.gap_why) == (True, None, None)
    assert await accounts.exists("ann")
    assert await accounts.active_devices(["ann"]) == {"ann": ["ann/phone"]}


async def test_a_known_device_arrives_unchanged_and_is_seen(accounts: Accounts) -> None:
    await arrive(accounts, "ann", "phone", provision=True)
    await last_seen("ann/phone", datetime.now(UTC) - INACTIVE + timedelta(minutes=1))
    await came("ann/phone", 11)
    before = datetime.now(UTC) - timedelta(seconds=1)
    arrival = await arrive(accounts, "ann", "phone", provision=False)
    assert arrival is not None
    assert (arrival.changed, arrival.gap_since) == (False, None)
    found = await Device.get_motor_collection().find_one({"_id": "ann/phone"})
    assert found is not None
    assert found["lastSeen"] >= before


async def test_a_device_that_has_just_come_counts_as_new_as_long_as_resolved_recipients_are_believed(
    accounts: Accounts,
) -> None:
    await arrive(accounts, "ann", "phone", provision=True)
    again = await arrive(accounts, "ann", "phone", provision=True)
    await came("ann/phone", 11)
    later = await arrive(accounts, "ann", "phone", provision=True)
    assert again is not None
    assert later is not None
    assert (again.changed, later.changed) == (True, False)


async def test_one_device_that_arrives_many_times_at_once_is_one_device(accounts: Accounts) -> None:
    found = await asyncio.gather(*(arrive(accounts, "ann", "phone", provision=True) for _ in range(10)))
    assert all(arrival is not None and arrival.gap_since is None for arrival in found)
    assert await Device.get_motor_collection().count_documents({}) == 1


async def test_a_device_back_from_inactivity_learns_since_when_it_missed_messages(accounts: Accounts) -> None:
    await arrive(accounts, "ann", "phone", provision=True)
    away = datetime.now(UTC) - INACTIVE - timedelta(days=5)
    await last_seen("ann/phone", away)
    arrival = await arrive(accounts, "ann", "phone", provision=True)
    assert arrival is not None
    assert arrival.changed
    assert arrival.gap_why == "inactive"
    assert arrival.gap_since is not None
    assert abs(arrival.gap_since - (away + INACTIVE).timestamp() * 1000) <= 1


async def test_an_arrival_tells_when_the_device_was_last_connected_live(accounts: Accounts) -> None:
    first = await arrive(accounts, "ann", "phone", provision=True, live=True)
    assert first is not None
    assert (first.live_until, first.quiet) == (None, False)
    before = datetime.now(UTC) - timedelta(hours=1)
    await Device.get_motor_collection().update_one({"_id": "ann/phone"}, {"$set": {"liveAt": before}})
    # Asking over HTTP is no connection on which anything was told.
    await arrive(accounts, "ann", "phone", provision=True)
    await User.get_motor_collection().update_one({"_id": "ann"}, {"$set": {"deliveredReceipts": False}})
    second = await arrive(accounts, "ann", "phone", provision=True, live=True)
    assert second is not None
    assert second.live_until == int(before.timestamp() * 1000)
    assert second.quiet
    third = await arrive(accounts, "ann", "phone", provision=True, live=True)
    assert third is not None
    assert third.live_until is not None
    assert third.live_until > second.live_until
    await Device.get_motor_collection().update_one({"_id": "ann/phone"}, {"$set": {"liveAt": before}})
    heard = before + timedelta(minutes=30)
    await accounts.seen({"ann/phone": heard})
    fourth = await arrive(accounts, "ann", "phone", provision=True, live=True)
    assert fourth is not None
    assert fourth.live_until is not None
    assert fourth.live_until == int(heard.timestamp() * 1000), "not when that was noted"


async def test_a_gap_is_told_until_the_device_has_drained(accounts: Accounts) -> None:
    await arrive(accounts, "ann", "phone", provision=True)
    await last_seen("ann/phone", datetime.now(UTC) - INACTIVE - timedelta(days=5))
    first = await arrive(accounts, "ann", "phone", provision=True)
    await came("ann/phone", 11)
    second = await arrive(accounts, "ann", "phone", provision=True)
    assert first is not None
    assert second is not None
    assert (second.changed, second.gap_since, second.gap_why) == (False, first.gap_since, "inactive")
    await accounts.close_gap("ann", "phone")
    third = await arrive(accounts, "ann", "phone", provision=True)
    assert third is not None
    assert third.gap_since is None


async def test_of_two_gaps_the_older_is_told(accounts: Accounts) -> None:
    await arrive(accounts, "ann", "phone", provision=True)
    await last_seen("ann/phone", datetime.now(UTC) - 3 * INACTIVE)
    first = await arrive(accounts, "ann", "phone", provision=True)
    await last_seen("ann/phone", datetime.now(UTC) - 2 * INACTIVE)
    second = await arrive(accounts, "ann", "phone", provision=True)
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
    await arrive(accounts, "ann", "phone", provision=True)
    await last_seen("ann/phone", None if away is None else datetime.now(UTC) - away)
    assert await accounts.active_devices(["ann"]) == ({"ann": ["ann/phone"]} if active else {})


async def test_devices_are_told_by_user(accounts: Accounts) -> None:
    for user, device in (("ann", "phone"), ("ann", "tablet"), ("bob", "phone"), ("cleo", "phone")):
        await arrive(accounts, user, device, provision=True)
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
        await arrive(accounts, "ann", device, provision=True)
        await last_seen(f"ann/{device}", moment)
    await accounts.seen(dict.fromkeys(("ann/a", "ann/b", "ann/unknown"), datetime.now(UTC)))
    found = {one["_id"]: one["lastSeen"] async for one in Device.get_motor_collection().find({})}
    assert found["ann/a"] > long_ago
    assert found["ann/b"] == future
    assert found["ann/c"] == long_ago
    assert set(found) == {"ann/a", "ann/b", "ann/c"}


# Conversations


async def everything(
    conversations: Conversations, user: str, limit: int, q: str | None = None
) -> tuple[list[str], int]:
    """The ids of every page, and how many pages there were."""
    found: list[str] = []
    cursor: str | None = None
    pages = 0
    while True:
        views, cursor = await conversations.page(user, limit=limit, cursor=cursor, q=q)
        assert len(views) <= limit
        found += [view.id for view in views]
        pages += 1
        if cursor is None:
            return found, pages


async def name_user(user: str, name: str | None = None, username: str | None = None) -> None:
    given = {key: value for key, value in (("name", name), ("username", username)) if value is not None}
    await User.get_motor_collection().update_one(
        {"_id": user}, {"$set": {"createdAt": BASE, **given}}, upsert=True
    )


async def test_a_conversation_is_shown_with_its_members_and_what_it_is_to_the_one_who_asks(
    conversations: Conversations, revisions: Revisions
) -> None:
    await name_user("ann", "Ann Archer", "ann.a")
    await name_user("bob", username="bobby")
    name, _ = await create(revisions, "ann", ["bob", "cleo"], name="trip")
    view = await conversations.get(name, "bob")
    assert (view.id, view.type, view.name, view.picture, view.description) == (
        name,
        "group",
        "trip",
        None,
        None,
    )
    assert (view.who_may_post, view.member_count) == ("members", 3)
    assert [(one.user, one.role, one.name) for one in view.members] == [
        ("ann", "admin", "Ann Archer"),
        ("bob", "member", "bobby"),
        ("cleo", "member", None),
    ]
    assert abs(view.created_at - datetime.now(UTC).timestamp() * 1000) < 60_000
    assert {one.joined_at for one in view.members} == {view.created_at} == {view.me.joined_at}
    me = view.me
    assert (me.role, me.muted_until, me.pinned, me.archived, me.read_up_to) == (
        "member",
        None,
        False,
        False,
        None,
    )
    assert (await conversations.get(name, "ann")).me.role == "admin"


async def test_absent_and_not_yours_and_left_and_dissolved_look_the_same(
    conversations: Conversations, revisions: Revisions
) -> None:
    name, _ = await create(revisions, "ann", ["bob", "cleo"])
    gone, _ = await create(revisions, "ann", ["bob"])
    await change(revisions, name, "ann", always(Proposal("removed", ["cleo"])), ["cleo"])
    await change(revisions, gone, "ann", always(Proposal("dissolved")), everybody=True)
    for conversation, user in ((name, "dan"), ("none", "ann"), (name, "cleo"), (gone, "ann")):
        assert await refused(conversations.get(conversation, user)) == "not_found"
        assert await refused(conversations.check_member(conversation, user)) == "not_found"
        assert await refused(conversations.members(conversation, user, limit=5, cursor=None)) == "not_found"
        assert await refused(conversations.set_own(conversation, user, {"pinned": True})) == "not_found"
        assert not await read(conversation, user, 5)
        assert await refused(conversations.member(conversation, user)) == "not_found"
    assert await everything(conversations, "cleo", 5) == ([], 1)
    assert await everything(conversations, "ann", 5) == ([name], 1)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 50])
async def test_pages_are_complete_and_last_changed_first(
    conversations: Conversations, revisions: Revisions, limit: int
) -> None:
    made = [(await create(revisions, "ann", ["bob"]))[0] for _ in range(7)]
    await create(revisions, "bob", ["cleo"])
    # Ties are usual: several changes in one millisecond.
    start = datetime.now(UTC).replace(microsecond=0)
    changed = {name: start - timedelta(milliseconds=number // 3) for number, name in enumerate(made)}
    for name, moment in changed.items():
        await Membership.get_motor_collection().update_one(
            {"_id": f"{name} ann"}, {"$set": {"updatedAt": moment}}
        )
    found, pages = await everything(conversations, "ann", limit)
    assert found == sorted(made, key=lambda name: (-changed[name].timestamp(), name))
    assert pages == -(-7 // limit)


async def test_what_is_changed_comes_first_for_everybody_in_it(
    conversations: Conversations, revisions: Revisions
) -> None:
    made = [(await create(revisions, "ann", ["bob"]))[0] for _ in range(3)]
    await Membership.get_motor_collection().update_many({}, {"$set": {"updatedAt": BASE}})
    await change(revisions, made[1], "ann", always(Proposal("changed", fields={"name": "new"})))
    for user in ("ann", "bob"):
        assert (await everything(conversations, user, 5))[0][0] == made[1]
    # Of two changes in one millisecond neither is the later one.
    await asyncio.sleep(0.005)
    await conversations.set_own(made[2], "bob", {"pinned": True})
    assert (await everything(conversations, "bob", 5))[0][0] == made[2]
    assert (await everything(conversations, "ann", 5))[0][0] == made[1], "a pin is one's own"


async def test_a_page_of_nobody_is_empty(conversations: Conversations) -> None:
    assert await conversations.page("ann", limit=10, cursor=None) == ([], None)


async def test_lists_show_everybody_of_small_conversations_and_oneself_of_large_ones(
    conversations: Conversations, revisions: Revisions
) -> None:
    people = [f"u{number:02}" for number in range(16)]
    small, _ = await create(revisions, "ann", people[:15])
    large, _ = await create(revisions, "ann", people)
    views, _ = await conversations.page("ann", limit=5, cursor=None)
    shown = {view.id: view for view in views}
    assert [one.user for one in shown[small].members] == ["ann", *people[:15]]
    assert [one.user for one in shown[large].members] == ["ann"]
    assert (shown[small].member_count, shown[large].member_count) == (16, 17)


@pytest.mark.parametrize(
    ("q", "wanted"),
    [
        ("tri", ["trip"]),
        ("TRIP to", ["trip"]),
        ("to oslo", ["trip"]),
        ("slo", []),
        ("bob", ["bob", "trip"]),
        ("BOB builder", ["bob", "trip"]),
        ("cl", ["cleo"]),
        ("ann", ["anns"]),
        ("caf", ["cafe"]),
        ("nothing", []),
        (".*", []),
        ("$ne", []),
    ],
)
@pytest.mark.parametrize("limit", [1, 10])
async def test_q_finds_words_that_begin_so_in_names_of_conversations_and_of_other_members(
    conversations: Conversations, revisions: Revisions, q: str, wanted: list[str], limit: int
) -> None:
    await name_user("ann", "Ann Archer")
    await name_user("bob", "Bob Builder")
    made = {
        "trip": (await create(revisions, "ann", ["bob"], name="Trip to Oslo"))[0],
        "cafe": (await create(revisions, "ann", ["dan"], name="CAFÉ"))[0],
        "anns": (await create(revisions, "ann", ["dan"], name="Of Ann"))[0],
        "bob": (await create(revisions, "ann", ["bob"], "direct"))[0],
        "cleo": (await create(revisions, "ann", ["cleo"], "direct"))[0],
    }
    found, _ = await everything(conversations, "ann", limit, q)
    assert sorted(found) == sorted(made[name] for name in wanted)


async def test_a_search_goes_through_conversations_at_any_depth_in_bounded_steps(
    conversations: Conversations, revisions: Revisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.store.conversations._SCANNED", 3)
    monkeypatch.setattr("relay.store.conversations._MOST_SCANNED", 6)
    deep = [(await create(revisions, "ann", ["bob"], name="needle"))[0] for _ in range(2)]
    for _ in range(20):
        await create(revisions, "ann", ["bob"], name="hay")
    views, cursor = await conversations.page("ann", limit=5, cursor=None, q="needle")
    assert views == []
    assert cursor is not None
    found, pages = await everything(conversations, "ann", 5, "needle")
    assert sorted(found) == sorted(deep)
    assert pages == 4


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
async def test_member_pages_are_complete_and_by_user(
    conversations: Conversations, revisions: Revisions, limit: int
) -> None:
    name, _ = await create(revisions, "m", ["b", "a", "Z", "c.d", "c", "x"])
    found: list[str] = []
    cursor: str | None = None
    while True:
        page, cursor = await conversations.members(name, "a", limit=limit, cursor=cursor)
        assert len(page) <= limit
        found += [one.user for one in page]
        if cursor is None:
            break
    assert found == sorted(["m", "b", "a", "Z", "c.d", "c", "x"])


async def test_what_a_member_sets_for_themselves_is_kept_and_unset(
    conversations: Conversations, revisions: Revisions
) -> None:
    name, _ = await create(revisions, "ann", ["bob"])
    until = datetime(2027, 1, 1, tzinfo=UTC)
    await conversations.set_own(name, "bob", {"mutedUntil": until, "pinned": True, "archived": True})
    me = (await conversations.get(name, "bob")).me
    assert (me.muted_until, me.pinned, me.archived) == (int(until.timestamp() * 1000), True, True)
    other = (await conversations.get(name, "ann")).me
    assert (other.muted_until, other.pinned, other.archived) == (None, False, False)
    await conversations.set_own(name, "bob", {"mutedUntil": None, "pinned": None})
    me = (await conversations.get(name, "bob")).me
    assert (me.muted_until, me.pinned, me.archived) == (None, False, True)


async def test_a_read_cursor_moves_forward_only(conversations: Conversations, revisions: Revisions) -> None:
    name, _ = await create(revisions, "ann", ["bob"])
    await asyncio.gather(*(read(name, "bob", up_to) for up_to in (5, 90, 7, 12)))
    assert (await conversations.get(name, "bob")).me.read_up_to == 90
    before = await row(name, "bob")
    await read(name, "bob", 89)
    assert await row(name, "bob") == before
    assert (await conversations.get(name, "ann")).me.read_up_to is None


async def test_who_comes_back_begins_anew(conversations: Conversations, revisions: Revisions) -> None:
    name, _ = await create(revisions, "ann", ["bob"])
    await conversations.set_own(name, "bob", {"pinned": True})
    await read(name, "bob", 5)
    first = (await conversations.get(name, "bob")).me
    await change(revisions, name, "ann", always(Proposal("role", ["bob"], role="admin")), ["bob"])
    await change(revisions, name, "ann", always(Proposal("removed", ["bob"])), ["bob"])
    await asyncio.sleep(0.005)
    await change(revisions, name, "ann", always(Proposal("added", ["bob"])), ["bob"])
    me = (await conversations.get(name, "bob")).me
    assert (me.role, me.pinned, me.read_up_to) == ("member", False, None)
    assert me.joined_at > first.joined_at


async def test_of_all_who_could_follow_an_admin_the_moderator_does_then_the_eldest(
    conversations: Conversations, revisions: Revisions
) -> None:
    name, _ = await create(revisions, "ann", ["cleo"])
    await asyncio.sleep(0.005)
    await change(revisions, name, "ann", always(Proposal("added", ["bob", "dan"])), ["bob", "dan"])
    assert await conversations.successor(name, "ann") == "cleo"
    await change(revisions, name, "ann", always(Proposal("role", ["dan"], role="moderator")), ["dan"])
    assert await conversations.successor(name, "ann") == "dan"
    assert await conversations.successor(name, "dan") == "cleo"
    await change(revisions, name, "ann", always(Proposal("removed", ["bob", "cleo", "dan"])), ["bob"])
    assert await conversations.successor(name, "ann") is None


async def test_the_conversations_of_a_user_are_all_of_theirs_up_to_a_bound(
    conversations: Conversations, revisions: Revisions
) -> None:
    made = {(await create(revisions, "ann", ["bob"]))[0]: "group" for _ in range(5)}
    made[(await create(revisions, "ann", ["bob"], "direct"))[0]] = "direct"
    await create(revisions, "bob", ["cleo"])
    assert len(await conversations.of_user("ann", 2)) == 2
    found = await conversations.of_user("ann", 100)
    assert dict(found) == made
    assert len(found) == len(made)


async def test_a_person_who_is_forgotten_is_found_by_no_key_of_theirs(
    conversations: Conversations, revisions: Revisions
) -> None:
    group, _ = await create(revisions, "ann", ["bob"], ref="a-ref")
    pair, _ = await create(revisions, "bob", ["ann"], "direct")
    kept, _ = await create(revisions, "bob", ["ann"], ref="b-ref")
    await conversations.forget_creator("ann", "nobody")
    assert [(await document(name))["createdBy"] for name in (group, pair, kept)] == ["nobody", "bob", "bob"]
    assert ["unique" in await document(name) for name in (group, pair, kept)] == [False, False, True]


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


async def test_both_backends_hold_the_same_documents(
    backend: str, accounts: Accounts, revisions: Revisions
) -> None:
    await arrive(accounts, "ann", "phone", provision=True)
    name, _ = await create(revisions, "ann", ["bob"], "direct")
    assert set(await document(name)) == {
        "_id",
        "type",
        "createdBy",
        "createdAt",
        "unique",
        "rev",
        "memberCount",
    }, backend
    assert set(await row(name, "bob")) == {
        "_id",
        "conversationId",
        "user",
        "role",
        "joinedAt",
        "updatedAt",
        "rev",
    }
    parsed = await Membership.get(f"{name} bob")
    assert parsed is not None
    assert parsed.user == "bob"
    assert await Conversation.get(name) is not None
