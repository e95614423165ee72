"""``/docs`` and ``/asyncapi.json``: whole, self-contained, and what they say is what the code does."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any, get_args

import msgspec
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from handlers.http import examples
from handlers.http.asyncapi import REPLIES, closes, document
from relay.wire import replies, server_frames
from relay.wire.codec import Refused, decode
from relay.wire.envelope import Envelope
from relay.wire.errors import CODES, RelayError
from relay.wire.frames import AnyOperation, Operation
from relay.wire.server_frames import AnyServerFrame, Part, ServerFrame, check_server_frame
from tests.support.device import new_id
from tests.support.node import Node

OPERATIONS = get_args(AnyOperation)
FRAMES = get_args(AnyServerFrame)
TALK, MESSAGE = "2b0f6a3e-58d1-4c7e-8f7a-6d5c4b3a2910", "7f9c24e8-3b1a-4f0d-9c55-0a1b2c3d4e5f"


def tag(kind: type[msgspec.Struct]) -> str:
    return str(kind.__struct_config__.tag)


def resolved(whole: Any, reference: str) -> Any:
    for part in reference.removeprefix("#/").split("/"):
        whole = whole[part.replace("~1", "/").replace("~0", "~")]
    return whole


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for item in value.values() for found in references(item)]
    return [found for item in value for found in references(item)] if isinstance(value, list) else []


# The page


async def test_the_page_and_all_its_parts_come_from_this_node(node: Node) -> None:
    async with node.http.get(node.url + "/docs") as answer:
        text = await answer.text()
        assert (answer.status, answer.content_type) == (200, "text/html")
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "http" not in policy
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|https?://", text)
    parts = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(parts) == 5
    assert all(part.startswith("/") for part in parts)
    for part in parts:
        async with node.http.get(node.url + part) as answer:
            assert answer.status == 200, part
            assert await answer.read()
            assert answer.headers.get("X-Content-Type-Options", "nosniff") == "nosniff"
    assert 'url: "/openapi.json"' in await (await node.http.get(node.url + "/docs/start.js")).text()


async def test_a_part_that_is_known_is_not_sent_again(node: Node) -> None:
    for path in ("/docs", "/docs/swagger-ui.js", "/docs/swagger-ui.css", "/docs/start.js"):
        async with node.http.get(node.url + path) as answer:
            tag = answer.headers["ETag"]
        async with node.http.get(node.url + path, headers={"If-None-Match": tag}) as answer:
            assert (answer.status, await answer.read()) == (304, b"")
            assert answer.headers["ETag"] == tag
        async with node.http.get(node.url + path, headers={"If-None-Match": '"older"'}) as answer:
            assert answer.status == 200


async def test_no_other_file_of_the_package_is_served(node: Node) -> None:
    for name in ("index.css", "swagger-editor.js", "..%2f..%2f__init__.py", "LICENSE", "page"):
        async with node.http.get(f"{node.url}/docs/{name}") as answer:
            assert answer.status == 404, name


# The description of the WebSocket


async def test_the_description_of_the_socket_is_served(node: Node) -> None:
    async with node.http.get(node.url + "/asyncapi.json") as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert await answer.json() == json.loads(json.dumps(document()))


def test_the_description_is_whole() -> None:
    found = document()
    assert found["asyncapi"] == "3.0.0"
    assert found["info"]["title"]
    assert found["info"]["version"]
    for reference in references(found):
        assert resolved(found, reference), reference
    for operation in found["operations"].values():
        assert operation["action"] in ("send", "receive")
        assert operation["summary"]
        assert operation["messages"]
        for message in [*operation["messages"], *operation.get("reply", {}).get("messages", ())]:
            assert message["$ref"].startswith("#/channels/socket/messages/")
    used = {
        message["$ref"].rpartition("/")[2]
        for one in found["operations"].values()
        for message in one["messages"]
    }
    assert used == set(found["channels"]["socket"]["messages"]) == set(found["components"]["messages"])


@pytest.mark.parametrize("kind", OPERATIONS, ids=tag)
def test_every_operation_is_described_with_all_its_fields(kind: type[Operation]) -> None:
    found = document()
    assert found["operations"][f"ask.{tag(kind)}"]["action"] == "receive"
    assert found["operations"][f"ask.{tag(kind)}"]["reply"]["messages"]
    message = found["components"]["messages"][f"ask.{tag(kind)}"]
    schema = resolved(found, message["payload"]["$ref"])
    assert set(schema["properties"]) == {"t", *(field.encode_name for field in msgspec.structs.fields(kind))}
    assert schema["additionalProperties"] is False
    assert message["examples"]


@pytest.mark.parametrize("kind", FRAMES, ids=tag)
def test_every_frame_of_the_relay_is_described_with_all_its_fields(kind: type[ServerFrame]) -> None:
    found = document()
    assert found["operations"][f"tell.{tag(kind)}"]["action"] == "send"
    message = found["components"]["messages"][f"tell.{tag(kind)}"]
    schema = resolved(found, message["payload"]["$ref"])
    assert set(schema["properties"]) == {"t", *(field.encode_name for field in msgspec.structs.fields(kind))}
    # A client ignores what it does not know.
    assert "additionalProperties" not in schema
    assert message["examples"]


def test_every_part_of_a_frame_and_every_frame_is_described() -> None:
    made = {
        kind.__name__
        for kind in vars(server_frames).values()
        if inspect.isclass(kind) and issubclass(kind, Part) and kind not in (Part, ServerFrame)
    }
    described = set(document()["components"]["schemas"])
    assert made <= described
    frames = {
        kind
        for kind in vars(server_frames).values()
        if inspect.isclass(kind) and issubclass(kind, ServerFrame)
    }
    assert frames - {ServerFrame} == set(FRAMES)


def test_no_frame_has_the_name_of_an_operation_s_type() -> None:
    names = [kind.__name__ for kind in (*OPERATIONS, *FRAMES)]
    assert len(names) == len(set(names))


def test_every_example_is_what_the_relay_takes_or_sends() -> None:
    found = document()
    schemas = found["components"]
    for name, message in found["components"]["messages"].items():
        for example in message["examples"]:
            value = example["payload"]
            validator = Draft202012Validator({**message["payload"], "components": schemas})
            assert [error.message for error in validator.iter_errors(value)] == [], name
            if name.startswith("ask."):
                (operation,) = decode(json.dumps(value))
                assert not isinstance(operation, Refused), name
            else:
                check_server_frame(value)
    assert {tag(kind) for kind in OPERATIONS} == set(examples.OPERATIONS)
    assert {tag(kind) for kind in OPERATIONS} == set(REPLIES)
    assert {tag(kind) for kind in FRAMES} == set(examples.FRAMES)
    assert {reply for answers in REPLIES.values() for reply in answers} <= set(examples.FRAMES)


def test_every_close_code_and_error_code_is_described() -> None:
    found = document()
    assert found["x-close-codes"] == {str(close.code): close.reason for close in closes()}
    assert {"1003", "1009", "1012", "4400", "4401", "4408", "4409", "4426", "4429"} <= set(
        found["x-close-codes"]
    )
    assert set(found["x-error-codes"]) == set(CODES)
    for code in (*found["x-close-codes"], *CODES):
        assert code in found["info"]["description"]


# What is sent and what is described


def every_reply() -> list[str]:
    """A frame of each function of ``replies``; a new function fails here until it is listed."""
    failure = RelayError("rate_limited", "too fast", retry_after=10)
    mismatch = RelayError(
        "device_mismatch",
        "changed",
        details={"missing": ["bob/phone"], "extra": [], "stale": [], "devicesRev": "x.0"},
    )
    waiting = {"id": MESSAGE, "awaiting": 2, "delivered": ["bob"]}
    gone = {"id": MESSAGE, "gone": True, "fate": "unknown", "delivered": []}
    welcome = dict(examples.FRAMES["welcome"][0])
    for name in ("t", "v"):
        del welcome[name]
    made: dict[str, list[str]] = {
        "stored": [replies.stored(TALK, MESSAGE, 5, 6, None), replies.stored(TALK, MESSAGE, 5, 6, 'r"')],
        "acked": [replies.acked(TALK, [MESSAGE], "r")],
        "receipt": [replies.receipt(TALK, [MESSAGE], "bob", "phone", 9)],
        "status": [replies.status(TALK, [dict(waiting), dict(gone)], "r"), replies.status(TALK, [], None)],
        "done": [replies.done("r")],
        "read": [replies.read(TALK, "bob", 5, 6)],
        "typing": [replies.typing(TALK, "bob", True), replies.typing(TALK, "bob", False)],
        "presence": [replies.presence("bob", True, 6), replies.presence("bob", False, None)],
        "drained": [replies.drained(0)],
        "pong": [replies.pong(7, None), replies.pong(7, "r")],
        "authed": [replies.authed(8, "r")],
        "bye": [replies.bye(500)],
        "keys": [replies.keys(3)],
        "error": [
            replies.error(failure, {"ref": "r", "id": None, "conv": TALK}),
            replies.error(mismatch, {"ref": None, "id": MESSAGE, "conv": TALK}),
        ],
        "welcome": [replies.welcome(welcome)],
    }
    public = {
        name for name, kind in vars(replies).items() if inspect.isfunction(kind) and not name.startswith("_")
    }
    assert public - {"dumps"} == set(made)
    return [frame for frames in made.values() for frame in frames]


def test_every_reply_that_is_put_together_by_hand_is_as_described() -> None:
    found = every_reply()
    message = Envelope(
        TALK,
        MESSAGE,
        user="ann",
        device="phone",
        seq=1,
        at=2,
        kind="text",
        body='{"a":1}',
        structured=True,
        awaiting=["bob/phone"],
        reply_to=MESSAGE,
        media=["m"],
        sealed={"bob/phone": "YQ=="},
    )
    plain = Envelope(
        TALK, MESSAGE, user="$relay", device="", seq=1, at=2, kind="system", body=None, awaiting=["bob/phone"]
    )
    found += [message.frame_for("bob/phone"), message.frame_for("bob/tablet"), plain.frame_for("bob/phone")]
    for frame in found:
        check_server_frame(json.loads(frame))
    assert {json.loads(frame)["t"] for frame in found} == {tag(kind) for kind in FRAMES}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"t": "unheard"},
        {"t": 5},
        {"t": "pong"},
        {"t": "pong", "time": "5"},
        {"t": "pong", "time": 5.5},
        {"t": "pong", "time": 5, "more": 1},
        {"t": "pong", "time": 5, "ref": None},
        {"t": "stored", "conv": TALK, "id": "x", "seq": 1, "at": 1},
        {"t": "stored", "conv": TALK, "id": MESSAGE, "seq": 1 << 53, "at": 1},
        {"t": "acked", "conv": TALK, "ids": [MESSAGE]},
        {"t": "status", "conv": TALK, "items": [{"id": MESSAGE}]},
        {
            "t": "status",
            "conv": TALK,
            "items": [{"id": MESSAGE, "gone": False, "fate": "x", "delivered": []}],
        },
        {
            "t": "status",
            "conv": TALK,
            "items": [{"id": MESSAGE, "awaiting": 1, "delivered": [], "gone": True}],
        },
        {"t": "error", "code": "unheard", "message": "x", "retry": False},
        {"t": "error", "code": "device_mismatch", "message": "x", "retry": False},
        {"t": "error", "code": "not_found", "message": "x", "retry": False, "devicesRev": "x"},
        {"t": "error", "code": "not_found", "message": "x", "retry": False, "details": {}},
    ],
    ids=json.dumps,
)
def test_a_frame_that_is_not_as_described_is_found(value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        check_server_frame(value)


async def test_what_a_device_hears_in_its_life_is_as_described(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann", welcome=False), await node.connect("bob", welcome=False)
    heard = [await ann.expect("welcome"), await ann.expect("drained"), await bob.expect("welcome")]
    message = await ann.send(conv, {"a": 1}, ref="1")
    heard += [await ann.expect("stored"), await bob.expect("msg")]
    await bob.put({"t": "ack", "conv": conv, "ids": [message], "ref": "2"})
    heard += [await bob.expect("acked"), await ann.expect("receipt")]
    other = await ann.send(conv, "waits")
    heard.append(await ann.expect("stored", id=other))
    await ann.put({"t": "status", "conv": conv, "ids": [message, other, new_id()]}, {"t": "ping", "ref": "3"})
    heard += [await ann.expect("status"), await ann.expect("pong")]
    await ann.put({"t": "auth", "token": node.token("ann", "phone")})
    heard.append(await ann.expect("authed"))
    await ann.put({"t": "unheard"}, {"t": "ack", "conv": "x", "ids": 5, "ref": "4"})
    heard += [await ann.expect("error"), await ann.expect("error")]
    await ann.send(conv, None, sealed={"cleo/phone": "YQ=="})
    heard.append(await ann.expect("error", code="device_mismatch"))
    for frame in heard:
        check_server_frame(frame)
