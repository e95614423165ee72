"""PROTOCOL 2: ``send`` with everything it may carry, ``status``, withdrawal, errors, arrays that fail alone."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tests.support.device import WireDevice, new_id
from tests.support.node import Node
from tests.support.waiting import until

WEEK_MS = 7 * 24 * 3600 * 1000


async def refused(device: WireDevice, **fields: Any) -> dict[str, Any]:
    """The error for a send with these fields; it names what failed."""
    op = {"t": "send", "id": new_id(), "kind": "text", "body": "x", "ref": new_id(), **fields}
    await device.put({name: value for name, value in op.items() if value is not ...})
    error = await device.expect("error", ref=op["ref"])
    assert isinstance(error["message"], str)
    assert "\n" not in error["message"]
    assert isinstance(error["retry"], bool)
    return error


async def pair(node: Node) -> tuple[str, WireDevice, WireDevice]:
    conv = await node.direct("ann", "bob")
    return conv, await node.connect("ann"), await node.connect("bob")


async def until_gone(node: Node, message: str) -> None:
    async with asyncio.timeout(3):
        while await node.db.messages.find_one({"id": message}):
            await asyncio.sleep(0.02)


async def status_of(device: WireDevice, conv: str, *messages: str) -> list[dict[str, Any]]:
    ref = new_id()
    await device.put({"t": "status", "conv": conv, "ids": list(messages), "ref": ref})
    found = await device.expect("status", ref=ref)
    assert set(found) == {"t", "conv", "items", "ref"}
    assert found["conv"] == conv
    return list(found["items"])


async def test_stored_has_exactly_the_promised_fields_and_a_seq_that_javascript_holds(node: Node) -> None:
    conv, ann, _ = await pair(node)
    stored = await ann.sent(conv)
    assert set(stored) == {"t", "conv", "id", "seq", "at"}
    assert stored["conv"] == conv
    assert 0 < stored["seq"] < 2**53
    assert abs(stored["at"] - time.time() * 1000) < 3000
    document = await node.db.messages.find_one({"id": stored["id"]})
    assert (document["seq"], document["sender"]) == (stored["seq"], {"user": "ann", "device": "phone"})


@pytest.mark.parametrize(
    "body",
    [
        "",
        "plain",
        'nul \0 tab \t quote " backslash \\ slash / </script>',
        "\u2028\u2029 \ufeff \x7f \x1f e\u0301 \u00e9 👩‍👩‍👧 \U0010ffff",
        '{"looks":"like JSON"}',
        "  spaces kept \r\n",
    ],
)
async def test_a_text_body_comes_back_byte_for_byte(node: Node, body: str) -> None:
    conv, ann, bob = await pair(node)
    await ann.sent(conv, body)
    live = await bob.expect("msg")
    assert live["body"] == body
    await bob.close()
    drained = await (await node.connect("bob")).expect("msg")
    assert drained == live


async def test_an_object_body_comes_back_equal(node: Node) -> None:
    conv, ann, bob = await pair(node)
    body = {
        "empty": {},
        "": [],
        "numbers": [
            0,
            -1,
            2**53 - 1,
            -(2**53) + 1,
            0.1,
            1e-7,
            1.5e300,
            123456789.123456789,
            3.0000000000000004,
        ],
        "null": None,
        "bools": [True, False],
        "$set": {"a.b": 1, "$where": "x"},
        "deep": {"a": {"b": {"c": [[["d", '\u2028 " \\ /']]]}}},
    }
    await ann.sent(conv, body)
    assert (await bob.expect("msg"))["body"] == body
    await bob.close()
    assert (await (await node.connect("bob")).expect("msg"))["body"] == body
    status, page = await node.request("GET", "/v1/sync", "bob", "phone")
    assert (status, page["messages"][0]["body"]) == (200, body)


async def test_a_body_may_be_left_out_or_null(node: Node) -> None:
    conv, ann, bob = await pair(node)
    await ann.put({"t": "send", "id": new_id(), "conv": conv, "kind": "text"})
    assert (await bob.expect("msg"))["body"] is None
    await ann.sent(conv, None)
    assert (await bob.expect("msg"))["body"] is None


async def test_optional_fields_travel_and_absent_ones_do_not_appear(node: Node) -> None:
    conv, ann, bob = await pair(node)
    first = await ann.sent(conv, "first", media=["m-1", "m_2"], silent=True)
    reply = await ann.sent(conv, "reply", replyTo=first["id"], kind="x.unknown-kind1", ttl=60)
    one, two = await bob.expect("msg"), await bob.expect("msg")
    assert one["media"] == ["m-1", "m_2"]
    assert set(one) == {"t", "id", "conv", "seq", "at", "from", "kind", "body", "media"}
    assert (two["id"], two["replyTo"], two["kind"]) == (reply["id"], first["id"], "x.unknown-kind1")
    assert set(two) == {"t", "id", "conv", "seq", "at", "from", "kind", "body", "replyTo"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text", "a reply"),
        ("edit", {"text": "hello, corrected"}),
        ("reaction", {"emoji": "\U0001f44d"}),
        ("delete", {"for": "me"}),
    ],
)
async def test_replies_edits_reactions_and_deletions_are_bodies_about_a_message(
    node: Node, kind: str, body: Any
) -> None:
    conv, ann, bob = await pair(node)
    first = await ann.sent(conv, "hello")
    tablet = await node.connect("ann", "tablet")
    about = await ann.sent(conv, body, kind=kind, replyTo=first["id"])
    original, arrived = await bob.expect("msg"), await bob.expect("msg")
    assert (original["id"], original["kind"], original["body"]) == (first["id"], "text", "hello")
    assert (arrived["kind"], arrived["replyTo"], arrived["body"]) == (kind, first["id"], body)
    assert arrived["seq"] > original["seq"]
    assert (await tablet.expect("msg", id=about["id"]))["body"] == body
    # Nothing happens to what it is about.
    assert await node.db.messages.find_one({"id": first["id"]}) is not None
    await bob.ack(conv, first["id"], about["id"])
    await tablet.ack(conv, about["id"])
    await until(lambda: _gone(node), 5, "all is acknowledged")


async def _gone(node: Node) -> bool:
    return await node.db.messages.find_one({}) is None


async def test_messages_of_one_connection_rise_in_seq_and_arrive_in_that_order(node: Node) -> None:
    conv, ann, bob = await pair(node)
    ids = [new_id() for _ in range(120)]
    await ann.put(*({"t": "send", "id": id_, "conv": conv, "kind": "text", "body": "x"} for id_ in ids))
    stored = [await ann.expect("stored") for _ in ids]
    seqs = {item["id"]: item["seq"] for item in stored}
    assert [seqs[id_] for id_ in ids] == sorted(set(seqs.values()))
    arrived = [await bob.expect("msg") for _ in ids]
    assert [item["id"] for item in arrived] == ids
    assert [item["seq"] for item in arrived] == [seqs[id_] for id_ in ids]


async def test_a_reply_sorts_after_what_its_sender_names_in_after(node: Node) -> None:
    conv, ann, bob = await pair(node)
    ahead = (int(time.time() * 1000) + 60 * 60 * 1000) << 10
    pushed = await ann.sent(conv, "from a clock that is an hour ahead", after=ahead)
    assert pushed["seq"] > ahead
    following = await ann.sent(conv, "of the same connection")
    assert following["seq"] > pushed["seq"]
    unmoved = await bob.sent(conv, "the node's clock has not moved")
    assert unmoved["seq"] < ahead
    replied = await bob.sent(conv, "reply", after=following["seq"])
    assert replied["seq"] > following["seq"]
    assert (await bob.sent(conv, after=0))["seq"] > replied["seq"]


async def test_an_after_more_than_two_hours_ahead_is_refused(node: Node) -> None:
    conv, ann, _ = await pair(node)
    too_far = (int(time.time() * 1000) + 2 * 60 * 60 * 1000 + 60_000) << 10
    assert (await refused(ann, conv=conv, after=too_far))["code"] == "bad_request"
    for wrong in (-1, 2**53, "1", 1.5, True, {"$gt": 0}):
        assert (await refused(ann, conv=conv, after=wrong))["code"] == "bad_request", wrong
    assert await node.db.messages.count_documents({}) == 0


async def test_time_to_live_has_the_promised_range(node: Node) -> None:
    conv, ann, _ = await pair(node)
    thirty = 30 * 24 * 3600
    kept = await ann.sent(conv, ttl=thirty)
    short = await ann.sent(conv, ttl=60)
    for ttl in (0, -1, thirty + 1, 1.5, "60", None, True):
        if ttl is not None:
            assert (await refused(ann, conv=conv, ttl=ttl))["code"] == "bad_request", ttl
    for stored, ttl in ((kept, thirty), (short, 60)):
        document = await node.db.messages.find_one({"id": stored["id"]})
        assert round(document["expiresAt"].timestamp() * 1000) == stored["at"] + ttl * 1000


async def test_kinds_and_ids_outside_their_form_are_refused(node: Node) -> None:
    conv, ann, _ = await pair(node)
    for kind in ("system", "Text", "", "1x", "a" * 33, "a b", "text\n", None, ...):
        assert (await refused(ann, conv=conv, kind=kind))["code"] == "bad_request", kind
    await ann.sent(conv, kind="a" * 32)
    for id_ in ("", "x", new_id().upper(), new_id() + "\n", new_id().replace("-", ""), 1, None, ...):
        assert (await refused(ann, conv=conv, id=id_))["code"] == "bad_request", id_
    for name in ("", "a b", "a" * 65, 1, None, ["x"], ...):
        assert (await refused(ann, conv=name))["code"] == "bad_request", name
    for reply in ("x", 1, [new_id()]):
        assert (await refused(ann, conv=conv, replyTo=reply))["code"] == "bad_request", reply
    assert await node.db.messages.count_documents({}) == 1


async def test_a_body_is_limited_in_bytes_not_in_characters(node: Node) -> None:
    conv, ann, bob = await pair(node)
    await ann.sent(conv, "a" * 65536)
    await ann.sent(conv, "é" * 32768)
    await ann.sent(conv, "😀" * 16384)
    for body in ("a" * 65537, "é" * 32768 + "a", "😀" * 16384 + "a", {"a": "b" * 65536}):
        error = await refused(ann, conv=conv, body=body)
        assert (error["code"], error["retry"]) == ("too_large", False)
    assert [len((await bob.expect("msg"))["body"]) for _ in range(3)] == [65536, 32768, 16384]


async def test_an_error_names_what_failed_and_whether_to_try_again(node: Node) -> None:
    _, ann, _ = await pair(node)
    error = await refused(ann, conv="unknown-conversation", id="7b0b4a1e-1111-4111-8111-111111111111")
    assert error.pop("message")
    assert error.pop("ref")
    assert error == {
        "t": "error",
        "code": "not_member",
        "retry": False,
        "id": "7b0b4a1e-1111-4111-8111-111111111111",
        "conv": "unknown-conversation",
    }


async def test_absent_and_not_ones_own_look_the_same(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    cleo = await node.connect("cleo")
    absent = await refused(cleo, conv="11111111-2222-4333-8444-555555555555")
    foreign = await refused(cleo, conv=conv)
    assert {**absent, "id": 0, "ref": 0, "conv": 0} == {**foreign, "id": 0, "ref": 0, "conv": 0}
    assert await node.db.messages.count_documents({}) == 0


async def test_operations_of_an_array_succeed_or_fail_alone_and_answer_with_their_ref(node: Node) -> None:
    conv, ann, bob = await pair(node)
    good, last = new_id(), new_id()
    await ann.put(
        {"t": "send", "id": good, "conv": conv, "kind": "text", "body": "one", "ref": "1"},
        {"t": "send", "id": new_id(), "conv": "elsewhere", "kind": "text", "body": "x", "ref": "2"},
        {"t": "nonsense", "ref": "3"},
        {"t": "ping", "ref": "4"},
        {"t": "ping", "surplus": 1, "ref": "5"},
        {"t": "status", "conv": conv, "ids": [good], "ref": "6"},
        {"t": "send", "id": last, "conv": conv, "kind": "text", "body": "two", "ref": "7"},
    )
    assert (await ann.expect("stored", ref="1"))["id"] == good
    assert (await ann.expect("error", ref="2"))["code"] == "not_member"
    assert (await ann.expect("error", ref="3"))["code"] == "bad_request"
    await ann.expect("pong", ref="4")
    assert (await ann.expect("error", ref="5"))["code"] == "bad_request"
    await ann.expect("status", ref="6")
    assert (await ann.expect("stored", ref="7"))["id"] == last
    assert [(await bob.expect("msg"))["id"] for _ in range(2)] == [good, last]


async def test_an_array_of_256_is_taken_and_one_of_257_is_one_error(node: Node) -> None:
    _, ann, _ = await pair(node)
    await ann.put(*({"t": "ping", "ref": str(n)} for n in range(256)))
    for n in range(256):
        await ann.expect("pong", ref=str(n))
    await ann.put(*({"t": "ping"} for _ in range(257)))
    assert (await ann.expect("error"))["code"] == "too_large"
    await ann.nothing("pong", 0.1)


async def test_a_ref_has_up_to_64_characters(node: Node) -> None:
    _, ann, _ = await pair(node)
    await ann.put({"t": "ping", "ref": "é" * 64})
    await ann.expect("pong", ref="é" * 64)
    for wrong in ("r" * 65, 1, ["r"], {"$ne": None}):
        await ann.put({"t": "ping", "ref": wrong})
        assert (await ann.expect("error"))["code"] == "bad_request", wrong


async def test_the_first_answer_comes_again_while_the_message_waits_even_after_the_sender_has_left(
    node: Node,
) -> None:
    conv, ann, bob = await pair(node)
    waiting, gone = await ann.sent(conv, "waits"), await ann.sent(conv, "gone")
    await bob.expect("msg", id=gone["id"])
    await bob.ack(conv, gone["id"])
    await node.db.memberships.delete_one({"_id": f"{conv} ann"})
    node.relay.context.audiences.changed(conversation=conv)
    assert (await refused(ann, conv=conv))["code"] == "not_member"
    for again in (False, True):
        assert await ann.sent(conv, "waits", id=waiting["id"], again=again) == waiting
    assert await ann.sent(conv, "gone", id=gone["id"], again=True) == gone
    assert (await refused(ann, conv=conv, id=gone["id"]))["code"] == "not_member"
    assert (await refused(ann, conv=conv, again=True))["code"] == "not_member"
    status, answer = await node.request(
        "POST",
        "/v1/messages",
        "ann",
        "phone",
        {"id": waiting["id"], "conv": conv, "kind": "text", "body": "waits", "again": True},
    )
    assert (status, answer) == (201, {name: waiting[name] for name in ("conv", "id", "seq", "at")})
    assert await node.db.messages.count_documents({}) == 1


async def test_a_resend_keeps_the_first_body(node: Node) -> None:
    conv, ann, bob = await pair(node)
    first = await ann.sent(conv, "first")
    assert await ann.sent(conv, "changed", id=first["id"], again=True) == first
    assert (await bob.expect("msg"))["body"] == "first"
    await bob.nothing("msg", 0.2)


async def test_the_same_message_twice_in_one_frame_is_stored_once_and_answered_twice_alike(
    node: Node,
) -> None:
    conv, ann, bob = await pair(node)
    op = {"t": "send", "id": new_id(), "conv": conv, "kind": "text", "body": "x"}
    await ann.put({**op, "ref": "1"}, {**op, "ref": "2", "again": True})
    one, two = await ann.expect("stored", ref="1"), await ann.expect("stored", ref="2")
    assert (one["seq"], one["at"]) == (two["seq"], two["at"])
    assert (await bob.expect("msg"))["seq"] == one["seq"]
    await bob.nothing("msg", 0.2)


async def test_an_id_is_taken_for_another_person_another_device_and_after_it_is_gone(node: Node) -> None:
    conv, ann, bob = await pair(node)
    tablet = await node.connect("ann", "tablet")
    stored = await ann.sent(conv)
    for device in (bob, tablet):
        for again in (False, True):
            error = await refused(device, conv=conv, id=stored["id"], again=again)
            assert (error["code"], error["retry"]) == ("id_conflict", False)
    for device in (bob, tablet):
        await device.expect("msg")
        await device.ack(conv, stored["id"])
    await until_gone(node, stored["id"])
    assert (await refused(bob, conv=conv, id=stored["id"], again=True))["code"] == "id_conflict"
    other = await node.direct("ann", "cleo")
    assert (await ann.sent(other, id=stored["id"]))["seq"] > stored["seq"]


async def test_only_a_devices_own_sealed_entry_is_delivered(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, phone = await node.connect("ann"), await node.connect("bob")
    laptop = await node.connect("bob", "laptop")
    status, devices = await node.request("GET", f"/v1/conversations/{conv}/devices", "ann", "phone")
    assert status == 200
    assert set(devices["devices"]) == {"ann/phone", "bob/phone", "bob/laptop"}
    sealed = {"bob/phone": "cGhvbmU=", "bob/laptop": "bGFwdG9w"}
    await ann.sent(conv, None, sealed=sealed, devicesRev=devices["devicesRev"])
    for device in (phone, laptop):
        message = await device.expect("msg")
        assert (message["sealed"], message["body"]) == (sealed[device.key], None)
        await device.close()
        again = await (await node.connect("bob", device.device)).expect("msg")
        assert again == message


async def test_a_sealed_message_for_other_devices_than_there_are_is_a_device_mismatch(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, _ = await node.connect("ann"), await node.connect("bob")
    await node.connect("bob", "laptop")
    _, devices = await node.request("GET", f"/v1/conversations/{conv}/devices", "ann", "phone")
    error = await refused(ann, conv=conv, body=None, sealed={"bob/phone": "YQ==", "bob/old": "Yg=="})
    assert error["code"] == "device_mismatch"
    assert (error["missing"], error["extra"], error["stale"]) == (["bob/laptop"], ["bob/old"], [])
    assert error["devicesRev"] == devices["devicesRev"]
    stale = await refused(ann, conv=conv, devicesRev="0" * 16)
    assert (stale["code"], stale["devicesRev"]) == ("device_mismatch", devices["devicesRev"])
    malformed: list[Any] = [
        {"bob/phone": ""},
        {"bob/phone": "not base64!"},
        {"bob": "YQ=="},
        {"bob/phone": {"$ne": 1}},
        [],
    ]
    for wrong in malformed:
        assert (await refused(ann, conv=conv, sealed=wrong))["code"] == "bad_request", wrong
    assert await node.db.messages.count_documents({}) == 0


async def test_a_sealed_message_is_answered_as_before_when_the_devices_have_changed_since(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, _ = await node.connect("ann"), await node.connect("bob")
    sealed = {"bob/phone": "YQ=="}
    stored = await ann.sent(conv, None, sealed=sealed)
    await node.connect("bob", "laptop")
    assert (await refused(ann, conv=conv, body=None, sealed=sealed))["code"] == "device_mismatch"
    for _ in range(2):
        assert await ann.sent(conv, None, id=stored["id"], sealed=sealed, again=True) == stored


async def test_a_message_with_a_devices_rev_is_answered_as_before_when_the_devices_have_changed_since(
    node: Node,
) -> None:
    conv = await node.direct("ann", "bob")
    ann, _ = await node.connect("ann"), await node.connect("bob")
    _, devices = await node.request("GET", f"/v1/conversations/{conv}/devices", "ann", "phone")
    stored = await ann.sent(conv, "x", devicesRev=devices["devicesRev"])
    await node.connect("bob", "laptop")
    for _ in range(2):
        await ann.put(
            {"t": "send", "id": stored["id"], "conv": conv, "kind": "text", "body": "x"}
            | {"devicesRev": devices["devicesRev"], "again": True, "ref": "again"}
        )
        answer = await ann.next()
        while answer.get("ref") != "again":
            answer = await ann.next()
        assert (answer["t"], answer.get("seq")) == ("stored", stored["seq"])


async def test_what_one_sends_reaches_ones_other_devices_but_not_the_sending_one(node: Node) -> None:
    conv, ann, bob = await pair(node)
    tablet = await node.connect("ann", "tablet")
    stored = await ann.sent(conv)
    assert (await tablet.expect("msg"))["id"] == stored["id"]
    assert (await bob.expect("msg"))["id"] == stored["id"]
    await ann.nothing("msg", 0.2)
    await tablet.ack(conv, stored["id"])
    assert (await ann.expect("receipt"))["by"] == {"user": "ann", "device": "tablet"}
    assert await status_of(ann, conv, stored["id"]) == [{"id": stored["id"], "awaiting": 1, "delivered": []}]


async def test_status_counts_a_person_at_their_first_device(node: Node) -> None:
    conv, ann, phone = await pair(node)
    await node.connect("bob", "laptop")
    stored = await ann.sent(conv)
    await phone.expect("msg")
    await phone.ack(conv, stored["id"])
    assert await status_of(ann, conv, stored["id"]) == [
        {"id": stored["id"], "awaiting": 0, "delivered": ["bob"]}
    ]


async def test_status_is_about_own_messages_only_and_of_all_own_devices(node: Node) -> None:
    conv, ann, bob = await pair(node)
    tablet = await node.connect("ann", "tablet")
    cleo = await node.connect("cleo")
    stored = await ann.sent(conv)
    unknown = [{"id": stored["id"], "gone": True, "fate": "unknown", "delivered": []}]
    assert await status_of(tablet, conv, stored["id"]) == [
        {"id": stored["id"], "awaiting": 1, "delivered": []}
    ]
    assert await status_of(bob, conv, stored["id"]) == unknown
    assert await status_of(cleo, conv, stored["id"]) == unknown
    assert await status_of(cleo, "elsewhere", stored["id"]) == unknown
    for device in (bob, tablet):
        await device.expect("msg")
        await device.ack(conv, stored["id"])
    await until_gone(node, stored["id"])
    for device in (ann, tablet):
        assert (await status_of(device, conv, stored["id"]))[0]["fate"] == "delivered"
    assert await status_of(cleo, conv, stored["id"]) == unknown


async def test_a_status_holds_up_to_a_thousand_ids(node: Node) -> None:
    conv, ann, _ = await pair(node)
    ids = [new_id() for _ in range(1000)]
    items = await status_of(ann, conv, *ids)
    assert [item["id"] for item in items] == ids
    assert await status_of(ann, conv) == []
    await ann.put({"t": "status", "conv": conv, "ids": [*ids, new_id()], "ref": "s"})
    error = await ann.expect("error", ref="s")
    assert (error["code"], error["conv"]) == ("too_large", conv)


async def test_a_withdrawal_is_refused_without_replyto_or_with_a_body(node: Node) -> None:
    conv, ann, _ = await pair(node)
    stored = await ann.sent(conv)
    assert (await refused(ann, conv=conv, kind="withdrawn", body=None))["code"] == "bad_request"
    refusal = await refused(ann, conv=conv, kind="withdrawn", body="x", replyTo=stored["id"])
    assert refusal["code"] == "bad_request"
    assert await node.db.messages.count_documents({}) == 1


async def test_a_withdrawal_from_another_own_device_works_and_frees_the_windows(node: Node) -> None:
    conv, ann, bob = await pair(node)
    tablet = await node.connect("ann", "tablet")
    stored = await ann.sent(conv)
    await bob.expect("msg")
    withdrawal = await tablet.sent(conv, None, kind="withdrawn", replyTo=stored["id"])
    await until_gone(node, stored["id"])
    for device in (ann, bob):
        told = await device.expect("msg", id=withdrawal["id"])
        assert (told["kind"], told["replyTo"], told["from"]["user"]) == ("withdrawn", stored["id"], "ann")
    await bob.ack(conv, stored["id"], withdrawal["id"])
    await ann.ack(conv, withdrawal["id"])
    await until_gone(node, withdrawal["id"])
    connection = node.relay.context.hub.get("bob/phone")
    assert connection is not None
    assert connection.delivery.in_flight == {}
    assert (await status_of(ann, conv, stored["id"]))[0]["fate"] == "withdrawn"


async def test_a_withdrawn_message_is_not_delivered_to_who_comes_later(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    stored = await ann.sent(conv)
    withdrawal = await ann.sent(conv, None, kind="withdrawn", replyTo=stored["id"])
    await until_gone(node, stored["id"])
    bob = await node.connect("bob")
    assert (await bob.expect("msg"))["id"] == withdrawal["id"]
    await bob.nothing("msg", 0.2)
    assert await ann.sent(
        conv, None, id=withdrawal["id"], kind="withdrawn", replyTo=stored["id"], again=True
    ) == (withdrawal)


async def test_a_message_gone_or_unknown_may_be_withdrawn_and_anothers_may_not_even_when_gone(
    node: Node,
) -> None:
    conv, ann, bob = await pair(node)
    stored = await ann.sent(conv)
    await bob.expect("msg")
    await bob.ack(conv, stored["id"])
    await until_gone(node, stored["id"])
    error = await refused(bob, conv=conv, kind="withdrawn", body=None, replyTo=stored["id"])
    assert (error["code"], error["retry"]) == ("forbidden", False)
    withdrawal = await ann.sent(conv, None, kind="withdrawn", replyTo=stored["id"])
    assert (await bob.expect("msg"))["id"] == withdrawal["id"]
    await ann.sent(conv, None, kind="withdrawn", replyTo=new_id())


async def test_a_stranger_learns_nothing_by_withdrawing(node: Node) -> None:
    conv, ann, _ = await pair(node)
    cleo = await node.connect("cleo")
    stored = await ann.sent(conv)
    for target in (stored["id"], new_id()):
        error = await refused(cleo, conv=conv, kind="withdrawn", body=None, replyTo=target)
        assert error["code"] == "not_member"
    assert await node.db.messages.count_documents({}) == 1


async def test_everything_ready_for_a_socket_leaves_in_frames_within_the_limit(node: Node) -> None:
    conv, ann, bob = await pair(node)
    await bob.close()
    for _ in range(14):
        await ann.sent(conv, "😀" * 10_000)
    for _ in range(40):
        await ann.sent(conv, "small")
    again = await node.connect("bob", welcome=False)
    seen = 0
    sizes = []
    while seen < 54:
        text = (await again.socket.receive(5)).data
        sizes.append(len(text.encode()))
        value = json.loads(text)
        operations = value if isinstance(value, list) else [value]
        assert len(operations) <= 256
        seen += sum(op["t"] == "msg" for op in operations)
    assert max(sizes) <= 262144
    assert len(sizes) < 20
