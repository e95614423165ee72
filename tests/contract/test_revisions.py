"""Changes of conversations, one after the other, raced, repeated and left half-way: in memory and on a real mongod."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from models.conversations import Conversation, Membership
from relay.store import revisions as module
from relay.store.attempts import wait
from relay.store.embedded import EmbeddedMongo
from relay.store.revisions import Proposal, Revision, Revisions, Situation
from relay.wire.errors import RelayError
from tests.support.control import (
    BACKENDS,
    Decide,
    always,
    carry_out,
    change,
    clear,
    create,
    document,
    open_control,
    refused,
    roles,
    row,
)

LONG_AGO = timedelta(minutes=1)


@pytest.fixture(scope="module", params=BACKENDS)
async def backend(request: pytest.FixtureRequest, mongod: EmbeddedMongo) -> AsyncIterator[str]:
    async with open_control(request.param, mongod.uri) as kind:
        yield kind


@pytest.fixture
async def revisions(backend: str) -> Revisions:
    await clear()
    return Revisions()


@pytest.fixture
async def group(revisions: Revisions) -> str:
    """A group of ann (its admin), bob and cleo."""
    return (await create(revisions, "ann", ["bob", "cleo"], name="group"))[0]


async def age(conversation: str, by: timedelta = LONG_AGO) -> None:
    """The author of what is under way began it so long ago."""
    found = (await document(conversation))["pending"]
    await Conversation.get_motor_collection().update_one(
        {"_id": conversation}, {"$set": {"pending.at": found["at"] - by}}
    )


async def begun(
    revisions: Revisions, conversation: str, decide: Decide, concerned: Sequence[str] = (), **how: Any
) -> Revision:
    """A revision of ann's that was written down and is not carried out yet."""
    revision, own = await revisions.begin(conversation, "ann", concerned, decide, **how)
    assert own
    assert revision is not None
    return revision


async def is_whole(conversation: str) -> None:
    """Nothing is under way, and the count is that of the members."""
    found = await document(conversation)
    assert "pending" not in found
    assert found["memberCount"] == len(await roles(conversation))


# Creating


async def test_a_new_group_has_its_members_and_an_admin(revisions: Revisions) -> None:
    name, new = await create(revisions, "bob", ["cleo", "ann", "cleo", "bob"], name="trip")
    assert new
    assert await roles(name) == {"ann": "member", "bob": "admin", "cleo": "member"}
    found = await document(name)
    assert (found["type"], found["name"], found["memberCount"], found["rev"]) == ("group", "trip", 3, 1)
    await is_whole(name)


async def test_a_direct_conversation_has_two_members_and_no_admin(revisions: Revisions) -> None:
    name, new = await create(revisions, "bob", ["ann"], "direct")
    assert new
    assert await roles(name) == {"ann": "member", "bob": "member"}
    await is_whole(name)


async def test_of_twenty_who_make_the_same_direct_conversation_at_once_one_does(revisions: Revisions) -> None:
    found = await asyncio.gather(
        *(
            create(Revisions(), *(("ann", ["bob"]) if number % 2 else ("bob", ["ann"])), "direct")
            for number in range(20)
        )
    )
    assert len({name for name, _ in found}) == 1
    assert [new for _, new in found].count(True) == 1
    assert await roles(found[0][0]) == {"ann": "member", "bob": "member"}
    assert await Conversation.get_motor_collection().count_documents({}) == 1
    assert await Membership.get_motor_collection().count_documents({}) == 2
    await is_whole(found[0][0])


async def test_of_twenty_who_use_one_ref_at_once_one_makes_the_group(revisions: Revisions) -> None:
    ref = str(uuid.uuid4())
    found = await asyncio.gather(*(create(Revisions(), "ann", ["bob", "cleo"], ref=ref) for _ in range(20)))
    assert len({name for name, _ in found}) == 1
    assert [new for _, new in found].count(True) == 1
    assert await roles(found[0][0]) == {"ann": "admin", "bob": "member", "cleo": "member"}
    await is_whole(found[0][0])


async def test_a_repeated_ref_finds_the_first_group_of_the_same_user(revisions: Revisions) -> None:
    ref = str(uuid.uuid4())
    first, _ = await create(revisions, "ann", ["bob"], ref=ref, name="trip")
    again = await create(revisions, "ann", ["cleo"], ref=ref, name="other")
    assert again == (first, False)
    assert await roles(first) == {"ann": "admin", "bob": "member"}
    assert (await document(first))["name"] == "trip"
    other, new = await create(revisions, "bob", ["ann"], ref=ref)
    assert new
    assert other != first


