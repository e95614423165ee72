"""The audit trail: one suite, in memory and on a real mongod."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from pymongo.errors import AutoReconnect, BulkWriteError
from structlog.testing import capture_logs

from models.audit import AuditEntry, AuditHead
from models.housekeeping import Setting
from relay.security.pseudonyms import Pseudonyms
from relay.store import audit as module
from relay.store import audit_reading
from relay.store.accounts import milliseconds
from relay.store.audit import Audit, check_key
from relay.store.audit_chain import End
from relay.store.embedded import EmbeddedMongo
from relay.store.mongo import time_limit
from relay.wire.errors import RelayError
from tests.support.control import BACKENDS, open_control
from tests.support.waiting import until

KEY = b"a key for tests only, of more than 32 bytes"
PEOPLE = Pseudonyms(KEY)


@pytest.fixture(scope="module", params=BACKENDS)
async def backend(request: pytest.FixtureRequest, mongod: EmbeddedMongo) -> AsyncIterator[str]:
    async with open_control(request.param, mongod.uri) as kind:
        yield kind


@pytest.fixture
async def audit(backend: str) -> AsyncIterator[Audit]:
    for document in (AuditEntry, AuditHead, Setting):
        await document.get_motor_collection().delete_many({})
    found = Audit(PEOPLE)
    yield found
    await found.close()


def entries() -> Any:
    return AuditEntry.get_motor_collection()


def heads() -> Any:
    return AuditHead.get_motor_collection()


async def write(audit: Audit, number: int, **fields: Any) -> None:
    """So many entries, one after the other."""
    for n in range(number):
        await audit.record("test.act", actor="ann", details={"n": n}, **fields)


async def erase(audit: Audit, user: str) -> None:
    """What is personal goes, as when this person is erased."""
    await audit.record("me.erase", actor=user, target=user)
    await audit.forget(user)


async def settled(number: int) -> None:
    """Waits until the head, which follows an append, names this entry."""
    while await heads().find_one({"_id": "head", "entry": number}) is None:
        await asyncio.sleep(0.01)


async def numbers() -> list[int]:
    return [entry["_id"] async for entry in entries().find({}, {"_id": 1}).sort([("_id", 1)])]


async def test_entries_count_from_one_and_name_who_did_what_on_whom_from_where(audit: Audit) -> None:
    await audit.record(
        "member.add", actor="ann", target="bob", address="192.0.2.7", agent="app/1", details={"n": 2}
    )
    await audit.record("me.export", actor="ann")
    first, second = [entry async for entry in entries().find().sort([("_id", 1)])]
    assert (first["_id"], second["_id"]) == (1, 2)
    assert {name: found["value"] for name, found in first["personal"].items()} == {
        "actor": "ann",
        "target": "bob",
        "address": "192.0.2.7",
        "agent": "app/1",
    }
    assert (first["actorKey"], first["targetKey"]) == (PEOPLE.of("ann"), PEOPLE.of("bob"))
    assert "targetKey" not in second
    assert second["previous"] == first["hash"]
    assert await AuditEntry.get(1) is not None

    async def followed() -> bool:
        # It follows each append, which is answered before.
        found = await heads().find_one({"_id": "head"})
        return (found["entry"], found["hash"]) == (2, second["hash"])

    await until(followed, 5, "the head names the last entry")
    verdict = await audit.verify()
    assert (verdict.holds, verdict.entries, verdict.erased) == (True, 2, 0)
    assert verdict.end == End(2, second["hash"])


async def test_an_empty_trail_holds(audit: Audit) -> None:
    assert (await audit.verify()).holds


async def test_entries_that_arrive_together_are_written_together(
    audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    collection = type(entries())
    insert = collection.insert_many

    def counted(self: Any, documents: list[Any], **options: Any) -> Any:
        calls.append(len(documents))
        return insert(self, documents, **options)

    monkeypatch.setattr(collection, "insert_many", counted)
    await asyncio.gather(*(write(audit, 1) for _ in range(300)))
    assert await numbers() == list(range(1, 301))
    assert sum(calls) == 300
    assert len(calls) <= 6
    assert (await audit.verify()).holds


async def test_several_nodes_make_one_chain_without_gaps(audit: Audit) -> None:
    nodes = [audit, Audit(PEOPLE), Audit(PEOPLE)]
    await asyncio.gather(*(write(node, 8) for node in nodes for _ in range(3)))
    assert await numbers() == list(range(1, 73))
    assert (await audit.verify()).holds
    for node in nodes:
        await node.close()


async def edit(change: dict[str, Any], number: int = 3) -> None:
    await entries().update_one({"_id": number}, change)


async def retype(name: str) -> None:
    """The same moment as a number, or the same number as a moment: JSON, which is sealed, shows no difference."""
    entry = await entries().find_one({"_id": 3})
    assert entry is not None
    at = entry["at"].replace(tzinfo=UTC)
    new = milliseconds(at) if name == "at" else datetime.fromtimestamp(entry["details"]["n"] / 1000, UTC)
    await edit({"$set": {name: new}})


async def swap() -> None:
    three, four = [await entries().find_one({"_id": n}) for n in (3, 4)]
    await entries().delete_many({"_id": {"$in": [3, 4]}})
    await entries().insert_many([{**four, "_id": 3}, {**three, "_id": 4}])


async def insert(number: Any) -> None:
    copy = await entries().find_one({"_id": 3})
    await entries().insert_one({**copy, "_id": number})


async def older_head() -> None:
    """Entries cut off at the end, and a head made to fit without the key."""
    await entries().delete_many({"_id": {"$gt": 3}})
    last = await entries().find_one({"_id": 3})
    await heads().update_one({"_id": "head"}, {"$set": {"entry": 3, "hash": last["hash"]}})


async def another_chain() -> None:
    """One entry written anew with the right form, but without the key."""
    forger = Audit(Pseudonyms(b"another key"))
    await entries().delete_many({})
    await heads().delete_many({})
    await write(forger, 6)
    await forger.close()


TAMPERING: dict[str, tuple[Callable[[], Awaitable[Any]], int | None, str]] = {
    "an act edited": (lambda: edit({"$set": {"act": "test.other"}}), 3, "edited"),
    "a detail edited": (lambda: edit({"$set": {"details.n": 7}}), 3, "edited"),
    "a field added": (lambda: edit({"$set": {"note": "x"}}), 3, "edited"),
    "a field removed": (lambda: edit({"$unset": {"details": ""}}), 3, "edited"),
    "the time edited": (lambda: edit({"$set": {"at": "yesterday"}}), 3, "edited"),
    "the time made a number": (lambda: retype("at"), 3, "its at is of another kind"),
    "a detail made a date": (lambda: retype("details.n"), 3, "its n is of another kind"),
    "a personal value dropped": (
        lambda: edit({"$unset": {"personal.address": ""}}),
        3,
        "its address is gone",
    ),
    "everything personal dropped": (
        lambda: entries().update_many({}, {"$unset": {"personal": ""}}),
        1,
        "is gone",
    ),
    "the actor's key edited": (lambda: edit({"$set": {"actorKey": PEOPLE.of("bob")}}), 3, "edited"),
    "the hash edited": (lambda: edit({"$set": {"hash": "0" * 64}}), 3, "edited"),
    "the hash removed": (lambda: edit({"$unset": {"hash": ""}}), 3, "edited"),
    "the first edited": (lambda: edit({"$set": {"act": "x"}}, 1), 1, "edited"),
    "the last edited": (lambda: edit({"$set": {"act": "x"}}, 6), 6, "edited"),
    "an address replaced": (
        lambda: edit({"$set": {"personal.address.value": "192.0.2.9"}}),
        3,
        "its address",
    ),
    "a personal value added": (
        lambda: edit({"$set": {"personal.target": {"value": "bob", "salt": "x"}}}),
        3,
        "its target",
    ),
    "a personal value of another kind": (lambda: edit({"$set": {"personal.actor": 5}}), 3, "its actor"),
    "everything personal of another kind": (lambda: edit({"$set": {"personal": "x"}}), 3, "edited"),
    "an entry missing": (lambda: entries().delete_one({"_id": 3}), 3, "entry 3 is missing"),
    "the first missing": (lambda: entries().delete_one({"_id": 1}), 1, "entry 1 is missing"),
    "entries missing": (
        lambda: entries().delete_many({"_id": {"$in": [3, 4]}}),
        3,
        "entries 3 to 4 are missing",
    ),
    "the last missing": (lambda: entries().delete_one({"_id": 6}), 6, "entry 6 is missing"),
    "all missing": (lambda: entries().delete_many({}), 1, "entries 1 to 6 are missing"),
    "two swapped": (swap, 3, "edited"),
    "one inserted at the end": (lambda: insert(7), 7, "edited"),
    "one inserted between": (lambda: insert(3.5), 4, "inserted"),
    "one inserted before": (lambda: insert(0), None, "inserted"),
    "one inserted under a name": (lambda: insert("x"), None, "inserted"),
    "the head deleted": (lambda: heads().delete_many({}), None, "head was deleted"),
    "the head edited": (
        lambda: heads().update_one({"_id": "head"}, {"$set": {"entry": 4}}),
        None,
        "head was edited",
    ),
    "the end cut off with its head": (older_head, None, "head was edited"),
    "another chain": (another_chain, None, "not the key"),
}


@pytest.mark.parametrize("name", TAMPERING)
async def test_verification_finds(audit: Audit, backend: str, name: str) -> None:
    tamper, bad, words = TAMPERING[name]
    if backend == "memory" and name == "one inserted under a name":
        pytest.skip("mongomock cannot compare a name with a number")
    await write(audit, 6, address="192.0.2.7")
    assert (await audit.verify()).holds
    await tamper()
    verdict = await audit.verify()
    assert not verdict.holds
    assert words in str(verdict.problem)
    if name != "another chain":
        assert verdict.bad == bad
    # A relay that goes on writing, or starts anew, does not heal what somebody broke.
    for node in (audit, Audit(PEOPLE)):
        await write(node, 2)
        await node.close()
        assert not (await audit.verify()).holds


async def test_an_end_that_was_noted_down_must_be_in_a_later_chain(audit: Audit) -> None:
    await write(audit, 3)
    noted = (await audit.verify()).end
    await write(audit, 3)
    assert (await audit.verify(expect=noted)).holds
    assert (await audit.verify(expect=End(0, "0" * 64))).holds
    other = await audit.verify(expect=End(3, "f" * 64))
    assert (other.bad, other.problem) == (3, "entry 3 is not the one that was noted down")
    # A whole trail that is gone with its head can only be noticed so.
    await entries().delete_many({})
    await heads().delete_many({})
    assert (await audit.verify()).holds
    gone = await audit.verify(expect=noted)
    assert (gone.bad, gone.problem) == (1, "entries 1 to 3 are missing")


async def test_the_wrong_key_is_called_so(audit: Audit) -> None:
    await check_key(PEOPLE)
    await write(audit, 2)
    stranger = Audit(Pseudonyms(b"another key"))
    assert "not the key" in str((await stranger.verify()).problem)
    await Setting.get_motor_collection().delete_many({})
    assert "not the key" in str((await stranger.verify()).problem)


async def test_a_node_with_another_key_is_refused(audit: Audit) -> None:
    await asyncio.gather(*(check_key(PEOPLE) for _ in range(5)))
    await check_key(PEOPLE)
    with pytest.raises(ValueError, match="another RELAY_PSEUDONYM_KEY"):
        await check_key(Pseudonyms(b"another key"))


async def test_many_pages_are_verified_with_progress(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (module, audit_reading):
        monkeypatch.setattr(part, "_PAGE", 4)
    await write(audit, 11)
    seen: list[tuple[int, int]] = []
    assert (await audit.verify(lambda done, total: seen.append((done, total)))).entries == 11
    assert seen == [(4, 11), (8, 11), (11, 11)]
    assert [entry["details"]["n"] async for entry in audit.entries_of("ann")] == list(range(11))
    await erase(audit, "ann")
    verdict = await audit.verify()
    assert (verdict.holds, verdict.erased) == (True, 12)


async def test_a_person_reads_what_they_did_and_what_was_done_to_them(audit: Audit) -> None:
    await audit.record("session.start", actor="ann", address="192.0.2.7", agent="app/1", details={"ok": True})
    await audit.record("member.add", actor="bob", target="ann", address="192.0.2.8", agent="app/2")
    await audit.record("contact.block", actor="bob", target="ann")
    await audit.record("report.make", actor="bob", target="ann")
    await audit.record("contact.block", actor="ann", target="bob")
    await audit.record("session.start", actor="bob", address="192.0.2.8")
    await audit.record("device.revoke", actor="ann", target="ann", device="phone")
    await audit.record("device.revoke", actor="bob", target="ann", device="tablet")
    found = [entry async for entry in audit.entries_of("ann")]
    assert [(entry.pop("entry"), entry.pop("at") > 0) for entry in found] == [
        (1, True),
        (5, True),
        (7, True),
        (2, True),
        (8, True),
    ]
    assert found == [
        {
            "act": "session.start",
            "actor": "ann",
            "address": "192.0.2.7",
            "agent": "app/1",
            "details": {"ok": True},
        },
        {"act": "contact.block", "actor": "ann", "target": "bob"},
        {"act": "device.revoke", "actor": "ann", "target": "ann", "device": "phone"},
        {"act": "member.add", "actor": "bob", "target": "ann"},
        {"act": "device.revoke", "actor": "bob", "target": "ann", "device": "tablet"},
    ]
    assert [entry async for entry in audit.entries_of("cleo")] == []


async def test_operators_read_the_last_entries_first(audit: Audit) -> None:
    await audit.record("a.one", actor="ann", target="bob")
    await audit.record("a.two", actor="bob", target="ann")
    await audit.record("a.one", actor="cleo")
    await audit.record("a.one", actor="ann", target="ann")

    async def listed(**wanted: Any) -> list[int]:
        return [entry["entry"] for entry in await audit.page(limit=3, **wanted)]

    assert await listed() == [4, 3, 2]
    assert await listed(user="ann") == [4, 2, 1]
    assert await listed(user="ann", act="a.one") == [4, 1]
    assert await listed(act="a.two") == [2]
    assert await listed(user="nobody") == []


async def test_a_forgotten_person_leaves_a_pseudonym_and_the_chain_holds(audit: Audit) -> None:
    await audit.record("member.add", actor="ann", target="bob", address="192.0.2.7", agent="app/1")
    await audit.record("member.add", actor="bob", target="ann", address="192.0.2.8", agent="app/2")
    await audit.record("session.start", actor="cleo", address="192.0.2.9")
    await audit.record("me.erase", actor="ann", target="ann", address="192.0.2.7")
    before = [entry async for entry in entries().find().sort([("_id", 1)])]
    for _ in range(2):
        await audit.forget("ann")
    after = [entry async for entry in entries().find().sort([("_id", 1)])]
    assert [sorted(entry["personal"]) for entry in after] == [
        ["target"],
        ["actor", "address", "agent"],
        ["actor", "address"],
        [],
    ]
    for old, new in zip(before, after, strict=True):
        assert {**old, "personal": 0} == {**new, "personal": 0}
    assert "ann" not in str(after[0]) + str(after[1])
    verdict = await audit.verify()
    assert (verdict.holds, verdict.entries, verdict.erased) == (True, 4, 3)
    # They are still found by who knows their id and has the key.
    assert [entry["act"] async for entry in audit.entries_of("ann")] == [
        "member.add",
        "me.erase",
        "member.add",
    ]


async def test_where_others_tried_to_log_in_as_an_erased_person_from_is_forgotten(audit: Audit) -> None:
    await audit.record("session.refuse", actor="$nobody", target="ann", address="192.0.2.7", agent="app/1")
    await audit.record("session.refuse", actor="$nobody", target="bob", address="192.0.2.8", agent="app/2")
    await audit.record("session.refuse", actor="$nobody", address="192.0.2.9", agent="app/3")
    await erase(audit, "ann")
    found = [
        sorted(entry["personal"]) async for entry in entries().find({"_id": {"$lt": 4}}).sort([("_id", 1)])
    ]
    assert found == [["actor"], ["actor", "address", "agent", "target"], ["actor", "address", "agent"]]
    assert (await audit.verify()).holds


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("part", ["actor", "target", "address", "agent", "device"])
async def test_a_personal_value_may_be_missing_only_when_its_person_was_erased(
    audit: Audit, part: str, whole: bool
) -> None:
    await write(audit, 2)
    whose = {"actor": "ann", "target": "bob", "address": "192.0.2.7", "agent": "app/1", "device": "phone"}
    await audit.record("test.act", **whose)  # type: ignore[arg-type]
    other, own = ("ann", "bob") if part in ("target", "device") else ("bob", "ann")
    await audit.record("me.erase", actor=other, target=other)
    # An erasure that somebody else did to this person is none that they asked for.
    await audit.record("me.erase", actor="$admin", target=own)
    await write(audit, 2)
    assert (await audit.verify()).holds
    await entries().update_one({"_id": 3}, {"$unset": {f"personal.{part}": ""}})
    if whole:
        await entries().update_many({"_id": {"$gt": 3}}, {"$unset": {"personal": ""}})
    verdict = await audit.verify()
    assert (verdict.bad, verdict.entries) == (3, 2)
    assert f"its {part} is gone" in str(verdict.problem)
    await audit.record("me.erase", actor=own, target=own)
    if not whole:
        assert (await audit.verify()).holds


async def test_the_end_of_the_chain_is_logged_so_that_one_put_back_is_noticed(audit: Audit) -> None:
    with capture_logs() as logs:
        await audit.tell_end()
    assert logs == []
    await write(audit, 2)
    await settled(2)
    old = await heads().find_one({"_id": "head"})
    await write(audit, 2)
    await settled(4)
    with capture_logs() as logs:
        await audit.tell_end()
    assert [(line["event"], line["entry"]) for line in logs] == [("audit head", 4)]
    await entries().delete_many({"_id": {"$gt": 2}})
    await heads().replace_one({"_id": "head"}, old)
    assert (await audit.verify()).holds
    verdict = await audit.verify(expect=End(logs[0]["entry"], logs[0]["hash"]))
    assert (verdict.bad, verdict.problem) == (3, "entries 3 to 4 are missing")
    await heads().update_one({"_id": "head"}, {"$set": {"entry": 1}})
    with capture_logs() as logs:
        await audit.tell_end()
    assert [line["log_level"] for line in logs] == ["error"]


async def test_what_cannot_be_stored_fails_alone(audit: Audit) -> None:
    async def bad() -> None:
        with pytest.raises(OverflowError):
            await audit.record("test.act", actor="ann", details={"n": 2**70})

    await asyncio.gather(write(audit, 5), bad(), write(audit, 5))
    await audit.record("test.act", actor="ann", agent="half \ud83d a character" + "x" * 1000)
    last = await entries().find_one({"_id": 11})
    assert last["personal"]["agent"]["value"].startswith("half ? a character")
    assert len(last["personal"]["agent"]["value"]) == 256
    assert (await audit.verify()).entries == 11


@pytest.mark.parametrize("lost", ["request", "answer", "half"])
async def test_an_entry_whose_outcome_is_unknown_is_written_once(
    audit: Audit, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    await write(audit, 1)
    collection = type(entries())
    insert = collection.insert_many
    failures = 2

    async def failing(self: Any, documents: list[Any], **options: Any) -> Any:
        nonlocal failures
        if not failures:
            return await insert(self, documents, **options)
        failures -= 1
        if lost != "request":
            await insert(self, documents if lost == "answer" else documents[:2], **options)
        raise AutoReconnect("the connection is lost")

    monkeypatch.setattr(collection, "insert_many", failing)
    await asyncio.gather(*(write(audit, 1) for _ in range(4)))
    assert await numbers() == [1, 2, 3, 4, 5]
    assert (await audit.verify()).holds


async def test_a_lost_request_that_arrives_late_makes_no_second_entry(
    audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(audit, 1)
    collection = type(entries())
    insert = collection.insert_many
    late: list[list[Any]] = []

    async def failing(self: Any, documents: list[Any], **options: Any) -> Any:
        if not late:
            late.append(documents)
            raise AutoReconnect("the connection is lost")
        if len(late) == 1:
            # It arrives between the look for it and the second try.
            late.append(documents)
            await insert(self, late[0], **options)
        return await insert(self, documents, **options)

    monkeypatch.setattr(collection, "insert_many", failing)
    await asyncio.gather(*(write(audit, 1) for _ in range(3)))
    monkeypatch.undo()
    assert len(late) == 2
    assert await numbers() == [1, 2, 3, 4]
    with pytest.raises(BulkWriteError):
        await entries().insert_many(late[1], ordered=True)
    assert (await audit.verify()).entries == 4


async def test_an_entry_that_cannot_be_written_in_time_is_refused_and_the_next_is_not(
    backend: str, audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = Audit(PEOPLE, seconds=0.3)
    collection = type(entries())

    async def failing(self: Any, documents: list[Any], **options: Any) -> Any:
        raise AutoReconnect("there is nobody")

    with monkeypatch.context() as patch:
        patch.setattr(collection, "insert_many", failing)
        refused = await asyncio.gather(
            *(impatient.record("test.act", actor="ann") for _ in range(3)), return_exceptions=True
        )
    assert [found.code for found in refused if isinstance(found, RelayError)] == ["unavailable"] * 3
    await asyncio.sleep(1.1)
    assert await numbers() == []
    await impatient.record("test.act", actor="bob")
    assert await numbers() == [1]
    await impatient.close()
    with pytest.raises(RelayError):
        await impatient.record("test.act", actor="bob")
    assert (await audit.verify()).holds


async def test_the_time_limit_of_who_writes_first_is_not_that_of_those_who_follow(audit: Audit) -> None:
    with time_limit(0.5):
        await audit.record("test.act", actor="ann")
    await asyncio.sleep(0.6)
    await audit.record("test.act", actor="bob")
    assert await numbers() == [1, 2]


async def test_a_crash_before_the_head_moved_is_no_fault(audit: Audit) -> None:
    await write(audit, 3)
    head = await heads().find_one({"_id": "head"})
    await write(audit, 3)
    await heads().replace_one({"_id": "head"}, head)
    assert (await audit.verify()).entries == 6
    other = Audit(PEOPLE)
    await write(other, 1)
    await other.close()
    assert await numbers() == list(range(1, 8))
    assert (await audit.verify()).holds
    assert (await heads().find_one({"_id": "head"}))["entry"] == 7
