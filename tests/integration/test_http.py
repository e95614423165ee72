"""PROTOCOL 3: conversations, waiting messages, sync, sending and acknowledging over HTTP."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.support.device import new_id
from tests.support.node import Node, NodeFactory


async def post(node: Node, user: str, path: str, body: Any) -> tuple[int, Any]:
    return await node.request("POST", path, user, "phone", body)


async def get(node: Node, user: str, path: str, device: str = "phone") -> tuple[int, Any]:
    return await node.request("GET", path, user, device)


async def stored(node: Node, conv: str, number: int, user: str = "ann") -> list[str]:
    found = []
    for n in range(number):
        message = {"id": new_id(), "conv": conv, "kind": "text", "body": f"{n}"}
        status, answer = await post(node, user, "/v1/messages", message)
        assert status == 201, answer
        found.append(message["id"])
    return found


def problem(found: tuple[int, Any]) -> tuple[int, str]:
    """The status and code of an error, which has the promised shape."""
    status, answer = found
    assert set(answer) == {"error"}
    assert set(answer["error"]) <= {"code", "message", "details"}
    assert "\n" not in answer["error"]["message"]
    return status, answer["error"]["code"]


async def test_a_direct_conversation_is_made_once_whoever_asks(node: Node) -> None:
    status, made = await post(node, "ann", "/v1/conversations", {"type": "direct", "members": ["bob"]})
    assert status == 201
    assert set(made) == {
        "id",
        "type",
        "name",
        "picture",
        "description",
        "settings",
        "members",
        "memberCount",
        "createdAt",
        "updatedAt",
        "me",
    }
    assert {frozenset(member) for member in made["members"]} == {
        frozenset(("user", "role", "name", "joinedAt"))
    }
    assert abs(made["createdAt"] - time.time() * 1000) < 3000
    assert (made["type"], made["name"]) == ("direct", None)
    assert sorted(member["user"] for member in made["members"]) == ["ann", "bob"]
    assert {member["role"] for member in made["members"]} == {"member"}
    for user, other in (("ann", "bob"), ("bob", "ann")):
        body = {"type": "direct", "members": [other], "ref": new_id()}
        assert await post(node, user, "/v1/conversations", body) == (200, made)
    assert await get(node, "bob", f"/v1/conversations/{made['id']}") == (200, made)


async def test_a_direct_conversation_asked_for_by_both_at_once_is_one(node: Node) -> None:
    found = await asyncio.gather(
        *(
            post(node, user, "/v1/conversations", {"type": "direct", "members": [other]})
            for user, other in (("ann", "bob"), ("bob", "ann")) * 4
        )
    )
    assert sorted(status for status, _ in found) == [200] * 7 + [201]
    assert len({answer["id"] for _, answer in found}) == 1
    assert all(len(answer["members"]) == 2 for _, answer in found)


async def test_a_repeated_ref_of_the_same_user_comes_back_with_200(node: Node) -> None:
    body = {"type": "group", "members": ["bob", "cleo", "bob"], "name": "Café ☕", "ref": new_id()}
    status, made = await post(node, "ann", "/v1/conversations", body)
    assert (status, made["name"]) == (201, "Café ☕")
    assert {member["user"]: member["role"] for member in made["members"]} == {
        "ann": "admin",
        "bob": "member",
        "cleo": "member",
    }
    assert await post(node, "ann", "/v1/conversations", body) == (200, made)
    status, other = await post(node, "bob", "/v1/conversations", {**body, "members": ["ann"]})
    assert (status, other["id"] != made["id"]) == (201, True)
    status, third = await post(node, "ann", "/v1/conversations", {**body, "ref": new_id()})
    assert (status, third["id"] != made["id"]) == (201, True)


async def test_the_creator_is_a_member_whether_named_or_not(node: Node) -> None:
    _, made = await post(node, "ann", "/v1/conversations", {"type": "group", "members": ["ann", "bob"]})
    assert sorted(member["user"] for member in made["members"]) == ["ann", "bob"]
    _, alone = await post(node, "ann", "/v1/conversations", {"type": "group", "members": []})
    assert [member["user"] for member in alone["members"]] == ["ann"]


async def test_malformed_conversations_are_refused_and_nothing_is_made(node: Node) -> None:
    good = {"type": "group", "members": ["bob"]}
    for change in (
        {"type": "channel"},
        {"type": None},
        {"members": "bob"},
        {"members": [{"$ne": None}]},
        {"members": {"$gt": ""}},
        {"members": ["bob/phone"]},
        {"members": ["$relay"]},
        {"members": ["bob\n"]},
        {"members": [""]},
        {"members": ["b" * 129]},
        {"members": [1]},
        {"type": "direct", "members": []},
        {"type": "direct", "members": ["ann"]},
        {"type": "direct", "members": ["bob", "cleo"]},
        {"type": "direct", "name": "no names here"},
        {"name": ""},
        {"name": "n" * 129},
        {"name": {"$ne": None}},
        {"ref": "no uuid"},
        {"ref": {"$ne": None}},
        {"createdBy": "bob"},
        {"_id": "x"},
    ):
        assert problem(await post(node, "ann", "/v1/conversations", {**good, **change})) == (
            400,
            "bad_request",
        ), change
    many = {**good, "members": [f"u{n}" for n in range(1001)]}
    assert problem(await post(node, "ann", "/v1/conversations", many)) == (413, "too_large")
    for body in ([], None, "x", 1, [good]):
        assert problem(await post(node, "ann", "/v1/conversations", body)) == (400, "bad_request"), body
    assert await node.db.conversations.count_documents({}) == 0
    assert await node.db.memberships.count_documents({}) == 0


async def test_without_provision_unknown_members_are_not_found(nodes: NodeFactory) -> None:
    node = await nodes.start(auto_provision=False)
    await node.db.users.insert_one({"_id": "ann"})
    await node.db.devices.insert_one({"_id": "ann/phone", "user": "ann"})
    found = await post(node, "ann", "/v1/conversations", {"type": "direct", "members": ["nobody"]})
    assert problem(found) == (404, "not_found")
    assert await node.db.conversations.count_documents({}) == 0


async def test_conversations_are_listed_last_changed_first_and_page_with_cursor_and_limit(node: Node) -> None:
    made = [await node.group("ann", [f"friend-{n}"]) for n in range(7)]
    await node.group("bob", ["cleo"])
    seen: list[str] = []
    cursor = ""
    pages = 0
    while True:
        status, page = await get(node, "ann", f"/v1/conversations?limit=3{cursor}")
        assert (status, set(page)) == (200, {"items", "next"})
        assert len(page["items"]) <= 3
        seen += [item["id"] for item in page["items"]]
        pages += 1
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert seen == made[::-1]
    assert pages == 3
    status, everything = await get(node, "ann", "/v1/conversations")
    assert [item["id"] for item in everything["items"]] == seen
    assert await get(node, "dora", "/v1/conversations") == (200, {"items": [], "next": None})


async def test_bad_pages_are_refused_everywhere(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    for path in ("/v1/conversations", "/v1/sync", f"/v1/conversations/{conv}/messages"):
        for query in (
            "limit=0",
            "limit=-1",
            "limit=x",
            "limit=1e3",
            "limit=257",
            "limit=",
            "limit=%D9%A1",
            "cursor=x",
            "cursor=",
            "cursor=%00",
            "cursor=W10=",
            "cursor=WzEsMl0=",
            "cursor=eyIkZ3QiOiIifQ==",
            "cursor=W3siJGd0IjowfSwgIiJd",
            "cursor=WzFlOTk5LCJ4Il0=",
            "cursor=Wzk5OTk5OTk5OTk5OTk5OTk5OTk5OTksIngiXQ==",
            "unknown=1",
            "limit[$ne]=1",
        ):
            assert problem(await get(node, "ann", f"{path}?{query}")) == (400, "bad_request"), (path, query)


async def test_absent_and_not_yours_look_the_same(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    for suffix in ("", "/messages", "/devices"):
        assert (await get(node, "bob", f"/v1/conversations/{conv}{suffix}"))[0] == 200
        foreign = await get(node, "cleo", f"/v1/conversations/{conv}{suffix}")
        absent = await get(node, "cleo", f"/v1/conversations/{new_id()}{suffix}")
        odd = await get(node, "cleo", f"/v1/conversations/%24ne%3A%20null{suffix}")
        assert problem(foreign) == (404, "not_found")
        assert foreign == absent == odd


async def test_devices_lists_all_devices_and_its_rev_changes_with_them(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    _, first = await get(node, "ann", f"/v1/conversations/{conv}/devices")
    assert first["devices"] == ["ann/phone"]
    await node.connect("bob", "tablet")
    _, second = await get(node, "ann", f"/v1/conversations/{conv}/devices")
    assert second["devices"] == ["ann/phone", "bob/tablet"]
    assert second["devicesRev"] != first["devicesRev"]
    assert await get(node, "bob", f"/v1/conversations/{conv}/devices", "tablet") == (200, second)
    assert set(second) == {"devicesRev", "devices"}


async def test_sync_pages_through_what_waits_without_taking_it(node: Node) -> None:
    one, two = await node.direct("ann", "bob"), await node.group("ann", ["bob"])
    await get(node, "bob", "/v1/sync")
    ids = await stored(node, one, 4) + await stored(node, two, 3)
    for _ in range(2):
        seen: list[dict[str, Any]] = []
        cursor: str | None = ""
        while cursor is not None:
            status, page = await get(node, "bob", f"/v1/sync?limit=3{cursor and f'&cursor={cursor}'}")
            assert (status, set(page)) == (200, {"messages", "next"})
            seen += page["messages"]
            cursor = page["next"]
        assert [message["id"] for message in seen] == ids
        assert [message["seq"] for message in seen] == sorted(message["seq"] for message in seen)
    assert {message["t"] for message in seen} == {"msg"}
    bob = await node.connect("bob")
    assert await bob.expect("msg") == seen[0]
    assert (await get(node, "bob", "/v1/sync?limit=7"))[1]["messages"] == seen


async def test_a_conversations_messages_are_those_that_wait_for_this_device_in_it(node: Node) -> None:
    one, two = await node.direct("ann", "bob"), await node.group("ann", ["bob"])
    await get(node, "bob", "/v1/sync")
    await get(node, "bob", "/v1/sync", "tablet")
    mine = await stored(node, one, 5)
    await stored(node, two, 2)
    status, page = await get(node, "bob", f"/v1/conversations/{one}/messages?limit=2")
    assert (status, [m["id"] for m in page["items"]]) == (200, mine[:2])
    status, rest = await get(node, "bob", f"/v1/conversations/{one}/messages?limit=9&cursor={page['next']}")
    assert ([m["id"] for m in rest["items"]], rest["next"]) == (mine[2:], None)
    await post(node, "bob", "/v1/acks", {"acks": [{"conv": one, "ids": mine[:4]}]})
    assert [
        m["id"] for m in (await get(node, "bob", f"/v1/conversations/{one}/messages"))[1]["items"]
    ] == mine[4:]
    tablet = (await get(node, "bob", f"/v1/conversations/{one}/messages", "tablet"))[1]
    assert [m["id"] for m in tablet["items"]] == mine
    assert (await get(node, "ann", f"/v1/conversations/{one}/messages"))[1] == {"items": [], "next": None}


async def test_a_message_over_http_is_like_one_over_the_socket(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    bob = await node.connect("bob")
    message: dict[str, Any] = {
        "id": new_id(),
        "conv": conv,
        "kind": "text",
        "body": {"a": [1, "é"]},
        "after": 5,
        "silent": True,
    }
    status, answer = await post(node, "ann", "/v1/messages", message)
    assert (status, set(answer)) == (201, {"conv", "id", "seq", "at"})
    live = await bob.expect("msg")
    assert (live["body"], live["seq"], live["from"]) == (
        message["body"],
        answer["seq"],
        {"user": "ann", "device": "phone"},
    )
    assert await post(node, "ann", "/v1/messages", message) == (201, answer)
    await bob.ack(conv, message["id"])
    assert await post(node, "ann", "/v1/messages", {**message, "again": True}) == (201, answer)
    assert problem(await post(node, "bob", "/v1/messages", {**message, "again": True})) == (
        409,
        "id_conflict",
    )


async def test_http_sends_fail_with_the_codes_of_the_table(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    await get(node, "bob", "/v1/sync")
    good = {"id": new_id(), "conv": conv, "kind": "text", "body": "x"}
    other = (await stored(node, conv, 1, "bob"))[0]
    for change, expected in (
        ({"conv": "elsewhere"}, (404, "not_member")),
        ({"kind": "system"}, (400, "bad_request")),
        ({"t": "send"}, (400, "bad_request")),
        ({"surplus": 1}, (400, "bad_request")),
        ({"id": {"$ne": None}}, (400, "bad_request")),
        ({"conv": {"$ne": None}}, (400, "bad_request")),
        ({"replyTo": {"$ne": None}}, (400, "bad_request")),
        ({"body": 1}, (400, "bad_request")),
        ({"body": [1]}, (400, "bad_request")),
        ({"body": {"k\0": 1}}, (400, "bad_request")),
        ({"ttl": 0}, (400, "bad_request")),
        ({"body": "x" * 65537}, (413, "too_large")),
        ({"id": other}, (409, "id_conflict")),
        ({"kind": "withdrawn", "body": None, "replyTo": other}, (403, "forbidden")),
        ({"sealed": {"cleo/phone": "YQ=="}}, (409, "device_mismatch")),
    ):
        assert problem(await post(node, "ann", "/v1/messages", {**good, **change})) == expected, change
    _, mismatch = await post(node, "ann", "/v1/messages", {**good, "sealed": {"cleo/phone": "YQ=="}})
    assert set(mismatch["error"]["details"]) == {"missing", "extra", "stale", "devicesRev"}
    assert await node.db.messages.distinct("id") == [other]


async def test_a_withdrawal_over_http_deletes_the_original(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    (original,) = await stored(node, conv, 1)
    withdrawal = {"id": new_id(), "conv": conv, "kind": "withdrawn", "replyTo": original}
    assert (await post(node, "ann", "/v1/messages", withdrawal))[0] == 201
    async with asyncio.timeout(3):
        while await node.db.messages.distinct("id") != [withdrawal["id"]]:
            await asyncio.sleep(0.02)


async def test_acks_over_http_are_durable_when_answered_and_make_receipts(node: Node) -> None:
    one, two = await node.direct("ann", "bob"), await node.group("ann", ["bob"])
    await get(node, "bob", "/v1/sync")
    ann = await node.connect("ann")
    first, second = await stored(node, one, 3), await stored(node, two, 2)
    acks = [{"conv": one, "ids": first}, {"conv": two, "ids": second}, {"conv": one, "ids": []}]
    status, _ = await post(node, "bob", "/v1/acks", {"acks": acks})
    assert status == 200
    assert await node.db.messages.count_documents({}) == 0
    receipts = [await ann.expect("receipt"), await ann.expect("receipt")]
    assert {receipt["conv"]: sorted(receipt["ids"]) for receipt in receipts} == {
        one: sorted(first),
        two: sorted(second),
    }
    assert (await post(node, "bob", "/v1/acks", {"acks": acks}))[0] == 200
    assert (await post(node, "bob", "/v1/acks", {"acks": []}))[0] == 200


async def test_malformed_acks_over_http_are_refused_and_acknowledge_nothing(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    await get(node, "bob", "/v1/sync")
    (message,) = await stored(node, conv, 1)
    for body in (
        {},
        {"acks": None},
        {"acks": {"conv": conv, "ids": [message]}},
        {"acks": [{"conv": conv}]},
        {"acks": [{"conv": conv, "ids": message}]},
        {"acks": [{"conv": conv, "ids": [message, {"$ne": None}]}]},
        {"acks": [{"conv": {"$ne": None}, "ids": [message]}]},
        {"acks": [{"conv": conv, "ids": [message]}, {"conv": conv, "ids": ["x"]}]},
        {"acks": [{"conv": conv, "ids": [message], "all": True}]},
        {"acks": [{"conv": conv, "ids": [message]}], "surplus": 1},
    ):
        assert problem(await post(node, "bob", "/v1/acks", body)) == (400, "bad_request"), body
    too_many = {"acks": [{"conv": conv, "ids": [message] + [new_id() for _ in range(1000)]}]}
    assert problem(await post(node, "bob", "/v1/acks", too_many))[0] in (400, 413)
    assert await node.db.messages.distinct("awaiting") == ["bob/phone"]


async def test_every_protected_route_refuses_missing_and_bad_tokens_with_401(node: Node) -> None:
    paths = [
        ("GET", "/v1/conversations"),
        ("POST", "/v1/conversations"),
        ("GET", "/v1/conversations/x"),
        ("GET", "/v1/conversations/x/messages"),
        ("GET", "/v1/conversations/x/devices"),
        ("GET", "/v1/sync"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/acks"),
    ]
    bad = ["", "Basic YTpi", "Bearer", "Bearer x", f"Bearer {node.token('ann', 'phone', lifetime=-1)}"]
    for method, path in paths:
        for header in bad:
            headers = {"Authorization": header} if header else {}
            async with node.http.request(method, node.url + path, headers=headers, json={}) as answer:
                assert problem((answer.status, await answer.json())) == (401, "unauthorized"), (path, header)
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert await node.db.devices.count_documents({}) == 0


async def test_info_needs_no_token_and_tells_what_welcome_tells(node: Node) -> None:
    welcome = (await node.connect("ann")).welcome
    async with node.http.get(node.url + "/v1/info") as answer:
        info = await answer.json()
        assert (answer.status, answer.content_type) == (200, "application/json")
    for name in ("limits", "features", "window", "windowBytes", "heartbeat"):
        assert info[name] == welcome[name]
    assert info["protocol"] == welcome["v"]
    assert info["version"]


async def test_health_and_metrics_need_no_token(node: Node) -> None:
    await node.connect("ann")
    for path, status in (("/livez", "ok"), ("/readyz", "ready")):
        async with node.http.get(node.url + path) as answer:
            assert (answer.status, await answer.json()) == (200, {"status": status, "problems": {}})
    async with node.http.get(node.url + "/metrics") as answer:
        text = await answer.text()
        assert (answer.status, answer.content_type) == (200, "text/plain")
    assert "relay_connections 1.0" in text
    assert "ann" not in text


async def test_unknown_paths_and_methods_are_json_errors(node: Node) -> None:
    assert problem(await get(node, "ann", "/v1/nothing")) == (404, "not_found")
    assert problem(await get(node, "ann", "/")) == (404, "not_found")
    async with node.http.delete(node.url + "/v1/sync", headers=node.headers("ann", "phone")) as answer:
        assert answer.status == 405
        assert "GET" in answer.headers["Allow"]
        assert set(await answer.json()) == {"error"}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/acks", "/v1/conversations"])
async def test_bodies_that_are_no_json_are_refused_on_every_route(node: Node, path: str) -> None:
    nested = b'{"a":' * 40 + b"1" + b"}" * 40
    for text in (
        b"",
        b"{",
        b"nonsense",
        b"\xff\xfe",
        b'"\\ud800"',
        b"NaN",
        b'{"id":NaN}',
        b'{"id":Infinity}',
        b'{"id":99999999999999999999}',
        b'{"id":"\\ud800"}',
        nested,
        b"[" * 6000 + b"]" * 6000,
        b'{"a":' * 6000 + b"1" + b"}" * 6000,
    ):
        async with node.http.post(node.url + path, data=text, headers=node.headers("ann", "phone")) as answer:
            assert problem((answer.status, await answer.json())) == (400, "bad_request"), text[:40]
    async with node.http.post(
        node.url + path, data=b'"' + b"a" * 262_144 + b'"', headers=node.headers("ann", "phone")
    ) as answer:
        assert problem((answer.status, await answer.json())) == (413, "too_large")
    async with node.http.get(node.url + "/livez") as answer:
        assert answer.status == 200
    assert await node.db.messages.count_documents({}) == await node.db.conversations.count_documents({}) == 0
