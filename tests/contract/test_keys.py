"""The key directory: one suite, in memory and on a real mongod."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from models.accounts import Device, User
from models.keys import PreKey, PublicKeys
from relay.store.embedded import EmbeddedMongo
from relay.store.keys import MAX_STOCK, KeyPair, Keys, Stock, Upload
from relay.wire.errors import RelayError
from tests.support.control import BACKENDS, open_control

PHONE = "ann/phone"
SIGNED = KeyPair(1, "c2lnbmVk", "c2ln")
LAST = KeyPair(99, "bGFzdA==", "c2ln")


@pytest.fixture(scope="module", params=BACKENDS)
async def backend(request: pytest.FixtureRequest, mongod: EmbeddedMongo) -> AsyncIterator[str]:
    async with open_control(request.param, mongod.uri) as kind:
        yield kind


@pytest.fixture
async def keys(backend: str) -> Keys:
    for document in (User, Device, PublicKeys, PreKey):
        await document.get_motor_collection().delete_many({})
    now = datetime.now(UTC)
    await User.get_motor_collection().insert_one({"_id": "ann", "createdAt": now})
    for device in (PHONE, "ann/tablet"):
        await Device.get_motor_collection().insert_one({"_id": device, "user": "ann", "createdAt": now})
    return Keys()


def one_time(*numbers: int) -> list[KeyPair]:
    return [KeyPair(number, f"one{number}") for number in numbers]


def kem(*numbers: int) -> list[KeyPair]:
    return [KeyPair(number, f"kem{number}", "c2ln") for number in numbers]


def upload(identity: str = "aWQ=", registration: int | None = 7, **changes: object) -> Upload:
    return replace(Upload(identity, registration, SIGNED), **changes)  # type: ignore[arg-type]


async def public(device: str = PHONE) -> dict[str, object]:
    found = await PublicKeys.get_motor_collection().find_one({"_id": device})
    assert found is not None
    return dict(found)


async def claimed(keys: Keys, device: str = PHONE) -> tuple[int | None, int | None]:
    (found,) = await keys.claim([device])
    return (
        None if found.one_time is None else found.one_time.id,
        None if found.kem is None else found.kem.id,
    )


async def test_an_upload_is_listed_and_counted(keys: Keys) -> None:
    assert await keys.stock(PHONE) == Stock(0, 0)
    assert await keys.news(PHONE, upload()) == "first"
    stock = await keys.store(PHONE, upload(one_time=one_time(1, 2, 3), kem=kem(1, 2), last_resort=LAST))
    assert stock == await keys.stock(PHONE) == Stock(3, 2)
    (entry,) = await keys.directory([PHONE, "ann/tablet", "bob/phone"])
    assert (entry.device, entry.identity, entry.registration, entry.signed) == (PHONE, "aWQ=", 7, SIGNED)
    assert await keys.stock(PHONE) == stock


async def test_the_same_upload_again_changes_nothing(keys: Keys) -> None:
    wanted = upload(one_time=one_time(1, 2), kem=kem(1), last_resort=LAST)
    await keys.store(PHONE, wanted)
    before = await public()
    assert await keys.store(PHONE, wanted) == Stock(2, 1)
    assert await public() == before


async def test_uploads_at_the_same_moment_all_succeed(keys: Keys) -> None:
    wanted = upload(one_time=one_time(*range(20)), kem=kem(*range(5)))
    found = await asyncio.gather(*(keys.store(PHONE, wanted) for _ in range(8)))
    assert await keys.stock(PHONE) == Stock(20, 5)
    assert found[-1].one_time <= 20


async def test_keys_are_handed_out_once_in_the_order_of_their_ids(keys: Keys) -> None:
    await keys.store(PHONE, upload(one_time=one_time(30, 4, 12), kem=kem(2)))
    assert [await claimed(keys) for _ in range(4)] == [(4, 2), (12, None), (30, None), (None, None)]
    assert await keys.stock(PHONE) == Stock(0, 0)


async def test_a_claim_returns_the_key_and_keeps_none_of_it(keys: Keys) -> None:
    await keys.store(PHONE, upload(one_time=one_time(1), kem=kem(5)))
    (found,) = await keys.claim([PHONE])
    assert found.one_time == KeyPair(1, "one1")
    assert found.kem == KeyPair(5, "kem5", "c2ln")
    for document in await PreKey.get_motor_collection().find({}).to_list(None):
        assert "key" not in document
        assert "signature" not in document
        assert document["claimedAt"] is not None


async def test_a_hundred_claims_at_once_get_a_hundred_different_keys(keys: Keys) -> None:
    await keys.store(PHONE, upload(one_time=one_time(*range(100)), kem=kem(*range(100))))
    found = await asyncio.gather(*(claimed(keys) for _ in range(100)))
    assert sorted(one for one, _ in found if one is not None) == list(range(100))
    assert sorted(one for _, one in found if one is not None) == list(range(100))
    assert await claimed(keys) == (None, None)


async def test_claims_racing_for_too_few_keys_share_them_out(keys: Keys) -> None:
    await keys.store(PHONE, upload(one_time=one_time(1, 2, 3)))
    found = [one for one, _ in await asyncio.gather(*(claimed(keys) for _ in range(20)))]
    assert sorted(one for one in found if one is not None) == [1, 2, 3]


async def test_a_repeated_upload_never_brings_back_what_was_handed_out(keys: Keys) -> None:
    wanted = upload(one_time=one_time(1, 2), kem=kem(1))
    await keys.store(PHONE, wanted)
    assert await claimed(keys) == (1, 1)
    assert await keys.store(PHONE, wanted) == Stock(1, 0)
    assert await claimed(keys) == (2, None)
    assert await keys.store(PHONE, wanted) == Stock(0, 0)
    assert await claimed(keys) == (None, None)


async def test_the_first_key_of_an_id_stays(keys: Keys) -> None:
    await keys.store(PHONE, upload(one_time=one_time(1)))
    await keys.store(PHONE, upload(one_time=[KeyPair(1, "other")]))
    (found,) = await keys.claim([PHONE])
    assert found.one_time == KeyPair(1, "one1")


async def test_the_last_resort_key_stands_in_for_kem_keys_and_is_not_used_up(keys: Keys) -> None:
    await keys.store(PHONE, upload(kem=kem(1), last_resort=LAST))
    assert [(await claimed(keys))[1] for _ in range(3)] == [1, 99, 99]
    assert await keys.store(PHONE, upload(kem=kem(2))) == Stock(0, 1)
    assert [(await claimed(keys))[1] for _ in range(2)] == [2, 99]


async def test_unknown_and_removed_devices_give_nothing(keys: Keys) -> None:
    await keys.store(PHONE, upload(one_time=one_time(1), last_resort=LAST))
    await Device.get_motor_collection().update_one({"_id": PHONE}, {"$set": {"removedAt": datetime.now(UTC)}})
    found = await keys.claim(["bob/none", PHONE, "ann/tablet"])
    assert [one.device for one in found] == ["bob/none", PHONE, "ann/tablet"]
    assert {(one.one_time, one.kem, one.low) for one in found} == {(None, None, None)}
    assert await keys.stock(PHONE) == Stock(1, 0)


async def test_a_claim_tells_how_many_are_left_only_when_they_are_few(keys: Keys) -> None:
    await keys.store(PHONE, upload(one_time=one_time(*range(22))))
    lows = [(await keys.claim([PHONE]))[0].low for _ in range(4)]
    assert lows == [None, None, 19, 18]


async def test_a_new_signed_prekey_retires_the_one_before(keys: Keys) -> None:
    for number in range(1, 14):
        await keys.store(PHONE, upload(signed=KeyPair(number, f"key{number}", "c2ln")))
    stored = await PublicKeys.get(PHONE)
    assert stored is not None
    assert stored.signedPreKey.id == 13
    assert [retired.id for retired in stored.history] == list(range(3, 13))
    assert all(retired.retiredAt.tzinfo or retired.retiredAt for retired in stored.history)


async def test_rotations_at_the_same_moment_lose_no_retired_key(keys: Keys) -> None:
    await keys.store(PHONE, upload())
    rotated = [upload(signed=KeyPair(number, f"key{number}", "c2ln")) for number in (2, 3, 4)]
    await asyncio.gather(*(keys.store(PHONE, one) for one in rotated))
    stored = await PublicKeys.get(PHONE)
    assert stored is not None
    assert {stored.signedPreKey.id, *(retired.id for retired in stored.history)} == {1, 2, 3, 4}


@pytest.mark.parametrize("change", [{"identity": "b3RoZXI="}, {"registration": 8}])
async def test_another_installation_starts_anew(keys: Keys, change: dict[str, object]) -> None:
    await keys.store(PHONE, upload(one_time=one_time(1, 2), kem=kem(1), last_resort=LAST))
    assert await claimed(keys) == (1, 1)
    fresh = [KeyPair(1, "another one1"), *one_time(5)]
    other = replace(upload(one_time=fresh), **change)  # type: ignore[arg-type]
    assert await keys.news(PHONE, other) == "installation"
    assert await keys.store(PHONE, other) == Stock(2, 0)
    assert await keys.news(PHONE, other) == "nothing"
    assert [await claimed(keys) for _ in range(3)] == [(1, None), (5, None), (None, None)]
    (entry,) = await keys.directory([PHONE])
    assert (entry.identity, entry.registration) == (other.identity, other.registration)


async def test_a_registration_id_told_later_or_left_out_is_no_other_installation(keys: Keys) -> None:
    await keys.store(PHONE, upload(registration=None, one_time=one_time(1)))
    named = upload(registration=7)
    assert await keys.news(PHONE, named) == "keys"
    assert await keys.store(PHONE, named) == Stock(1, 0)
    left_out = upload(registration=None)
    assert await keys.news(PHONE, left_out) == "nothing"
    assert await keys.store(PHONE, left_out) == Stock(1, 0)
    (entry,) = await keys.directory([PHONE])
    assert entry.registration == 7
    assert await keys.news(PHONE, upload(registration=8)) == "installation"


async def test_what_a_former_installation_was_asked_for_is_not_given_twice_when_it_returns(
    keys: Keys,
) -> None:
    wanted = upload(one_time=one_time(1, 2))
    await keys.store(PHONE, wanted)
    assert await claimed(keys) == (1, None)
    await keys.store(PHONE, upload("b3RoZXI="))
    assert await keys.store(PHONE, wanted) == Stock(1, 0)
    assert await claimed(keys) == (2, None)


async def test_a_replacement_that_died_after_any_write_is_finished_by_its_repetition(keys: Keys) -> None:
    await keys.store(PHONE, upload(one_time=one_time(1, 2, 3)))
    other = upload("b3RoZXI=", 8, one_time=one_time(1, 2))
    assert await keys.relink(PHONE, 8)
    # Nothing is published yet, so a repetition is still seen as a replacement.
    assert await keys.news(PHONE, other) == "installation"
    await keys._publish(PHONE, other)
    assert (await keys.claim([PHONE]))[0].one_time is None
    assert await keys.store(PHONE, other) == Stock(2, 0)
    assert await PreKey.get_motor_collection().count_documents({}) == 2


async def test_a_relinked_device_gets_a_gap_from_then_on(keys: Keys) -> None:
    start = datetime.now(UTC) - timedelta(seconds=1)
    assert await keys.register(PHONE, 7)
    found = await Device.get(PHONE)
    assert found is not None
    assert (found.registrationId, found.relinkedAt, found.gap, found.since) == (7, None, None, None)
    assert await keys.relink(PHONE, 8)
    found = await Device.get(PHONE)
    assert found is not None
    assert found.gap is not None
    assert found.registrationId == 8
    assert found.gap.why == "reset"
    assert found.gap.since == found.since == found.relinkedAt
    assert found.since is not None
    assert found.since.replace(tzinfo=UTC) > start
    await keys.relinked(PHONE)
    again = await Device.get(PHONE)
    assert again is not None
    assert again.since == found.since
    assert again.relinkedAt is not None
    assert found.relinkedAt is not None
    assert again.relinkedAt >= found.relinkedAt


async def test_a_removed_or_unknown_device_can_neither_register_nor_relink(keys: Keys) -> None:
    await Device.get_motor_collection().update_one({"_id": PHONE}, {"$set": {"removedAt": datetime.now(UTC)}})
    for device in (PHONE, "bob/none"):
        assert not await keys.register(device, 5)
        assert not await keys.relink(device, 5)
        assert not await keys.register(device, None)
    assert await Device.get("bob/none") is None


async def test_a_stock_has_a_limit_that_repetitions_do_not_meet(keys: Keys) -> None:
    full = [one_time(*range(start, start + 200)) for start in range(0, MAX_STOCK, 200)]
    for part in full:
        await keys.store(PHONE, upload(one_time=part))
    with pytest.raises(RelayError) as refused:
        await keys.store(PHONE, upload(one_time=one_time(5000)))
    assert refused.value.code == "too_large"
    assert await keys.store(PHONE, upload(one_time=full[0])) == Stock(MAX_STOCK, 0)
    await claimed(keys)
    assert await keys.store(PHONE, upload(one_time=one_time(5000))) == Stock(MAX_STOCK, 0)


async def test_forgotten_keys_are_gone_and_others_stay(keys: Keys) -> None:
    wanted = upload(one_time=one_time(1, 2), kem=kem(1), last_resort=LAST)
    for device in (PHONE, "ann/tablet"):
        await keys.store(device, wanted)
    await keys.forget(PHONE)
    await keys.forget(PHONE)
    assert [entry.device for entry in await keys.directory([PHONE, "ann/tablet"])] == ["ann/tablet"]
    assert await PreKey.get_motor_collection().count_documents({"device": PHONE}) == 0
    assert await keys.stock("ann/tablet") == Stock(2, 1)
    assert await keys.news(PHONE, wanted) == "first"


async def test_a_device_that_comes_back_with_its_keys_gives_none_of_them_twice(keys: Keys) -> None:
    wanted = upload(one_time=one_time(1, 2))
    await keys.store(PHONE, wanted)
    assert await claimed(keys) == (1, None)
    await keys.forget(PHONE)
    assert await keys.directory([PHONE]) == []
    assert await keys.store(PHONE, wanted) == Stock(1, 0)
    assert await claimed(keys) == (2, None)


async def test_a_key_that_was_handed_out_stays_so_whichever_installation_it_is_said_to_be_of(
    keys: Keys,
) -> None:
    wanted = upload(registration=None, one_time=one_time(10), kem=kem(10))
    await keys.store(PHONE, wanted)
    assert await claimed(keys) == (10, 10)
    await keys.store(PHONE, replace(wanted, registration=7))
    await keys.forget(PHONE)
    assert await keys.store(PHONE, replace(wanted, registration=7)) == Stock(0, 0)
    assert await keys.store(PHONE, replace(wanted, identity="b3RoZXI=")) == Stock(0, 0)
    assert await claimed(keys) == (None, None)


async def test_the_mark_of_a_key_that_was_handed_out_runs_out_only_with_its_device(keys: Keys) -> None:
    wanted = upload(one_time=one_time(1, 2))
    await keys.store(PHONE, wanted)
    await claimed(keys)
    marks = PreKey.get_motor_collection()
    assert await marks.count_documents({"forgottenAt": {"$ne": None}}) == 0
    await keys.forget(PHONE)
    assert await marks.count_documents({"forgottenAt": {"$type": "date"}}) == 1
    await keys.store(PHONE, wanted)
    assert await marks.count_documents({"forgottenAt": {"$ne": None}}) == 0
    expiring = {
        name
        for index in PreKey.Settings.indexes
        for name in index.document["key"]
        if "expireAfterSeconds" in index.document
    }
    assert expiring == {"forgottenAt"}


async def test_only_devices_that_have_keys_can_be_claimed_of(keys: Keys) -> None:
    for device in (PHONE, "ann/tablet"):
        await keys.store(device, upload())
    await Device.get_motor_collection().update_one({"_id": PHONE}, {"$set": {"removedAt": datetime.now(UTC)}})
    assert await keys.claimable(["bob/none", PHONE, "ann/tablet"]) == ["ann/tablet"]


async def test_what_an_upload_changes_is_told(keys: Keys) -> None:
    await keys.store(PHONE, upload(last_resort=LAST))
    assert await keys.news(PHONE, upload(one_time=one_time(1), kem=kem(1))) == "nothing"
    assert await keys.news(PHONE, upload(signed=KeyPair(2, "bmV3", "c2ln"))) == "keys"
    assert await keys.news(PHONE, upload(last_resort=KeyPair(98, "bmV3", "c2ln"))) == "keys"


@pytest.mark.parametrize("gone", [True, False])
async def test_of_an_erased_person_not_even_a_mark_stays(keys: Keys, gone: bool) -> None:
    await keys.store(PHONE, upload(one_time=one_time(1, 2)))
    await claimed(keys)
    users = User.get_motor_collection()
    if gone:
        await users.delete_one({"_id": "ann"})
    else:
        await users.update_one({"_id": "ann"}, {"$set": {"erasingAt": datetime.now(UTC)}})
    await keys.forget(PHONE)
    for document in (PublicKeys, PreKey):
        assert await document.get_motor_collection().count_documents({}) == 0
