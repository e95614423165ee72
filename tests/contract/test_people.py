"""The stores of people, contacts and reports: one suite, in memory and on a real mongod."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.accounts import Device, User
from models.contacts import Contact, Report
from models.conversations import Conversation, Membership
from relay.store.contacts import Contacts
from relay.store.embedded import EmbeddedMongo
from relay.store.people import SEARCHES, People
from relay.store.reports import Complaint, Reports
from relay.store.searching import KEY_LENGTH, fold, looks_like_phone, phone_key, search_keys
from relay.wire.cursor import text_cursor_at
from relay.wire.errors import RelayError
from relay.wire.ids import new_id
from tests.support.control import BACKENDS, open_control

MOST = 6


@pytest.fixture(scope="module", params=BACKENDS)
async def backend(request: pytest.FixtureRequest, mongod: EmbeddedMongo) -> AsyncIterator[str]:
    async with open_control(request.param, mongod.uri) as kind:
        yield kind


@pytest.fixture
async def people(backend: str) -> People:
    for document in (User, Device, Contact, Report, Conversation, Membership):
        await document.get_motor_collection().delete_many({})
    return People()


@pytest.fixture
def contacts(people: People) -> Contacts:
    return Contacts(most=MOST)


async def make(people: People, user: str, **fields: Any) -> None:
    """A user with these fields, found as the store would have it."""
    username = fields.pop("username", None)
    document = {"_id": user, "createdAt": datetime.now(UTC)}
    await User.get_motor_collection().insert_one(
        document if username is None else document | {"username": username}
    )
    await people.change(user, {"about": "here", **fields})


async def stored(user: str) -> dict[str, Any]:
    found = await User.get_motor_collection().find_one({"_id": user})
    assert found is not None
    return dict(found)


async def test_who_changed_whether_receipts_are_told_is_found_by_when_and_the_last_change_counts(
    people: People,
) -> None:
    for user in ("ann", "bob", "cleo"):
        await make(people, user)
    before = datetime.now(UTC) - timedelta(seconds=1)
    await people.change("ann", {"deliveredReceipts": False})
    first = (await people.own("ann")).receipts_at
    assert first == (await people.change("ann", {"deliveredReceipts": False})).receipts_at, "no change"
    for value in (False, None):
        await people.change("bob", {"deliveredReceipts": value})
    await people.change("cleo", {"readReceipts": False})
    found = {user: (quiet, moment) async for user, quiet, moment in people.receipts_changed_since(before)}
    assert {user: quiet for user, (quiet, _) in found.items()} == {"ann": True, "bob": False}
    assert found["ann"][1] == first
    assert [
        one async for one in people.receipts_changed_since(datetime.now(UTC) + timedelta(minutes=1))
    ] == []


async def refused(call: Awaitable[object]) -> str:
    with pytest.raises(RelayError) as caught:
        await call
    return caught.value.code


async def all_pages(
    page: Callable[[str | None], Awaitable[tuple[list[Any], str | None]]], limit: int
) -> list[Any]:
    """Everything a list tells, page by page."""
    found: list[Any] = []
    cursor: str | None = None
    for _ in range(200):
        items, cursor = await page(cursor)
        assert len(items) <= limit
        found += items
        if cursor is None:
            return found
    raise AssertionError("the list has no end")


async def found_by(people: People, q: str, *, limit: int = 50) -> list[str]:
    return [
        profile.id
        for profile in await all_pages(lambda cursor: people.search(q, limit=limit, cursor=cursor), limit)
    ]


# Folding


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("  Ann   Lee ", "ann lee"),
        ("ANN", "ann"),
        ("Straße", "strasse"),
        ("ﬁne", "fine"),
        ("Ａｎｎ", "ann"),
        ("Cafe\u0301", "caf\u00e9"),
        ("\u00a0\t\n", ""),
        ("", ""),
        ("x" * 100, "x" * KEY_LENGTH),
    ],
)
def test_texts_that_read_alike_fold_alike(text: str, folded: str) -> None:
    assert fold(text) == folded


@settings(max_examples=200)
@given(st.text(max_size=100))
def test_a_folded_text_is_short_and_has_no_blanks_around_it(text: str) -> None:
    folded = fold(text)
    assert len(folded) <= KEY_LENGTH
    assert folded == folded.strip()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("+49 30 555-0100", "+49305550100"),
        ("49 (30) 5550100", "+49305550100"),
        ("+1234567", "+1234567"),
        ("+123456", None),
        ("+1234567890123456", None),
        ("+0123456789", None),
        ("++4930555010", None),
        ("+49x30555010", None),
        ("+٤٩٣٠٥٥٥٠١٠٠", None),
        ("", None),
    ],
)
def test_a_phone_number_has_one_form(text: str, key: str | None) -> None:
    assert phone_key(text) == key


@pytest.mark.parametrize(
    ("q", "phone"), [("+49", True), ("12 34-5", True), ("ann", False), ("- -", False), ("1a", False)]
)
def test_what_looks_like_a_phone_number_is_searched_as_one(q: str, phone: bool) -> None:
    assert looks_like_phone(q) is phone


def test_preferences_suspension_and_erasure_take_keys_away() -> None:
    user: dict[str, Any] = {"username": "Ann.L", "name": "Ann  Lee", "phone": "+49305550100"}
    assert search_keys(user) == (
        {"usernameKey": "ann.l", "nameKey": "ann lee", "phoneKey": "+49305550100"},
        [],
    )
    assert search_keys(user | {"findableByName": False}) == (
        {"phoneKey": "+49305550100"},
        ["usernameKey", "nameKey"],
    )
    assert search_keys(user | {"findableByPhone": False})[1] == ["phoneKey"]
    for gone in ("suspendedAt", "erasingAt"):
        assert search_keys(user | {gone: datetime.now(UTC)}) == ({}, ["usernameKey", "nameKey", "phoneKey"])
    assert search_keys({}) == ({}, ["usernameKey", "nameKey", "phoneKey"])


# Profiles


async def test_a_profile_starts_empty_with_everything_allowed(people: People) -> None:
    await User.get_motor_collection().insert_one({"_id": "ann", "createdAt": datetime.now(UTC)})
    own = await people.own("ann")
    assert (own.id, own.username, own.name, own.phone, own.picture, own.about) == (
        "ann",
        None,
        None,
        None,
        None,
        None,
    )
    assert (own.findable_by_name, own.findable_by_phone) == (True, True)
    assert (own.who_may_message, own.who_may_add) == ("anyone", "anyone")
    assert abs(own.created_at - datetime.now(UTC).timestamp() * 1000) < 60_000
    assert await refused(people.own("nobody")) == "not_found"
    assert await refused(people.change("nobody", {"name": "Ann"})) == "not_found"


async def test_keys_follow_the_profile(people: People) -> None:
    await make(people, "ann", name="Ann Lee", phone="+49305550100")
    assert (await stored("ann"))["nameKey"] == "ann lee"
    await people.change("ann", {"name": "Zoe", "findableByPhone": False})
    document = await stored("ann")
    assert document["nameKey"] == "zoe"
    assert "phoneKey" not in document
    await people.change("ann", {"name": None, "findableByPhone": None})
    document = await stored("ann")
    assert "name" not in document
    assert "nameKey" not in document
    assert document["phoneKey"] == "+49305550100"


async def test_every_change_moves_its_time_and_nothing_else_does(people: People) -> None:
    await make(people, "ann")
    ahead = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    await User.get_motor_collection().update_one({"_id": "ann"}, {"$set": {"updatedAt": ahead}})
    await people.change("ann", {"name": "Ann"})
    moved = (await stored("ann"))["updatedAt"]
    assert moved > ahead
    await people.change("ann", {"name": "Ann"})
    await people.change("ann", {})
    assert (await stored("ann"))["updatedAt"] == moved


async def test_changes_of_different_fields_at_once_all_last(people: People) -> None:
    await make(people, "ann")
    await asyncio.gather(
        people.change("ann", {"name": "Ann Lee"}),
        people.change("ann", {"phone": "+49305550100"}),
        people.change("ann", {"about": "away"}),
        people.change("ann", {"picture": "p1"}),
        people.change("ann", {"whoMayAdd": "contacts"}),
        people.change("ann", {"findableByName": False}),
    )
    document = await stored("ann")
    assert (document["name"], document["phone"], document["about"]) == ("Ann Lee", "+49305550100", "away")
    assert (document["picture"], document["whoMayAdd"], document["findableByName"]) == (
        "p1",
        "contacts",
        False,
    )
    assert document["phoneKey"] == "+49305550100"
    assert "nameKey" not in document


async def test_others_see_no_phone_and_nobody_who_is_suspended_or_leaving(people: People) -> None:
    await make(people, "ann", name="Ann", phone="+49305550100", picture="p1")
    await make(people, "bob")
    await make(people, "cleo")
    await people.suspend("bob")
    await User.get_motor_collection().update_one({"_id": "cleo"}, {"$set": {"erasingAt": datetime.now(UTC)}})
    found = await people.profiles(["ann", "bob", "cleo", "nobody"])
    assert set(found) == {"ann"}
    assert (found["ann"].name, found["ann"].picture, found["ann"].about) == ("Ann", "p1", "here")
    assert not hasattr(found["ann"], "phone")
    assert await people.profile("bob") is None


async def test_names_and_restrictions_of_many(people: People) -> None:
    await make(people, "ann", name="Ann", username="ann.l")
    await make(people, "bob", username="bobby", whoMayMessage="contacts")
    await make(people, "cleo", whoMayAdd="contacts")
    assert await people.names(["ann", "bob", "cleo", "nobody"]) == {
        "ann": "Ann",
        "bob": "bobby",
        "cleo": None,
    }
    assert await people.restricted(["ann", "bob", "cleo", "nobody"]) == {
        "bob": {"whoMayMessage": "contacts", "whoMayAdd": "anyone"},
        "cleo": {"whoMayMessage": "anyone", "whoMayAdd": "contacts"},
    }


async def test_last_seen_is_the_newest_of_a_persons_devices(people: People) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    rows = [("ann", "a", now - timedelta(hours=1)), ("ann", "b", now), ("ann", "c", None), ("bob", "a", None)]
    for user, device, seen in rows:
        document = {"_id": f"{user}/{device}", "user": user, "createdAt": now}
        await Device.get_motor_collection().insert_one(
            document if seen is None else document | {"lastSeen": seen}
        )
    assert await people.last_seen(["ann", "bob"]) == {"ann": int(now.timestamp() * 1000)}


async def test_people_share_a_conversation_while_both_are_in_it(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.store.people._SHARED_BATCH", 2)
    now = datetime.now(UTC)
    for number in range(5):
        await member(f"c{number}", "ann", now)
    await member("c0", "bob", now)
    await member("c9", "cleo", now)
    assert await people.share_conversation("ann", "bob")
    assert await people.share_conversation("bob", "ann")
    assert not await people.share_conversation("ann", "cleo")
    await Membership.get_motor_collection().update_one({"_id": "c0 bob"}, {"$set": {"removedAt": now}})
    assert not await people.share_conversation("ann", "bob")
    assert not await people.share_conversation("bob", "ann")


async def member(conversation: str, user: str, now: datetime) -> None:
    await Membership.get_motor_collection().insert_one(
        {
            "_id": f"{conversation} {user}",
            "conversationId": conversation,
            "user": user,
            "role": "member",
            "joinedAt": now,
            "updatedAt": now,
        }
    )


async def test_a_push_address_is_kept_on_a_device_that_is_there(people: People) -> None:
    devices = Device.get_motor_collection()
    await devices.insert_one({"_id": "ann/phone", "user": "ann", "createdAt": datetime.now(UTC)})
    assert await people.set_push("ann", "phone", {"provider": "apns", "token": "t"})
    found = await devices.find_one({"_id": "ann/phone"})
    assert found is not None
    assert found["push"] == {"provider": "apns", "token": "t"}
    assert await people.set_push("ann", "phone", None)
    found = await devices.find_one({"_id": "ann/phone"})
    assert found is not None
    assert "push" not in found
    await devices.update_one({"_id": "ann/phone"}, {"$set": {"removedAt": datetime.now(UTC)}})
    assert not await people.set_push("ann", "phone", {"provider": "apns", "token": "t"})
    assert not await people.set_push("ann", "none", None)


# The search


async def test_people_are_found_by_the_beginning_of_name_and_user_name(people: People) -> None:
    await make(people, "u1", name="Ann Lee", username="xenia")
    await make(people, "u2", name="Bob", username="annika")
    await make(people, "u3", name="Joann", username="bobann")
    await make(people, "u4", name="ÄNN")
    assert await found_by(people, "ann") == ["u1", "u2"]
    assert await found_by(people, "ANN L") == ["u1"]
    assert await found_by(people, "ａｎｎ") == ["u1", "u2"]
    assert await found_by(people, "än") == ["u4"]
    assert await found_by(people, "lee") == []


async def test_no_sign_of_a_search_has_a_meaning_of_its_own(people: People) -> None:
    await make(people, "u1", name="Ann")
    await make(people, "u2", name="a.*(")
    for q in (".*", "^a", "a.", "$ne", "a|b", "[a-z]", "\\w"):
        assert await found_by(people, q) == (["u2"] if q == "a." else [])


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 50])
async def test_pages_of_a_search_are_complete_and_without_repeats(people: People, limit: int) -> None:
    expected: list[tuple[str, str]] = []
    for number in range(24):
        name = ["Ann", "Ann", f"Anna {number % 5}", "Bob", "Ann\U0001f600"][number % 5]
        username = (
            [f"ann{number}", f"zed{number}", None, f"anke{number}", "ann"][number % 5] if number else "ann"
        )
        username = None if username == "ann" and number else username
        await make(people, f"u{number:02}", name=name, **({"username": username} if username else {}))
        keys = [fold(key) for key in (name, username or "") if fold(key).startswith("an")]
        if keys:
            expected.append((min(keys), f"u{number:02}"))
    assert len(expected) > 20
    assert await found_by(people, "an", limit=limit) == [user for _, user in sorted(expected)]


async def test_a_phone_number_is_found_whole_only_and_only_when_its_owner_lets_it(people: People) -> None:
    await make(people, "u1", name="Ann", phone="+49305550100")
    await make(people, "u2", name="Bob", phone="+49305550100", findableByPhone=False)
    await make(people, "u3", name="Cleo", phone="+49305550101")
    assert await found_by(people, "+49 30 5550100") == ["u1"]
    assert await found_by(people, "49305550100") == ["u1"]
    for q in ("+4930555010", "+49", "305550100", "+49305550100x"):
        assert await found_by(people, q) == []
    await people.change("u2", {"findableByPhone": None})
    assert await found_by(people, "+49305550100", limit=1) == ["u1", "u2"]


async def test_who_opted_out_is_suspended_or_leaves_is_not_found(people: People) -> None:
    await make(people, "u1", name="Ann", findableByName=False)
    await make(people, "u2", name="Ann", phone="+49305550100")
    assert await found_by(people, "ann") == ["u2"]
    await people.suspend("u2")
    assert await found_by(people, "ann") == []
    assert await found_by(people, "+49305550100") == []
    await people.unsuspend("u2")
    assert await found_by(people, "ann") == ["u2"]
    # Keys that a race left behind show nobody either.
    await User.get_motor_collection().update_one({"_id": "u2"}, {"$set": {"erasingAt": datetime.now(UTC)}})
    assert await found_by(people, "ann") == []


@pytest.mark.parametrize(
    "cursor", ["", "x", "é", text_cursor_at("zed", "u1"), text_cursor_at("\U0010ffff", "")]
)
async def test_a_cursor_of_nothing_or_of_another_search_is_refused(people: People, cursor: str) -> None:
    assert await refused(people.search("ann", limit=5, cursor=cursor)) == "bad_request"


async def test_the_last_searches_are_kept_newest_first_each_once(people: People) -> None:
    await make(people, "ann")
    for number in range(SEARCHES + 5):
        await people.remember_search("ann", f"q{number}")
    await people.remember_search("ann", "q10")
    kept = [search.q for search in await people.searches("ann")]
    assert kept == ["q10", *(f"q{number}" for number in range(SEARCHES + 4, 4, -1) if number != 10)]
    await people.clear_searches("ann")
    assert await people.searches("ann") == []
    assert await people.searches("nobody") == []


async def test_the_same_search_by_several_devices_at_once_is_kept_once(people: People) -> None:
    await make(people, "ann")
    await asyncio.gather(*(people.remember_search("ann", "bob") for _ in range(20)))
    assert [search.q for search in await people.searches("ann")] == ["bob"]


# Suspension


async def test_suspension_ends_sessions_and_can_be_repeated(people: People) -> None:
    await make(people, "ann", name="Ann")
    now = datetime.now(UTC)
    devices = Device.get_motor_collection()
    for device in ("phone", "tablet"):
        await devices.insert_one(
            {
                "_id": f"ann/{device}",
                "user": "ann",
                "createdAt": now,
                "endedAt": now - timedelta(days=1),
                "session": {"id": f"s-{device}", "current": "c", "createdAt": now, "rotatedAt": now},
            }
        )
    assert await people.suspend("ann")
    since = (await stored("ann"))["suspendedAt"]
    ended = {row["_id"]: row["endedAt"] async for row in devices.find({})}
    assert all(moment >= since for moment in ended.values())
    assert await devices.count_documents({"session": {"$exists": True}}) == 0
    # A crash in between left one device as it was; the repetition ends it and changes nothing else.
    await devices.update_one({"_id": "ann/phone"}, {"$unset": {"endedAt": ""}})
    assert await people.suspend("ann")
    assert (await stored("ann"))["suspendedAt"] == since
    again = {row["_id"]: row["endedAt"] async for row in devices.find({})}
    assert again["ann/tablet"] == ended["ann/tablet"]
    assert again["ann/phone"] >= since
    assert await people.unsuspend("ann")
    assert await people.unsuspend("ann")
    document = await stored("ann")
    assert "suspendedAt" not in document
    assert document["nameKey"] == "ann"
    assert not await people.suspend("nobody")
    assert not await people.unsuspend("nobody")


# Contacts


async def add(contacts: Contacts, owner: str, user: str, name: str | None = None, shown: str = "") -> bool:
    return (await contacts.add(owner, user, name=name, shown=shown))[1]


async def block(contacts: Contacts, owner: str, user: str, blocked: bool = True) -> None:
    await contacts.change(owner, user, blocked=blocked, named=False, name=None, shown="")


async def everybody(users: Sequence[str]) -> set[str]:
    """All of them are online."""
    return set(users)


async def rename(contacts: Contacts, owner: str, user: str, name: str | None, shown: str = "") -> None:
    await contacts.change(owner, user, blocked=None, named=True, name=name, shown=shown)


async def raw(owner: str, user: str) -> dict[str, Any]:
    found = await Contact.get_motor_collection().find_one({"_id": f"{owner} {user}"})
    assert found is not None
    return dict(found)


async def test_adding_is_told_apart_from_being_there(contacts: Contacts) -> None:
    entry, new = await contacts.add("ann", "bob", name="Bobby", shown="Bob")
    assert new
    assert (entry.user, entry.name, entry.listed, entry.blocked) == ("bob", "Bobby", True, False)
    assert not await add(contacts, "ann", "bob")
    assert (await raw("ann", "bob"))["name"] == "Bobby"
    assert not await add(contacts, "ann", "bob", "Robert")
    assert (await raw("ann", "bob"))["sortKey"] == "robert"
    assert await contacts.entry("bob", "ann") is None


async def test_of_many_additions_at_once_one_is_the_first(contacts: Contacts) -> None:
    found = await asyncio.gather(*(add(contacts, "ann", "bob", f"Bob {number}") for number in range(10)))
    assert found.count(True) == 1
    assert await Contact.get_motor_collection().count_documents({}) == 1


async def test_a_block_a_new_name_and_an_addition_at_once_all_last(contacts: Contacts) -> None:
    for number in range(5):
        user = f"u{number}"
        await add(contacts, "ann", user)
        await asyncio.gather(
            block(contacts, "ann", user), rename(contacts, "ann", user, "Bob"), add(contacts, "ann", user)
        )
        document = await raw("ann", user)
        assert (document["listed"], document["blocked"], document["name"]) == (True, True, "Bob")


async def test_who_leaves_the_list_stays_blocked(contacts: Contacts) -> None:
    await add(contacts, "ann", "bob")
    await block(contacts, "ann", "bob")
    await contacts.remove("ann", "bob")
    document = await raw("ann", "bob")
    assert (document["listed"], document["blocked"]) == (False, True)
    assert "removedAt" not in document
    assert await refused(contacts.remove("ann", "bob")) == "not_found"
    await block(contacts, "ann", "bob", False)
    assert (await raw("ann", "bob"))["removedAt"] is not None
    await add(contacts, "ann", "bob")
    assert "removedAt" not in await raw("ann", "bob")


async def test_there_is_nobody_to_name_unblock_or_remove(contacts: Contacts) -> None:
    assert await refused(contacts.remove("ann", "bob")) == "not_found"
    assert await refused(rename(contacts, "ann", "bob", "Bob")) == "not_found"
    assert await refused(block(contacts, "ann", "bob", False)) == "not_found"
    await block(contacts, "ann", "bob")
    await rename(contacts, "ann", "bob", "Bob")
    await block(contacts, "ann", "bob", False)
    # An answer that got lost is asked for again.
    await block(contacts, "ann", "bob", False)
    assert await refused(rename(contacts, "ann", "bob", "Bob")) == "not_found"
    assert await refused(contacts.remove("ann", "bob")) == "not_found"


async def test_every_change_of_a_contact_moves_its_time_and_nothing_else_does(contacts: Contacts) -> None:
    moments: list[datetime] = []

    async def moved(change: Awaitable[object]) -> bool:
        await change
        moments.append((await raw("ann", "bob"))["updatedAt"])
        return len(moments) < 2 or moments[-1] > moments[-2]

    assert await moved(add(contacts, "ann", "bob"))
    assert await moved(rename(contacts, "ann", "bob", "Bob"))
    assert await moved(block(contacts, "ann", "bob"))
    assert await moved(block(contacts, "ann", "bob", False))
    assert await moved(contacts.remove("ann", "bob"))
    assert await moved(add(contacts, "ann", "bob"))
    assert not await moved(add(contacts, "ann", "bob"))
    assert not await moved(block(contacts, "ann", "bob", False))


async def test_a_full_list_takes_nobody_new(contacts: Contacts) -> None:
    for number in range(MOST):
        await add(contacts, "ann", f"u{number}")
        await block(contacts, "ann", f"b{number}")
    assert await refused(add(contacts, "ann", "bob")) == "too_large"
    assert await refused(block(contacts, "ann", "bob")) == "too_large"
    assert not await add(contacts, "ann", "u0", "still here")
    await contacts.remove("ann", "u0")
    assert await add(contacts, "ann", "bob")
    assert await add(contacts, "bob", "ann")


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 50])
async def test_pages_of_contacts_are_complete_and_sorted_by_name(people: People, limit: int) -> None:
    contacts = Contacts(most=100)
    names = {f"u{number:02}": f"{'CAb'[number % 3]}x" for number in range(12)} | {"none": ""}
    for user, name in names.items():
        await add(contacts, "ann", user, name or None)
    await add(contacts, "bob", "u01")
    await block(contacts, "ann", "blocked")
    await add(contacts, "ann", "gone")
    await contacts.remove("ann", "gone")
    found = await all_pages(lambda cursor: contacts.page("ann", limit=limit, cursor=cursor), limit)
    expected = sorted(names, key=lambda user: (fold(names[user]) or user, f"ann {user}"))
    assert [entry.user for entry in found] == expected
    some = await all_pages(lambda cursor: contacts.page("ann", limit=limit, cursor=cursor, q="C"), limit)
    assert [entry.user for entry in some] == ["u00", "u03", "u06", "u09"]
    await block(contacts, "ann", "u05")
    blocked = await all_pages(lambda cursor: contacts.blocked_page("ann", limit=limit, cursor=cursor), limit)
    assert [entry.user for entry in blocked] == ["blocked", "u05"]


async def test_blocks_and_lists_of_many(contacts: Contacts) -> None:
    await block(contacts, "ann", "bob")
    await block(contacts, "bob", "cleo")
    await block(contacts, "dan", "ann")
    await add(contacts, "cleo", "ann")
    await add(contacts, "bob", "ann")
    await block(contacts, "bob", "ann")
    assert await contacts.blocks_among(["ann", "bob", "cleo"]) == {
        ("ann", "bob"),
        ("bob", "cleo"),
        ("bob", "ann"),
    }
    assert await contacts.blocks_among(["ann", "cleo"]) == set()
    assert await contacts.blocks_among(["ann"]) == set()
    assert await contacts.lists(["bob", "cleo", "dan", "nobody"], "ann") == {"bob", "cleo"}
    assert await contacts.blockers(["bob", "cleo", "dan", "nobody"], "ann") == {"bob", "dan"}
    await block(contacts, "ann", "bob", False)
    assert await contacts.blocks_among(["ann", "bob"]) == {("bob", "ann")}


@pytest.mark.parametrize("limit", [1, 2, 50])
async def test_who_is_online_is_told_to_whom_they_know(
    people: People, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.store.contacts._SCAN", 3)
    contacts = Contacts(most=100)
    for number in range(16):
        await add(contacts, "ann", f"u{number:02}")
    for user in ("u00", "u05", "u06", "u11"):
        await add(contacts, user, "ann")
    await block(contacts, "u06", "ann")
    for user in ("u07", "u08", "stranger"):
        await Conversation.get_motor_collection().insert_one(
            {
                "_id": f"c-{user}",
                "type": "direct",
                "createdBy": "ann",
                "createdAt": datetime.now(UTC),
                "unique": "direct " + " ".join(sorted(("ann", user))),
            }
        )
    await block(contacts, "u08", "ann")

    async def online(users: Sequence[str]) -> set[str]:
        return set(users) - {"u11"}

    found = await all_pages(
        lambda cursor: contacts.online_page("ann", online, limit=limit, cursor=cursor), limit
    )
    assert found == ["u00", "u05", "u07"]


async def test_the_documents_are_those_of_the_models(contacts: Contacts, people: People) -> None:
    await add(contacts, "ann", "bob", "Bob")
    await block(contacts, "ann", "bob")
    await add(contacts, "ann", "cleo")
    await contacts.remove("ann", "cleo")
    for name in ("ann bob", "ann cleo"):
        parsed = await Contact.get(name)
        assert parsed is not None
        assert set(await raw(*name.split())) <= {"_id", *Contact.model_fields}
    await make(people, "ann", name="Ann")
    await people.remember_search("ann", "bob")
    assert await User.get("ann") is not None
    assert set(await stored("ann")) <= {"_id", *User.model_fields}


async def test_a_block_has_a_time_that_a_new_name_does_not_move(contacts: Contacts) -> None:
    await add(contacts, "ann", "bob", "Bob")
    assert (await raw("ann", "bob")).get("blockedAt") is None
    await block(contacts, "ann", "bob")
    since = (await raw("ann", "bob"))["blockedAt"]
    await contacts.change("ann", "bob", blocked=True, named=True, name="Rob", shown="Bob")
    changed = await raw("ann", "bob")
    assert changed["blockedAt"] == since < changed["updatedAt"]
    await block(contacts, "ann", "bob", False)
    assert "blockedAt" not in await raw("ann", "bob")


# Reports


def about(user: str, reporter: str = "ann", reason: str = "spam", **more: Any) -> Complaint:
    return Complaint(new_id(), reporter, user, reason, **more)


async def complain(complaint: Complaint) -> str:
    """Its id, or that of the same one before."""
    return await Reports().same(complaint) or await Reports().add(complaint)


async def test_reports_wait_oldest_first_until_they_are_closed(people: People) -> None:
    reports = Reports()
    made = [await complain(about(f"u{number}", text="again")) for number in range(5)]
    pages = await all_pages(lambda cursor: reports.open_page(2, cursor), 2)
    assert sorted(view.id for view in pages) == sorted(made)
    assert [view.created_at for view in pages] == sorted(view.created_at for view in pages)
    assert (pages[0].reporter, pages[0].reason, pages[0].text, pages[0].messages) == (
        "ann",
        "spam",
        "again",
        (),
    )
    assert await reports.close(made[0])
    assert await reports.close(made[0])
    assert not await reports.close("none")
    assert len((await reports.open_page(50))[0]) == 4


async def test_the_same_report_is_kept_once_while_it_is_open(people: People) -> None:
    reports = Reports()
    first = about("bob", messages=["m1"], text="x")
    assert await complain(first) == first.id
    assert await complain(about("bob", messages=["m1"], text="x")) == first.id
    for other in (about("bob"), about("bob", reporter="cleo")):
        assert await complain(other) == other.id
    assert await reports.exists(first.id)
    await reports.close(first.id)
    assert await reports.exists(first.id)
    again = about("bob", messages=["m1"], text="x")
    assert await complain(again) == again.id
    # Also when nobody looked before.
    assert await reports.add(about("bob", messages=["m1"], text="x")) == again.id


async def test_only_members_report_out_of_a_conversation(people: People) -> None:
    await member("c1", "ann", datetime.now(UTC))
    await complain(about("bob", reason="abuse", conversation="c1"))
    assert await refused(Reports().same(about("bob", reporter="cleo", conversation="c1"))) == "not_found"


async def test_every_list_is_read_in_the_order_of_an_index(
    backend: str, people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "memory":
        pytest.skip("mongomock has no plans")
    monkeypatch.setattr("relay.store.contacts._SCAN", 10)
    contacts = Contacts(most=1000)
    now = datetime.now(UTC)
    rows = [
        {"_id": f"u{number:03}", "createdAt": now, "username": f"ann{number}", "usernameKey": f"ann{number}"}
        | {"name": "Ann", "nameKey": "ann", "phone": "+49305550100", "phoneKey": "+49305550100"}
        for number in range(300)
    ]
    await User.get_motor_collection().insert_many(rows)
    for number in range(60):
        await add(contacts, "ann", f"u{number:03}", f"Bob {number % 7}")
        await block(contacts, "ann", f"u{number:03}")
        await block(contacts, f"u{number:03}", "u299")
        await complain(about(f"u{number:03}"))
    database = User.get_motor_collection().database
    await database.command("profile", 2)
    try:
        for q in ("ann", "+49305550100"):
            await found_by(people, q, limit=20)
        await all_pages(lambda cursor: contacts.page("ann", limit=7, cursor=cursor), 7)
        await all_pages(lambda cursor: contacts.page("ann", limit=7, cursor=cursor, q="bob 3"), 7)
        await all_pages(lambda cursor: contacts.blocked_page("ann", limit=7, cursor=cursor), 7)
        await all_pages(lambda cursor: contacts.online_page("ann", everybody, limit=7, cursor=cursor), 7)
        await contacts.blocks_among([f"u{number:03}" for number in range(300)])
        await contacts.lists(["ann", "bob"], "u001")
        await add(contacts, "ann", "new")
        await block(contacts, "ann", "new")
        await people.last_seen(["ann", "bob"])
        await people.share_conversation("ann", "bob")
        await people.restricted(["u001", "u002"])
        await Reports().open_page(10)
        await complain(about("bob"))
        await people.suspend("u001")
    finally:
        await database.command("profile", 0)
    plans = 0
    async for entry in database["system.profile"].find({"planSummary": {"$exists": True}}):
        plans += 1
        told = {
            name: entry.get(name)
            for name in ("op", "ns", "planSummary", "docsExamined", "nreturned", "command")
        }
        assert "COLLSCAN" not in entry["planSummary"], told
        assert not entry.get("hasSortStage"), told
        # A page reads little more than it shows, the last as the first.
        if "limit" in entry.get("command", {}):
            assert entry["keysExamined"] <= 2 * entry["nreturned"] + 5, told
    assert plans > 50