async def test_groups_without_a_ref_are_different_groups(revisions: Revisions) -> None:
    first, _ = await create(revisions, "ann", ["bob"])
    second, new = await create(revisions, "ann", ["bob"])
    assert new
    assert first != second


async def test_people_of_similar_names_do_not_share_a_direct_conversation(revisions: Revisions) -> None:
    pairs = [("a", "b"), ("a", "b.c"), ("a.b", "c"), ("a", "B"), ("a", "a"), ("ref", "a"), ("direct", "a")]
    found = [(await create(revisions, one, [other], "direct"))[0] for one, other in pairs]
    assert len(set(found)) == len(pairs)


async def test_a_ref_is_free_again_when_its_group_is_dissolved(revisions: Revisions) -> None:
    first, _ = await create(revisions, "ann", ["bob"], ref="r")
    await change(revisions, first, "ann", always(Proposal("dissolved")), everybody=True)
    second, new = await create(revisions, "ann", ["bob"], ref="r")
    assert new
    assert second != first


@pytest.mark.parametrize("written", [[], ["ann"], ["bob"], ["ann", "bob"]])
@pytest.mark.parametrize("asks", ["ann", "bob"])
async def test_a_creation_that_died_is_finished_by_whoever_asks_again(
    revisions: Revisions, written: list[str], asks: str
) -> None:
    name, revision, _ = await revisions.create("ann", "direct", ["bob"], name=None, ref=None)
    assert revision is not None
    await revisions.apply(revision)
    gone = [f"{name} {user}" for user in ("ann", "bob") if user not in written]
    await Membership.get_motor_collection().delete_many({"_id": {"$in": gone}})
    other = "bob" if asks == "ann" else "ann"
    assert await create(Revisions(), asks, [other], "direct") == (name, False)
    assert await roles(name) == {"ann": "member", "bob": "member"}
    await is_whole(name)


# Stalled revisions


