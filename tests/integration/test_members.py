"""Conversations and their members over HTTP: rights, races, what is told, and changes that a crash left half-way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from handlers import changing
from relay.jobs.repair import Repair
from relay.routing import invalidation
from relay.routing.invalidation import Invalidation
from relay.store import audience
from relay.store.releases import Releases
from relay.store.revisions import Proposal, Revision, Revisions
from relay.wire.codec import loads
from relay.wire.errors import RelayError
from tests.support.device import new_id
from tests.support.node import Node, NodeFactory
from tests.support.waiting import until


async def ask(node: Node, user: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    return await node.request(method, path, user, "phone", body)


def at(conv: str, suffix: str = "") -> str:
    return f"/v1/conversations/{conv}{suffix}"


async def roles(node: Node, conv: str) -> dict[str, str]:
    rows = node.db.memberships.find({"conversationId": conv, "removedAt": None})
    return {row["user"]: row["role"] async for row in rows}


async def told(node: Node, conv: str) -> list[dict[str, Any]]:
    """The stored system messages of a conversation, in order: their bodies."""
    cursor = node.db.messages.find({"conversationId": conv, "kind": "system"}).sort([("seq", 1)])
    return [{**loads(found["body"]), "id": found["_id"]} async for found in cursor]


async def crew(node: Node) -> str:
    """A group with one of every role, twice where it matters."""
    conv = await node.group("ann", ["adam", "mod", "max", "bob", "ben"])
    for user, role in (("adam", "admin"), ("mod", "moderator"), ("max", "moderator")):
        await node.db.memberships.update_one({"_id": f"{conv} {user}"}, {"$set": {"role": role}})
    return conv


async def balanced(node: Node) -> None:
    """Accepted is what has ended and what really waits."""
    ledger = node.relay.context.ledger
    waiting = [
        one async for one in await node.db.messages.aggregate([{"$project": {"n": {"$size": "$awaiting"}}}])
    ]
    assert ledger.waiting == sum(one["n"] for one in waiting)


# Rights

ACTS: dict[str, tuple[str, str, Any, dict[str, int]]] = {
    "add": ("POST", "/members", {"users": ["eve"]}, {"admin": 200, "moderator": 200, "member": 403}),
    "remove a member": ("DELETE", "/members/ben", None, {"admin": 200, "moderator": 200, "member": 403}),
    "remove a moderator": ("DELETE", "/members/max", None, {"admin": 200, "moderator": 200, "member": 403}),
    "remove an admin": ("DELETE", "/members/adam", None, {"admin": 200, "moderator": 403, "member": 403}),
    "make a moderator": (
        "PATCH",
        "/members/ben",
        {"role": "moderator"},
        {"admin": 200, "moderator": 200, "member": 403},
    ),
    "make an admin": (
        "PATCH",
        "/members/ben",
        {"role": "admin"},
        {"admin": 200, "moderator": 403, "member": 403},
    ),
    "unmake a moderator": (
        "PATCH",
        "/members/max",
        {"role": "member"},
        {"admin": 200, "moderator": 200, "member": 403},
    ),
    "unmake an admin": (
        "PATCH",
        "/members/adam",
        {"role": "member"},
        {"admin": 200, "moderator": 403, "member": 403},
    ),
    "rename": ("PATCH", "", {"name": "new"}, {"admin": 200, "moderator": 200, "member": 403}),
    "close": (
        "PATCH",
        "",
        {"settings": {"whoMayPost": "moderators"}},
        {"admin": 200, "moderator": 200, "member": 403},
    ),
    "dissolve": ("DELETE", "", None, {"admin": 200, "moderator": 403, "member": 403}),
    "remove a stranger": ("DELETE", "/members/zoe", None, {"admin": 404, "moderator": 404, "member": 403}),
    "promote a stranger": (
        "PATCH",
        "/members/zoe",
        {"role": "admin"},
        {"admin": 404, "moderator": 404, "member": 403},
    ),
    "promote oneself": (
        "PATCH",
        "/members/{me}",
        {"role": "admin"},
        {"admin": 200, "moderator": 403, "member": 403},
    ),
    "leave": ("DELETE", "/members/{me}", None, {"admin": 200, "moderator": 200, "member": 200}),
    "look": ("GET", "", None, {"admin": 200, "moderator": 200, "member": 200}),
    "list members": ("GET", "/members", None, {"admin": 200, "moderator": 200, "member": 200}),
    "pin": ("PATCH", "/me", {"pinned": True}, {"admin": 200, "moderator": 200, "member": 200}),
}
WHO = {"admin": "ann", "moderator": "mod", "member": "bob", "stranger": "zoe"}
CODES = {403: "forbidden", 404: "not_found"}


async def test_every_role_may_do_what_it_may_and_nothing_else(node: Node) -> None:
    for act, (method, suffix, body, expected) in ACTS.items():
        for role, user in WHO.items():
            conv = await crew(node)
            before = await node.db.conversations.find_one({"_id": conv}), await roles(node, conv)
            status, found = await ask(node, user, method, at(conv, suffix.replace("{me}", user)), body)
            wanted = expected.get(role, 404)
            assert status == wanted, (role, act, found)
            if wanted in CODES:
                assert found["error"]["code"] == CODES[wanted], (role, act)
                after = await node.db.conversations.find_one({"_id": conv}), await roles(node, conv)
                assert after == before, (role, act)
                assert await told(node, conv) == [], (role, act)


async def test_nobody_changes_a_direct_conversation(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    before = await node.db.conversations.find_one({"_id": conv})
    for method, suffix, body, _ in ACTS.values():
        if method == "GET" or suffix == "/me":
            continue
        for user, wanted in (("ann", 403), ("zoe", 404)):
            path = at(conv, suffix.replace("{me}", user).replace("adam", "bob"))
            assert (await ask(node, user, method, path, body))[0] == wanted, (method, suffix)
    assert await node.db.conversations.find_one({"_id": conv}) == before
    assert await roles(node, conv) == {"ann": "member", "bob": "member"}


async def test_the_last_admin_stays_admin_until_there_is_another(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    refused: list[tuple[str, Any]] = [("PATCH", {"role": role}) for role in ("member", "moderator")]
    for method, body in [("DELETE", None), *refused]:
        status, found = await ask(node, "ann", method, at(conv, "/members/ann"), body)
        assert (status, found["error"]["code"]) == (409, "conflict")
    assert await roles(node, conv) == {"ann": "admin", "bob": "member"}
    assert await told(node, conv) == []
    assert (await ask(node, "ann", "PATCH", at(conv, "/members/bob"), {"role": "admin"}))[0] == 200
    assert (await ask(node, "ann", "DELETE", at(conv, "/members/ann")))[0] == 200
    assert await roles(node, conv) == {"bob": "admin"}


@pytest.mark.parametrize("act", ["leave", "unmake each other", "unmake themselves"])
async def test_of_two_admins_who_go_at_once_one_stays(node: Node, act: str) -> None:
    for _ in range(4):
        conv = await node.group("ann", ["bob", "cleo"])
        await ask(node, "ann", "PATCH", at(conv, "/members/bob"), {"role": "admin"})

        async def go(user: str, other: str, conv: str = conv) -> tuple[int, Any]:
            if act == "leave":
                return await ask(node, user, "DELETE", at(conv, f"/members/{user}"))
            whom = other if act == "unmake each other" else user
            return await ask(node, user, "PATCH", at(conv, f"/members/{whom}"), {"role": "member"})

        found = await asyncio.gather(go("ann", "bob"), go("bob", "ann"))
        assert sorted(status for status, _ in found) in ([200, 409], [200, 403]), found
        assert list((await roles(node, conv)).values()).count("admin") == 1


async def test_a_group_that_its_only_member_leaves_is_dissolved(node: Node) -> None:
    ref = new_id()
    body = {"type": "group", "members": [], "ref": ref}
    _, made = await ask(node, "ann", "POST", "/v1/conversations", body)
    assert (await ask(node, "ann", "DELETE", at(made["id"], "/members/ann")))[0] == 200
    assert (await ask(node, "ann", "GET", at(made["id"])))[0] == 404
    status, other = await ask(node, "ann", "POST", "/v1/conversations", body)
    assert (status, other["id"] != made["id"]) == (201, True)


# Creating


async def test_twenty_who_make_one_conversation_at_once_are_told_once(node: Node) -> None:
    body = {"type": "group", "members": ["bob", "cleo"], "ref": new_id()}
    found = await asyncio.gather(*(ask(node, "ann", "POST", "/v1/conversations", body) for _ in range(20)))
    assert sorted(status for status, _ in found) == [200] * 19 + [201]
    assert len({answer["id"] for _, answer in found}) == 1
    assert all(answer["memberCount"] == 3 == len(answer["members"]) for _, answer in found)
    (created,) = await told(node, found[0][1]["id"])
    assert (created["event"], created["by"], sorted(created["users"])) == (
        "created",
        "ann",
        ["ann", "bob", "cleo"],
    )


async def test_a_creation_whose_answer_was_lost_is_found_whatever_its_members_want_since(node: Node) -> None:
    body = {"type": "group", "members": ["bob", "cleo"], "ref": new_id()}
    _, made = await ask(node, "ann", "POST", "/v1/conversations", body)
    preferences = {"whoMayAdd": "contacts", "whoMayMessage": "contacts"}
    assert (await ask(node, "bob", "PATCH", "/v1/me", {"preferences": preferences}))[0] == 200
    assert (await ask(node, "cleo", "DELETE", "/v1/me"))[0] == 200
    status, again = await ask(node, "ann", "POST", "/v1/conversations", body)
    assert (status, again["id"]) == (200, made["id"])
    for user, other in (("ann", {**body, "ref": new_id()}), ("zoe", body)):
        status, _ = await ask(node, user, "POST", "/v1/conversations", other)
        assert status == 404, "what is new is refused, and a ref is its user's own"


async def test_of_a_pair_that_writes_to_each_other_at_once_on_two_nodes_one_conversation_comes(
    nodes: NodeFactory,
) -> None:
    one, two = [await nodes.start() for _ in range(2)]

    async def make(number: int) -> tuple[int, Any]:
        user, other = ("ann", "bob") if number % 2 else ("bob", "ann")
        body = {"type": "direct", "members": [other]}
        return await ask((one, two)[number // 2 % 2], user, "POST", "/v1/conversations", body)

    found = await asyncio.gather(*(make(number) for number in range(20)))
    assert sorted(status for status, _ in found) == [200] * 19 + [201]
    (conv,) = {answer["id"] for _, answer in found}
    assert all({member["user"] for member in answer["members"]} == {"ann", "bob"} for _, answer in found)
    assert await one.db.conversations.count_documents({}) == 1
    assert set(await roles(two, conv)) == {"ann", "bob"}


@pytest.mark.parametrize("how", ["asked again", "repair"])
@pytest.mark.parametrize("kind", ["direct", "group"])
async def test_a_creation_that_died_after_its_first_write_is_finished(
    node: Node, kind: Any, how: str
) -> None:
    ctx, ref = node.relay.context, None if kind == "direct" else new_id()
    await ctx.accounts.add_users(["ann", "bob"])
    conv, _, _ = await ctx.revisions.create("ann", kind, ["bob"], name=None, ref=ref)
    assert (await ask(node, "ann", "GET", at(conv)))[0] == 404
    if how == "repair":
        await age(node, conv)
        await Repair(ctx).run()
    else:
        body = {"type": kind, "members": ["bob"], **({} if ref is None else {"ref": ref})}
        status, again = await ask(node, "ann", "POST", "/v1/conversations", body)
        assert (status, again["id"]) == (200, conv)
    assert set(await roles(node, conv)) == {"ann", "bob"}
    assert "pending" not in await node.db.conversations.find_one({"_id": conv})
    assert len(await told(node, conv)) == (kind == "group")
    assert (await ask(node, "bob", "GET", at(conv)))[0] == 200


# Races and crashes


@pytest.mark.parametrize("count", [1, 2])
async def test_twenty_changes_at_once_end_consistent_and_each_is_told_once(
    nodes: NodeFactory, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    # While another node lives every change waits for the leases that it may hold.
    for place in (audience, invalidation):
        monkeypatch.setattr(place, "LEASE_SECONDS", 0.1)
    running = [await nodes.start(commit_timeout_seconds=0.5) for _ in range(count)]
    one = running[0]
    conv = await one.group("ann", [f"u{number}" for number in range(6)])
    await one.connect("ann")

    async def act(number: int) -> tuple[int, Any]:
        node, user = running[number % count], f"u{number % 9}"
        if number % 3 == 0:
            return await ask(node, "ann", "POST", at(conv, "/members"), {"users": [user, f"{user}b"]})
        if number % 3 == 1:
            return await ask(node, "ann", "DELETE", at(conv, f"/members/{user}"))
        return await ask(node, "ann", "PATCH", at(conv), {"name": f"name {number}"})

    found = await asyncio.gather(*(act(number) for number in range(20)))
    # Others may be at it for longer than one waits.
    assert {status for status, _ in found} <= ({200, 404} if count == 1 else {200, 404, 503}), found
    assert [status for status, _ in found].count(200) >= 3

    async def over() -> bool:
        return "pending" not in await one.db.conversations.find_one({"_id": conv})

    await until(over, 10, "the last change is carried out")
    stored = await one.db.conversations.find_one({"_id": conv})
    present = await roles(one, conv)
    assert stored["memberCount"] == len(present)
    events = await told(one, conv)
    assert len(events) == stored["rev"] - 1
    # Replayed in the order in which they are told, the messages make the members that are.
    members = {"ann"} | {f"u{number}" for number in range(6)}
    for event in events:
        if event["event"] == "added":
            assert not members & set(event["users"])
            members |= set(event["users"])
        elif event["event"] == "removed":
            assert members >= set(event["users"])
            members -= set(event["users"])
    assert members == set(present)
    assert any(stored["name"] == f"name {number}" for number in range(2, 20, 3))


class Crash(Exception):
    """The node died here."""


STEPS: dict[str, tuple[Any, str]] = {
    "planning": (Releases, "plan"),
    "applying": (Revisions, "apply"),
    "invalidating": (Invalidation, "tell"),
    "releasing": (Releases, "run"),
    "telling": (changing, "_announce"),
    "finishing": (Revisions, "finish"),
}
CHANGES: dict[str, tuple[Proposal, dict[str, str]]] = {
    "added": (
        Proposal("added", ["dan"]),
        {"ann": "admin", "bob": "member", "cleo": "member", "dan": "member"},
    ),
    "removed": (Proposal("removed", ["bob"]), {"ann": "admin", "cleo": "member"}),
    "left": (Proposal("left", ["bob"]), {"ann": "admin", "cleo": "member"}),
    "role": (
        Proposal("role", ["bob"], role="admin"),
        {"ann": "admin", "bob": "admin", "cleo": "member"},
    ),
    "changed": (
        Proposal("changed", fields={"name": "new"}),
        {"ann": "admin", "bob": "member", "cleo": "member"},
    ),
    "dissolved": (Proposal("dissolved"), {}),
}


async def age(node: Node, conv: str) -> None:
    """What is under way was begun a minute ago."""
    found = await node.db.conversations.find_one({"_id": conv})
    before = found["pending"]["at"] - timedelta(minutes=1)
    await node.db.conversations.update_one({"_id": conv}, {"$set": {"pending.at": before}})


def crashing(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    async def dies(*_: Any, **__: Any) -> Any:
        raise Crash

    owner, name = STEPS[step]
    monkeypatch.setattr(owner, name, dies)


def proposing(proposal: Proposal) -> Callable[[object], Proposal]:
    return lambda _: proposal


@pytest.mark.parametrize("step", list(STEPS))
async def test_a_crash_at_any_step_is_finished_by_repair_and_told_once(
    node: Node, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    ctx = node.relay.context
    for event, (proposal, after) in CHANGES.items():
        conv = await node.group("ann", ["bob", "cleo"])
        ann = await node.connect("ann", f"for-{event}")
        await ann.sent(conv)
        with monkeypatch.context() as patch:
            crashing(patch, step)
            try:
                await changing.change(
                    ctx, conv, "ann", ["bob", "dan"], proposing(proposal), everybody=event == "dissolved"
                )
            except Crash:
                crashed = True
            else:
                crashed = False
        # Releases are for those who go.
        assert crashed == (step not in ("planning", "releasing") or event in ("removed", "left")), event
        if crashed:
            left = await node.db.conversations.find_one({"_id": conv})
            assert left["pending"]["event"] == event
            late = Revision(
                conv,
                "group",
                left["pending"]["id"],
                left["pending"]["number"],
                event,  # type: ignore[arg-type]
                "ann",
                tuple(left["pending"]["users"]),
                proposal.role,
                left["pending"]["at"],
            )
            await age(node, conv)
            await Repair(ctx).run()
            await Repair(ctx).run()
        stored = await node.db.conversations.find_one({"_id": conv})
        assert "pending" not in stored, (event, step)
        assert stored["memberCount"] == len(after)
        assert ("dissolvedAt" in stored) == (event == "dissolved")
        assert await roles(node, conv) == after, (event, step)
        (only,) = await told(node, conv)
        assert (only["event"], only["by"]) == (event, "ann"), (event, step)
        if event in ("removed", "left"):
            left_over = {"conversationId": conv, "kind": "text", "awaiting": "bob/*"}
            assert await node.db.messages.count_documents(left_over) == 0, (event, step)
        if crashed:
            # Its author was only asleep; and has come back when nobody waits for the message any more.
            await changing.carry_out(ctx, late)
            assert len(await told(node, conv)) == 1, (event, step)
            loop = asyncio.get_running_loop()
            await ctx.endings.remove([only["id"]], "withdrawn", deadline=loop.time() + 5)
            await changing.carry_out(ctx, late)
            assert await told(node, conv) == [], (event, step)
            assert await roles(node, conv) == after
    await balanced(node)


async def test_a_change_left_half_way_is_finished_by_the_job_of_any_node(
    nodes: NodeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await nodes.start()
    conv = await one.group("ann", ["bob", "cleo"])
    with monkeypatch.context() as patch:
        crashing(patch, "applying")
        with pytest.raises(Crash):
            await changing.change(
                one.relay.context, conv, "ann", ["bob"], proposing(Proposal("removed", ["bob"]))
            )
    await nodes.stop(one)
    await age(one, conv)
    two = await nodes.start()
    async with asyncio.timeout(8):
        while "pending" in await two.db.conversations.find_one({"_id": conv}):
            await asyncio.sleep(0.05)
    assert set(await roles(two, conv)) == {"ann", "cleo"}
    assert [one["event"] for one in await told(two, conv)] == ["removed"]


async def test_one_change_that_cannot_be_finished_does_not_hold_up_the_others(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = node.relay.context
    made = []
    for _ in range(3):
        conv = await node.group("ann", ["bob"])
        await ctx.revisions.begin(conv, "ann", [], proposing(Proposal("changed", fields={"name": "new"})))
        await age(node, conv)
        made.append(conv)
    real = changing.carry_out

    async def carry_out(context: Any, revision: Revision) -> None:
        if revision.conversation == made[0]:
            raise RelayError("unavailable", "not now")
        await real(context, revision)

    with monkeypatch.context() as patch:
        patch.setattr(changing, "carry_out", carry_out)
        await Repair(ctx).run()
        pending = [conv for conv in made if "pending" in await node.db.conversations.find_one({"_id": conv})]
    assert pending == made[:1]


# What is told


async def test_members_and_those_concerned_are_told_by_system_messages(node: Node) -> None:
    devices = {user: await node.connect(user) for user in ("ann", "bob", "cleo", "dan")}
    conv = await node.group("ann", ["bob", "cleo"], announced=True)
    told_of: list[tuple[str, str, Any, dict[str, Any], set[str]]] = [
        ("POST", "/members", {"users": ["dan", "bob"]}, {"event": "added", "users": ["dan"]}, set(devices)),
        (
            "PATCH",
            "/members/bob",
            {"role": "moderator"},
            {"event": "role", "users": ["bob"], "role": "moderator"},
            set(devices),
        ),
        ("PATCH", "", {"name": "new"}, {"event": "changed", "users": []}, set(devices)),
        ("DELETE", "/members/dan", None, {"event": "removed", "users": ["dan"]}, set(devices)),
        ("DELETE", "", None, {"event": "dissolved", "users": ["ann", "bob", "cleo"]}, set(devices) - {"dan"}),
    ]
    for user in ("ann", "bob", "cleo"):
        message = await devices[user].expect("msg", conv=conv)
        assert (message["kind"], message["from"]["user"]) == ("system", "$relay")
        assert message["body"] == {"event": "created", "by": "ann", "users": ["ann", "bob", "cleo"]}
        await devices[user].ack(conv, message["id"])
    last = 0
    for method, suffix, body, expected, who in told_of:
        assert (await ask(node, "ann", method, at(conv, suffix), body))[0] == 200
        for user, device in devices.items():
            if user not in who:
                await device.nothing("msg", 0.05)
                continue
            message = await device.expect("msg", conv=conv)
            assert message["kind"] == "system"
            assert message["from"]["user"] == "$relay"
            assert message["body"] == {"by": "ann", **expected}, user
            assert message["seq"] > last
            await device.ack(conv, message["id"])
        last = message["seq"]
    assert await node.db.messages.count_documents({}) == 0
    await balanced(node)


async def test_leaving_is_told_to_those_who_stay_and_to_ones_own_devices(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    ann, phone, tablet = (
        await node.connect("ann"),
        await node.connect("bob"),
        await node.connect("bob", "tablet"),
    )
    assert (await ask(node, "bob", "DELETE", at(conv, "/members/bob")))[0] == 200
    for device in (ann, phone, tablet):
        assert (await device.expect("msg"))["body"] == {"event": "left", "by": "bob", "users": ["bob"]}


async def test_a_direct_conversation_has_no_system_messages(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    assert await node.db.messages.count_documents({"conversationId": conv}) == 0


async def test_nothing_is_told_of_what_changes_nothing(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    before = await node.db.conversations.find_one({"_id": conv})
    assert (await ask(node, "ann", "POST", at(conv, "/members"), {"users": ["bob", "ann"]}))[0] == 200
    assert (await ask(node, "ann", "PATCH", at(conv, "/members/bob"), {"role": "member"}))[0] == 200
    fields = {"picture": None, "description": None, "settings": {"whoMayPost": "members"}}
    for body in ({}, {"name": "group"}, fields):
        assert (await ask(node, "ann", "PATCH", at(conv), body))[0] == 200
    assert await node.db.conversations.find_one({"_id": conv}) == before
    assert await told(node, conv) == []


# Bounds and bad input


async def test_conversations_are_made_and_people_are_added_only_so_often(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_conversation="3/hour")
    for user in ("bob", "cleo"):
        assert (await ask(node, user, "GET", "/v1/me"))[0] == 200
    group = {"type": "group", "name": "us", "members": ["bob"]}
    status, made = await ask(node, "ann", "POST", "/v1/conversations", group)
    assert status == 201
    assert (await ask(node, "ann", "POST", "/v1/conversations", {"type": "direct", "members": ["bob"]}))[
        0
    ] == 201
    more = at(made["id"], "/members"), {"users": ["cleo"]}
    assert (await ask(node, "ann", "POST", *more))[0] == 200
    there = await node.db.conversations.count_documents({})
    for path, body in (("/v1/conversations", group), more):
        async with node.http.post(
            node.url + path, json=body, headers=node.headers("ann", "phone")
        ) as response:
            found = await response.json()
            assert (response.status, found["error"]["code"]) == (429, "rate_limited")
            assert 0 < int(response.headers["Retry-After"]) <= 3600
    assert await node.db.conversations.count_documents({}) == there
    # Another person has a count of their own.
    assert (await ask(node, "bob", "POST", "/v1/conversations", {"type": "direct", "members": ["cleo"]}))[
        0
    ] == 201


async def test_changes_that_are_told_to_everybody_are_limited_for_each_person(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_conversation_change="4/hour")
    conv = await node.group("ann", ["bob", "cleo", "dan"])
    acts: list[tuple[str, str, Any]] = [
        ("PATCH", "", {"name": "new"}),
        ("PATCH", "/members/bob", {"role": "admin"}),
        ("DELETE", "/members/dan", None),
        # What is refused counts, too.
        ("DELETE", "/members/zoe", None),
    ]
    assert [(await ask(node, "ann", method, at(conv, suffix), body))[0] for method, suffix, body in acts] == [
        *(200, 200, 200),
        404,
    ]
    before = await node.db.conversations.find_one({"_id": conv}), await roles(node, conv)
    entries, messages = await node.db.audit.count_documents({}), len(await told(node, conv))
    for method, suffix, body in [*acts, ("DELETE", "/members/ann", None), ("DELETE", "", None)]:
        status, found = await ask(node, "ann", method, at(conv, suffix), body)
        assert (status, found["error"]["code"]) == (429, "rate_limited"), (method, suffix)
    assert (await node.db.conversations.find_one({"_id": conv}), await roles(node, conv)) == before
    assert (await node.db.audit.count_documents({}), len(await told(node, conv))) == (entries, messages)
    # What concerns oneself alone, and other people, are not limited by it.
    assert (await ask(node, "ann", "PATCH", at(conv, "/me"), {"pinned": True}))[0] == 200
    assert (await ask(node, "bob", "PATCH", at(conv), {"name": "bob's"}))[0] == 200


async def test_a_group_has_no_more_members_than_it_may(nodes: NodeFactory) -> None:
    node = await nodes.start(max_members=4)
    for members, status in ((["a", "b", "c"], 201), (["a", "b", "c", "d"], 413)):
        found = await ask(node, "ann", "POST", "/v1/conversations", {"type": "group", "members": members})
        assert found[0] == status
    conv = await node.group("ann", ["a", "b"])
    assert (await ask(node, "ann", "POST", at(conv, "/members"), {"users": ["c", "d"]}))[0] == 413
    raced = await asyncio.gather(
        *(ask(node, "ann", "POST", at(conv, "/members"), {"users": [user]}) for user in "cdefgh")
    )
    assert sorted(status for status, _ in raced) == [200] + [413] * 5
    assert len(await roles(node, conv)) == 4
    many = {"users": [f"u{number}" for number in range(1001)]}
    assert (await ask(node, "ann", "POST", at(conv, "/members"), many))[0] == 413


async def test_malformed_changes_are_refused_and_change_nothing(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    before = await node.db.conversations.find_one({"_id": conv}), await roles(node, conv)
    bodies: dict[tuple[str, str], list[Any]] = {
        ("POST", "/members"): [
            None,
            {},
            [],
            {"users": []},
            {"users": "cleo"},
            {"users": [1]},
            {"users": [{"$ne": None}]},
            {"users": ["a b"]},
            {"users": [""]},
            {"users": ["$relay"]},
            {"users": ["cleo"], "role": "admin"},
        ],
        ("PATCH", "/members/bob"): [
            None,
            {},
            {"role": "owner"},
            {"role": None},
            {"role": {"$ne": 1}},
            {"role": "admin", "x": 1},
        ],
        ("PATCH", ""): [
            {"name": None},
            {"name": ""},
            {"name": "n" * 129},
            {"name": "a\0"},
            {"name": "a\nb"},
            {"name": {"$ne": 1}},
            {"picture": "../x"},
            {"picture": 1},
            {"description": "d" * 1025},
            {"description": "\x01"},
            {"settings": {"whoMayPost": "nobody"}},
            {"settings": {"whoMayPost": {"$ne": 1}}},
            {"settings": {"x": 1}},
            {"settings": "x"},
            {"type": "direct"},
            {"rev": 7},
            {"pending": None},
        ],
        ("PATCH", "/me"): [
            {"pinned": "yes"},
            {"pinned": 1},
            {"archived": {"$ne": 1}},
            {"mutedUntil": -1},
            {"mutedUntil": 10**18},
            {"mutedUntil": "x"},
            {"mutedUntil": 1.5},
            {"role": "admin"},
        ],
    }
    bad = [(method, suffix, body) for (method, suffix), all_ in bodies.items() for body in all_]
    for method, suffix, body in bad:
        status, found = await ask(node, "ann", method, at(conv, suffix), body)
        assert (status, found["error"]["code"]) in ((400, "bad_request"), (413, "too_large")), (suffix, body)
    for path in (at(conv, "/members/%24ne"), at(conv, "/members/a%20b"), at("%24ne", "/members/bob")):
        assert (await ask(node, "ann", "DELETE", path))[0] == 404, path
        assert (await ask(node, "ann", "PATCH", path, {"role": "member"}))[0] == 404, path
    assert (await node.db.conversations.find_one({"_id": conv}), await roles(node, conv)) == before


async def test_lists_page_with_limits_and_q(node: Node) -> None:
    await node.db.users.insert_one({"_id": "bob", "createdAt": datetime.now(UTC), "name": "Bob Builder"})
    trip = await node.group("ann", ["bob", "cleo", "dan"])
    await ask(node, "ann", "PATCH", at(trip), {"name": "Trip to Oslo"})
    other = await node.group("ann", ["cleo"])
    for q, wanted in (
        ("oslo", [trip]),
        ("BUILD", [trip]),
        ("cle", [trip, other]),
        ("group", [other]),
        ("%24ne", []),
        (".*", []),
    ):
        status, page = await ask(node, "ann", "GET", f"/v1/conversations?q={q}")
        assert (status, sorted(one["id"] for one in page["items"])) == (200, sorted(wanted)), q
    for query in ("q=", "q=%20", "q=" + "x" * 65, "limit=201", "limit=0", "cursor=x", "skip=1"):
        assert (await ask(node, "ann", "GET", f"/v1/conversations?{query}"))[0] == 400, query
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        status, page = await ask(node, "ann", "GET", at(trip, f"/members?limit=3{cursor}"))
        assert (status, len(page["items"]) <= 3) == (200, True)
        found += page["items"]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert [(one["user"], one["role"], one["name"]) for one in found] == [
        ("ann", "admin", None),
        ("bob", "member", "Bob Builder"),
        ("cleo", "member", None),
        ("dan", "member", None),
    ]
    for query in ("limit=201", "limit=0", "limit=x", "cursor=x", "q=a"):
        assert (await ask(node, "ann", "GET", at(trip, f"/members?{query}")))[0] == 400, query


async def test_strangers_learn_nothing_about_the_people_they_name(nodes: NodeFactory) -> None:
    node = await nodes.start(auto_provision=False)
    for user in ("ann", "bob", "zoe"):
        known_since = {"createdAt": datetime.now(UTC)}
        await node.db.users.insert_one({"_id": user, **known_since})
        await node.db.devices.insert_one({"_id": f"{user}/phone", "user": user, **known_since})
    conv = await node.group("ann", ["bob"])
    known = await ask(node, "zoe", "POST", at(conv, "/members"), {"users": ["bob"]})
    unknown = await ask(node, "zoe", "POST", at(conv, "/members"), {"users": ["nobody"]})
    assert known == unknown
    assert known[0] == 404
    status, found = await ask(node, "ann", "POST", at(conv, "/members"), {"users": ["bob", "nobody"]})
    assert (status, found["error"]["details"]) == (404, {"users": ["nobody"]})
    assert set(await roles(node, conv)) == {"ann", "bob"}


async def test_changes_are_on_record(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    await ask(node, "ann", "POST", at(conv, "/members"), {"users": ["dan"]})
    await ask(node, "ann", "PATCH", at(conv, "/members/bob"), {"role": "admin"})
    await ask(node, "ann", "PATCH", at(conv), {"name": "new"})
    await ask(node, "ann", "DELETE", at(conv, "/members/dan"))
    await ask(node, "cleo", "DELETE", at(conv, "/members/cleo"))
    await ask(node, "zoe", "DELETE", at(conv))
    await ask(node, "ann", "DELETE", at(conv))
    others = {"act": {"$ne": "device.provision"}}
    acts = [one["act"] async for one in node.db.audit.find(others).sort([("_id", 1)])]
    assert acts == [
        "member.add",
        "member.role",
        "conversation.change",
        "member.remove",
        "member.leave",
        "conversation.dissolve",
    ]
