"""Who may see whether somebody is online, and read cursors since a moment, on either backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from models.accounts import User
from models.conversations import Membership
from relay.store import reading
from relay.store import sights as module
from relay.store.embedded import EmbeddedMongo
from relay.store.reading import ReadCursors
from relay.store.revisions import Proposal, Revisions
from relay.store.sights import Pair, Sight, Sights
from tests.support.control import BACKENDS, always, change, clear, contact, create, open_control, read

PEOPLE = ("ann", "bob", "cleo", "dan", "eve", "fay")


@pytest.fixture(scope="module", params=BACKENDS)
async def backend(request: pytest.FixtureRequest, mongod: EmbeddedMongo) -> AsyncIterator[str]:
    async with open_control(request.param, mongod.uri) as kind:
        yield kind


@pytest.fixture
async def revisions(backend: str) -> Revisions:
    await clear()
    now = datetime.now(UTC)
    await User.get_motor_collection().insert_many([{"_id": user, "createdAt": now} for user in PEOPLE])
    return Revisions()


@pytest.fixture
def sights(revisions: Revisions) -> Sights:
    return Sights(timeout=5)


async def of_ann(sights: Sights) -> dict[str, Sight]:
    found = await sights.of({("ann", user) for user in (*PEOPLE, "nobody")})
    return {user: sight for (_, user), sight in found.items()}


async def test_contacts_of_theirs_and_members_are_seen_and_nobody_else(
    sights: Sights, revisions: Revisions
) -> None:
    await contact("bob", "ann", listed=True)
    await contact("ann", "fay", listed=True)
    await create(revisions, "ann", ["cleo"], "direct")
    await create(revisions, "dan", ["ann", "bob"])
    left, _ = await create(revisions, "ann", ["eve", "dan"])
    await change(revisions, left, "ann", always(Proposal("removed", ["eve"])), ["eve"])
    assert await of_ann(sights) == dict.fromkeys(("ann", "bob", "cleo", "dan"), Sight())


async def test_who_is_blocked_sees_the_moment_and_who_was_shown_nothing_still_nothing(
    sights: Sights, revisions: Revisions
) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    for owner, listed in (("bob", True), ("cleo", False), ("dan", False)):
        await contact(owner, "ann", listed=listed, blocked=True, blockedAt=moment)
    await create(revisions, "ann", ["cleo"])
    blocked = Sight(True, int(moment.timestamp() * 1000))
    assert await of_ann(sights) == {"ann": Sight(), "bob": blocked, "cleo": blocked}


async def test_suspended_and_erased_people_are_seen_by_nobody(sights: Sights, revisions: Revisions) -> None:
    for user, mark in (("bob", "suspendedAt"), ("cleo", "erasingAt")):
        await contact(user, "ann", listed=True)
        await User.get_motor_collection().update_one({"_id": user}, {"$set": {mark: datetime.now(UTC)}})
    assert await of_ann(sights) == {"ann": Sight()}


@pytest.mark.parametrize("page", [1, 2, 5000])
async def test_many_pairs_at_once_are_as_each_alone(
    sights: Sights, revisions: Revisions, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(module, "_PAGE", page)
    await contact("bob", "ann", listed=True)
    await contact("eve", "dan", listed=True, blocked=True)
    await create(revisions, "ann", ["cleo", "dan"])
    await create(revisions, "bob", ["dan"])
    await create(revisions, "eve", ["fay"])
    pairs = {(viewer, user) for viewer in PEOPLE for user in PEOPLE}
    alone: dict[Pair, Sight] = {}
    for pair in pairs:
        alone |= await sights.of([pair])
    assert await sights.of(pairs) == alone
    assert await sights.of([pair for pair in pairs if pair[1] == "dan"]) == {
        pair: sight for pair, sight in alone.items() if pair[1] == "dan"
    }
    assert len(alone) == len(PEOPLE) + 1 + 6 + 2 + 2 + 1


async def test_the_cursors_since_a_moment_are_the_newest_and_those_one_is_told_of(
    revisions: Revisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    cursors = ReadCursors(timeout=5)
    names = [(await create(revisions, "ann", ["bob", "cleo"]))[0] for _ in range(4)]
    others, _ = await create(revisions, "bob", ["cleo"])
    now = datetime.now(UTC)
    for number, name in enumerate([*names, others]):
        for user in ("bob", "cleo"):
            assert await read(name, user, number + 1)
            await Membership.get_motor_collection().update_one(
                {"_id": f"{name} {user}"}, {"$set": {"readAt": now - timedelta(minutes=10 - number)}}
            )
    await User.get_motor_collection().update_one({"_id": "cleo"}, {"$set": {"readReceipts": False}})

    async def since(minutes: float, limit: int = 100) -> list[tuple[str, str, int]]:
        moment = int((now - timedelta(minutes=minutes)).timestamp() * 1000)
        found = await cursors.since("ann", moment, limit)
        return [(one.conversation, one.user, one.up_to) for one in found]

    assert await since(60) == [(name, "bob", number + 1) for number, name in enumerate(names)]
    assert await since(8.5) == [(names[2], "bob", 3), (names[3], "bob", 4)]
    assert await since(1) == []
    await User.get_motor_collection().update_one({"_id": "cleo"}, {"$unset": {"readReceipts": ""}})
    assert await since(60, 3) == [(names[2], "cleo", 3), (names[3], "bob", 4), (names[3], "cleo", 4)]


@pytest.mark.parametrize("chunk", [1, 2, 1000])
async def test_cursors_for_many_people_are_those_for_each(
    revisions: Revisions, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    cursors = ReadCursors(timeout=5)
    monkeypatch.setattr(reading, "_CHUNK_TOGETHER", chunk)
    monkeypatch.setattr(reading, "MAX_LIVE_MEMBERS", 3)
    now = datetime.now(UTC)
    groups = [["bob", "cleo"], ["bob", "dan"], ["cleo", "eve", "fay"], ["dan"], ["bob", "cleo", "dan", "eve"]]
    for number, others in enumerate(groups):
        name, _ = await create(revisions, "ann", others)
        for place, user in enumerate(["ann", *others]):
            if (number + place) % 3:
                assert await read(name, user, number + 1)
                moved = now - timedelta(minutes=10 * number + place)
                await Membership.get_motor_collection().update_one(
                    {"_id": f"{name} {user}"}, {"$set": {"readAt": moved}}
                )
    await User.get_motor_collection().update_one({"_id": "dan"}, {"$set": {"readReceipts": False}})
    await contact("bob", "ann", listed=True, blocked=True)
    await contact("cleo", "eve", listed=False, blocked=True)
    moments = [int((now - timedelta(minutes=minutes)).timestamp() * 1000) for minutes in (60, 25, 5)]
    asked = [(user, moment) for user in [*PEOPLE, "nobody"] for moment in moments]
    alone = [await cursors.since(user, moment, 1000) for user, moment in asked]
    assert await cursors.since_for(asked, 1000) == alone
    assert await cursors.since_for(asked, 2) == [its[-2:] for its in alone]
    assert sum(map(len, alone)) > 10
    monkeypatch.setattr(reading, "_CURSORS_TOGETHER", 3)
    assert await cursors.since_for(asked, 1000) is None
    monkeypatch.setattr(reading, "_CURSORS_TOGETHER", 1000)
    monkeypatch.setattr(reading, "_CONVERSATIONS_TOGETHER", 3)
    assert await cursors.since_for(asked, 1000) is None


async def test_everything_is_read_by_an_index_and_only_what_is_wanted(
    backend: str, sights: Sights, revisions: Revisions
) -> None:
    if backend == "memory":
        pytest.skip("mongomock has no plans")
    cursors = ReadCursors(timeout=5)
    now = datetime.now(UTC)
    people = [f"u{number:03}" for number in range(300)]
    await User.get_motor_collection().insert_many([{"_id": user, "createdAt": now} for user in people])
    rows = [
        {
            "_id": f"{conv} {user}",
            "conversationId": conv,
            "user": user,
            "role": "member",
            "joinedAt": now,
            "updatedAt": now,
            "readUpTo": 1,
            "readAt": now - timedelta(days=1),
        }
        for conv in (f"c{number:02}" for number in range(40))
        for user in people[:: 1 + int(conv[1:]) % 7]
    ]
    await Membership.get_motor_collection().insert_many(rows)
    fresh = [("c00", "u000"), ("c01", "u002"), ("c02", "u003")]
    database = User.get_motor_collection().database
    await database.drop_collection("system.profile")
    await database.command("profile", 2)
    try:
        found = await cursors.move(dict.fromkeys(fresh, 9))
        told = await cursors.since("u000", int((now - timedelta(hours=1)).timestamp() * 1000), 1000)
        moment = int((now - timedelta(hours=1)).timestamp() * 1000)
        both = await cursors.since_for([("u000", moment), ("u001", moment)], 1000)
        seen = await sights.of({("u000", user) for user in people} | {("u001", "u002")})
    finally:
        await database.command("profile", 0)
    assert found.moved == found.members == set(fresh)
    assert sorted((one.conversation, one.user) for one in told) == sorted(fresh)
    assert both is not None
    assert both[0] == told
    assert len(seen) == 301
    plans = 0
    async for entry in database["system.profile"].find({"planSummary": {"$exists": True}}):
        plans += 1
        assert "COLLSCAN" not in entry["planSummary"], entry["command"]
        assert not entry.get("hasSortStage"), entry["command"]
        wanted = 100 + 3 * entry.get("nreturned", 0) + 3 * entry.get("nMatched", 0)
        # Ids that are asked for may be absent, and cost a key each.
        if "readAt" in str(entry["command"]):
            assert entry["keysExamined"] <= wanted, entry
    assert plans >= 6
