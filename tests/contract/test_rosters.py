"""Who receives what, and who may write, as it is read from the store: in memory and on a real mongod."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from models.accounts import Device, User
from models.conversations import Membership
from relay.store import rosters as module
from relay.store.accounts import milliseconds
from relay.store.embedded import EmbeddedMongo
from relay.store.revisions import Proposal, Revisions
from relay.store.rosters import Rosters
from tests.support.control import BACKENDS, always, change, clear, contact, create, open_control

INACTIVE = timedelta(days=30)


@pytest.fixture(scope="module", params=BACKENDS)
async def backend(request: pytest.FixtureRequest, mongod: EmbeddedMongo) -> AsyncIterator[str]:
    async with open_control(request.param, mongod.uri) as kind:
        yield kind


@pytest.fixture
async def revisions(backend: str) -> Revisions:
    await clear()
    return Revisions()


@pytest.fixture
def rosters(revisions: Revisions) -> Rosters:
    return Rosters(inactive=INACTIVE)


async def device(key: str, away: timedelta | None = timedelta(0), **fields: Any) -> None:
    """A device that was last seen so long ago; None: not connected yet."""
    now = datetime.now(UTC)
    seen = {} if away is None else {"lastSeen": now - away}
    await Device.get_motor_collection().insert_one(
        {"_id": key, "user": key.partition("/")[0], "createdAt": now, **seen, **fields}
    )


async def strict(user: str, **preferences: Any) -> None:
    await User.get_motor_collection().insert_one({"_id": user, "createdAt": datetime.now(UTC), **preferences})


async def test_members_come_with_their_active_devices(revisions: Revisions, rosters: Rosters) -> None:
    await device("ann/phone")
    await device("ann/tablet", 2 * INACTIVE)
    await device("bob/phone", INACTIVE - timedelta(minutes=1))
    await device("bob/laptop", INACTIVE + timedelta(minutes=1))
    await device("bob/new", None)
    await device("dan/phone")
    await device("dan/old", removedAt=datetime.now(UTC))
    one, _ = await create(revisions, "ann", ["bob", "cleo"])
    two, _ = await create(revisions, "ann", ["dan"], "direct")
    found = await rosters.load([one, two, "none"])
    assert {
        name: {user: sorted(keys) for user, keys in roster.members.items()} for name, roster in found.items()
    } == {
        one: {"ann": ["ann/phone"], "bob": ["bob/new", "bob/phone"], "cleo": []},
        two: {"ann": ["ann/phone"], "dan": ["dan/phone"]},
    }
    for roster in found.values():
        assert (roster.relinked, roster.blocks, dict(roster.refusals)) == ({}, frozenset(), {})


async def test_who_left_and_what_was_dissolved_receive_nothing(
    revisions: Revisions, rosters: Rosters
) -> None:
    name, _ = await create(revisions, "ann", ["bob", "cleo"])
    await change(revisions, name, "ann", always(Proposal("removed", ["bob"])), ["bob"])
    assert set((await rosters.load([name]))[name].members) == {"ann", "cleo"}
    await change(revisions, name, "ann", always(Proposal("dissolved")), everybody=True)
    assert await rosters.load([name]) == {}


async def test_a_change_that_is_only_written_down_changes_no_recipients(
    revisions: Revisions, rosters: Rosters
) -> None:
    name, _ = await create(revisions, "ann", ["bob"])
    revision, _ = await revisions.begin(name, "ann", ["bob"], always(Proposal("removed", ["bob"])))
    assert set((await rosters.load([name]))[name].members) == {"ann", "bob"}
    assert revision is not None
    await revisions.apply(revision)
    assert set((await rosters.load([name]))[name].members) == {"ann"}


async def test_who_sees_a_conversation_while_it_is_made_writes_to_everybody_in_it(
    revisions: Revisions, rosters: Rosters
) -> None:
    await device("bob/phone")
    name, revision, _ = await revisions.create("ann", "group", ["bob", "cleo"], name=None, ref=None)
    assert await rosters.load([name]) == {}
    assert revision is not None
    await revisions.apply(revision)
    rows = Membership.get_motor_collection()
    late = await rows.find_one_and_delete({"_id": f"{name} bob"})
    everybody = {"ann": [], "bob": ["bob/phone"], "cleo": []}
    assert (await rosters.load([name]))[name].members == everybody
    await rows.insert_one(late)
    await revisions.finish(revision)
    assert (await rosters.load([name]))[name].members == everybody


async def test_memberships_that_are_written_while_they_are_read_are_read_again(
    revisions: Revisions, rosters: Rosters, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = await create(revisions, "ann", ["bob"])
    rows = Membership.get_motor_collection()
    late = await rows.find_one_and_delete({"_id": f"{name} bob"})
    real = rosters._settings

    async def settings(conversations: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
        await rows.replace_one({"_id": late["_id"]}, late, upsert=True)
        return await real(conversations)

    monkeypatch.setattr(rosters, "_settings", settings)
    assert set((await rosters.load([name]))[name].members) == {"ann", "bob"}


async def test_many_rosters_are_complete(
    revisions: Revisions, rosters: Rosters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOAD", 3)
    made = [(await create(revisions, "ann", [f"u{number}"]))[0] for number in range(8)]
    found = await rosters.load(made)
    assert {name: set(roster.members) for name, roster in found.items()} == {
        name: {"ann", f"u{number}"} for number, name in enumerate(made)
    }
    assert await rosters.load([]) == {}


async def test_relinked_devices_come_with_the_time_of_it(revisions: Revisions, rosters: Rosters) -> None:
    moment = datetime(2026, 5, 1, tzinfo=UTC)
    await device("ann/phone", relinkedAt=moment)
    await device("ann/tablet")
    name, _ = await create(revisions, "ann", ["bob"])
    assert (await rosters.load([name]))[name].relinked == {"ann/phone": milliseconds(moment)}


async def test_blocks_are_told_where_both_are_members_and_refuse_in_direct_conversations_only(
    revisions: Revisions, rosters: Rosters
) -> None:
    pair, _ = await create(revisions, "ann", ["bob"], "direct")
    group, _ = await create(revisions, "ann", ["bob", "cleo"])
    other, _ = await create(revisions, "ann", ["cleo"], "direct")
    await contact("bob", "ann", blocked=True)
    await contact("bob", "dan", blocked=True)
    await contact("cleo", "ann", listed=True)
    found = await rosters.load([pair, group, other])
    assert found[pair].blocks == found[group].blocks == {("bob", "ann")}
    assert found[other].blocks == frozenset()
    assert {user: code for user, (code, _) in found[pair].refusals.items()} == {"bob": "blocked"}
    assert found[group].refusals == found[other].refusals == {}
    await contact("bob", "ann", blocked=False)
    found = await rosters.load([pair, group])
    assert found[pair].blocks == found[group].blocks == frozenset()
    assert found[pair].refusals == {}


async def test_who_takes_messages_from_contacts_only_refuses_all_others_in_direct_conversations(
    revisions: Revisions, rosters: Rosters
) -> None:
    await strict("bob", whoMayMessage="contacts")
    await strict("cleo", whoMayAdd="contacts")
    stranger, _ = await create(revisions, "ann", ["bob"], "direct")
    friend, _ = await create(revisions, "dan", ["bob"], "direct")
    group, _ = await create(revisions, "ann", ["bob", "cleo"])
    other, _ = await create(revisions, "ann", ["cleo"], "direct")
    await contact("bob", "dan", listed=True)
    await contact("bob", "ann", name="not listed")
    found = await rosters.load([stranger, friend, group, other])
    assert {user: code for user, (code, _) in found[stranger].refusals.items()} == {"ann": "forbidden"}
    assert found[friend].refusals == found[group].refusals == found[other].refusals == {}
    await contact("bob", "ann", listed=True)
    assert (await rosters.load([stranger]))[stranger].refusals == {}


async def test_where_only_moderators_may_write_members_may_not(
    revisions: Revisions, rosters: Rosters
) -> None:
    name, _ = await create(revisions, "ann", ["bob", "cleo"])
    await change(revisions, name, "ann", always(Proposal("role", ["bob"], role="moderator")), ["bob"])
    await change(revisions, name, "ann", always(Proposal("changed", fields={"whoMayPost": "moderators"})))
    refusals = (await rosters.load([name]))[name].refusals
    assert {user: code for user, (code, _) in refusals.items()} == {"cleo": "forbidden"}
    await change(revisions, name, "ann", always(Proposal("changed", fields={"whoMayPost": "members"})))
    assert (await rosters.load([name]))[name].refusals == {}


async def test_mailboxes_are_active_devices_or_the_placeholder(rosters: Rosters) -> None:
    await device("ann/phone")
    await device("ann/laptop")
    await device("bob/phone", 2 * INACTIVE)
    assert await rosters.mailboxes(["ann", "bob", "cleo"]) == {
        "ann": ["ann/laptop", "ann/phone"],
        "bob": ["bob/*"],
        "cleo": ["cleo/*"],
    }
    assert await rosters.mailboxes([]) == {}


async def test_a_roster_needs_no_membership_of_a_conversation_document(
    revisions: Revisions, rosters: Rosters
) -> None:
    """A conversation whose document is gone still has the members it has: nothing is lost by a missing setting."""
    now = datetime.now(UTC)
    await Membership.get_motor_collection().insert_one(
        {
            "_id": "talk ann",
            "conversationId": "talk",
            "user": "ann",
            "role": "member",
            "joinedAt": now,
            "updatedAt": now,
        }
    )
    assert {name: dict(one.members) for name, one in (await rosters.load(["talk"])).items()} == {
        "talk": {"ann": []}
    }


async def test_full_mailboxes_are_named_and_nobody_is_refused_while_one_has_room(
    revisions: Revisions, rosters: Rosters
) -> None:
    now = datetime.now(UTC)
    await device("ann/phone")
    await device("bob/phone")
    await device("bob/tablet", fullSince=now)
    await strict("cleo", full={"any": now, "blocked": now})
    await strict("dan", full={"any": now})
    await device("dan/phone")
    group, _ = await create(revisions, "ann", ["bob", "cleo", "dan"])
    direct, _ = await create(revisions, "ann", ["bob"], "direct")
    found = await rosters.load([group, direct])
    assert found[group].full == {"bob/tablet", "cleo/*"}, "who has a device is not reached by the placeholder"
    assert found[direct].full == {"bob/tablet"}
    assert found[direct].refusals == {}
    await Device.get_motor_collection().update_one({"_id": "bob/phone"}, {"$set": {"fullSince": now}})
    found = await rosters.load([group, direct])
    assert found[direct].refusals["ann"][0] == "mailbox_full"
    assert "bob" not in found[direct].refusals
    assert found[group].refusals == {}
    assert await rosters.full_among(["ann/phone", "bob/phone", "cleo/*"]) == {"bob/phone", "cleo/*"}


async def test_a_direct_message_to_a_person_without_a_device_is_refused_when_their_placeholder_is_full(
    revisions: Revisions, rosters: Rosters
) -> None:
    direct, _ = await create(revisions, "ann", ["cleo"], "direct")
    await strict("cleo", full={"any": datetime.now(UTC)})
    assert (await rosters.load([direct]))[direct].refusals["ann"][0] == "mailbox_full"


async def test_what_the_blocked_have_filled_refuses_nobody(revisions: Revisions, rosters: Rosters) -> None:
    await strict("bob", full={"blocked": datetime.now(UTC)})
    await device("bob/phone")
    direct, _ = await create(revisions, "ann", ["bob"], "direct")
    await contact("bob", "ann", blocked=True)
    roster = (await rosters.load([direct]))[direct]
    assert roster.full == {"bob/!"}
    assert "ann" not in roster.refusals
