"""DESIGN 1.7: limits of conversations and groups, and the count of limits that were reached."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from relay.wire.limits import Limit
from tests.support.device import new_id
from tests.support.failpoints import failing
from tests.support.node import Node, NodeFactory
from tests.support.waiting import until


async def make(node: Node, user: str, *members: str, **fields: Any) -> tuple[int, Any]:
    body = {"type": "group", "members": list(members), "name": "group", **fields}
    return await node.request("POST", "/v1/conversations", user, "phone", body)


async def direct(node: Node, user: str, other: str) -> tuple[int, Any]:
    return await node.request(
        "POST", "/v1/conversations", user, "phone", {"type": "direct", "members": [other]}
    )


def reached(node: Node, limit: Limit) -> float:
    """How often this limit was reached, as ``/metrics`` tells."""
    for line in node.relay.context.metrics.render().decode().splitlines():
        if line.startswith(f'relay_limits_reached_total{{limit="{limit.value}"}} '):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"{limit} is not counted")


async def test_one_can_be_in_so_many_conversations_and_what_exists_is_still_found(nodes: NodeFactory) -> None:
    node = await nodes.start(max_conversations=3)
    ref = new_id()
    first, again = await make(node, "ann", "bob", ref=ref), await direct(node, "ann", "bob")
    third = await make(node, "ann", "cleo")
    assert [first[0], again[0], third[0]] == [201, 201, 201]
    for answered in (await make(node, "ann", "cleo"), await direct(node, "ann", "dora")):
        assert answered[0] == 413
        assert answered[1]["error"]["code"] == "too_large"
        assert answered[1]["error"]["details"] == {"users": ["ann"]}
        assert "3" in answered[1]["error"]["message"]
    assert (await direct(node, "ann", "bob"))[0] == 200
    assert (await direct(node, "bob", "ann"))[0] == 200
    assert (await make(node, "ann", "bob", ref=ref))[0] == 200
    code, _ = await node.request("DELETE", f"/v1/conversations/{third[1]['id']}", "ann", "phone")
    assert code == 200
    assert (await make(node, "ann", "cleo"))[0] == 201
    assert reached(node, Limit.CONVERSATIONS) == 2


async def test_nobody_is_added_beyond_their_limit_and_how_many_they_have_is_not_told(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(max_conversations=2)
    for _ in range(2):
        assert (await make(node, "bob"))[0] == 201
    refused = await make(node, "ann", "bob", "cleo")
    assert refused[0] == 413
    assert refused[1]["error"]["details"] == {"users": ["bob"]}
    assert "2" not in refused[1]["error"]["message"]
    assert (await direct(node, "ann", "bob"))[0] == 413
    group = (await make(node, "ann", "cleo"))[1]["id"]
    path = f"/v1/conversations/{group}/members"
    code, found = await node.request("POST", path, "ann", "phone", {"users": ["dora", "bob"]})
    assert (code, found["error"]["details"]) == (413, {"users": ["bob"]})
    code, found = await node.request("POST", path, "ann", "phone", {"users": ["dora", "cleo"]})
    assert (code, found["memberCount"]) == (200, 3)
    assert (await make(node, "dora", "ann"))[0] == 201, "ann is in one conversation"


@pytest.mark.parametrize("who", ["the maker", "somebody named", "somebody added"])
async def test_of_many_that_ask_at_once_as_many_succeed_as_the_limit_allows(
    nodes: NodeFactory, who: str
) -> None:
    node = await nodes.start(max_conversations=5)
    makers = ["ann"] * 8 if who == "the maker" else [f"maker{number}" for number in range(8)]
    crowded = "ann" if who == "the maker" else "bob"
    for _ in range(3):
        assert (await make(node, crowded))[0] == 201
    for user in makers:
        # Known, so that nobody is held up by arriving.
        assert (await node.request("GET", "/v1/conversations", user, "phone"))[0] == 200
    if who == "somebody added":
        groups = [(await make(node, maker))[1]["id"] for maker in makers]
        asked = [
            node.request("POST", f"/v1/conversations/{group}/members", maker, "phone", {"users": ["bob"]})
            for maker, group in zip(makers, groups, strict=True)
        ]
    else:
        asked = [make(node, maker, "bob") for maker in makers]
    answers = await asyncio.gather(*asked)
    refused = [found["error"] for code, found in answers if code == 413]
    assert len(refused) == 6, sorted(code for code, _ in answers)
    assert all(error["code"] == "too_large" and error["details"]["users"] == [crowded] for error in refused)
    assert await node.db.memberships.count_documents({"user": crowded, "removedAt": None}) == 5


async def test_one_conversation_asked_for_several_times_at_once_is_found_at_the_limit(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(max_conversations=2)
    assert (await make(node, "ann"))[0] == 201
    ref = new_id()
    answers = await asyncio.gather(*(make(node, "ann", "bob", ref=ref) for _ in range(6)))
    assert sorted(code for code, _ in answers) == [200] * 5 + [201]
    assert len({found["id"] for _, found in answers}) == 1
    assert (await make(node, "ann"))[0] == 413


async def test_the_count_of_conversations_uses_an_index_and_stops_at_the_limit(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    assert conv
    explained = await node.db.command(
        {
            "explain": {
                "aggregate": "memberships",
                "pipeline": [{"$match": {"user": "ann", "removedAt": None}}, {"$limit": 5}],
                "cursor": {},
            },
            "verbosity": "queryPlanner",
        }
    )
    assert "COLLSCAN" not in str(explained)
    assert "user_removedAt" in str(explained)


async def test_a_group_grows_by_several_requests_up_to_its_limit(nodes: NodeFactory) -> None:
    node = await nodes.start(max_members=2500)
    group = (await make(node, "ann"))[1]["id"]
    path = f"/v1/conversations/{group}/members"
    count = 1
    for start, number in ((0, 1000), (1000, 1000), (2000, 499)):
        users = [f"user-{n}" for n in range(start, start + number)]
        code, found = await node.request("POST", path, "ann", "phone", {"users": users})
        assert code == 200, found
        count += number
        assert found["memberCount"] == count
    code, found = await node.request("POST", path, "ann", "phone", {"users": ["one-too-many"]})
    assert (code, found["error"]["code"]) == (413, "too_large")
    assert reached(node, Limit.MEMBERS) == 1
    code, found = await node.request("POST", path, "ann", "phone", {"users": [f"u{n}" for n in range(1001)]})
    assert (code, found["error"]["code"]) == (413, "too_large")
    assert reached(node, Limit.LIST) == 1
    revision = await node.db.conversations.find_one({"_id": group})
    assert "pending" not in revision


async def test_info_tells_the_limits(nodes: NodeFactory) -> None:
    node = await nodes.start(mailbox_messages=7, max_conversations=8, max_members=9, max_recipients=10)
    async with node.http.get(node.url + "/v1/info") as response:
        limits = (await response.json())["quotas"]
    assert limits["mailbox"] == 7
    assert limits["conversations"] == 8
    assert limits["members"] == 9
    assert limits["recipients"] == 10
    assert (limits["largeGroup"], limits["largeGroupBody"]) == (1000, 8192)


async def test_every_limit_has_a_count_from_the_start(node: Node) -> None:
    assert {limit: reached(node, limit) for limit in Limit} == dict.fromkeys(Limit, 0)


async def test_limits_of_the_wire_are_counted(nodes: NodeFactory) -> None:
    node = await nodes.start(
        window=1,
        max_body_bytes=100,
        max_frame_bytes=4096,
        message_rate=1,
        message_burst=4,
        rate_search="1/minute",
    )
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await bob.expect("drained")
    await ann.send(conv, "x" * 101)
    await ann.expect("error", code="too_large")
    assert reached(node, Limit.BODY) == 1
    await ann.sent(conv)
    await ann.sent(conv)
    await bob.expect("msg")
    assert reached(node, Limit.WINDOW) == 1
    for _ in range(3):
        await ann.send(conv)
    await ann.expect("error", code="rate_limited")
    assert reached(node, Limit.MESSAGE_RATE) >= 1
    await ann.put(*({"t": "ping"} for _ in range(257)))
    await ann.expect("error", code="too_large")
    assert reached(node, Limit.OPERATIONS) == 1
    for _ in range(2):
        await node.request("GET", "/v1/users?q=someone", "ann", "phone")
    assert reached(node, Limit.REQUEST_RATE) == 1
    await ann.socket.send_str("[" + " " * 5000 + "]")
    assert await ann.closed() == 1009

    async def counted() -> bool:
        return reached(node, Limit.FRAME) == 1

    await until(counted, 3, "the frame is counted")


async def test_connections_that_find_no_room_are_counted(nodes: NodeFactory) -> None:
    node = await nodes.start(max_connections=1)
    await node.connect("ann")
    refused = await node.connect("bob", welcome=False)
    assert await refused.closed() == 4429
    assert reached(node, Limit.CONNECTIONS) == 1


@pytest.mark.parametrize("what", ["find", "aggregate"])
async def test_a_store_that_does_not_answer_lets_nobody_past_the_limit(nodes: NodeFactory, what: str) -> None:
    node = await nodes.start(max_conversations=1)
    assert (await make(node, "ann"))[0] == 201
    async with failing(node, what, "memberships", errorCode=8):
        code, _ = await make(node, "ann")
    assert code in (413, 503)


async def test_limits_of_live_events_are_counted(nodes: NodeFactory) -> None:
    node = await nodes.start(typing_rate=0.01, typing_burst=1, max_watches=1)
    conv = await node.group("ann", ["bob"])
    ann = await node.connect("ann")
    for on in (True, False):
        await ann.put({"t": "typing", "conv": conv, "on": on})
    assert (await ann.expect("error"))["code"] == "rate_limited"
    await ann.put({"t": "presence", "users": ["bob", "cleo"]})
    assert (await ann.expect("error"))["code"] == "too_large"
    assert [reached(node, limit) for limit in (Limit.TYPING_RATE, Limit.WATCHES)] == [1, 1]
