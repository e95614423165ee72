"""PROTOCOL 3: a person takes their data along, and is erased, whatever fails in between."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import aiohttp
import pytest

from handlers import erasing
from handlers.changing import leave_all
from handlers.http import personal
from relay.jobs.housekeeping import InterruptedErasures
from relay.jobs.repair import Repair
from relay.security.pseudonyms import Pseudonyms
from relay.store.erasure import Erasures, Intent
from relay.wire.errors import RelayError
from tests.support.device import Closed, WireDevice, new_id
from tests.support.failpoints import failing
from tests.support.node import Node, NodeFactory
from tests.support.waiting import until

ANN = "ann-8d1c"
KEY = "a key for tests only, of more than 32 bytes"
AT_ONCE = timedelta(0)


def pseudonym(user: str = ANN) -> str:
    return Pseudonyms(KEY.encode()).of(user)


def person(number: int) -> str:
    """One of several anns of one test."""
    return ANN + "abcdefghijkl"[number]


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    return await nodes.start(pseudonym_key=KEY)


async def pair(nodes: NodeFactory) -> tuple[Node, Node]:
    """Two nodes of one relay. They believe what they have resolved for a moment only: each change waits as long as that,
    which other tests measure."""
    node, other = await nodes.start(pseudonym_key=KEY), await nodes.start(pseudonym_key=KEY)
    for each in (node, other):
        each.relay.context.invalidation.lease = 0.1
    return node, other


class Life:
    """What ann has at a relay: two devices, a direct conversation, a group she made, and what others have of her."""

    def __init__(self, phone: WireDevice, bob: WireDevice, direct: str, group: str) -> None:
        self.phone = phone
        self.bob = bob
        self.direct = direct
        self.group = group


async def live(node: Node, user: str = ANN) -> Life:
    phone = await node.connect(user, "phone")
    tablet = await node.connect(user, "tablet")
    await tablet.close()
    bob = await node.connect("bob", "phone")
    direct = await node.direct(user, "bob")
    group = await node.group(user, ["bob", "cleo"])
    now = datetime.now(UTC)
    await node.db.users.update_one(
        {"_id": user},
        {
            "$set": {
                "name": "Ann 8d1c",
                "phone": "+4915112345678",
                "username": user,
                "usernameKey": user,
                "password": "a hash",
                "searches": [{"q": "bo", "at": now}],
            }
        },
    )
    await node.db.devices.update_one(
        {"_id": f"{user}/phone"},
        {
            "$set": {
                "name": "Ann's phone",
                "session": {
                    "id": f"session-s1-{user}",
                    "current": "hash-of-a-token",
                    "successor": "sealed-token",
                    "createdAt": now,
                    "rotatedAt": now,
                },
            }
        },
    )
    await node.db.contacts.insert_many(
        [
            {
                "_id": f"{one} {other}",
                "owner": one,
                "user": other,
                "name": f"what {one} calls {other}",
                "sortKey": other,
                "listed": True,
                "blocked": False,
                "createdAt": now,
                "updatedAt": now,
            }
            for one, other in ((user, "bob"), ("bob", user))
        ]
    )
    await node.db.reports.insert_many(
        [
            {"_id": new_id(), "reporter": user, "user": "cleo", "reason": "spam", "createdAt": now},
            {
                "_id": new_id(),
                "reporter": "bob",
                "user": user,
                "reason": "abuse",
                "text": "she did",
                "createdAt": now,
            },
        ]
    )
    key = {"id": 1, "key": "a2V5", "signature": "c2ln"}
    await node.db.public_keys.insert_one(
        {
            "_id": f"{user}/phone",
            "user": user,
            "generation": "g",
            "identityKey": "aWQ=",
            "signedPreKey": key,
            "history": [],
            "updatedAt": now,
        }
    )
    await node.db.prekeys.insert_one(
        {
            "_id": f"{user}/phone g one 1",
            "device": f"{user}/phone",
            "generation": "g",
            "kind": "one",
            "keyId": 1,
            "key": "a2V5",
        }
    )
    await node.relay.context.audit.record("contact.block", actor="bob", target=user, address="192.0.2.99")
    await node.relay.context.audit.record(
        "member.role", actor="bob", target=user, address="192.0.2.99", agent="bob's app"
    )
    await node.relay.context.audit.record("device.note", actor=user, target=user, device="tablet")
    await node.relay.context.audit.record(
        "session.start", actor=user, target=user, address="192.0.2.7", agent="app/1"
    )
    # One message waits for her tablet, another for her phone too; one she sent waits for bob.
    first = (await bob.sent(direct, "to ann"))["id"]
    await phone.expect("msg", id=first)
    await phone.ack(direct, first)
    await bob.sent(group, "to the group")
    await phone.sent(direct, "from ann")
    return Life(phone, bob, direct, group)


async def holding(node: Node, *names: str) -> dict[str, list[Any]]:
    """Every document of the database that holds one of these, by collection."""
    found: dict[str, list[Any]] = {}
    for name in await node.db.list_collection_names():
        async for document in node.db[name].find():
            if any(text in repr(document) for text in names):
                found.setdefault(name, []).append(document)
    return found


async def settle(node: Node) -> None:
    """What the jobs do within a minute or two."""
    ctx = node.relay.context
    past = datetime.now(UTC) - timedelta(minutes=10)
    await InterruptedErasures(ctx, settle=AT_ONCE).run()
    await node.db.conversations.update_many({"pending.at": {"$exists": True}}, {"$set": {"pending.at": past}})
    await Repair(ctx).run()
    await InterruptedErasures(ctx, settle=AT_ONCE).run()
    # The second run of a release comes after twenty seconds, and is its last; the first may not have come either.
    for _ in range(2):
        await node.db.releases.update_many({}, {"$set": {"dueAt": past, "at": past}})
        await ctx.releases.run_due()


async def assert_gone(node: Node, user: str = ANN) -> None:
    """Nothing names ann any more but what is said to."""
    found = await holding(node, user, "Ann 8d1c", "Ann's phone", "4915112345678", "192.0.2.7'")
    for document in found.pop("messages", []):
        own = document["sender"]["user"] == user
        told = document["sender"]["user"] == "$relay"
        assert own or told, document
        assert not any(user in key for key in document["awaiting"]), document
        assert user not in repr(document.get("deliveredTo")), document
        assert user not in repr(document.get("sealed")), document
    found.pop("fates", None)
    for document in found.pop("contacts", []):
        assert_bare(document, user)
    assert found == {}
    assert (await node.relay.context.audit.verify()).holds
    assert await node.db.tombstones.count_documents({"_id": pseudonym(user)}) == 1


def assert_bare(contact: dict[str, Any], user: str) -> None:
    """All that others keep of an erased contact is that it is removed."""
    assert set(contact) == {
        *("_id", "owner", "user", "sortKey", "listed", "blocked"),
        *("createdAt", "updatedAt", "removedAt"),
    }
    assert (contact["user"], contact["sortKey"]) == (user, "")
    assert not contact["listed"]
    assert not contact["blocked"]


async def closed(device: WireDevice) -> int | None:
    """The close code, after whatever comes before it."""
    try:
        while True:
            await device.next(20)
    except Closed as error:
        return error.code


async def begun(node: Node, user: str = ANN) -> Intent:
    """An erasure that is decided, and nothing more."""
    ctx = node.relay.context
    await ctx.audit.record("me.erase", actor=user, target=user)
    return await Erasures(ctx.pseudonyms).begin(user)


async def erase(node: Node, user: str = ANN, device: str = "phone") -> tuple[int, Any]:
    return await node.request("DELETE", "/v1/me", user, device)


@pytest.mark.parametrize("known", ["by a token", "as a whole life"])
async def test_an_erased_person_leaves_nothing_but_a_pseudonym(node: Node, known: str) -> None:
    if known == "as a whole life":
        await live(node)
    assert await erase(node) == (200, {"done": True})
    # At the answer only the bare id is left, for half a minute.
    user = await node.db.users.find_one({"_id": ANN})
    assert set(user) == {"_id", "createdAt", "erasingAt"}
    left = await holding(node, ANN)
    assert set(left) <= {"users", "devices", "erasures", "releases", "messages", "fates", "contacts"}
    assert await holding(node, "Ann 8d1c", "Ann's phone", "4915112345678", "calls ann") == {}
    await settle(node)
    await assert_gone(node)
    told = await node.db.audit.find_one({"act": "me.erase"})
    assert (told["actorKey"], told["personal"]) == (pseudonym(), {})


async def test_what_was_sealed_for_an_erased_person_goes(node: Node) -> None:
    for device in ("phone", "tablet"):
        await node.request("GET", "/v1/me", ANN, device)
    for user in ("bob", "cleo"):
        await node.request("GET", "/v1/me", user, "phone")
    bob = await node.connect("bob", "phone")
    conversation = await node.group("bob", [ANN, "cleo"])
    sealed = {f"{ANN}/phone": "YQ==", f"{ANN}/tablet": "Yg==", "cleo/phone": "Yw=="}
    logged_out = (await bob.sent(conversation, None, sealed=sealed))["id"]
    assert (await node.request("DELETE", "/v1/auth/devices/tablet", ANN, "phone"))[0] == 200
    sealed.pop(f"{ANN}/tablet")
    waiting = (await bob.sent(conversation, None, sealed=sealed))["id"]
    # Blocked: it waits under another name than it is sealed for.
    await node.request("PATCH", "/v1/contacts/bob", ANN, "phone", {"blocked": True})
    blocked = (await bob.sent(conversation, None, sealed=sealed))["id"]
    # What is no ciphertext keeps nothing else from going.
    odd = await node.db.messages.find_one({"id": waiting})
    odd |= {"_id": f"{conversation} odd", "id": "odd", "sealed": [7, {"device": 5}]}
    await node.db.messages.insert_one(odd)
    await erase(node)
    await settle(node)
    assert (await node.db.messages.find_one({"id": "odd"}))["awaiting"] == ["cleo/phone"]
    rows = {
        row["id"]: [entry["device"] for entry in row["sealed"]]
        async for row in node.db.messages.find({"sender.user": "bob", "id": {"$ne": "odd"}})
    }
    assert rows == {key: ["cleo/phone"] for key in (logged_out, waiting, blocked)}
    await assert_gone(node)


async def test_what_others_have_stays(node: Node) -> None:
    life = await live(node)
    await node.request("GET", "/v1/me", "cleo", "phone")
    assert (await node.request("POST", "/v1/contacts", "bob", "phone", {"user": "cleo"}))[0] == 201
    await erase(node)
    await settle(node)
    assert {row["_id"] async for row in node.db.contacts.find({"listed": True})} == {"bob cleo"}
    (report,) = [row async for row in node.db.reports.find()]
    assert (report["user"], report["reporter"], "text" in report) == (pseudonym(), "bob", False)
    status, group = await node.request("GET", f"/v1/conversations/{life.group}", "bob", "phone")
    assert status == 200
    assert {member["user"]: member["role"] for member in group["members"]}.get("bob") == "admin"
    assert ANN not in str(group)
    # The message she sent still reaches bob; the ones that waited for her wait for nobody.
    assert (await life.bob.expect("msg", body="from ann"))["from"]["user"] == ANN
    direct = await node.db.messages.find({"conversationId": life.direct}).to_list(10)
    assert [message["body"] for message in direct] == ["from ann"]


async def test_devices_of_others_are_told_that_an_erased_contact_is_none_any_more(node: Node) -> None:
    await live(node)
    status, before = await node.request("GET", "/v1/changes", "bob", "phone")
    assert [(one["user"], one["listed"]) for one in before["contacts"]] == [(ANN, True)]
    assert (await node.request("PATCH", f"/v1/contacts/{ANN}", "cleo", "phone", {"blocked": True}))[0] == 200
    for name in ("dan", "eve"):
        contact = {"user": ANN, "name": f"what {name} calls her"}
        assert (await node.request("POST", "/v1/contacts", name, "phone", contact))[0] in (200, 201)
    assert (await node.request("DELETE", f"/v1/contacts/{ANN}", "eve", "phone"))[0] == 200
    long_ago = datetime.now(UTC) - timedelta(days=20)
    await node.db.contacts.update_one(
        {"_id": f"eve {ANN}"}, {"$set": {"removedAt": long_ago, "updatedAt": long_ago}}
    )
    await erase(node)
    await settle(node)
    for name in ("bob", "cleo", "dan"):
        status, found = await node.request("GET", f"/v1/changes?since={before['next']}", name, "phone")
        assert status == 200
        assert found["contacts"] == [{"user": ANN, "name": None, "listed": False, "blocked": False}], name
        status, page = await node.request("GET", "/v1/contacts", name, "phone")
        assert (status, page["items"]) == (200, [])
    rows = {row["_id"]: row async for row in node.db.contacts.find()}
    assert set(rows) == {f"{name} {ANN}" for name in ("bob", "cleo", "dan", "eve")}
    for row in rows.values():
        assert_bare(row, ANN)
    # What was removed long ago is not kept any longer for that.
    stored = rows[f"eve {ANN}"]
    assert abs(stored["removedAt"].replace(tzinfo=UTC) - long_ago) < timedelta(seconds=1)
    ends = {one["name"]: one async for one in await node.db.contacts.list_indexes()}
    assert ends["removedAt_ttl"]["expireAfterSeconds"] == 31 * 86_400


async def test_an_erased_persons_sockets_close_and_their_tokens_are_refused(nodes: NodeFactory) -> None:
    node, other = await pair(nodes)
    phone = await node.connect(ANN, "phone")
    elsewhere = await other.connect(ANN, "tablet")
    old = node.headers(ANN, "phone")
    codes = asyncio.gather(closed(phone), closed(elsewhere))
    await erase(node)
    assert list(await codes) == [4401, 4401]
    for finished in (False, True):
        for where in (node, other):
            async with where.http.get(where.url + "/v1/conversations", headers=old) as response:
                assert response.status == 401, finished
        await settle(node)
    assert await holding(node, ANN) == {}


async def test_a_token_issued_later_makes_a_new_account_of_the_same_id(node: Node) -> None:
    life = await live(node)
    await erase(node)
    await settle(node)
    await asyncio.sleep(1.1)
    status, found = await node.request("GET", "/v1/conversations", ANN, "phone")
    assert (status, found["items"]) == (200, [])
    status, _ = await node.request("GET", f"/v1/conversations/{life.direct}", ANN, "phone")
    assert status == 404
    # A node that is late with the old erasure leaves the new account alone.
    await settle(node)
    assert (await node.db.users.find_one({"_id": ANN})).get("erasingAt") is None


async def test_a_node_that_dies_between_two_steps_leaves_nothing_behind(node: Node) -> None:
    ctx = node.relay.context
    deaths = range(len(erasing.STEPS) + 1)
    for done in deaths:
        await live(node, person(done))
        intent = await begun(node, person(done))
        for step in erasing.STEPS[:done]:
            await step(ctx, intent)
    # The first round comes before everything has settled.
    await InterruptedErasures(ctx).run()
    assert await node.db.erasures.count_documents({}) == len(deaths)
    await settle(node)
    for done in deaths:
        await assert_gone(node, person(done))


FAULTS = [
    ("insert", "erasures"),
    ("update", "users"),
    ("update", "memberships"),
    ("insert", "releases"),
    ("update", "messages"),
    ("delete", "contacts"),
    ("update", "contacts"),
    ("delete", "reports"),
    ("delete", "memberships"),
    ("update", "audit"),
]


async def test_a_database_that_fails_anywhere_only_delays_it(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasing, "_PATIENCE_SECONDS", 1)
    for number, (command, collection) in enumerate(FAULTS):
        user = person(number)
        await live(node, user)
        async with failing(node, command, collection, errorCode=50):
            status, _ = await erase(node, user)
        if status == 503:
            # Nothing was decided: the account is as it was, and the person asks again.
            assert collection == "erasures"
            assert (await node.db.users.find_one({"_id": user}))["name"] == "Ann 8d1c"
            status, _ = await erase(node, user)
        assert status == 200, collection
    await settle(node)
    for number in range(len(FAULTS)):
        await assert_gone(node, person(number))


async def test_an_erasure_that_takes_long_is_answered_and_goes_on(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await live(node)
    monkeypatch.setattr(erasing, "_PATIENCE_SECONDS", 0)
    assert (await erase(node))[0] == 200
    await settle(node)
    await assert_gone(node)


@pytest.mark.parametrize("error", [RelayError("unavailable", "not now"), KeyError("type")])
async def test_one_erasure_that_fails_keeps_no_other_from_ending(
    node: Node, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for user in ("dan", ANN):
        await node.request("GET", "/v1/conversations", user, "phone")
        await begun(node, user)

    async def failing_for_dan(ctx: Any, user: str) -> None:
        if user == "dan":
            raise error
        await leave_all(ctx, user)

    monkeypatch.setattr(erasing, "leave_all", failing_for_dan)
    await settle(node)
    assert [row["_id"] async for row in node.db.erasures.find()] == ["dan"]
    monkeypatch.undo()
    await settle(node)
    assert await node.db.erasures.count_documents({}) == 0


async def test_whatever_fails_when_an_erasure_is_decided_is_not_the_answer(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await live(node)

    async def failing(*_: object) -> None:
        raise KeyError("type")

    with monkeypatch.context() as patch:
        patch.setattr(erasing, "leave_all", failing)
        assert await erase(node) == (200, {"done": True})
    await settle(node)
    await assert_gone(node)


async def test_one_erasure_that_hangs_keeps_no_other_from_ending(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("dan", ANN):
        await node.request("GET", "/v1/conversations", user, "phone")
        await begun(node, user)
    over = asyncio.Event()

    async def hanging_for_dan(ctx: Any, user: str) -> None:
        if user == "dan":
            await over.wait()
        await leave_all(ctx, user)

    async def only_dans() -> bool:
        return [row["_id"] async for row in node.db.erasures.find()] == ["dan"]

    monkeypatch.setattr(erasing, "leave_all", hanging_for_dan)
    job = asyncio.create_task(InterruptedErasures(node.relay.context, settle=AT_ONCE).run())
    try:
        await until(only_dans, 10, "the other erasure has ended")
    finally:
        over.set()
        await job
    await settle(node)
    assert await node.db.erasures.count_documents({}) == 0


async def test_a_conversation_that_was_not_left_is_left_before_its_membership_goes(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handlers.changing._MOST_LEFT", 1)
    await node.request("GET", "/v1/me", "bob", "phone")
    groups = [await node.group(ANN, ["bob"]) for _ in range(3)]
    # One that is gone, and one whose membership stayed behind: there is nothing to leave.
    await node.db.conversations.delete_one({"_id": groups[0]})
    assert (await erase(node))[0] == 200
    for _ in groups:
        await settle(node)
    for group in groups[1:]:
        status, found = await node.request("GET", f"/v1/conversations/{group}", "bob", "phone")
        assert (status, [member["user"] for member in found["members"]]) == (200, ["bob"])
        assert (found["memberCount"], found["members"][0]["role"]) == (1, "admin")
    await assert_gone(node)


async def test_who_is_taken_out_by_two_at_once_has_one_successor_and_leaves_once(node: Node) -> None:
    await node.request("GET", "/v1/me", "bob", "phone")
    group = await node.group(ANN, ["bob", "cleo"])
    # A request for erasure is still at it when the job takes it up.
    await asyncio.gather(*(leave_all(node.relay.context, ANN) for _ in range(3)))
    acts = [row["act"] async for row in node.db.audit.find({"details.conversation": group})]
    assert sorted(acts) == ["member.leave", "member.role"]


async def test_an_erasure_awaits_a_creation_that_stopped_half_way(node: Node) -> None:
    ctx = node.relay.context
    await node.request("GET", "/v1/me", ANN, "phone")
    await node.request("GET", "/v1/me", "bob", "phone")
    # Its node lives, and may still be at it.
    await ctx.revisions.create("bob", "group", [ANN], name="g", ref=None)
    _, revision, _ = await ctx.revisions.create(ANN, "group", ["bob"], name="g", ref=None)
    assert revision is not None
    with ctx.revisions.carrying(revision):
        assert (await erase(node))[0] == 200
        await InterruptedErasures(ctx, settle=AT_ONCE).run()
        assert await node.db.erasures.count_documents({}) == 1
    await settle(node)
    await settle(node)
    await assert_gone(node)


async def test_two_nodes_that_end_one_erasure_at_once_end_it(nodes: NodeFactory) -> None:
    node, other = await pair(nodes)
    await live(node)
    await begun(node)
    await asyncio.gather(
        *(InterruptedErasures(each.relay.context, settle=AT_ONCE).run() for each in (node, other, node))
    )
    await settle(node)
    await assert_gone(node)


async def test_an_erasure_that_is_decided_when_its_node_stops_is_answered_and_goes_on_elsewhere(
    nodes: NodeFactory,
) -> None:
    node, other = await pair(nodes)
    await live(node)
    # As after SIGTERM, while requests that were there before are still answered.
    await node.relay.context.sends.close(1)
    await node.relay.context.endings.close(1)
    assert await erase(node) == (200, {"done": True})
    await nodes.stop(node)
    for _ in range(2):
        await settle(other)
    await assert_gone(other)


async def test_fates_run_out_after_72_hours_or_as_the_operator_sets(nodes: NodeFactory) -> None:
    node = await nodes.start()
    phone, bob = await node.connect(ANN, "phone"), await node.connect("bob", "phone")
    conversation = await node.direct(ANN, "bob")
    message = (await phone.sent(conversation))["id"]
    await bob.expect("msg", id=message)
    await bob.ack(conversation, message)
    # MongoDB's time to live takes a date, and leaves anything else for ever.
    assert await node.db.fates.count_documents({"at": {"$type": "date"}}) == 1
    assert (await node.db.fates.index_information())["at_ttl"]["expireAfterSeconds"] == 72 * 3600
    await nodes.stop(node)
    node = await nodes.start(fate_hours=1)
    found = await node.db.fates.index_information()
    assert (found["at_ttl"]["key"], found["at_ttl"]["expireAfterSeconds"]) == ([("at", 1)], 3600)


@pytest.mark.parametrize("path", ["/v1/me?all=1", "/v1/me/export?user=bob"])
async def test_parameters_are_refused(node: Node, path: str) -> None:
    method = "GET" if "export" in path else "DELETE"
    status, found = await node.request(method, path, ANN, "phone")
    assert (status, found["error"]["code"]) == (400, "bad_request")
    async with node.http.request(method, node.url + path.partition("?")[0]) as response:
        assert response.status == 401


@asynccontextmanager
async def exporting(node: Node, user: str = ANN) -> AsyncIterator[aiohttp.ClientResponse]:
    async with node.http.get(node.url + "/v1/me/export", headers=node.headers(user, "phone")) as response:
        yield response


async def exported(node: Node, user: str = ANN) -> tuple[dict[str, Any], str]:
    """The parsed files of an export, and its README."""
    async with exporting(node, user) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/zip"
        data = await response.read()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        files = {
            name.removeprefix("relay-export/"): archive.read(name).decode() for name in archive.namelist()
        }
    readme = files.pop("README.txt")
    return {name: json.loads(text) for name, text in files.items()}, readme


async def test_an_export_holds_everything_kept_about_a_person(node: Node) -> None:
    life = await live(node)
    found, readme = await exported(node)
    assert set(found) == set(personal._FILES)
    assert all(name in readme for name in found)
    assert "72 h" in readme
    profile = found["profile.json"]
    assert (profile["id"], profile["name"], profile["phone"]) == (ANN, "Ann 8d1c", "+4915112345678")
    assert abs(profile["createdAt"] / 1000 - datetime.now(UTC).timestamp()) < 60
    assert {device["id"] for device in found["devices.json"]} == {f"{ANN}/phone", f"{ANN}/tablet"}
    assert [key["identityKey"] for key in found["keys.json"]] == ["aWQ="]
    assert [key["keyId"] for key in found["prekeys.json"]] == [1]
    assert [contact["user"] for contact in found["contacts.json"]] == ["bob"]
    kept = {row["conversationId"]: row for row in found["conversations.json"]}
    assert kept[life.direct]["with"] == "bob"
    assert (kept[life.group]["role"], kept[life.group]["name"]) == ("admin", "group")
    assert kept[life.group]["createdByYou"] is True
    assert found["searches.json"][0]["q"] == "bo"
    assert [report["user"] for report in found["reports.json"]] == ["cleo"]
    waiting = {
        (message["mailbox"], message["body"]) for message in found["waiting.json"] if message.get("body")
    }
    assert {
        (f"{ANN}/phone", "to the group"),
        (f"{ANN}/tablet", "to the group"),
        (f"{ANN}/tablet", "to ann"),
    } <= waiting
    assert [message["body"] for message in found["sent.json"]] == ["from ann"]
    assert [message["body"] for message in found["received.json"]] == ["to ann"]
    assert {entry.get("device") for entry in found["audit.json"] if entry["act"] == "device.note"} == {
        "tablet"
    }
    acts = [entry["act"] for entry in found["audit.json"]]
    assert {"me.export", "session.start", "member.role"} <= set(acts)
    assert "contact.block" not in acts


async def test_an_export_holds_what_was_received_and_still_waits_for_others(node: Node) -> None:
    phone = await node.connect(ANN, "phone")
    for user in ("bob", "cleo"):
        await node.request("GET", "/v1/me", user, "phone")
    bob = await node.connect("bob", "phone")
    conversation = await node.group("bob", [ANN, "cleo"])
    message = (await bob.sent(conversation, "to all"))["id"]
    await phone.expect("msg", id=message)
    await phone.ack(conversation, message)
    found, _ = await exported(node)
    (received,) = found["received.json"]
    assert (received["id"], received["from"]["user"], received["body"]) == (message, "bob", "to all")
    assert [entry["device"] for entry in received["deliveredTo"]] == ["phone"]
    assert found["waiting.json"] == []
    assert (await exported(node, "cleo"))[0]["received.json"] == []


async def test_an_export_names_groups_that_were_made_and_left_long_ago(node: Node) -> None:
    await node.request("GET", "/v1/me", "bob", "phone")
    group = await node.group(ANN, ["bob"])
    await node.request("PATCH", f"/v1/conversations/{group}/members/bob", ANN, "phone", {"role": "admin"})
    assert (await node.request("DELETE", f"/v1/conversations/{group}/members/{ANN}", ANN, "phone"))[0] == 200
    await node.request("PATCH", f"/v1/conversations/{group}", "bob", "phone", {"name": "a later name"})
    files, _ = await exported(node)
    assert [(row["conversationId"], row["name"]) for row in files["conversations.json"]] == [(group, None)]
    await node.db.memberships.delete_one({"_id": f"{group} {ANN}"})
    files, _ = await exported(node)
    (row,) = files["conversations.json"]
    assert (row["conversationId"], row["createdByYou"]) == (group, True)
    assert "a later name" not in json.dumps(files)


async def test_an_export_holds_no_secret_and_nobody_elses_data(node: Node) -> None:
    await live(node)
    text = json.dumps(await exported(node))
    for secret in (
        "a hash",
        "hash-of-a-token",
        "sealed-token",
        "session-s1",
        "192.0.2.99",
        "bob's app",
        "calls ann",
    ):
        assert secret not in text, secret
    theirs = json.dumps(await exported(node, "cleo"))
    for secret in ("Ann 8d1c", "4915112345678", "to ann", "from ann", "192.0.2.7"):
        assert secret not in theirs, secret


async def test_an_export_of_somebody_who_has_nothing_is_empty(node: Node) -> None:
    found, _ = await exported(node, "dan")
    assert {name for name, value in found.items() if value} == {"profile.json", "devices.json", "audit.json"}
    assert [entry["act"] for entry in found["audit.json"]][-1] == "me.export"


async def test_a_large_export_is_streamed_in_pieces(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.store.export._PAGE", 50)
    await live(node)
    now = datetime.now(UTC)
    await node.db.contacts.insert_many(
        [
            {"_id": f"{ANN} u{n}", "owner": ANN, "user": f"u{n}", "name": token_hex(500), "createdAt": now}
            for n in range(2000)
        ]
    )
    held: list[int] = []
    take = personal._Sink.take

    def noted(self: personal._Sink) -> bytes:
        held.append(self.size)
        return take(self)

    monkeypatch.setattr(personal._Sink, "take", noted)
    found, _ = await exported(node)
    assert len(found["contacts.json"]) == 2001
    assert len(held) > 3
    assert max(held) < 2 * personal._CHUNK


async def test_an_export_that_breaks_off_does_not_look_complete(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await live(node)
    async with failing(node, "find", "reports", errorCode=50), exporting(node) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    assert len((await exported(node))[0]["reports.json"]) == 1


async def test_an_export_that_meets_what_it_cannot_read_breaks_off_at_once(node: Node) -> None:
    await live(node)
    await node.db.audit.update_one({"act": "session.start"}, {"$set": {"at": 5}})
    async with asyncio.timeout(10), exporting(node) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await response.read()


async def test_sent_messages_count_people_so_that_a_block_does_not_show(node: Node) -> None:
    conversations = []
    for other in ("bob", "cleo"):
        for device in ("phone", "tablet"):
            await node.request("GET", "/v1/me", other, device)
        if other == "cleo":
            await node.request("PATCH", f"/v1/contacts/{ANN}", other, "phone", {"blocked": True})
        conversations.append(await node.direct(ANN, other))
    ann = await node.connect(ANN)
    for conversation in conversations:
        await ann.sent(conversation, "hello")
    rows = [row async for row in node.db.messages.find({"body": "hello"})]
    assert sorted(len(row["awaiting"]) for row in rows) == [1, 2]
    found, _ = await exported(node)
    assert [message["awaiting"] for message in found["sent.json"]] == [1, 1]


async def test_an_export_that_the_store_cannot_begin_is_unavailable(node: Node) -> None:
    await live(node)
    async with failing(node, "find", "users", errorCode=50), exporting(node) as response:
        assert response.status == 503


async def test_a_client_that_leaves_in_the_middle_harms_nobody(node: Node) -> None:
    await live(node)
    now = datetime.now(UTC)
    await node.db.contacts.insert_many(
        [
            {"_id": f"{ANN} u{n}", "owner": ANN, "user": f"u{n}", "name": token_hex(900), "createdAt": now}
            for n in range(3000)
        ]
    )
    async with exporting(node) as response:
        await response.content.readexactly(10)
    assert (await exported(node))[0]["profile.json"]["id"] == ANN
