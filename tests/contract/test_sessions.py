"""The stores of sessions and of devices' standing: one suite, in memory and on a real mongod."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from models.accounts import Device, User
from models.housekeeping import Tombstone
from relay.security.pseudonyms import Pseudonyms
from relay.security.refresh import begin
from relay.store import accounts as store
from relay.store.accounts import Accounts, Standing
from relay.store.arriving import Provision
from relay.store.embedded import EmbeddedMongo
from relay.store.sessions import Installation, Opened, Renewed, Reused, Sessions, new_device
from relay.wire.errors import RelayError
from tests.support.arriving import arrive
from tests.support.control import BACKENDS, open_control

PSEUDONYMS = Pseudonyms(b"a key for tests only, of 32 bytes")
PHONE = Installation("phone", "Ann's phone", "ios")
TABLET = Installation("tablet", "Ann's tablet", "ios")


@pytest.fixture(scope="module", params=BACKENDS)
async def backend(request: pytest.FixtureRequest, mongod: EmbeddedMongo) -> AsyncIterator[str]:
    async with open_control(request.param, mongod.uri) as kind:
        yield kind


@pytest.fixture
async def sessions(backend: str) -> Sessions:
    for document in (User, Device, Tombstone):
        await document.get_motor_collection().delete_many({})
    return Sessions(refresh_days=90, repeat_hours=24, max_devices=3)


@pytest.fixture
def accounts(sessions: Sessions) -> Accounts:
    return Accounts(inactive=timedelta(days=30), pseudonyms=PSEUDONYMS)


async def row(key: str) -> dict[str, Any]:
    found: dict[str, Any] | None = await Device.get_motor_collection().find_one({"_id": key})
    assert found is not None
    return found


async def change(key: str, **fields: Any) -> None:
    await Device.get_motor_collection().update_one({"_id": key}, {"$set": fields})


async def renewed(sessions: Sessions, token: object) -> Renewed:
    found = await sessions.renew(str(token))
    assert isinstance(found, Renewed), found
    return found


async def opened(sessions: Sessions, installation: Installation = PHONE, user: str = "ann") -> Opened:
    return await sessions.open(user, installation)


# Accounts


async def test_an_account_is_found_by_its_user_name_with_what_it_was_given(sessions: Sessions) -> None:
    made = await sessions.register("ann", "a hash", name="Ann", phone="+49305550100")
    assert await sessions.account("ann") == made
    assert await sessions.account_of(made.user) == made
    assert (made.username, made.name, made.password) == ("ann", "Ann", "a hash")
    assert not made.suspended and not made.erasing
    assert await sessions.account("bob") is None
    document = await User.get_motor_collection().find_one({"_id": made.user})
    assert document is not None
    assert {"usernameKey", "nameKey", "phoneKey"} <= document.keys(), "others can find them"


async def test_of_many_who_want_one_name_at_once_one_gets_it(sessions: Sessions) -> None:
    found = await asyncio.gather(
        *(sessions.register("ann", f"hash {number}") for number in range(10)), return_exceptions=True
    )
    errors = [one for one in found if isinstance(one, RelayError)]
    assert [error.code for error in errors] == ["conflict"] * 9
    assert await User.get_motor_collection().count_documents({}) == 1


async def test_a_new_hash_is_stored_only_in_place_of_the_old_one(sessions: Sessions) -> None:
    made = await sessions.register("ann", "old")
    await sessions.rehash(made.user, "old", "new")
    await sessions.rehash(made.user, "old", "newer")
    found = await sessions.account("ann")
    assert found is not None and found.password == "new"


# Opening


async def test_of_a_session_only_hashes_are_stored(sessions: Sessions) -> None:
    name = new_device()
    assert len(name) == 16
    found = await opened(sessions, Installation(name, "phone", "ios"))
    assert found.changed and not found.fresh and not found.ended
    stored = await row(f"ann/{name}")
    assert stored["session"]["id"] == found.token.session
    assert found.token.secret not in str(stored)
    assert found.token.handle not in str(stored)


async def test_another_log_in_on_a_device_ends_its_session(sessions: Sessions) -> None:
    first = await opened(sessions)
    await change("ann/phone", createdAt=datetime.now(UTC) - timedelta(minutes=1))
    second = await opened(sessions)
    assert second.ended and not second.changed and not second.fresh
    assert await sessions.renew(str(first.token)) is None
    await renewed(sessions, second.token)


async def test_a_log_in_repeated_at_once_tells_again_that_the_device_is_there(sessions: Sessions) -> None:
    first, second = await opened(sessions), await opened(sessions)
    assert first.changed and second.changed, "who made it may have died before it told"


async def test_log_ins_on_one_device_at_once_leave_one_session(sessions: Sessions) -> None:
    found = await asyncio.gather(*(opened(sessions) for _ in range(5)))
    good = [one for one in found if isinstance(await sessions.renew(str(one.token)), Renewed)]
    assert len(good) == 1


async def test_a_reset_device_begins_anew_and_learns_that_it_missed_something(sessions: Sessions) -> None:
    await opened(sessions)
    before = datetime.now(UTC) - timedelta(milliseconds=2)
    found = await opened(sessions, Installation("phone", "phone", "ios", reset=True))
    assert found.changed and found.fresh and found.ended
    stored = await row("ann/phone")
    assert stored["gap"]["why"] == "reset"
    assert stored["since"] == stored["relinkedAt"] == stored["gap"]["since"] >= before
    assert stored["endedAt"] == stored["since"]


async def test_a_user_has_at_most_so_many_devices_with_a_session(sessions: Sessions) -> None:
    for name in ("a", "b", "c"):
        await opened(sessions, Installation(name, name, "ios"))
    await opened(sessions, Installation("a", "a", "ios"))
    with pytest.raises(RelayError) as caught:
        await opened(sessions, Installation("d", "d", "ios"))
    assert caught.value.code == "conflict"
    assert await sessions.is_active("ann", "d") is None
    await opened(sessions, Installation("d", "d", "ios"), "bob")
    await sessions.remove("ann", "b")
    await opened(sessions, Installation("d", "d", "ios"))


async def test_a_session_that_was_idle_for_too_long_takes_no_place(sessions: Sessions) -> None:
    for name in ("a", "b", "c"):
        await opened(sessions, Installation(name, name, "ios"))
    await change("ann/a", **{"session.rotatedAt": datetime.now(UTC) - timedelta(days=91)})
    await opened(sessions, Installation("d", "d", "ios"))


async def test_log_ins_on_too_many_devices_at_once_do_not_all_stay(sessions: Sessions) -> None:
    found = await asyncio.gather(
        *(opened(sessions, Installation(f"d{number}", "d", "ios")) for number in range(8)),
        return_exceptions=True,
    )
    stay = [one for one in found if isinstance(one, Opened) and not one.too_many]
    assert len(stay) <= 3


async def test_one_persons_device_id_is_not_anothers(sessions: Sessions) -> None:
    ann, bob = await opened(sessions), await opened(sessions, PHONE, "bob")
    assert (await renewed(sessions, ann.token)).user == "ann"
    assert (await renewed(sessions, bob.token)).user == "bob"


# Renewal


async def test_each_refresh_token_gives_its_successor(sessions: Sessions) -> None:
    token = (await opened(sessions)).token
    seen = {str(token)}
    for _ in range(5):
        found = await renewed(sessions, token)
        assert (found.user, found.device) == ("ann", "phone")
        assert found.token.session == token.session
        token = found.token
        seen.add(str(token))
    assert len(seen) == 6


async def test_a_lost_answer_is_repeated_until_the_successor_is_used(sessions: Sessions) -> None:
    first = (await opened(sessions)).token
    second = (await renewed(sessions, first)).token
    for _ in range(3):
        assert (await renewed(sessions, first)).token == second
    third = (await renewed(sessions, second)).token
    assert await sessions.renew(str(first)) == Reused("ann", "phone")
    assert await sessions.renew(str(third)) is None, "the session has ended for whoever holds it"


async def test_renewals_with_one_token_at_once_get_the_same_successor(sessions: Sessions) -> None:
    token = (await opened(sessions)).token
    found = await asyncio.gather(*(renewed(sessions, token) for _ in range(10)))
    assert len({str(one.token) for one in found}) == 1
    await renewed(sessions, found[0].token)


async def test_an_older_token_ends_the_session_and_what_was_issued_in_it(
    sessions: Sessions, accounts: Accounts
) -> None:
    first = (await opened(sessions)).token
    second = (await renewed(sessions, first)).token
    await renewed(sessions, second)
    assert isinstance(await sessions.renew(str(first)), Reused)
    assert "session" not in await row("ann/phone")
    standing = await accounts.standing("ann", "phone")
    assert standing is None, "this user was never created"
    await accounts.add_users(["ann"])
    standing = await accounts.standing("ann", "phone")
    assert standing is not None
    assert not standing.accepts(int(time.time()), first.session)
    assert await sessions.renew(str(first)) is None, "a second reuse finds nothing to end"


async def test_a_wrong_secret_with_a_right_session_ends_it(sessions: Sessions) -> None:
    token = (await opened(sessions)).token
    assert isinstance(await sessions.renew(f"{token.handle}.{begin().secret}"), Reused)
    assert await sessions.renew(str(token)) is None


async def test_who_knows_only_what_is_stored_or_in_access_tokens_cannot_end_a_session(
    sessions: Sessions,
) -> None:
    token = (await opened(sessions)).token
    assert token.session == (await row("ann/phone"))["session"]["id"]
    assert await sessions.renew(f"{token.session}.{begin().secret}") is None
    await renewed(sessions, token)


async def test_a_repetition_is_suspicious_once_an_hour(sessions: Sessions) -> None:
    first = (await opened(sessions)).token
    found = await renewed(sessions, first)
    assert not found.suspicious
    assert (await renewed(sessions, first)).suspicious
    assert (await renewed(sessions, first)).suspicious, "until it was noted"
    await sessions.note_repeat("ann", "phone", first.session)
    assert not (await renewed(sessions, first)).suspicious
    second = (await renewed(sessions, found.token)).token
    assert not (await renewed(sessions, found.token)).suspicious, "nor after the next exchange"
    await change("ann/phone", **{"session.repeatedAt": datetime.now(UTC) - timedelta(minutes=61)})
    assert (await renewed(sessions, found.token)).suspicious
    await sessions.note_repeat("ann", "phone", begin().session)
    assert (await renewed(sessions, found.token)).suspicious, "another session's"
    assert not (await renewed(sessions, second)).suspicious


async def test_the_repetition_ends_with_its_time(sessions: Sessions) -> None:
    first = (await opened(sessions)).token
    await renewed(sessions, first)
    await change("ann/phone", **{"session.rotatedAt": datetime.now(UTC) - timedelta(hours=23, minutes=59)})
    await renewed(sessions, first)
    await change("ann/phone", **{"session.rotatedAt": datetime.now(UTC) - timedelta(hours=24, minutes=1)})
    assert isinstance(await sessions.renew(str(first)), Reused)


async def test_a_session_that_was_idle_for_too_long_has_ended(sessions: Sessions) -> None:
    token = (await opened(sessions)).token
    await change("ann/phone", **{"session.rotatedAt": datetime.now(UTC) - timedelta(days=89)})
    token = (await renewed(sessions, token)).token
    await change("ann/phone", **{"session.rotatedAt": datetime.now(UTC) - timedelta(days=91)})
    assert await sessions.renew(str(token)) is None


@pytest.mark.parametrize("text", ["", "a.b", "x" * 256, "a" * 22 + "." + "b" * 43])
async def test_what_belongs_to_no_session_renews_nothing(sessions: Sessions, text: str) -> None:
    await opened(sessions)
    assert await sessions.renew(text) is None
    assert "session" in await row("ann/phone")


# Removal


async def test_a_removed_device_is_listed_no_more_and_removed_once(sessions: Sessions) -> None:
    await opened(sessions)
    await opened(sessions, TABLET)
    assert [view.id for view in await sessions.devices("ann")] == ["phone", "tablet"]
    assert await sessions.remove("ann", "phone")
    assert not await sessions.remove("ann", "phone")
    assert not await sessions.remove("ann", "laptop")
    assert [view.id for view in await sessions.devices("ann")] == ["tablet"]
    found = [await sessions.is_active("ann", name) for name in ("tablet", "phone", "laptop")]
    assert found == [True, False, None]


async def test_a_removed_device_has_no_session_and_no_push_token(sessions: Sessions) -> None:
    token = (await opened(sessions)).token
    await change("ann/phone", push={"provider": "apns", "token": "t"})
    await sessions.remove("ann", "phone")
    stored = await row("ann/phone")
    assert "session" not in stored and "push" not in stored
    assert stored["removedAt"] == stored["endedAt"]
    assert await sessions.renew(str(token)) is None


async def test_a_removed_device_gets_no_new_messages_until_it_logs_in_again(
    sessions: Sessions, accounts: Accounts
) -> None:
    await opened(sessions)
    assert await accounts.active_devices(["ann"]) == {"ann": ["ann/phone"]}
    await sessions.remove("ann", "phone")
    assert await accounts.active_devices(["ann"]) == {}
    found = await opened(sessions)
    assert found.changed and found.fresh
    assert await accounts.active_devices(["ann"]) == {"ann": ["ann/phone"]}
    stored = await row("ann/phone")
    assert stored["gap"]["why"] == "reset"
    assert stored["since"] >= stored["endedAt"]


# Standing


def test_a_token_of_another_issuer_is_good_when_issued_after_the_end() -> None:
    standing = Standing(ended=5_500, session="s", barred=False)
    assert [standing.accepts(second, None) for second in (4, 5, 6)] == [False, False, True]
    assert Standing(ended=5_000, session=None, barred=False).accepts(5, None) is False
    assert Standing(ended=None, session=None, barred=False).accepts(0, None)


def test_a_token_of_ours_is_good_only_for_the_devices_session() -> None:
    standing = Standing(ended=9_000, session="s", barred=False)
    assert standing.accepts(1, "s")
    assert not standing.accepts(10, "other")
    assert not Standing(ended=None, session=None, barred=False).accepts(10, "s")
    assert not Standing(ended=None, session="s", barred=True).accepts(10, "s")


@pytest.mark.parametrize("mark", ["suspendedAt", "erasingAt"])
async def test_nobody_who_is_suspended_or_being_erased_arrives(
    sessions: Sessions, accounts: Accounts, mark: str
) -> None:
    made = await sessions.register("ann", "hash")
    session = (await opened(sessions, PHONE, made.user)).token.session
    now = int(time.time())
    assert await arrive(accounts, made.user, "phone", provision=True, issued=now, session=session)
    await User.get_motor_collection().update_one({"_id": made.user}, {"$set": {mark: datetime.now(UTC)}})
    for name in ("phone", "new"):
        assert await arrive(accounts, made.user, name, provision=True, issued=now + 5) is None
    assert await arrive(accounts, made.user, "phone", provision=True, issued=now, session=session) is None
    standing = await accounts.standing(made.user, "phone")
    assert standing is not None and standing.barred


@pytest.mark.parametrize("returns", [False, True])
async def test_who_is_suspended_while_a_new_device_arrives_has_none_that_is_good(
    sessions: Sessions, accounts: Accounts, monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    now = int(time.time()) + 5
    await accounts.add_users(["ann"])
    if returns:
        assert await arrive(accounts, "ann", "phone", provision=True)
        await sessions.remove("ann", "phone")
    judge, judged = store.is_barred, 0

    def suspended_meanwhile(person: Any) -> bool:
        nonlocal judged
        judged += 1
        # The first time they were not: the suspension came after that question, and before the device.
        return judged > 1 or judge(person)

    with monkeypatch.context() as patch:
        patch.setattr(store, "is_barred", suspended_meanwhile)
        noted = Provision(returned=returns, account=False)
        found = await arrive(accounts, "ann", "phone", provision=True, issued=now, noted=noted)
    assert found is None
    assert judged == 2
    stored = await row("ann/phone")
    assert datetime.now(UTC) - stored["endedAt"] < timedelta(seconds=5), "its older tokens stay bad"


async def test_a_removed_device_comes_back_only_with_a_token_issued_after_its_removal(
    sessions: Sessions, accounts: Accounts
) -> None:
    now = int(time.time())
    assert await arrive(accounts, "ann", "phone", provision=True, issued=now)
    await sessions.remove("ann", "phone")
    assert await arrive(accounts, "ann", "phone", provision=True, issued=now) is None
    assert await arrive(accounts, "ann", "phone", provision=False, issued=now + 5) is None
    assert await arrive(accounts, "ann", "phone", provision=True, issued=now + 5, session="s") is None
    assert "removedAt" in await row("ann/phone")
    found = await arrive(accounts, "ann", "phone", provision=True, issued=now + 5)
    assert found is not None
    assert found.changed and found.returned
    assert found.gap_why == "reset"
    assert await arrive(accounts, "ann", "phone", provision=True, issued=now) is None, "old tokens stay bad"
    again = await arrive(accounts, "ann", "phone", provision=True, issued=now + 5)
    assert again is not None and not again.returned


async def test_a_token_of_a_session_creates_neither_user_nor_device(accounts: Accounts) -> None:
    assert await arrive(accounts, "ann", "phone", provision=True, session="s") is None
    await accounts.add_users(["ann"])
    assert await arrive(accounts, "ann", "phone", provision=True, session="s") is None
    assert await Device.get_motor_collection().count_documents({}) == 0


async def test_the_standing_is_remembered_for_a_while_and_forgotten_on_demand(
    sessions: Sessions, accounts: Accounts
) -> None:
    await arrive(accounts, "ann", "phone", provision=True)
    assert await accounts.standing("ann", "laptop", within=60) is None
    assert await accounts.standing("bob", "phone", within=60) is None
    first = await accounts.standing("ann", "phone", within=60)
    assert first is not None and not first.barred
    await sessions.remove("ann", "phone")
    assert await accounts.standing("ann", "phone", within=60) == first
    accounts.forget("ann/phone")
    found = await accounts.standing("ann", "phone", within=60)
    assert found is not None and found.barred


async def test_a_standing_read_while_the_device_was_revoked_is_not_remembered(
    sessions: Sessions, accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    await arrive(accounts, "ann", "phone", provision=True)
    judge = store.is_barred

    def revoked_meanwhile(person: Any) -> bool:
        accounts.forget("ann/phone")
        return judge(person)

    with monkeypatch.context() as patch:
        patch.setattr(store, "is_barred", revoked_meanwhile)
        read_before = await accounts.standing("ann", "phone", within=60)
    assert read_before is not None and not read_before.barred
    await sessions.remove("ann", "phone")
    found = await accounts.standing("ann", "phone", within=60)
    assert found is not None and found.barred


async def test_what_ended_lately_is_told_with_what_is_still_good(
    sessions: Sessions, accounts: Accounts
) -> None:
    await opened(sessions)
    await opened(sessions, TABLET)
    again = await opened(sessions)
    await sessions.remove("ann", "tablet")
    await opened(sessions, PHONE, "bob")
    since = datetime.now(UTC) - timedelta(seconds=30)
    found = {key: standing async for key, standing in accounts.ended_since(since)}
    assert found.keys() == {"ann/phone", "ann/tablet"}
    assert found["ann/phone"].session == again.token.session
    assert found["ann/tablet"].barred
    later = datetime.now(UTC) + timedelta(seconds=1)
    assert [key async for key, _ in accounts.ended_since(later)] == []


async def test_who_was_suspended_or_began_to_be_erased_lately_is_told(
    sessions: Sessions, accounts: Accounts
) -> None:
    now = datetime.now(UTC)
    await accounts.add_users(["ann", "bob", "cleo"])
    users = User.get_motor_collection()
    await users.update_one({"_id": "ann"}, {"$set": {"suspendedAt": now}})
    await users.update_one({"_id": "bob"}, {"$set": {"erasingAt": now}})
    await users.update_one({"_id": "cleo"}, {"$set": {"suspendedAt": now - timedelta(minutes=2)}})
    since = now - timedelta(minutes=1)
    assert sorted([user async for user in accounts.barred_since(since)]) == ["ann", "bob"]


# Erased people


async def test_an_erased_person_comes_back_only_with_a_token_issued_later(accounts: Accounts) -> None:
    at = datetime.now(UTC)
    await Tombstone.get_motor_collection().insert_one({"_id": PSEUDONYMS.of("ann"), "at": at})
    now = int(at.timestamp())
    assert await arrive(accounts, "ann", "phone", provision=True, issued=now) is None
    assert not await accounts.exists("ann")
    assert await arrive(accounts, "ann", "phone", provision=True, issued=now + 1)
    assert await accounts.exists("ann")


async def test_naming_an_erased_person_as_a_member_does_not_bring_them_back(accounts: Accounts) -> None:
    await Tombstone.get_motor_collection().insert_one({"_id": PSEUDONYMS.of("ann"), "at": datetime.now(UTC)})
    await accounts.add_users(["ann", "bob"])
    assert await accounts.missing_users(["ann", "bob", "cleo"]) == ["ann", "cleo"]


async def test_who_is_being_erased_counts_as_missing(accounts: Accounts) -> None:
    await accounts.add_users(["ann"])
    await User.get_motor_collection().update_one({"_id": "ann"}, {"$set": {"erasingAt": datetime.now(UTC)}})
    assert await accounts.missing_users(["ann"]) == ["ann"]
    assert not await accounts.exists("ann")


# Indexes


async def test_every_question_on_the_way_in_uses_an_index(
    backend: str, sessions: Sessions, accounts: Accounts
) -> None:
    if backend == "memory":
        return
    made = await sessions.register("ann", "hash")
    for number in range(3):
        await opened(sessions, Installation(f"d{number}", "d", "ios"), made.user)
    database = Device.get_motor_collection().database
    await database.command("profile", 2)
    try:
        token = (await opened(sessions, Installation("d1", "d", "ios"), made.user)).token
        await sessions.account("ann")
        await renewed(sessions, token)
        await sessions.devices(made.user)
        await accounts.standing(made.user, "d1")
        await accounts.missing_users([made.user])
        since = datetime.now(UTC) - timedelta(minutes=1)
        assert [key async for key, _ in accounts.ended_since(since)]
        assert not [user async for user in accounts.barred_since(since)]
    finally:
        await database.command("profile", 0)
    seen = 0
    async for entry in database["system.profile"].find({"ns": {"$regex": r"\.(users|devices)$"}}):
        if "planSummary" in entry:
            seen += 1
            assert "COLLSCAN" not in entry["planSummary"], entry["command"]
            assert not entry.get("hasSortStage"), entry["command"]
    assert seen >= 8
