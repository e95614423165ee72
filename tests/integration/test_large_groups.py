"""Groups of more devices than fit into one stored message, over real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from handlers import sending
from tests.support.device import WireDevice, new_id
from tests.support.failpoints import MAJORITY_TIMEOUT, failing
from tests.support.node import Node, NodeFactory
from tests.support.waiting import until

PEOPLE = [f"p{number}" for number in range(11)]


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    """Messages to more than four devices are stored in parts."""
    return await nodes.start(inline_recipients=4)


async def group(node: Node) -> tuple[str, WireDevice, list[WireDevice]]:
    ann = await node.connect("ann")
    others = [await node.connect(user) for user in PEOPLE]
    for device in (ann, *others):
        await device.expect("drained")
    return await node.group("ann", PEOPLE), ann, others


async def empty(node: Node) -> None:
    async def nothing() -> bool:
        return not await node.db.messages.count_documents({})

    await until(nothing, 5, "the store is empty")
    ledger = node.relay.context.ledger
    assert ledger.waiting == 0
    ended = sum(
        ledger.count(name) for name in ("acknowledged", "expired", "withdrawn", "released", "trimmed")
    )
    assert ledger.count("accepted") == ended


async def test_everybody_gets_a_message_once_and_it_is_gone(node: Node) -> None:
    conv, ann, others = await group(node)
    stored = await ann.sent(conv, "hello all")
    assert await node.db.messages.count_documents({}) == 3
    for device in others:
        got = await device.expect("msg", id=stored["id"])
        assert (got["seq"], got["body"]) == (stored["seq"], "hello all")
        await device.ack(conv, stored["id"])
        await device.nothing("msg", 0.02)
    await empty(node)


async def test_who_was_away_drains_it_and_acknowledges_over_http(node: Node) -> None:
    conv, ann, others = await group(node)
    away = others.pop()
    await away.close()
    stored = await ann.sent(conv)
    for device in others:
        await device.expect("msg")
        await device.ack(conv, stored["id"])
    status, found = await node.request("GET", "/v1/sync", away.user, away.device)
    assert status == 200
    assert [one["id"] for one in found["messages"]] == [stored["id"]]
    body = {"acks": [{"conv": conv, "ids": [stored["id"]]}]}
    assert (await node.request("POST", "/v1/acks", away.user, away.device, body))[0] == 200
    await empty(node)


async def test_status_treats_the_parts_as_one_message(node: Node) -> None:
    conv, ann, others = await group(node)
    stored = await ann.sent(conv)

    async def status() -> dict[str, Any]:
        await ann.put({"t": "status", "conv": conv, "ids": [stored["id"]]})
        found: dict[str, Any] = (await ann.expect("status"))["items"][0]
        return found

    assert await status() == {"id": stored["id"], "awaiting": 11, "delivered": []}
    # The last part ends first, then the second loses one of its recipients.
    for device in (*others[8:], others[5]):
        await device.ack(conv, stored["id"])
    told = await status()
    assert told["awaiting"] == 7
    assert told["delivered"] == sorted(["p8", "p9", "p10", "p5"])
    for device in others:
        await device.ack(conv, stored["id"])
    told = await status()
    assert (told["gone"], told["fate"], told["delivered"]) == (True, "delivered", sorted(PEOPLE))
    await empty(node)


async def test_too_many_names_for_a_frame_are_a_count(nodes: NodeFactory) -> None:
    node = await nodes.start(inline_recipients=4, max_frame_bytes=1024, max_body_bytes=512)
    ann = await node.connect("ann")
    people = [f"{'x' * 100}{number}" for number in range(8)]
    conv = await node.group("ann", people)
    others = [await node.connect(user) for user in people]
    stored = await ann.sent(conv)
    for device in others:
        await device.ack(conv, stored["id"])
    await ann.put({"t": "status", "conv": conv, "ids": [stored["id"]]})
    (told,) = (await ann.expect("status"))["items"]
    assert (told["delivered"], told["deliveredCount"]) == ([], 8)


async def test_a_withdrawn_message_ends_in_all_its_parts(node: Node) -> None:
    conv, ann, others = await group(node)
    for device in others[3:]:
        await device.close()
    stored = await ann.sent(conv, "oops")
    withdrawal = new_id()
    await ann.put(
        {
            "t": "send",
            "id": withdrawal,
            "conv": conv,
            "kind": "withdrawn",
            "replyTo": stored["id"],
            "body": None,
        }
    )
    await ann.expect("stored", id=withdrawal)

    async def original_is_gone() -> bool:
        return not await node.db.messages.count_documents({"id": stored["id"]})

    await until(original_is_gone, 5, "no part of the original waits")
    late = await node.connect("p9")
    got = await late.expect("msg")
    assert got["kind"] == "withdrawn"
    await ann.put({"t": "status", "conv": conv, "ids": [stored["id"]]})
    (told,) = (await ann.expect("status"))["items"]
    assert (told["fate"], told["delivered"]) == ("withdrawn", [])


async def test_a_resend_is_answered_with_the_first_seq(node: Node) -> None:
    conv, ann, others = await group(node)
    stored = await ann.sent(conv)
    again = await ann.sent(conv, id=stored["id"], again=True)
    assert again["seq"] == stored["seq"]
    for device in others:
        await device.expect("msg")
        await device.nothing("msg", 0.02)
        await device.ack(conv, stored["id"])
    await empty(node)
    assert (await ann.sent(conv, id=stored["id"], again=True))["seq"] == stored["seq"]
    await empty(node)


async def test_a_short_lived_message_expires_in_all_its_parts(nodes: NodeFactory) -> None:
    node = await nodes.start(inline_recipients=4, expiry_seconds=0.1)
    ann = await node.connect("ann")
    conv = await node.group("ann", PEOPLE)
    stored = await ann.sent(conv, ttl=1)
    await empty_of(node, stored["id"])
    await ann.put({"t": "status", "conv": conv, "ids": [stored["id"]]})
    (told,) = (await ann.expect("status"))["items"]
    assert told["fate"] == "expired"
    assert node.relay.context.ledger.count("expired") == len(PEOPLE)
    await empty(node)


async def empty_of(node: Node, message: str) -> None:
    async def nothing() -> bool:
        return not await node.db.messages.count_documents({"id": message})

    await until(nothing, 5, "the message is gone")


async def test_the_number_of_recipients_has_a_typed_limit(nodes: NodeFactory) -> None:
    node = await nodes.start(inline_recipients=4, max_recipients=10)
    ann = await node.connect("ann")
    conv = await node.group("ann", PEOPLE)
    message = await ann.send(conv)
    refused = await ann.expect("error", id=message)
    assert (refused["code"], refused["retry"]) == ("too_large", False)
    status, answer = await node.request(
        "POST", "/v1/messages", "ann", "phone", {"id": new_id(), "conv": conv, "kind": "text", "body": "x"}
    )
    assert (status, answer["error"]["code"]) == (413, "too_large")


async def test_a_frame_of_many_messages_to_many_devices_lets_others_be_served_in_between(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, ann, _ = await group(node)
    turns: list[int] = []
    turn = 0

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(next_turn)

    submit = sending.submit

    def noting(*args: Any) -> Any:
        turns.append(turn)
        return submit(*args)

    monkeypatch.setattr(sending, "submit", noting)
    loop = asyncio.get_running_loop()
    loop.call_soon(next_turn)
    sends = [{"t": "send", "id": new_id(), "conv": conv, "kind": "text", "body": "x"} for _ in range(5)]
    await ann.put(*sends)
    for one in sends:
        await ann.expect("stored", id=one["id"])
    assert len(set(turns)) == 5


NO_ANSWER: dict[str, Any] = {"closeConnection": True}
REFUSED: dict[str, Any] = {"errorCode": 189}
IN_DOUBT: dict[str, Any] = {"writeConcernError": MAJORITY_TIMEOUT}
STALLED: dict[str, Any] = {"blockConnection": True, "blockTimeMS": 1500}


@pytest.mark.parametrize("how", [NO_ANSWER, REFUSED, IN_DOUBT, STALLED])
@pytest.mark.parametrize(("command", "times"), [("insert", 1), ("insert", 3), ("update", 1)])
async def test_whatever_step_of_storing_fails_everybody_gets_it_once_and_the_books_balance(
    nodes: NodeFactory, command: str, times: int, how: dict[str, Any]
) -> None:
    node = await nodes.start(inline_recipients=4, commit_timeout_seconds=1, sweep_seconds=1)
    conv, ann, others = await group(node)
    async with failing(node, command, times=times, **how):
        stored = await ann.sent(conv, "hello all")
    for device in others:
        got = await device.expect("msg", id=stored["id"])
        assert got["seq"] == stored["seq"]
        await device.ack(conv, stored["id"])
    for device in others:
        await device.nothing("msg", 0.02)
    await settled(node)


@pytest.mark.parametrize("how", [NO_ANSWER, REFUSED, IN_DOUBT, STALLED])
@pytest.mark.parametrize(("command", "times"), [("delete", 1), ("update", 1), ("find", 1)])
async def test_whatever_step_of_ending_fails_it_is_gone_and_the_books_balance(
    nodes: NodeFactory, command: str, times: int, how: dict[str, Any]
) -> None:
    if command == "find" and how is IN_DOUBT:
        pytest.skip("a read has no write concern")
    node = await nodes.start(inline_recipients=4, commit_timeout_seconds=1, sweep_seconds=1)
    conv, ann, others = await group(node)
    stored = await ann.sent(conv, "hello all")
    for device in others:
        await device.expect("msg", id=stored["id"])
    async with failing(node, command, times=times, **how):
        for number, device in enumerate(others):
            if number % 2:
                body = {"acks": [{"conv": conv, "ids": [stored["id"]]}]}
                assert (await node.request("POST", "/v1/acks", device.user, device.device, body))[0] == 200
            else:
                await device.ack(conv, stored["id"])
    await settled(node)


async def settled(node: Node) -> None:
    """The store is empty and the books balance, once the jobs have looked at what is in doubt."""

    async def done() -> bool:
        return not node.relay.context.ledger.waiting and not await node.db.messages.count_documents({})

    await until(done, 12, "nothing is in doubt")
    await empty(node)
