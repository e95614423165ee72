"""Arriving in a group is arriving alone, with fewer calls: every kind of device, side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.errors import AutoReconnect, ExecutionTimeout

from models.accounts import Device, User
from models.audit import AuditEntry
from models.housekeeping import Tombstone
from relay.metrics import Metrics
from relay.security.pseudonyms import Pseudonyms
from relay.store import arrivals as module
from relay.store.accounts import Accounts, Arrival
from relay.store.arrivals import Arrivals
from relay.store.arriving import Arriving, Provision
from relay.store.audit import Audit
from relay.store.embedded import EmbeddedMongo
from relay.store.mongo import PyMongoError
from relay.wire.errors import RelayError
from tests.support.arriving import arrive
from tests.support.control import clear, open_control
from tests.support.on_cluster import ON_CLUSTER
from tests.support.waiting import until

INACTIVE = timedelta(days=30)
NOW = datetime.now(UTC).replace(microsecond=0)
OLD = NOW - timedelta(days=3)
ISSUED = int(NOW.timestamp()) - 60
AWAY = {"lastSeen": NOW - timedelta(days=40)}
GAP = {"since": OLD, "why": "full", "latest": OLD}


@dataclass(frozen=True)
class Kind:
    """A kind of device: what is stored of its user (None: nothing), of it, and how it comes."""

    name: str
    user: dict[str, Any] | None
    device: dict[str, Any] | None
    provision: bool = True
    session: str | None = None
    issued: int | None = ISSUED
    erased: datetime | None = None
    live: bool = True


KNOWN: dict[str, Any] = {"createdAt": OLD, "lastSeen": OLD, "liveAt": OLD}
SESSION = {"id": "s-", "current": "c", "createdAt": OLD, "rotatedAt": OLD}
KINDS = [
    Kind("known", {}, KNOWN),
    Kind("known by HTTP", {}, KNOWN, live=False),
    Kind("known without provision", {}, KNOWN, provision=False),
    Kind("never connected", {}, {"createdAt": OLD}),
    Kind("quiet", {"deliveredReceipts": False}, KNOWN),
    Kind("with a gap", {}, {**KNOWN, "gap": GAP}),
    Kind("full", {}, {**KNOWN, "gap": GAP, "fullSince": OLD}),
    Kind("new a moment ago", {}, {"createdAt": NOW, "lastSeen": NOW}),
    Kind("back a moment ago", {}, {**KNOWN, "backAt": NOW}),
    Kind("user with a gap", {"gap": GAP}, KNOWN),
    Kind("new, user with a gap", {"gap": GAP}, None),
    Kind("never seen", None, None),
    Kind("never seen, by HTTP", None, None, live=False),
    Kind("never seen without provision", None, None, provision=False),
    Kind("never seen with a session", None, None, session="s"),
    Kind("new device", {}, None),
    Kind("new device without provision", {}, None, provision=False),
    Kind("device without its user", None, KNOWN),
    Kind("suspended", {"suspendedAt": OLD}, KNOWN),
    Kind("suspended, new device", {"suspendedAt": OLD}, None),
    Kind("being erased", {"erasingAt": OLD}, KNOWN),
    Kind("erased before the token", None, None, erased=OLD),
    Kind("erased after the token", None, None, erased=NOW),
    Kind("session", {}, {**KNOWN, "session": SESSION}, session="s"),
    Kind("another session", {}, {**KNOWN, "session": SESSION}, session="other"),
    Kind("token before the end", {}, {**KNOWN, "endedAt": NOW}),
    Kind("token after the end", {}, {**KNOWN, "endedAt": OLD}),
    Kind("inactive", {}, {**KNOWN, **AWAY}),
    Kind("inactive with a gap", {}, {**KNOWN, **AWAY, "gap": GAP}),
    Kind("inactive, token before the end", {}, {**KNOWN, **AWAY, "endedAt": NOW}),
    Kind("nearly inactive", {}, {**KNOWN, "lastSeen": datetime.now(UTC) - INACTIVE + timedelta(seconds=50)}),
    Kind("removed before the token", {}, {**KNOWN, "removedAt": OLD, "endedAt": OLD}),
    Kind("removed after the token", {}, {**KNOWN, "removedAt": NOW, "endedAt": NOW}),
    Kind("removed, without provision", {}, {**KNOWN, "removedAt": OLD}, provision=False),
    Kind("no issue time", {}, {**KNOWN, "endedAt": OLD}, issued=None),
]


@pytest.fixture(scope="module")
async def control(mongod: EmbeddedMongo) -> AsyncIterator[str]:
    async with open_control("mongod", mongod.uri) as kind:
        yield kind


class House:
    """Accounts, and arrivals in groups on them; everything is made twice, for either way."""

    def __init__(self) -> None:
        self.pseudonyms = Pseudonyms(b"a key for tests only, of 32 bytes.")
        self.accounts = Accounts(inactive=INACTIVE, pseudonyms=self.pseudonyms)
        self.audit = Audit(self.pseudonyms)
        self.arrivals = Arrivals(self.accounts, self.audit, Metrics())

    async def make(self, kind: Kind, user: str) -> None:
        if kind.user is not None:
            await User.get_motor_collection().insert_one({"_id": user, "createdAt": OLD, **kind.user})
        if kind.device is not None:
            device = {"_id": f"{user}/phone", "user": user, **kind.device}
            if "session" in device:
                device["session"] = {**SESSION, "id": f"s {user}"}
            await Device.get_motor_collection().insert_one(device)
        if kind.erased is not None:
            grave = {"_id": self.pseudonyms.of(user), "at": kind.erased}
            await Tombstone.get_motor_collection().insert_one(grave)

    async def alone(self, kind: Kind, user: str) -> Arrival | None:
        return await arrive(self.accounts, user, "phone", **self._how(kind, user))

    async def together(self, kind: Kind, user: str, noted: Provision | None = None) -> Arrival | None:
        how = self._how(kind, user) | {"noted": noted}
        return await self.arrivals.arrive(
            Arriving(user=user, device="phone", **how, address="192.0.2.7", agent="app/1")
        )

    def _how(self, kind: Kind, user: str) -> dict[str, Any]:
        session = f"s {user}" if kind.session == "s" else kind.session
        return {"provision": kind.provision, "issued": kind.issued, "session": session, "live": kind.live}

    async def noted(self) -> list[dict[str, Any]]:
        """What the trail says of devices that were made or came back: user, device, address, agent, details."""
        return [
            {name: found["value"] for name, found in entry["personal"].items()} | entry["details"]
            async for entry in AuditEntry.get_motor_collection().find({"act": "device.provision"})
        ]

    async def close(self) -> None:
        await self.arrivals.close()
        await self.audit.close()


@pytest.fixture
async def house(control: str) -> AsyncIterator[House]:
    await clear()
    found = House()
    yield found
    await found.close()


async def stored(user: str) -> tuple[Any, Any]:
    """What is stored of a user and their phone; times that are about now are all the same."""

    def shape(row: Any) -> Any:
        if isinstance(row, dict):
            return {name: shape(value) for name, value in row.items() if name not in ("_id", "id", "user")}
        if isinstance(row, datetime):
            return "now" if row > NOW + timedelta(seconds=1) else row
        return row

    person = await User.get_motor_collection().find_one({"_id": user})
    device = await Device.get_motor_collection().find_one({"_id": f"{user}/phone"})
    return shape(person), shape(device)


async def test_everybody_arrives_in_a_group_as_they_would_alone(house: House) -> None:
    await asyncio.sleep(max(0.0, (NOW - datetime.now(UTC)).total_seconds() + 1.1))
    for number, kind in enumerate(KINDS):
        await house.make(kind, f"a{number}")
        await house.make(kind, f"g{number}")
    alone = [await house.alone(kind, f"a{number}") for number, kind in enumerate(KINDS)]
    together = await asyncio.gather(
        *(house.together(kind, f"g{number}") for number, kind in enumerate(KINDS))
    )
    for number, kind in enumerate(KINDS):
        assert alone[number] == together[number], kind.name
        assert await stored(f"a{number}") == await stored(f"g{number}"), kind.name
    assert sum(one is None for one in alone) == 12
    assert sum(one is not None and one.changed for one in alone) > 5


async def commands() -> dict[str, int]:
    """How many commands of a kind this mongod has done."""
    database = User.get_motor_collection().database
    status = await database.client.admin.command("serverStatus")
    found = status["metrics"]["commands"]
    names = ("find", "update", "insert", "findAndModify", "aggregate", "delete", "getMore")
    return {name: found[name]["total"] for name in names}


@pytest.mark.skipif(ON_CLUSTER, reason="a router counts for nobody")
@pytest.mark.parametrize(("name", "most"), [("known", 10), ("never seen", 45), ("new device", 40)])
async def test_two_hundred_at_once_take_a_few_commands(house: House, name: str, most: int) -> None:
    kind = next(one for one in KINDS if one.name == name)
    for number in range(200):
        await house.make(kind, f"u{number}")
    before = await commands()
    found = await asyncio.gather(*(house.together(kind, f"u{number}") for number in range(200)))
    after = await commands()
    assert all(found)
    assert sum(after.values()) - sum(before.values()) <= most, (before, after)


async def test_one_device_that_comes_many_times_at_once_is_made_once_and_always_told_of(house: House) -> None:
    kind = next(one for one in KINDS if one.name == "never seen")
    found = await asyncio.gather(*(house.together(kind, f"u{number % 3}") for number in range(30)))
    assert all(one is not None and one.changed for one in found)
    assert await Device.get_motor_collection().count_documents({}) == 3
    assert await User.get_motor_collection().count_documents({}) == 3


async def test_groups_of_two_nodes_that_bring_the_same_devices_agree(house: House) -> None:
    other = House()
    kind = next(one for one in KINDS if one.name == "never seen")
    found = await asyncio.gather(
        *(one.together(kind, f"u{number}") for number in range(60) for one in (house, other))
    )
    assert all(one is not None and one.changed for one in found)
    assert await Device.get_motor_collection().count_documents({}) == 60
    await other.close()


async def test_who_is_stored_as_nonsense_fails_alone(house: House) -> None:
    kind = KINDS[0]
    for number in range(50):
        await house.make(kind, f"u{number}")
    for number, change in ((7, {"gap": {"why": "no since"}}), (9, {"lastSeen": "yesterday"})):
        await Device.get_motor_collection().update_one({"_id": f"u{number}/phone"}, {"$set": change})
    found = await asyncio.gather(
        *(house.together(kind, f"u{number}") for number in range(50)), return_exceptions=True
    )
    assert {number for number, one in enumerate(found) if not isinstance(one, Arrival)} <= {7, 9}
    assert isinstance(found[7], KeyError)


async def test_who_is_removed_between_the_look_and_the_note_does_not_arrive(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = replace(KINDS[0], provision=False)
    for number in range(20):
        await house.make(kind, f"u{number}")
    write = house.arrivals._write

    async def late(*given: Any) -> list[str]:
        gone = {"removedAt": datetime.now(UTC), "endedAt": datetime.now(UTC)}
        await Device.get_motor_collection().update_one({"_id": "u5/phone"}, {"$set": gone})
        return await write(*given)

    monkeypatch.setattr(house.arrivals, "_write", late)
    found = await asyncio.gather(*(house.together(kind, f"u{number}") for number in range(20)))
    assert [number for number, one in enumerate(found) if one is None] == [5]


async def test_a_user_suspended_while_their_new_device_is_made_has_none_that_is_good(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = next(one for one in KINDS if one.name == "new device")
    for number in range(20):
        await house.make(kind, f"u{number}")
    create = house.arrivals._create

    async def late(*given: Any) -> Any:
        await User.get_motor_collection().update_one({"_id": "u5"}, {"$set": {"suspendedAt": NOW}})
        return await create(*given)

    monkeypatch.setattr(house.arrivals, "_create", late)
    noted = Provision(returned=False, account=False)
    found = await asyncio.gather(*(house.together(kind, f"u{number}", noted) for number in range(20)))
    assert [number for number, one in enumerate(found) if one is None] == [5]
    row = await Device.get_motor_collection().find_one({"_id": "u5/phone"})
    assert row is not None
    assert row["endedAt"] is not None


async def test_a_group_that_takes_too_long_arrives_one_by_one(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        await house.make(KINDS[0], f"u{number}")

    async def slow(*_: Any) -> Any:
        raise ExecutionTimeout("operation exceeded time limit", 50)

    monkeypatch.setattr(house.arrivals, "_arrive", slow)
    found = await asyncio.gather(*(house.together(KINDS[0], f"u{number}") for number in range(30)))
    assert all(found)


async def test_a_database_that_is_away_is_told_to_all_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    async def away(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls += 1
        raise AutoReconnect("connection closed")

    monkeypatch.setattr(house.arrivals, "_arrive", away)
    monkeypatch.setattr(house.accounts, "arrive", away)
    found = await asyncio.gather(
        *(house.together(KINDS[0], f"u{number}") for number in range(100)), return_exceptions=True
    )
    assert all(isinstance(one, PyMongoError) for one in found)
    assert calls <= 3


async def test_who_has_waited_for_too_long_is_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ALONE_SECONDS", 0.2)

    async def slow(*_: Any) -> Any:
        raise ExecutionTimeout("operation exceeded time limit", 50)

    async def hangs(*_: Any, **__: Any) -> Any:
        await asyncio.sleep(1)
        raise ExecutionTimeout("operation exceeded time limit", 50)

    monkeypatch.setattr(house.arrivals, "_arrive", slow)
    monkeypatch.setattr(house.accounts, "arrive", hangs)
    async with asyncio.timeout(10):
        found = await asyncio.gather(
            *(house.together(KINDS[0], f"u{number}") for number in range(100)), return_exceptions=True
        )
    assert all(isinstance(one, PyMongoError) for one in found)


# The audit trail


def kind_of(name: str, **changes: Any) -> Kind:
    return replace(next(one for one in KINDS if one.name == name), **changes)


ENTRY = {"address": "192.0.2.7", "agent": "app/1", "device": "phone"}


async def test_of_several_hundred_new_devices_at_once_each_has_one_entry(house: House) -> None:
    users = [f"u{number:03}" for number in range(600)]
    kind = kind_of("never seen")
    found = await asyncio.gather(*(house.together(kind, user) for user in users))
    assert all(found)
    told = sorted(await house.noted(), key=lambda entry: entry["actor"])
    made = {"returned": False, "account": True}
    assert told == [{"actor": user, "target": user, **ENTRY, **made} for user in users]
    assert (await house.audit.verify()).entries == len(users)
    # They are here again.
    found = await asyncio.gather(*(house.together(kind, user) for user in users))
    assert all(found)
    assert len(await house.noted()) == len(users)


async def test_only_who_is_made_or_brought_back_is_in_the_trail(house: House) -> None:
    for number, kind in enumerate(KINDS):
        await house.make(kind, f"u{number}")
    for number, kind in enumerate(KINDS):
        await house.together(kind, f"u{number}")
    told = {entry["actor"]: (entry["returned"], entry.get("account", False)) for entry in await house.noted()}
    assert {kind.name: told[f"u{number}"] for number, kind in enumerate(KINDS) if f"u{number}" in told} == {
        "new, user with a gap": (False, False),
        "never seen": (False, True),
        "never seen, by HTTP": (False, True),
        "new device": (False, False),
        # Of such a one only the user is made.
        "device without its user": (False, True),
        "erased before the token": (False, True),
        "removed before the token": (True, False),
    }


async def test_who_has_no_good_token_leaves_no_entry_in_a_group_either(house: House) -> None:
    barred = ("erased after the token", "suspended, new device", "removed after the token")
    kinds = [kind_of(barred[number % len(barred)]) for number in range(30)]
    for number, kind in enumerate(kinds):
        await house.make(kind, f"u{number}")
    found = await asyncio.gather(*(house.together(kind, f"u{number}") for number, kind in enumerate(kinds)))
    assert found == [None] * len(kinds)
    assert await house.noted() == []


@pytest.mark.parametrize("name", ["never seen", "removed before the token"])
async def test_a_device_that_comes_many_times_at_once_has_one_entry(house: House, name: str) -> None:
    kind = kind_of(name)
    for number in range(3):
        await house.make(kind, f"u{number}")
    found = await asyncio.gather(*(house.together(kind, f"u{number % 3}") for number in range(30)))
    assert all(one is not None and one.changed for one in found)
    assert sorted(entry["actor"] for entry in await house.noted()) == ["u0", "u1", "u2"]


@pytest.mark.parametrize("together", [1, 40])
@pytest.mark.parametrize("name", ["never seen", "new device", "removed before the token"])
async def test_without_its_entry_nobody_is_made_or_brought_back(
    house: House, monkeypatch: pytest.MonkeyPatch, name: str, together: int
) -> None:
    kind = kind_of(name)
    users = [f"u{number}" for number in range(together)]
    for user in users:
        await house.make(kind, user)
    before = [await stored(user) for user in users]
    monkeypatch.setattr(house.audit, "_seconds", 0.0)
    found = await asyncio.gather(*(house.together(kind, user) for user in users), return_exceptions=True)
    assert [getattr(one, "code", one) for one in found] == ["unavailable"] * together
    assert [await stored(user) for user in users] == before
    monkeypatch.undo()
    assert all(await asyncio.gather(*(house.together(kind, user) for user in users)))


async def test_who_is_known_does_not_wait_for_a_trail_that_hangs(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NEW_SECONDS", 2.0)
    known = [f"k{number}" for number in range(20)]
    for user in known:
        await house.make(kind_of("known"), user)
    free = asyncio.Event()
    record = house.audit.record

    async def hangs(*given: Any, **fields: Any) -> None:
        await free.wait()
        await record(*given, **fields)

    monkeypatch.setattr(house.audit, "record", hangs)
    tasks = [asyncio.ensure_future(house.together(kind_of("never seen"), f"u{n}")) for n in range(400)]
    while not house.arrivals._unnoted:
        await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        assert all(await asyncio.gather(*(house.together(kind_of("known"), user) for user in known)))

    async def gave_up() -> bool:
        return sum(task.done() for task in tasks) >= 100

    # Three hundred are with the trail.
    await until(gave_up, 20, "the rest has waited for its turn for too long")
    free.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    made = sum(isinstance(one, Arrival) for one in found)
    assert {one.code for one in found if isinstance(one, RelayError)} == {"unavailable"}
    assert 0 < made <= 300
    assert await Device.get_motor_collection().count_documents({"_id": {"$regex": "^u"}}) == made


async def test_who_was_removed_meanwhile_is_noted_as_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = kind_of("new device")
    await house.make(kind, "u0")
    record = house.audit.record
    past = {"removedAt": OLD, "endedAt": OLD}

    async def late(*given: Any, **fields: Any) -> None:
        await record(*given, **fields)
        await Device.get_motor_collection().update_one(
            {"_id": "u0/phone"}, {"$setOnInsert": {"user": "u0", "createdAt": OLD, **past}}, upsert=True
        )

    monkeypatch.setattr(house.audit, "record", late)
    arrival = await house.together(kind, "u0")
    assert arrival is not None
    assert arrival.returned
    assert [entry["returned"] for entry in await house.noted()] == [False, True]


async def test_a_node_that_stops_refuses_who_waits(house: House) -> None:
    tasks = [asyncio.ensure_future(house.together(KINDS[0], f"u{number}")) for number in range(10)]
    await asyncio.sleep(0)
    await house.arrivals.close()
    for one in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(one, RelayError)
        assert one.code == "unavailable"