async def test_what_is_stalled_is_found_the_oldest_first_and_bounded(
    revisions: Revisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for number in range(5):
        name, _, _ = await revisions.create("ann", "group", ["bob"], name=None, ref=None)
        await age(name, LONG_AGO + timedelta(minutes=number % 3))
        names.append(name)
    fresh, _, _ = await revisions.create("ann", "group", ["bob"], name=None, ref=None)
    found = await revisions.stalled()
    assert {one.conversation for one in found} == set(names)
    assert [one.at for one in found] == sorted(one.at for one in found)
    monkeypatch.setattr(module, "_REPAIR", 2)
    assert len(await revisions.stalled()) == 2
    for one in found:
        await carry_out(revisions, one)
        await is_whole(one.conversation)
    assert await revisions.stalled() == []
    assert "pending" in await document(fresh)


async def test_of_several_nodes_one_tries_what_is_due_and_what_failed_waits_for_its_time(
    revisions: Revisions,
) -> None:
    for _ in range(2):
        name, _, _ = await revisions.create("ann", "group", ["bob"], name=None, ref=None)
        await age(name)
    one, two = Revisions("one"), Revisions("two")
    first, other = await one.stalled()
    mine = await one.claim(first)
    assert mine is not None and mine.id == first.id
    assert await two.claim(first) is None
    assert [found.id for found in await two.stalled()] == [other.id]
    await one.failed(mine, applied=True)
    found = await document(first.conversation)
    assert (found["pending"]["tries"], found["pending"]["applied"]) == (1, True)
    collection = Conversation.get_motor_collection()
    await collection.update_one({"_id": first.conversation}, {"$set": {"pending.dueAt": mine.at}})
    # What was not tried yet comes first.
    assert [found.id for found in await two.stalled()] == [other.id, first.id]
    again = (await two.stalled())[1]
    assert (again.tries, again.applied) == (1, True)
    await two.failed(again, applied=False)
    assert (await document(first.conversation))["pending"]["applied"], "what is done stays done"
    assert [found.id for found in await two.stalled()] == [other.id]


def test_the_wait_doubles_at_random_and_is_bounded() -> None:
    waits = {tries: wait(tries).total_seconds() for tries in (1, 2, 3, 4, 100, 10_000)}
    for tries, expected in zip(waits, (5, 10, 20, 40, 300, 300), strict=True):
        assert 0.75 * expected <= waits[tries] <= 1.25 * expected
    assert len({wait(3) for _ in range(20)}) > 1


EVENTS: dict[str, tuple[Proposal, dict[str, Any]]] = {
    "added": (Proposal("added", ["dan", "eve"]), {}),
    "removed": (Proposal("removed", ["bob"]), {}),
    "left": (Proposal("left", ["ann"]), {}),
    "role": (Proposal("role", ["bob"], role="moderator"), {}),
    "changed": (Proposal("changed", fields={"name": "new", "picture": "p1"}), {}),
    "dissolved": (Proposal("dissolved"), {"everybody": True}),
}
AFTER: dict[str, dict[str, str]] = {
    "added": {"ann": "admin", "bob": "member", "cleo": "member", "dan": "member", "eve": "member"},
    "removed": {"ann": "admin", "cleo": "member"},
    "left": {"bob": "member", "cleo": "member"},
    "role": {"ann": "admin", "bob": "moderator", "cleo": "member"},
    "changed": {"ann": "admin", "bob": "member", "cleo": "member"},
    "dissolved": {},
}


@pytest.mark.parametrize("event", list(EVENTS))
@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_a_change_that_died_half_way_is_finished_by_who_changes_next(
    revisions: Revisions, group: str, event: str, steps: int
) -> None:
    proposal, how = EVENTS[event]
    left = await begun(revisions, group, always(proposal), proposal.users, **how)
    for _ in range(steps):
        await revisions.apply(left)
    await age(group)
    stuck, own = await revisions.begin(group, None, [], always(Proposal("changed", fields={"about": "x"})))
    assert (own, stuck is not None) == (False, True)
    assert stuck is not None
    assert (stuck.id, stuck.event, stuck.users, stuck.number) == (
        left.id,
        left.event,
        left.users,
        left.number,
    )
    await carry_out(revisions, stuck)
    assert await roles(group) == AFTER[event]
    found = await document(group)
    assert "pending" not in found
    assert found["memberCount"] == len(AFTER[event])
    assert ("dissolvedAt" in found) == (event == "dissolved")
    assert found["name"] == ("new" if event == "changed" else "group")


@pytest.mark.parametrize("event", list(EVENTS))
async def test_every_step_may_be_repeated_at_any_time(revisions: Revisions, group: str, event: str) -> None:
    proposal, how = EVENTS[event]
    one = await begun(revisions, group, always(proposal), proposal.users, **how)
    await asyncio.gather(*(carry_out(revisions, one) for _ in range(5)))
    before = [await document(group), await roles(group)]
    await carry_out(revisions, one)
    assert [await document(group), await roles(group)] == before
    assert before[1] == AFTER[event]


async def lives(node: str) -> bool:
    return node == "one"


async def test_a_change_in_progress_makes_others_wait_and_then_give_up(
    revisions: Revisions, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.15)
    one, two = Revisions("one", lives), Revisions("two", lives)
    first = await begun(one, group, always(Proposal("removed", ["bob"])), ["bob"])
    with one.carrying(first):
        for node in (one, two):
            with pytest.raises(RelayError) as caught:
                await node.begin(group, "ann", [], always(Proposal("changed", fields={"name": "x"})))
            assert (caught.value.code, caught.value.retry_after) == ("unavailable", 1000)


async def test_a_change_in_progress_is_waited_for(revisions: Revisions, group: str) -> None:
    one, two = Revisions("one", lives), Revisions("two", lives)
    first = await begun(one, group, always(Proposal("removed", ["bob"])), ["bob"])
    seen: list[Situation] = []

    def decide(situation: Situation) -> Proposal | None:
        seen.append(situation)
        return None

    with one.carrying(first):
        waiting = asyncio.ensure_future(two.begin(group, "ann", ["bob"], decide))
        await asyncio.sleep(0.1)
        assert seen == []
        await carry_out(one, first)
    assert await waiting == (None, True)
    assert [(one.roles, one.members) for one in seen] == [({"ann": "admin"}, 2)]


async def test_a_change_is_abandoned_when_its_node_is_gone_or_gave_it_up_or_takes_too_long(
    revisions: Revisions, group: str
) -> None:
    one, two, three = (Revisions(name, lives) for name in ("one", "two", "three"))
    left = await begun(one, group, always(Proposal("removed", ["bob"])), ["bob"])
    assert await one.is_abandoned(left), "it is not at it"
    assert not await two.is_abandoned(left), "another node cannot know"
    with one.carrying(left):
        with one.carrying(left):
            assert not await one.is_abandoned(left)
        assert not await one.is_abandoned(left)
        await age(group, 2 * LONG_AGO)
        (late,) = await two.stalled()
        assert await one.is_abandoned(late)
        assert await two.is_abandoned(late)
    await carry_out(two, late)
    gone = await begun(two, group, always(Proposal("removed", ["cleo"])), ["cleo"])
    with two.carrying(gone):
        assert await three.is_abandoned(gone), "its node does not live"


# Late authors


async def test_an_author_who_wakes_up_late_changes_nothing(revisions: Revisions, group: str) -> None:
    late: list[Revision] = []

    async def stalls(proposal: Proposal, concerned: Sequence[str], after: Proposal) -> None:
        """The author of ``proposal`` stops after having written it down; others finish it, and go on."""
        one = await begun(revisions, group, always(proposal), concerned)
        await carry_out(revisions, one)
        await change(revisions, group, "ann", always(after), concerned)
        late.append(one)

    await stalls(Proposal("added", ["dan"]), ["dan"], Proposal("removed", ["dan"]))
    await stalls(Proposal("removed", ["bob"]), ["bob"], Proposal("added", ["bob"]))
    await stalls(
        Proposal("role", ["cleo"], role="admin"), ["cleo"], Proposal("role", ["cleo"], role="member")
    )
    await stalls(Proposal("left", ["bob"]), ["bob"], Proposal("added", ["bob"]))
    await change(revisions, group, "ann", always(Proposal("role", ["bob"], role="moderator")), ["bob"])
    expected = {"ann": "admin", "bob": "moderator", "cleo": "member"}
    assert await roles(group) == expected
    before = {user: await row(group, user) for user in ("ann", "bob", "cleo", "dan")}
    stored = await document(group)
    for one in late:
        await carry_out(revisions, one)
    assert await roles(group) == expected
    assert {user: await row(group, user) for user in before} == before
    assert await document(group) == stored


async def test_a_late_creator_brings_nobody_back(revisions: Revisions) -> None:
    name, created, _ = await revisions.create("ann", "group", ["bob"], name=None, ref=None)
    assert created is not None
    await carry_out(revisions, created)
    await change(revisions, name, "ann", always(Proposal("removed", ["bob"])), ["bob"])
    await carry_out(revisions, created)
    assert await roles(name) == {"ann": "admin"}


async def test_a_late_end_of_a_change_does_not_end_the_next_one(revisions: Revisions, group: str) -> None:
    first = await begun(revisions, group, always(Proposal("removed", ["bob"])), ["bob"])
    await carry_out(revisions, first)
    second = await begun(revisions, group, always(Proposal("removed", ["cleo"])), ["cleo"])
    await revisions.finish(first)
    assert (await document(group))["pending"]["id"] == second.id


# Deciding


async def test_a_decision_is_made_from_the_present_situation(revisions: Revisions, group: str) -> None:
    seen: list[Situation] = []

    def decide(situation: Situation) -> Proposal | None:
        seen.append(situation)
        return None

    assert await revisions.begin(group, "bob", ["cleo", "dan", "ann"], decide) == (None, True)
    await revisions.begin(group, None, ["bob"], decide)
    await revisions.begin(group, "ann", [], decide, everybody=True)
    await change(revisions, group, "ann", always(Proposal("role", ["bob"], role="admin")), ["bob"])
    await revisions.begin(group, "ann", ["bob"], decide)
    assert [(one.role, dict(one.roles), one.admins, one.members) for one in seen] == [
        ("member", {"ann": "admin", "bob": "member", "cleo": "member"}, 1, 3),
        ("admin", {"bob": "member"}, 0, 3),
        ("admin", {"ann": "admin", "bob": "member", "cleo": "member"}, 1, 3),
        ("admin", {"ann": "admin", "bob": "admin"}, 2, 3),
    ]
    assert {one.type for one in seen} == {"group"}
    await is_whole(group)


async def test_strangers_and_former_members_and_unknown_conversations_are_not_found(
    revisions: Revisions, group: str
) -> None:
    await change(revisions, group, "ann", always(Proposal("removed", ["cleo"])), ["cleo"])
    gone, _ = await create(revisions, "ann", ["bob"])
    await change(revisions, gone, "ann", always(Proposal("dissolved")), everybody=True)
    for name, actor in ((group, "dan"), (group, "cleo"), ("none", "ann"), (gone, "ann"), (gone, None)):
        call = revisions.begin(name, actor, [], always(Proposal("changed", fields={"name": "x"})))
        assert await refused(call) == "not_found", (name, actor)


async def test_a_refusal_leaves_nothing_behind(revisions: Revisions, group: str) -> None:
    before = await document(group)

    def decide(_: Situation) -> Proposal | None:
        raise RelayError("forbidden", "no")

    assert await refused(revisions.begin(group, "ann", [], decide)) == "forbidden"
    assert await document(group) == before


async def test_fields_are_set_and_unset(revisions: Revisions, group: str) -> None:
    fields = {"name": "new", "picture": "p1", "description": "about", "whoMayPost": "moderators"}
    await change(revisions, group, "ann", always(Proposal("changed", fields=fields)))
    found = await document(group)
    assert {name: found[name] for name in fields} == fields
    await change(
        revisions, group, "ann", always(Proposal("changed", fields={"picture": None, "description": None}))
    )
    found = await document(group)
    assert (found["name"], found["whoMayPost"]) == ("new", "moderators")
    assert not {"picture", "description"} & set(found)
    assert found["rev"] == 3


async def test_every_change_moves_the_conversation_up_for_all_members(
    revisions: Revisions, group: str
) -> None:
    for event, (proposal, how) in EVENTS.items():
        old = datetime(2026, 1, 1, tzinfo=UTC)
        await Membership.get_motor_collection().update_many({}, {"$set": {"updatedAt": old}})
        members = set(await roles(group))
        await change(revisions, group, None, always(proposal), proposal.users, **how)
        for user in members | set(await roles(group)):
            assert (await row(group, user))["updatedAt"] > old, (event, user)


# Many at once


async def test_changes_that_race_on_several_nodes_end_consistent(revisions: Revisions) -> None:
    name, _ = await create(revisions, "ann", [f"u{number}" for number in range(8)], name="start")
    # Three nodes: each knows its own turns only.
    nodes = [Revisions() for _ in range(3)]
    done: list[Revision] = []
    names: dict[int, str] = {}

    async def one(number: int) -> None:
        user = f"u{number % 10}"
        node = nodes[number % 3]

        def add(situation: Situation) -> Proposal | None:
            return None if user in situation.roles else Proposal("added", [user])

        def remove(situation: Situation) -> Proposal | None:
            return Proposal("removed", [user]) if user in situation.roles else None

        def rename(_: Situation) -> Proposal | None:
            return Proposal("changed", fields={"name": f"name {number}"})

        decide = (add, remove, rename)[number // 2 % 3]
        found = await change(node, name, "ann", decide, [user])
        if found is not None:
            done.append(found)
            if found.event == "changed":
                names[found.number] = f"name {number}"

    await asyncio.gather(*(one(number) for number in range(20)))
    await is_whole(name)
    assert [one.number for one in sorted(done, key=lambda one: one.number)] == list(range(2, 2 + len(done)))
    assert (await document(name))["rev"] == 1 + len(done)
    members = {"ann"} | {f"u{number}" for number in range(8)}
    for revision in sorted(done, key=lambda one: one.number):
        if revision.event == "added":
            assert not members & set(revision.users)
            members |= set(revision.users)
        elif revision.event == "removed":
            assert members >= set(revision.users)
            members -= set(revision.users)
    assert set(await roles(name)) == members
    assert len(names) > 1
    assert (await document(name))["name"] == names[max(names)]


async def test_turns_are_taken_one_after_the_other_and_forgotten(revisions: Revisions) -> None:
    inside = 0
    order: list[int] = []

    async def one(number: int) -> None:
        nonlocal inside
        async with revisions.turn("talk"):
            inside += 1
            assert inside == 1
            await asyncio.sleep(0.001)
            order.append(number)
            inside -= 1

    waiting = [asyncio.ensure_future(one(number)) for number in range(6)]
    await asyncio.sleep(0)
    waiting[3].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == [0, 1, 2, 4, 5]
    assert revisions._turns == {}
