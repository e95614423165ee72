"""Whatever comes in: a typed error or a documented close, nothing stored, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from relay.wire.errors import CODES
from tests.support.chat import chatting
from tests.support.device import Closed, WireDevice, new_id
from tests.support.node import Node, NodeFactory
from tests.support.raw import CLOSE, CONTINUATION, TEXT, RawSocket, frame

CLOSES = {1003, 1009, 1012, 4400, 4401, 4408, 4409, 4426, 4429}
OPERATORS: list[Any] = [{"$ne": None}, {"$gt": ""}, {"$in": ["x"]}, {"$where": "1"}, ["x"], None, 1, True, ""]


class Scene:
    """A conversation of ann and bob, next to two people who keep chatting."""

    def __init__(
        self, node: Node, conv: str, ann: WireDevice, bob: WireDevice, waiting: dict[str, Any]
    ) -> None:
        self.node = node
        self.conv = conv
        self.ann = ann
        self.bob = bob
        self.waiting = waiting

    def send(self, **changes: Any) -> dict[str, Any]:
        """A good ``send`` with changes; a change to ``...`` takes a field away."""
        op = {"t": "send", "id": new_id(), "conv": self.conv, "kind": "text", "body": "x", "ref": new_id()}
        return {name: value for name, value in {**op, **changes}.items() if value is not ...}

    async def text(self, text: str) -> list[dict[str, Any]]:
        """What ann hears for a frame of this text, up to the answer to a ping behind it. Raises Closed."""
        mark = new_id()
        await self.ann.socket.send_str(text)
        await self.ann.put({"t": "ping", "ref": mark})
        heard = []
        while (found := await self.ann.next()).get("ref") != mark:
            heard.append(found)
        return heard

    async def refused(self, text: str, code: str = "bad_request") -> None:
        """The frame is answered by exactly one error of this code."""
        heard = await self.text(text)
        assert [found["t"] for found in heard] == ["error"], (text[:200], heard)
        assert heard[0]["code"] == code, (text[:200], heard)
        assert "\n" not in heard[0]["message"]
        assert len(heard[0]["message"]) <= 300

    async def closed(self, text: str, code: int) -> None:
        """The frame closes a connection with this code; nothing is said before."""
        device = await self.node.connect("ann", f"d-{new_id()[:8]}")
        await device.expect("drained")
        await device.socket.send_str(text)
        with pytest.raises(Closed) as closed:
            await device.next()
        assert closed.value.code == code, text[:200]


@asynccontextmanager
async def scene(node: Node) -> AsyncIterator[Scene]:
    """The stage for one kind of bad input. Afterwards: the process takes new connections and messages, the chat has
    gone on, and nothing but the one message that waited before is stored."""
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await ann.expect("drained")
    waiting = await ann.sent(conv, "waits")
    await bob.expect("msg")
    before = await node.db.messages.find_one({"id": waiting["id"]})
    async with chatting(node) as chat:
        yield Scene(node, conv, ann, bob, waiting)
        await chat.goes_on(3)
        left = [found async for found in node.db.messages.find({"conversationId": {"$ne": chat.conv}})]
        assert left == [before]
    await bob.ack(conv, waiting["id"])
    late = await node.connect("ann", "latecomer")
    stored = await late.sent(conv, "as if nothing had been")
    assert (await bob.expect("msg"))["id"] == stored["id"]
    assert not node.relay.stopping.is_set()


async def test_text_that_is_not_json_objects_closes_with_4400(node: Node) -> None:
    async with scene(node) as s:
        good = json.dumps(s.send())
        for text in (
            "",
            "{",
            "nonsense",
            good[:-1],
            good + "}",
            good + " x",
            good.replace('"', "'"),
            "1",
            '"text"',
            "null",
            "true",
            "NaN",
            "[1]",
            "[[]]",
            f"[{good},null]",
            f"[{good}",
            "\ufeff" + good,
            "\0",
            '{"t":"ping",}',
            '{t:"ping"}',
        ):
            await s.closed(text, 4400)


async def test_numbers_and_strings_that_json_forbids_are_refused_too(node: Node) -> None:
    async with scene(node) as s:
        head = json.dumps(s.send(body=..., id=...))[:-1]
        taken = []
        for value in (
            "01",
            "-01",
            "1.",
            "1.e5",
            "-",
            ".5",
            "+5",
            "1e",
            "0x10",
            '"raw \t tab"',
            '"raw \n line"',
            '"\\x41"',
        ):
            device = await node.connect("ann", "strict")
            id_ = new_id()
            await device.socket.send_str(f'{head},"id":"{id_}","body":{{"a":{value}}}}}')
            try:
                while (found := await device.next())["t"] not in ("stored", "error"):
                    pass
            except Closed:
                assert device.socket.close_code == 4400, value
                continue
            if found["t"] == "stored":
                taken.append(value)
                await node.db.messages.delete_one({"id": id_})
        assert taken == []


async def test_nesting_is_refused_beyond_32_levels_and_harmless_at_any_depth(node: Node) -> None:
    async with scene(node) as s:
        for depth in (31, 40, 300, 900):
            for left, right, inner in (('{"a":', "}", "1"), ("[", "]", ""), ('[{"a":', "}]", "1")):
                if depth * len(left) > 5000:
                    continue
                body = f'{{"x":{left * depth}{inner}{right * depth}}}'
                await s.refused(json.dumps(s.send(body=...))[:-1] + f',"body":{body}}}')
        for depth in (5001, 50_000):
            for left, right in (('{"a":', "}"), ("[", "]")):
                deep = f"{left * depth}1{right * depth}"
                if len(deep) < 260_000:
                    await s.closed(f'{{"t":"send","body":{deep}}}', 4400)
                    await s.closed(deep, 4400)
                await s.closed(left * min(depth, 50_000), 4400)
        flat = await s.text(json.dumps(s.send(kind="system", body={"a": [[[[[{}]]]]]})))
        assert flat[0]["message"] == "kind system is the relay's own"


async def test_operator_objects_are_refused_wherever_an_id_belongs(node: Node) -> None:
    async with scene(node) as s:
        ok = {"conv": s.conv, "ids": [s.waiting["id"]]}
        for bad in OPERATORS:
            for name in ("id", "conv", "kind"):
                await s.refused(json.dumps(s.send(**{name: bad})))
            if bad is not None:
                await s.refused(json.dumps(s.send(replyTo=bad)))
                await s.refused(
                    json.dumps({"t": "ping", "ref": bad}) if bad != "" else '{"t":"ping","ref":1}'
                )
            for t in ("ack", "status"):
                await s.refused(json.dumps({"t": t, **ok, "conv": bad}))
                await s.refused(json.dumps({"t": t, **ok, "ids": [bad]}))
                await s.refused(json.dumps({"t": t, **ok, "ids": [s.waiting["id"], bad]}))
            await s.refused(json.dumps({"t": bad}))
        for t in ("ack", "status"):
            await s.refused(json.dumps({"t": t, "conv": s.conv, "ids": {"$exists": True}}))
        await s.refused('{"t":"send","$where":"1"}')


async def test_wrong_types_and_unknown_fields_and_operations_are_refused(node: Node) -> None:
    async with scene(node) as s:
        wrong: dict[str, list[Any]] = {
            "body": [1, 1.5, True, [], ["x"]],
            "media": ["m", {"a": 1}, [1], ["a b"], [None], ["m"] * 33],
            "sealed": ["x", [], {"bob/phone": 1}, {"bob/phone": None}, {"bob": "YQ=="}, {"/": "YQ=="}],
            "devicesRev": [1, {}, "r" * 65],
            "ttl": ["1", 1.5, True, {}, -5, 0, 2**31, 2**70],
            "silent": [1, 0, "true", {}, None],
            "after": ["1", 1.5, True, {}, -1, 2**53, 2**64, 2**200],
            "again": [1, "true", {}, None],
            "ref": [1, True, {}, [], "r" * 65],
        }
        for name, bads in wrong.items():
            for bad in bads:
                code = "too_large" if name == "media" and len(bad) == 33 else "bad_request"
                await s.refused(json.dumps(s.send(**{name: bad})), code)
        for surplus in (
            "seq",
            "at",
            "from",
            "sender",
            "awaiting",
            "_id",
            "$set",
            "__proto__",
            "Body",
            "reply_to",
            "",
        ):
            await s.refused(json.dumps(s.send(**{surplus: "x"})))
        for t in ("", "SEND", "msg", "stored", "welcome", "drained", "no such thing", "send ", "$where"):
            await s.refused(json.dumps({"t": t}))
        await s.refused("{}")
        await s.refused('{"ref":"without t"}')
        assert await s.text("[]") == []


async def test_numbers_that_json_or_javascript_cannot_hold_are_refused(node: Node) -> None:
    async with scene(node) as s:
        head = json.dumps(s.send(body=..., id=...))[:-1]
        for number in (
            "NaN",
            "Infinity",
            "-Infinity",
            "1e999",
            "-1e999",
            "9007199254740992",
            "-9007199254740992",
            "9223372036854775808",
            "18446744073709551616",
            "1" + "0" * 300,
        ):
            for body in (f'{{"n":{number}}}', f'{{"a":[{{"b":[{number}]}}]}}'):
                await s.refused(f'{head},"id":"{new_id()}","body":{body}}}')
            for name in ("after", "ttl", "body", "ref2"):
                await s.refused(f'{head},"id":"{new_id()}","{name}":{number}}}')
        await s.closed(f'{head},"after":{"9" * 5000}}}', 4400)


async def test_lone_surrogates_and_nul_keys_are_refused_and_never_echoed(node: Node) -> None:
    async with scene(node) as s:
        head = json.dumps(s.send(body=..., ref=...))[:-1]
        for lone in ("\\ud800", "\\udfff", "\\udc00\\ud800", "a\\ud83d", "\\ud83dx\\ude00"):
            for field in (
                f'"body":"{lone}"',
                f'"body":{{"a":"{lone}"}}',
                f'"body":{{"{lone}":1}}',
                f'"body":{{"a":[{{"b":["{lone}"]}}]}}',
                f'"ref":"{lone}"',
                f'"{lone}":1',
                f'"kind":"{lone}"',
                f'"devicesRev":"{lone}"',
            ):
                await s.refused(f"{head},{field}}}")
            await s.refused(f'{{"t":"{lone}"}}')
            await s.refused(f'{{"t":"ping","ref":"{lone}"}}')
        for body in ('{"a\\u0000b":1}', '{"a":{"\\u0000":1}}', '{"a":[{"b\\u0000":1}]}'):
            await s.refused(f'{head},"body":{body}}}')
        assert (await s.text('{"t":"ping","ref":"\\ud83d\\ude00"}'))[0]["ref"] == "😀"


async def test_of_a_key_given_twice_the_last_wins_and_only_that_one_is_checked(node: Node) -> None:
    async with scene(node) as s:
        heard = await s.text('{"t":"ping","ref":"first","ref":"last"}')
        assert [found["ref"] for found in heard] == ["last"]
        await s.refused(json.dumps(s.send())[:-1] + ',"conv":{"$ne":null}}')
        await s.refused('{"t":"ping","t":"send"}')


async def test_bytes_that_are_not_utf8_close_the_connection(node: Node) -> None:
    async with scene(node):
        for payload in (b"\xff", b'{"t":"ping","ref":"\xc0\xaf"}', b'{"t":"ping","ref":"\xed\xa0\x80"}'):
            raw = await RawSocket.open(node, node.headers("ann", "raw"))
            await raw.send(TEXT, payload)
            assert (await raw.until(CLOSE)).code == 1007  # RFC 6455 8.1
            raw.cut()


async def test_a_frame_of_exactly_the_limit_is_read_and_one_byte_more_closes_with_1009(node: Node) -> None:
    async with scene(node) as s:
        limit = s.ann.welcome["limits"]["frame"]
        text = '{"t":"ping","ref":"exactly"}'
        heard = await s.text(text + " " * (limit - len(text)))
        assert [found["t"] for found in heard] == ["pong"]
        await s.closed(text + " " * (limit - len(text) + 1), 1009)
        await s.closed(text + "é" * (limit // 2), 1009)
        await s.closed("x" * (limit * 4), 1009)
        raw = await RawSocket.open(node, node.headers("ann", "fragments"))
        await raw.send(TEXT, b'{"t":"ping"', fin=False)
        for _ in range(3):
            await raw.send(CONTINUATION, b" " * (limit // 3), fin=False)
        assert (await raw.until(CLOSE)).code == 1009
        raw.cut()
        huge = await RawSocket.open(node, node.headers("ann", "huge"))
        huge.writer.write(b"\x81\xff" + (2**62).to_bytes(8, "big") + b"\0\0\0\0" + b"{")
        assert (await huge.until(CLOSE)).code in (1002, 1009)
        huge.cut()


async def test_an_oversize_body_or_array_is_an_error_and_the_connection_goes_on(node: Node) -> None:
    async with scene(node) as s:
        await s.refused(json.dumps(s.send(body="x" * 65_537)), "too_large")
        await s.refused(json.dumps(s.send(body={"x": "y" * 65_536})), "too_large")
        await s.refused(json.dumps([{"t": "ping"}] * 257), "too_large")
        await s.refused(json.dumps([s.send(body="") for _ in range(257)]), "too_large")
        many = {"conv": s.conv, "ids": [s.waiting["id"]] + [new_id() for _ in range(1000)]}
        for t in ("ack", "status"):
            await s.refused(json.dumps({"t": t, **many}), "too_large")


async def test_binary_frames_close_with_1003(node: Node) -> None:
    async with scene(node) as s:
        for payload in (b"", b"\0\1\2", json.dumps(s.send()).encode()):
            device = await node.connect("ann", "binary")
            await device.socket.send_bytes(payload)
            assert await device.closed() == 1003


async def test_broken_websocket_framing_closes_that_connection_only(node: Node) -> None:
    async with scene(node):
        for number, raw_bytes in enumerate(
            (
                frame(3, b"reserved opcode"),
                frame(11, b"reserved control"),
                b"\xf1" + frame(TEXT, b"{}")[1:],
                frame(CONTINUATION, b"nothing to go on with"),
                frame(9, b"p" * 126),
                frame(9, b"p", fin=False),
                frame(8, b"\x00"),
                frame(8, (1005).to_bytes(2, "big")),
                frame(TEXT, b"{", fin=False) + frame(TEXT, b"}"),
                b"\x81\xfe\x00",
                b"GET / HTTP/1.1\r\n\r\n",
            )
        ):
            raw = await RawSocket.open(node, node.headers("ann", f"broken-{number}"))
            raw.writer.write(raw_bytes)
            raw.writer.write_eof()
            async with asyncio.timeout(5):
                while await raw.reader.read(4096):
                    pass
            raw.cut()
        async with asyncio.timeout(5):
            while any(c.device.startswith("broken") for c in node.relay.context.hub):
                await asyncio.sleep(0.02)


async def test_a_stranger_can_neither_send_nor_acknowledge_nor_ask_nor_withdraw(node: Node) -> None:
    async with scene(node) as s:
        mallory = await node.connect("mallory")
        message = s.waiting["id"]
        for fields in ({}, {"id": message}, {"id": message, "again": True}, {"replyTo": message}):
            op = s.send(**fields)
            await mallory.put(op)
            assert (await mallory.expect("error", ref=op["ref"]))["code"] == "not_member"
        op = s.send(kind="withdrawn", body=None, replyTo=message)
        await mallory.put(op)
        assert (await mallory.expect("error", ref=op["ref"]))["code"] == "not_member"
        await mallory.ack(s.conv, message)
        await mallory.put({"t": "status", "conv": s.conv, "ids": [message]})
        assert (await mallory.expect("status"))["items"] == [
            {"id": message, "gone": True, "fate": "unknown", "delivered": []}
        ]
        for suffix in ("", "/messages", "/devices"):
            status, _ = await node.request("GET", f"/v1/conversations/{s.conv}{suffix}", "mallory", "phone")
            assert status == 404
        status, page = await node.request("GET", "/v1/sync", "mallory", "phone")
        assert (status, page["messages"]) == (200, [])
        await mallory.nothing("msg", 0.1)
        await s.ann.nothing("receipt", 0.1)


async def test_anothers_message_id_is_refused_and_the_message_unchanged(node: Node) -> None:
    async with scene(node) as s:
        for again in (False, True):
            op = s.send(id=s.waiting["id"], body="replaced", again=again)
            await s.bob.put(op)
            assert (await s.bob.expect("error", ref=op["ref"]))["code"] == "id_conflict"
        op = s.send(kind="withdrawn", body=None, replyTo=s.waiting["id"])
        await s.bob.put(op)
        assert (await s.bob.expect("error", ref=op["ref"]))["code"] == "forbidden"


@pytest.mark.parametrize("left", [False, True], ids=["a member", "a former member"])
@pytest.mark.parametrize("gone", [False, True], ids=["waits", "is gone"])
async def test_nobody_withdraws_anothers_message_by_the_id_of_an_own_one(
    node: Node, gone: bool, left: bool
) -> None:
    # The answer to a resend is found by its id: what else it says was never checked.
    conv = await node.group("ann", ["bob", "mallory"])
    ann, mallory = await node.connect("ann"), await node.connect("mallory")
    await (await node.connect("bob")).close()
    own = (await mallory.sent(conv, "my own"))["id"]
    if gone:
        for user in ("ann", "bob"):
            device = ann if user == "ann" else await node.connect("bob")
            await device.expect("msg", id=own)
            await device.ack(conv, own)
        await mallory.expect("receipt")
    theirs = (await ann.sent(conv, "ann's"))["id"]
    if left:
        status, _ = await node.request("DELETE", f"/v1/conversations/{conv}/members/mallory", "ann", "phone")
        assert status < 300
    attack = {"id": own, "conv": conv, "kind": "withdrawn", "body": None, "replyTo": theirs, "again": True}
    await mallory.put({"t": "send", "ref": "w", **attack})
    heard = await mallory.next()
    while heard.get("ref") != "w":
        heard = await mallory.next()
    status, _ = await node.request("POST", "/v1/messages", "mallory", "phone", attack)
    assert (heard["t"], status) == ("stored", 201), "the answer that its own message had"
    # Whatever was queued for its end has come to it when this has.
    await ann.put({"t": "ack", "conv": conv, "ids": [new_id()], "ref": "behind"})
    await ann.expect("acked", ref="behind")
    waiting = await node.db.messages.find_one({"id": theirs})
    assert waiting is not None and "bob/phone" in waiting["awaiting"]
    assert waiting["_id"] not in node.relay.context.messages.hot._withdrawn, "it may still be kept for many"
    bob = await node.connect("bob")
    assert (await bob.expect("msg", id=theirs))["body"] == "ann's"


async def test_a_document_that_cannot_be_stored_fails_alone_in_a_batch_of_500(nodes: NodeFactory) -> None:
    node = await nodes.start(commits_in_flight=1)
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    await node.db.command(
        {"collMod": "messages", "validator": {"body": {"$ne": "poison"}}, "validationAction": "error"}
    )
    ops = [{"t": "send", "id": new_id(), "conv": conv, "kind": "text", "body": f"{n}"} for n in range(500)]
    poison = ops[317]
    poison["body"] = "poison"
    nul = {
        "t": "send",
        "id": new_id(),
        "conv": conv,
        "kind": "text",
        "body": {"a\0b": "refused by the codec"},
    }
    async with chatting(node) as chat:
        await ann.put(*ops[:200], nul)
        await ann.put(*ops[200:400])
        await ann.put(*ops[400:])
        answers: dict[str, dict[str, Any]] = {}
        while len(answers) < 501:
            found = await ann.next()
            if found["t"] in ("stored", "error"):
                assert found["id"] not in answers
                answers[found["id"]] = found
        await chat.goes_on(2)
    failed = {id_: found for id_, found in answers.items() if found["t"] == "error"}
    assert set(failed) == {poison["id"], nul["id"]}
    for found in failed.values():
        assert (found["code"], found["retry"], found["conv"]) == ("bad_request", False, conv)
    stored = set(await node.db.messages.distinct("id", {"conversationId": conv}))
    assert stored == {op["id"] for op in ops} - {poison["id"]}
    assert len(stored) == 499
    bob = await node.connect("bob")
    arrived: list[str] = []
    while len(arrived) < 499:
        message = await bob.expect("msg")
        arrived.append(message["id"])
        await bob.ack(conv, message["id"], durable=False)
    assert arrived == [op["id"] for op in ops if op is not poison]


@pytest.mark.parametrize("window", [256, 3])
async def test_stored_documents_that_cannot_be_read_hold_nobody_up(nodes: NodeFactory, window: int) -> None:
    node = await nodes.start(window=window)
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await (await node.connect("bob")).close()
    first = await ann.sent(conv, "before")
    document = await node.db.messages.find_one({"id": first["id"]})
    broken: tuple[dict[str, Any], ...] = (
        {"body": 5},
        {"sender": "nobody"},
        {"sealed": [1]},
        {"sender": None},
    )
    for number, change in enumerate(broken):
        id_ = new_id()
        await node.db.messages.insert_one(
            {**document, "_id": f"{conv} {id_}", "id": id_, "seq": document["seq"] + number + 1, **change}
        )
    last = await ann.sent(conv, "behind")
    page = await node.request("GET", f"/v1/sync?limit={window}", "bob", "phone")
    synced = [message["id"] for message in page[1]["messages"]]
    while page[1]["next"] is not None:
        cursor = page[1]["next"]
        page = await node.request("GET", f"/v1/sync?limit={window}&cursor={cursor}", "bob", "phone")
        synced += [message["id"] for message in page[1]["messages"]]
    assert synced == [first["id"], last["id"]]
    bob = await node.connect("bob")
    for stored in (first, last):
        assert (await bob.expect("msg", 2))["id"] == stored["id"]
        await bob.ack(conv, stored["id"])
    assert (await bob.expect("drained"))["count"] == 2
    live = await ann.sent(conv, "live")
    assert (await bob.expect("msg"))["id"] == live["id"]


async def test_a_window_full_of_unreadable_documents_does_not_hold_up_the_socket(nodes: NodeFactory) -> None:
    node = await nodes.start(window=3)
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await (await node.connect("bob")).close()
    document = await node.db.messages.find_one({"id": (await ann.sent(conv, "template"))["id"]})
    await node.db.messages.delete_many({})
    for number in range(3):
        id_ = new_id()
        broken = {"_id": f"{conv} {id_}", "id": id_, "seq": document["seq"] + number, "sender": None}
        await node.db.messages.insert_one({**document, **broken})
    behind = await ann.sent(conv, "behind")
    async with chatting(node):
        bob = await node.connect("bob")
        assert (await bob.expect("msg", 2))["id"] == behind["id"]
    pages = node.relay.context.metrics.drains._value.get()
    assert pages < 50


def mutated(rng: random.Random, seeds: list[str]) -> str:
    """A good frame with something done to it."""
    text = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        kind = rng.randrange(9)
        place = rng.randrange(len(text) + 1)
        end = min(len(text), place + rng.randrange(1, 12))
        if kind == 0:
            text = text[:place] + text[end:]
        elif kind == 1:
            text = (
                text[:place]
                + chr(rng.choice((0, 34, 92, 0x7F, 0xE9, 0x2028, 0x1F600, 123, 91, 44)))
                + text[place:]
            )
        elif kind == 2:
            text = text[:place] + text[place:end] * rng.randrange(2, 40) + text[end:]
        elif kind == 3:
            text = text.replace(
                rng.choice(('"', ":", ",", "}", "-", "a", "1")), rng.choice(("", "{", "0", '\\"', "[")), 1
            )
        elif kind in (4, 5, 6):
            junk = (
                "null",
                "[]",
                "{}",
                "-1",
                "1e400",
                "9" * 25,
                "true",
                '{"$ne":null}',
                '"\\ud800"',
                '"\\u0000"',
                "[[[[]]]]",
            )
            value = (
                json.loads(text) if text.startswith("{") and text.endswith("}") and _is_json(text) else None
            )
            if isinstance(value, dict) and value:
                name = rng.choice([*value, "surplus", "ref"])
                rest = ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in value.items() if k != name)
                text = "{" + rest + ("," if rest else "") + f"{json.dumps(name)}:{rng.choice(junk)}" + "}"
        elif kind == 7:
            text = f"[{text},{rng.choice(seeds)}]"
        else:
            text = text[: rng.randrange(len(text) + 1)]
    return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


async def test_mutated_frames_are_answered_by_typed_errors_or_documented_closes(node: Node) -> None:
    seed = 20_261_121
    rng = random.Random(seed)
    conv = await node.direct("ann", "bob")
    outside = "no-conversation-of-anns"
    seeds = [
        json.dumps(
            {"t": "send", "id": new_id(), "conv": outside, "kind": "text", "body": "hello", "ref": "r"}
        ),
        json.dumps(
            {"t": "send", "id": new_id(), "conv": outside, "kind": "text", "body": {"a": [1, {"b": 2.5}]}}
        ),
        json.dumps(
            {"t": "send", "id": new_id(), "conv": outside, "kind": "x", "sealed": {"b/p": "YQ=="}, "ttl": 5}
        ),
        json.dumps(
            {
                "t": "send",
                "id": new_id(),
                "conv": outside,
                "kind": "withdrawn",
                "replyTo": new_id(),
                "after": 7,
            }
        ),
        json.dumps({"t": "ack", "conv": conv, "ids": [new_id(), new_id()], "ref": "a"}),
        json.dumps({"t": "status", "conv": conv, "ids": [new_id()]}),
        json.dumps({"t": "ping", "ref": "p"}),
        json.dumps({"t": "auth", "token": node.token("ann", "fuzz")}),
    ]
    replies = {"pong", "error", "acked", "status", "authed", "drained", "welcome"}
    closes = answers = 0
    async with chatting(node) as chat:
        device = await node.connect("ann", "fuzz")
        for number in range(700):
            text = mutated(rng, seeds)
            mark = f"mark-{number}"
            try:
                await device.socket.send_str(text)
                await device.put({"t": "ping", "ref": mark})
                while (found := await device.next()).get("ref") != mark:
                    assert found["t"] in replies, (seed, number, text, found)
                    if found["t"] == "error":
                        assert found["code"] in CODES, (seed, number, text, found)
                        assert found["code"] not in ("internal", "unavailable"), (seed, number, text, found)
                        assert found["retry"] is CODES[found["code"]].retry
                        answers += 1
            except (Closed, aiohttp.ClientConnectionError):
                assert device.socket.close_code in CLOSES, (seed, number, text)
                closes += 1
                device = await node.connect("ann", "fuzz")
        assert await node.db.messages.count_documents({"conversationId": {"$ne": chat.conv}}) == 0
    assert closes > 20
    assert answers > 100


async def test_random_bytes_on_the_socket_harm_only_that_socket(node: Node) -> None:
    rng = random.Random(7)
    async with chatting(node):
        for number in range(40):
            raw = await RawSocket.open(node, node.headers("ann", f"noise-{number}"))
            raw.writer.write(rng.randbytes(rng.randrange(1, 3000)))
            if number % 2:
                raw.writer.write_eof()
                async with asyncio.timeout(5):
                    try:
                        while await raw.reader.read(4096):
                            pass
                    except ConnectionError:
                        continue
            raw.cut()
        async with asyncio.timeout(5):
            while any(c.device.startswith("noise") for c in node.relay.context.hub):
                await asyncio.sleep(0.02)
    assert not node.relay.stopping.is_set()
