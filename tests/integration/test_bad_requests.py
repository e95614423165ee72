"""Every endpoint against bad input: wrong bodies, path parameters and query parameters, and requests that race.

Each is answered by a typed 4xx with one line for people and none of the program's own words, and changes nothing. The bad
bodies are made from good ones: every value is replaced by everything that ``/openapi.json`` does not allow there. The good body
is taken in the end, so what was refused was refused for the change.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import gzip
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Final

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from yarl import URL

import handlers.http.route
import relay.session.web
from handlers.http.openapi import document
from handlers.http.route import Route
from handlers.http.routes import ROUTES
from relay.store.embedded import EmbeddedMongo
from relay.wire.errors import CODES
from tests.support.databases import Databases
from tests.support.described import undescribed
from tests.support.device import new_id
from tests.support.node import Node, NodeFactory

DOCUMENT: Final = document(ROUTES)
ENDPOINTS: Final = {f"{route.method} {route.path}": route for route in ROUTES}
WITH_BODY: Final = {name: route for name, route in ENDPOINTS.items() if route.request is not None}
WITH_PARTS: Final = {name: route for name, route in ENDPOINTS.items() if "{" in route.path}
WITH_QUERY: Final = {name: route for name, route in ENDPOINTS.items() if route.query}
LARGEST: Final = 262_144

KEY: Final = "BU6pMRmRvJ7P0bnEkEgcOBoqQNOj8C1rk9mrqGmnbJdb"
SIGNED: Final = {"id": 3, "key": KEY, "signature": KEY}
DEVICE: Final = {"id": "phone", "name": "Ann's phone", "platform": "ios", "reset": False}
MESSAGE: Final = "7f9c24e8-3b1a-4f0d-9c55-0a1b2c3d4e5f"

# A body that is taken, with every field there is. `{group}`, `{rev}` and `{refresh}` come from the scene.
GOOD: Final[Mapping[str, dict[str, Any]]] = {
    "POST /v1/auth/register": {
        "username": "newcomer",
        "password": "correct horse battery",
        "name": "Newcomer",
        "phone": "+49 30 5550100",
        "device": DEVICE,
    },
    "POST /v1/auth/login": {
        "username": "ann",
        "password": "correct horse battery",
        "name": "Ann",
        "phone": "+49 30 5550100",
        "device": DEVICE,
    },
    "POST /v1/auth/refresh": {"refreshToken": "{refresh}"},
    "PATCH /v1/me": {
        "name": "Ann",
        "phone": "+49 30 5550101",
        "picture": "picture",
        "about": "at work",
        "preferences": {
            "findableByName": False,
            "findableByPhone": False,
            "whoMayMessage": "contacts",
            "whoMayAdd": "contacts",
            "deliveredReceipts": False,
            "readReceipts": False,
        },
    },
    "PUT /v1/me/push": {"provider": "fcm", "token": "a token"},
    "POST /v1/contacts": {"user": "bob", "name": "Bob"},
    "PATCH /v1/contacts/{user}": {"name": "Bob next door", "blocked": True},
    "POST /v1/reports": {
        "user": "bob",
        "reason": "spam",
        "text": "buy now",
        "conversation": "{group}",
        "messages": [MESSAGE],
    },
    "POST /v1/conversations": {"type": "group", "members": ["bob"], "name": "Allotment", "ref": MESSAGE},
    "PATCH /v1/conversations/{id}": {
        "name": "Allotment",
        "picture": "picture",
        "description": "who waters",
        "settings": {"whoMayPost": "moderators"},
    },
    "PATCH /v1/conversations/{id}/me": {"mutedUntil": 1_795_221_560_670, "pinned": True, "archived": True},
    "POST /v1/conversations/{id}/members": {"users": ["cleo"]},
    "PATCH /v1/conversations/{id}/members/{user}": {"role": "moderator"},
    "POST /v1/messages": {
        "id": MESSAGE,
        "conv": "{group}",
        "kind": "text",
        "body": "hello",
        "replyTo": MESSAGE,
        "media": ["picture"],
        "sealed": {"bob/phone": "c2VhbGVk"},
        "devicesRev": "{rev}",
        "ttl": 3600,
        "silent": True,
        "after": 1,
        "again": True,
        "ref": "1",
    },
    "POST /v1/acks": {
        "acks": [{"conv": "{group}", "ids": [MESSAGE]}],
        "reads": [{"conv": "{group}", "upTo": 1}],
    },
    "PUT /v1/keys": {
        "identityKey": KEY,
        "registrationId": 11845,
        "signedPreKey": SIGNED,
        "oneTimePreKeys": [{"id": 41, "key": KEY}],
        "kemPreKeys": [SIGNED],
        "lastResort": SIGNED,
    },
    "POST /v1/keys/claim": {"devices": ["bob/phone"]},
}
# Fields without a form: looked up by their hash, compared, ignored, or the sender's own business.
FORMLESS: Final = {
    "POST /v1/auth/login name",
    "POST /v1/auth/login phone",
    "POST /v1/auth/refresh refreshToken",
    "POST /v1/messages body",
    "POST /v1/messages devicesRev",
    "POST /v1/messages ref",
}
# As large as a request may be: what is sealed for a device has no limit of its own.
UNLIMITED: Final = {"POST /v1/messages sealed.bob/phone"}

OPERATORS: Final[list[Any]] = [
    {"$ne": 1},
    {"$gt": ""},
    {"$in": ["ann"]},
    {"$where": "1"},
    {"$regex": "."},
    [{"$ne": 1}],
]
CANDIDATES: Final[list[Any]] = [
    *OPERATORS,
    None,
    True,
    False,
    0,
    1,
    -1,
    1.5,
    2**31,
    "",
    " ",
    "1",
    "true",
    "null",
    "$ne",
    "ä/ö",
    "x\0y",
    "\0",
    "x\x07y",
    "\x1b[31m",
    "\x7f",
    "\u202etxt",
    "x\u2028y",
    "a" * 5000,
    "a" * 100_000,
    [],
    ["x"],
    [[]],
    [None],
    {},
    {"x": 1},
]
# Whatever the field: no JSON that the relay takes.
IMPOSSIBLE: Final[list[Any]] = ["\ud800", "x\udfffy", 2**53, -(2**53), 10**30, float("nan"), float("inf")]
STRANGE_NAMES: Final = ("surplus", "$where", "__proto__", "_id", "two\nlines", "x\x1b[31m", "a.b", "")

PROGRAM_WORDS: Final = re.compile(
    r"Traceback|Error\b|Exception|object has no|instance of|dictionary|NoneType|<class|\bNone\b|pydantic|msgspec"
    r"|bson|pymongo|0x[0-9a-f]{6}|\.py\b|Input should|(?:String|List) should|of another form|\[\^|\)\*|\{\d+,\d*\}|"
    + "|".join(route.request.__name__ for route in WITH_BODY.values() if route.request)
)


def endpoints(chosen: Mapping[str, Route]) -> pytest.MarkDecorator:
    """Once for each of these endpoints."""
    return pytest.mark.parametrize("name", list(chosen))


def good(name: str, **values: str) -> dict[str, Any]:
    """A good body with these values."""
    text = json.dumps(GOOD[name])
    for place in ("group", "rev", "refresh"):
        text = text.replace(f"{{{place}}}", values.get(place, MESSAGE))
    found: dict[str, Any] = json.loads(text)
    return found


class Scene:
    """ann, who asks, with what the good requests name: bob, cleo, a group of ann and bob, and dora, whom ann lists. ``theirs``
    is a group without ann."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.group = self.theirs = self.rev = self.refresh = ""

    @classmethod
    async def make(cls, node: Node) -> Scene:
        """Makes all of it on a fresh node."""
        found = cls(node)
        for user in ("ann", "bob", "cleo", "dora"):
            await node.request("GET", "/v1/me", user, "phone")
        found.theirs = await node.group("bob", ["cleo"])
        await node.request("POST", "/v1/contacts", "ann", "phone", {"user": "dora"})
        account = {
            "username": "ann",
            "password": "correct horse battery",
            "device": {**DEVICE, "id": "tablet"},
        }
        status, text = await found.ask(
            "POST /v1/auth/register", "/v1/auth/register", json.dumps(account).encode()
        )
        assert status == 201, text
        found.refresh = json.loads(text)["refreshToken"]
        return found

    async def renew(self) -> None:
        """A group nobody has changed."""
        self.group = await self.node.group("ann", ["bob"])
        _, found = await self.node.request("GET", f"/v1/conversations/{self.group}/devices", "ann", "phone")
        self.rev = found["devicesRev"]

    def good(self, name: str) -> dict[str, Any]:
        """A body that is taken."""
        return good(name, group=self.group, rev=self.rev, refresh=self.refresh)

    def path(self, name: str, **parts: str) -> str:
        """The path of an endpoint about things that are there; ``parts`` are put in as they are."""
        values = {
            "id": "bob" if "/users/" in name else self.group,
            "user": "bob" if "members" in name else "dora",
            "device": "phone",
            **parts,
        }
        return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], ENDPOINTS[name].path)

    async def ask(self, name: str, path: str, data: bytes | None, user: str = "ann") -> tuple[int, str]:
        """The status and text of an answer; its type is JSON."""
        headers = self.node.headers(user, "phone")
        if data is not None:
            headers["Content-Type"] = "application/json"
        url = URL(self.node.url + path, encoded=True)
        async with self.node.http.request(ENDPOINTS[name].method, url, data=data, headers=headers) as answer:
            text = await answer.text()
            missing = undescribed(ENDPOINTS[name].method, path, answer.status, text)
            assert missing is None, f"{name} as {path[:100]}: {missing} is not described"
            return answer.status, text

    async def put(self, name: str, body: Any) -> tuple[int, str]:
        """The answer to a body, however wrong."""
        return await self.ask(name, self.path(name), json.dumps(body).encode())

    async def stored(self) -> dict[str, Any]:
        """All that is in the database but what the node keeps for itself, and the trail of refused log-ins."""
        db = self.node.db
        names = set(await db.list_collection_names()) - {
            "nodes",
            "balances",
            "settings",
            "audit",
            "audit_head",
        }
        found = {name: await db[name].find().sort("_id").to_list(None) for name in sorted(names)}
        acts = await db.audit.find({"act": {"$ne": "session.refuse"}}).to_list(None)
        return {**found, "audit": acts}


@pytest.fixture(scope="module")
async def scene(
    mongod: EmbeddedMongo, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Scene]:
    """One relay for all: what is refused leaves no trace."""
    factory = NodeFactory(mongod.uri, tmp_path_factory.mktemp("bad"), databases)
    node = await factory.start()
    yield await Scene.make(node)
    await factory.close()


def refused(found: tuple[int, str], what: object, *statuses: int) -> None:
    """The answer is an error of one of these statuses (else: any 4xx) in the promised shape."""
    status, text = found
    said = f"{str(what)[:300]} -> {status} {text[:300]}"
    assert status in statuses if statuses else 400 <= status < 500, said
    answer = json.loads(text)
    assert set(answer) == {"error"}, said
    error = answer["error"]
    assert set(error) <= {"code", "message", "details"}, said
    assert CODES[error["code"]].status == status, said
    assert error["message"].isprintable(), said
    assert 0 < len(error["message"]) <= 300, said
    assert not PROGRAM_WORDS.search(error["message"]), said


def validator(name: str) -> Draft202012Validator:
    """What ``/openapi.json`` allows for the body of an endpoint."""
    request = WITH_BODY[name].request
    assert request is not None
    components = copy.deepcopy(DOCUMENT["components"])
    return Draft202012Validator(
        {"$ref": f"#/components/schemas/{request.__name__}", "components": end_means_end(components)}
    )


def end_means_end(value: Any) -> Any:
    """Patterns as ECMA-262 reads them: ``$`` is the end, not also the place before a last newline."""
    if isinstance(value, dict):
        return {
            key: re.sub(r"\$$", r"\\Z", one)
            if key == "pattern" and isinstance(one, str)
            else end_means_end(one)
            for key, one in value.items()
        }
    return [end_means_end(one) for one in value] if isinstance(value, list) else value


Place = tuple[str | int, ...]


def places(value: Any, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value within a body, with the way to it."""
    yield at, value
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, one in items:
        yield from places(one, (*at, key))


def replaced(body: Any, at: Place, value: Any) -> Any:
    """The body with another value at this place; ``...`` takes it away."""
    if not at:
        return value
    found = copy.deepcopy(body)
    inner = found
    for key in at[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return found


def label(name: str, at: Place) -> str:
    return f"{name} {'.'.join(str(key) for key in at if not isinstance(key, int))}".strip()


def mutants(body: dict[str, Any]) -> Iterator[tuple[Place, Any]]:
    """The body with one thing wrong, perhaps."""
    for at, value in places(body):
        for candidate in CANDIDATES:
            yield at, replaced(body, at, candidate)
        if at:
            yield at, replaced(body, at, ...)
        if isinstance(value, str):
            for candidate in (
                value + "\n",
                value + "\0",
                "\0" + value,
                value + "\x1b[31m",
                [value],
                {"$eq": value},
            ):
                yield at, replaced(body, at, candidate)
        if isinstance(value, int) and not isinstance(value, bool):
            for number in (str(value), value + 0.5, -value - 1, 2**53 - 1):
                yield at, replaced(body, at, number)
        if isinstance(value, list) and value:
            yield at, replaced(body, at, value * 2000)
            yield at, replaced(body, at, value[0])
        if isinstance(value, dict):
            for strange in STRANGE_NAMES:
                yield at, replaced(body, (*at, strange), 1)


def test_the_good_bodies_have_every_field_of_every_endpoint() -> None:
    assert set(GOOD) == set(WITH_BODY)
    schemas = DOCUMENT["components"]["schemas"]
    for name, body in GOOD.items():
        request = WITH_BODY[name].request
        assert request is not None
        assert set(body) == set(schemas[request.__name__]["properties"]), name


def texts_that_may_be(value: str) -> set[str]:
    """Which texts of all bodies may be this one, as described."""
    found = set()
    for name in GOOD:
        check, body = validator(name), good(name)
        assert check.is_valid(body), name
        for at, one in places(body):
            if isinstance(one, str) and check.is_valid(replaced(body, at, value)):
                found.add(label(name, at))
    return found


def test_no_object_of_a_body_may_hold_an_unknown_field() -> None:
    for name in GOOD:
        check, body = validator(name), good(name)
        for at, one in places(body):
            for strange in STRANGE_NAMES if isinstance(one, dict) else ():
                assert not check.is_valid(replaced(body, (*at, strange), 1)), (label(name, at), strange)


def test_only_fields_without_a_form_may_hold_control_characters() -> None:
    assert texts_that_may_be("x\0y") == FORMLESS


def test_every_text_has_a_limit() -> None:
    # The limit of a message's body is the operator's to set, and told by `/v1/info`.
    assert texts_that_may_be("a" * 200_000) == UNLIMITED | {"POST /v1/messages body"}


@endpoints(WITH_BODY)
async def test_what_the_description_does_not_allow_in_a_body_is_refused_and_changes_nothing(
    scene: Scene, name: str
) -> None:
    await scene.renew()
    body = scene.good(name)
    check = validator(name)
    assert check.is_valid(body)
    before = await scene.stored()
    tried = 0
    for at, mutant in mutants(body):
        if not check.is_valid(mutant):
            refused(await scene.put(name, mutant), (label(name, at), mutant), 400, 413)
            tried += 1
        elif label(name, at) in FORMLESS and "\0" in json.dumps(mutant):
            status, _ = found = await scene.put(name, mutant)
            assert status < 500, (mutant, found)
    for at, _ in places(body):
        for value in IMPOSSIBLE:
            refused(await scene.put(name, replaced(body, at, value)), (label(name, at), value), 400)
    assert tried > 30
    assert await scene.stored() == before
    status, text = await scene.put(name, body)
    assert status in (200, 201), text


@endpoints(WITH_BODY)
async def test_what_is_no_json_object_is_refused_and_changes_nothing(scene: Scene, name: str) -> None:
    await scene.renew()
    good = json.dumps(scene.good(name)).encode()
    first = next(iter(GOOD[name])).encode()
    before = await scene.stored()
    for data in (
        None,
        b"",
        b" ",
        b"null",
        b"1",
        b'"text"',
        b"[]",
        b"[" + good + b"]",
        good[:-1],
        good + b"}",
        good + good,
        good.replace(b'"', b"'"),
        good[:-1] + b",}",
        b"\xef\xbb\xbf" + good,
        b"\xff\xfe" + good,
        good.decode().encode("utf-16"),
        b"\0" + good,
        b"a=1&b=2",
        b"<a/>",
        b'{"' + first + b'":NaN}',
        b'{"' + first + b'":"\\ud800"}',
        b'{"' + first + b'":"raw \x07 control"}',
        b'{"\\ud800":1}',
        b'{"\\u0000":1}',
        b'{"' + first + b'":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"' + first + b'":' + b'{"x":' * 40 + b"1" + b"}" * 40 + b"}",
        b"[" * 100_000,
        b'{"x":' * 30_000 + b"1" + b"}" * 30_000,
    ):
        refused(await scene.ask(name, scene.path(name), data), (name, data), 400)
    refused(await scene.ask(name, scene.path(name), b" " * (LARGEST + 1)), (name, "blanks"), 413)
    large = good[:-1] + b',"surplus":"' + b"a" * LARGEST + b'"}'
    refused(await scene.ask(name, scene.path(name), large), (name, "large"), 413)
    assert await scene.stored() == before


@endpoints(WITH_BODY)
async def test_a_body_that_is_not_encoded_as_it_says_or_bursts_is_refused(scene: Scene, name: str) -> None:
    await scene.renew()
    text = json.dumps(scene.good(name)).encode()
    bomb = gzip.compress(text[:-1] + b" " * (20 * LARGEST) + b"}")
    before = await scene.stored()
    for encoding, data, status in (
        ("gzip", text, 400),
        ("deflate", text, 400),
        ("gzip", bomb[:-200], 413),
        ("gzip", bomb, 413),
    ):
        # The relay hangs up on who sends such a body: nothing else may come on that connection.
        headers = {"Content-Encoding": encoding, "Connection": "close", **scene.node.headers("ann", "phone")}
        url = scene.node.url + scene.path(name)
        async with scene.node.http.request(ENDPOINTS[name].method, url, data=data, headers=headers) as answer:
            refused((answer.status, await answer.text()), (name, encoding), status)
    assert await scene.stored() == before


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("POST /v1/auth/login", {"device": None}, "device: must be a JSON object"),
        ("POST /v1/auth/login", {"password": 5}, "password: must be a string"),
        (
            "POST /v1/auth/login",
            {"device": {**DEVICE, "id": "/"}},
            "device.id: must be an id: 1 to 64 of A-Z a-z 0-9 _ . : -",
        ),
        ("POST /v1/auth/login", {"extra": 5}, "extra: is not a field of this request"),
        ("PATCH /v1/me", {"name": " "}, "name: must be one line of text that is not blank"),
        ("PATCH /v1/me", {"phone": "030 1"}, "phone: must be an international number, like +49 30 5550100"),
        ("PATCH /v1/me", {"phone": "+49 30 12"}, "phone: must have 7 to 15 digits after the +"),
        ("PATCH /v1/me", {"about": "x" * 257}, "about: must have at most 256 characters"),
        ("PUT /v1/me/push", {"provider": "x"}, "provider: must be 'apns', 'fcm', 'expo' or 'webpush'"),
        ("POST /v1/conversations", {"ref": "x"}, "ref: must be a UUID in lower case"),
        (
            "POST /v1/conversations",
            {"members": ["a b"]},
            "members.0: must be a user id: 1 to 128 of A-Z a-z 0-9 _ . @ : + -",
        ),
        ("POST /v1/conversations", {"members": ["x"] * 1001}, "members: must have at most 1000 items"),
        ("PATCH /v1/conversations/{id}/me", {"pinned": 1}, "pinned: must be true or false"),
        ("POST /v1/keys/claim", {"devices": ["a/b", "a/b"]}, "devices: a device comes twice"),
    ],
)
async def test_what_is_wrong_is_said_in_words_for_people(
    scene: Scene, name: str, change: dict[str, Any], words: str
) -> None:
    await scene.renew()
    status, text = await scene.put(name, {**scene.good(name), **change})
    assert (status, json.loads(text)["error"]["message"]) == (413 if "1000" in words else 400, words)


async def test_a_body_that_lacks_a_field_or_is_no_object_is_said_in_words_for_people(scene: Scene) -> None:
    for body, words in (({}, "devices: is missing"), ([], "the request body must be a JSON object")):
        status, text = await scene.put("POST /v1/keys/claim", body)
        assert (status, json.loads(text)["error"]["message"]) == (400, words)


@pytest.mark.parametrize(
    ("request_line", "headers", "words"),
    [
        ("GET /v1/users?q=" + "a" * 9000, "", "the address or a header of the request is too long"),
        ("GET /v1/me", "X-Long: " + "a" * 9000, "the address or a header of the request is too long"),
        ("POST /v1/acks", "Content-Length: -1", "this is not a request in HTTP that the relay can read"),
        ("BREW /v1/me", "", "this is not a request in HTTP that the relay can read"),
        ("PUT /v1/contacts", "", "this path takes GET, POST only"),
        ("GET /v1/nothing", "", "there is nothing at this path; /docs lists what there is"),
        ("GET /v1/ws", "", "this path is a WebSocket, and the request does not ask for one"),
    ],
)
async def test_what_no_endpoint_sees_is_a_typed_error_too(
    scene: Scene, request_line: str, headers: str, words: str
) -> None:
    where = URL(scene.node.url)
    reader, writer = await asyncio.open_connection(where.host, where.port)
    lines = [f"{request_line} HTTP/1.1", "Host: relay", "Connection: close", *([headers] if headers else [])]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    head, _, text = answer.partition("\r\n\r\n")
    assert "Content-Type: application/json" in head
    assert json.loads(text)["error"]["message"] == words
    status = int(head.split()[1])
    assert status in (400, 404, 405)
    assert json.loads(text)["error"]["code"] == ("not_found" if status == 404 else "bad_request")


@pytest.mark.parametrize("begun", [b"", b"GET /livez HTTP/1.1\r\nHost: rel"])
async def test_a_connection_without_a_whole_request_is_given_up(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(relay.session.web, "FIRST_REQUEST_SECONDS", 0.3)
    where = URL(scene.node.url)
    reader, writer = await asyncio.open_connection(where.host, where.port)
    writer.write(begun)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    socket = await scene.node.connect("ann", "watch")
    await asyncio.sleep(0.5)
    await socket.put({"t": "ping"})
    await socket.expect("pong")


async def test_a_body_that_is_announced_and_does_not_come_is_given_up(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers.http.route, "BODY_SECONDS", 0.2)
    where = URL(scene.node.url)
    reader, writer = await asyncio.open_connection(where.host, where.port)
    writer.write(b"POST /v1/auth/login HTTP/1.1\r\nHost: relay\r\nContent-Length: 200000000\r\n\r\n{")
    status, *_ = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).split(b"\r\n")
    answer = json.loads(await asyncio.wait_for(reader.readuntil(b"}}"), 5))
    assert status == b"HTTP/1.1 400 Bad Request"
    assert answer["error"] == {"code": "bad_request", "message": "the request body did not come in time"}
    writer.close()


STRANGE_PARTS: Final = (
    "nothing-has-this-id",
    "%00",
    "x%00",
    "%2F",
    "a%2Fb",
    "%2e%2e%2f%2e%2e%2fetc",
    "a%5Cb",
    "%0A",
    "{name}%0A",
    "{name}%00",
    "{name}%20",
    "{name}%2Fmembers",
    "%7B%22%24ne%22%3A1%7D",
    "$ne",
    "%24where",
    "[$ne]",
    "*",
    "{name}*",
    "%25",
    "%",
    "%zz",
    "%ff",
    "%c0%af",
    "%ed%a0%80",
    "%F0%9F%A6%93",
    "%E2%80%AE",
    "a%20b",
    "a;b",
    "a'b",
    "'%20or%201=1--",
    "a" * 129,
    "a" * 7000,
)


@endpoints(WITH_PARTS)
async def test_a_path_that_names_nothing_of_ones_own_is_not_found(scene: Scene, name: str) -> None:
    await scene.renew()
    data = None
    if name in GOOD:
        # Anybody may be blocked: nobody but one's contacts can be named anew.
        body = {"name": "Dora"} if name == "PATCH /v1/contacts/{user}" else scene.good(name)
        data = json.dumps(body).encode()
    others = {"id": scene.theirs, "user": "cleo", "device": "no-phone-of-ann"}
    await scene.node.request("GET", "/v1/me", "bob", others["device"])
    known = {"id": scene.group, "user": "bob", "device": "phone"}
    before = await scene.stored()
    for part in re.findall(r"\{(\w+)\}", ENDPOINTS[name].path):
        values = [value.replace("{name}", known[part]) for value in STRANGE_PARTS]
        if "/users/" not in name:
            values.append(others[part])
        for value in values:
            found = await scene.ask(name, scene.path(name, **{part: value}), data)
            refused(found, (name, part, value), 404)
    assert await scene.stored() == before


def cursor(value: Any) -> str:
    """A cursor as the relay might make it."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


WRONG: Final[Mapping[str, tuple[str, ...]]] = {
    "limit": (
        "",
        "0",
        "-1",
        "+1",
        "1e3",
        "1.0",
        "%201",
        "1%20",
        "0x10",
        "true",
        "null",
        "1000000000",
        "9" * 400,
    )
    + ("%D9%A3", "%C2%B2", "1%00", "1,2", "%7B%22%24ne%22%3A1%7D"),
    "cursor": (
        "",
        "x",
        "%00",
        "%ff",
        "%F0%9F%A6%93",
        "null",
        "AAAA",
        "%7B%22%24ne%22%3A1%7D",
        "a" * 4000,
        *map(
            cursor,
            (
                None,
                1,
                "x",
                {},
                {"$ne": 1},
                [],
                [1],
                [None, None],
                [True, "x"],
                [1, {"$gt": ""}],
                [{"$gt": 0}, "x"],
                [1, 1],
                [1.5, "x"],
                [float("nan"), "x"],
                [2**53, "x"],
                [-(2**70), "x"],
                [1, "\ud800"],
                [1, "x", 1],
                [[[[]]], "x"],
            ),
        ),
    ),
    "q": ("%00", "x%00y", "x%07y", "%0A", "x%1B[31m", "", "%20", "a" * 65, "a" * 5000),
    "blocked": ("", "True", "1", "0", "yes", "null", "%00", "true,false"),
}
# Right in form, and nowhere: an empty page, the first, or a refusal.
FAR: Final = tuple(
    cursor([number, text])
    for number in (0, -1, 2**53 - 1, -(2**53) + 1, 253_402_300_799_999, 253_402_300_800_000)
    for text in ("", "x", "\0", "x" * 2000, "$ne", f"{MESSAGE} {MESSAGE}")
) + tuple(cursor([key, "x"]) for key in ("", "\0", "zzz", "\U0010ffff"))


@endpoints(WITH_QUERY)
async def test_parameters_that_are_wrong_unknown_or_given_twice_are_refused(scene: Scene, name: str) -> None:
    await scene.renew()
    path, base = scene.path(name), "q=ann&" if name == "GET /v1/users" else ""
    status, text = await scene.ask(name, f"{path}?{base}", None)
    assert status == 200, text
    before = await scene.stored()
    for parameter in ENDPOINTS[name].query:
        rest = "" if parameter == "q" else base
        for value in WRONG["cursor" if parameter == "since" else parameter]:
            asked = f"{path}?{rest}{parameter}={value}"
            refused(await scene.ask(name, asked, None), asked, 400)
        good = {"limit": "1", "q": "ann", "blocked": "true"}.get(parameter, cursor([1, "x"]))
        for asked in (
            f"{parameter}={good}&{parameter}={good}",
            f"{parameter}={good}&{parameter}=",
            f"{parameter}[]={good}",
        ):
            refused(await scene.ask(name, f"{path}?{rest}{asked}", None), asked, 400)
    for asked in (
        "surplus=1",
        "$where=1",
        "%00=1",
        "_id=x",
        "limit[$gt]=1",
        "=1",
        "two%0Alines=1",
        "a" * 3000 + "=1",
    ):
        refused(await scene.ask(name, f"{path}?{base}{asked}", None), (name, asked), 400)
    assert await scene.stored() == before
    for place in FAR if "cursor" in ENDPOINTS[name].query else ():
        status, text = found = await scene.ask(name, f"{path}?{base}cursor={place}", None)
        if status != 200:
            refused(found, place, 400)


async def test_what_a_name_may_hold_may_be_searched_for(scene: Scene) -> None:
    ask = scene.node.request
    for user, name in (
        ("zwnj", "\u0639\u0644\u06cc\u200c\u0631\u0636\u0627"),
        ("zwj", "\U0001f468\u200d\U0001f33e Joe"),
    ):
        status, found = await ask("PATCH", "/v1/me", user, "phone", {"name": name})
        assert status == 200, found
        await ask("POST", "/v1/contacts", "ann", "phone", {"user": user})
        await scene.node.group("ann", [user])
        for path in ("/v1/users", "/v1/contacts", "/v1/conversations"):
            status, found = await ask("GET", str(URL(path) % {"q": name}), "ann", "phone")
            assert status == 200, found
            assert len(found["items"]) == 1, (path, found)


async def test_of_two_registrations_of_one_name_at_once_one_is_refused(scene: Scene) -> None:
    name = "POST /v1/auth/register"
    bodies = [{**GOOD[name], "username": spelling, "name": spelling} for spelling in ("Twin", "tWIN")]
    found = await asyncio.gather(*(scene.put(name, body) for body in bodies))
    assert sorted(status for status, _ in found) == [201, 409]
    refused(max(found), "twin", 409)
    assert await scene.node.db.users.count_documents({"username": "twin"}) == 1


async def together(scene: Scene, calls: list[tuple[str, str, Any]]) -> list[tuple[int, Any]]:
    """The answers to requests of ann's that come at once."""
    return await asyncio.gather(
        *(scene.node.request(method, path, "ann", "phone", body) for method, path, body in calls)
    )


async def test_changes_of_different_fields_at_once_all_last(scene: Scene) -> None:
    await scene.renew()
    await scene.node.request("POST", "/v1/contacts", "ann", "phone", {"user": "dora"})
    group = f"/v1/conversations/{scene.group}"
    until = 1_795_221_560_000
    changes: list[tuple[str, list[dict[str, Any]], str]] = [
        (
            "/v1/me",
            [{"name": "Anna"}, {"about": "away"}, {"picture": "p2"}, {"phone": "+493055501"}],
            "/v1/me",
        ),
        (group, [{"name": "Both"}, {"description": "last"}, {"picture": "p3"}], group),
        (f"{group}/me", [{"pinned": True}, {"archived": True}, {"mutedUntil": until}], group),
        ("/v1/contacts/dora", [{"name": "Dodo"}, {"blocked": True}], "/v1/contacts?blocked=true"),
    ]
    for path, fields, shown in changes:
        found = await together(scene, [("PATCH", path, field) for field in fields])
        assert [status for status, _ in found] == [200] * len(fields), found
        _, after = await scene.node.request("GET", shown, "ann", "phone")
        if "items" in after:
            (after,) = [item for item in after["items"] if item["user"] == "dora"]
        if path.endswith("/me") and path != shown:
            after = after["me"]
        for field in fields:
            assert field.items() <= after.items(), (path, field, after)


async def test_what_is_made_twice_at_once_is_made_once(scene: Scene) -> None:
    await scene.renew()
    db, ref, message = scene.node.db, new_id(), new_id()
    for path, body, counted, wanted, statuses in (
        (
            "/v1/conversations",
            {"type": "group", "members": ["bob"], "name": "once", "ref": ref},
            db.conversations,
            {"name": "once"},
            [200] * 9 + [201],
        ),
        (
            "/v1/contacts",
            {"user": "cleo", "name": "Cleo"},
            db.contacts,
            {"owner": "ann", "user": "cleo"},
            [200] * 9 + [201],
        ),
        (
            "/v1/messages",
            {"id": message, "conv": scene.group, "kind": "text", "body": "once"},
            db.messages,
            {"id": message},
            [201] * 10,
        ),
    ):
        found = await together(scene, [("POST", path, body)] * 10)
        assert sorted(status for status, _ in found) == statuses, found
        same = {json.dumps([answer.get("id"), answer.get("user"), answer.get("seq")]) for _, answer in found}
        assert len(same) == 1, found
        assert await counted.count_documents(wanted) == 1


async def test_the_same_report_at_once_is_kept_once(scene: Scene) -> None:
    body = {"user": "cleo", "reason": "abuse", "text": "once"}
    found = await together(scene, [("POST", "/v1/reports", body)] * 10)
    assert sorted(status for status, _ in found) == [200] * 9 + [201], found
    assert len({answer["id"] for _, answer in found}) == 1
    assert await scene.node.db.reports.count_documents({"text": "once"}) == 1


async def test_keys_published_at_once_are_never_mixed(scene: Scene) -> None:
    def upload(number: int, registration: int) -> dict[str, Any]:
        key = base64.b64encode(bytes([number]) * 33).decode()
        return {
            "identityKey": key,
            "registrationId": registration,
            "signedPreKey": {"id": number, "key": key, "signature": key},
            "oneTimePreKeys": [{"id": number, "key": key}],
        }

    same = await together(scene, [("PUT", "/v1/keys", upload(1, 1))] * 8)
    assert [status for status, _ in same] == [200] * 8, same
    assert await scene.node.request("GET", "/v1/keys/count", "ann", "phone") == (
        200,
        {"oneTime": 1, "kem": 0},
    )
    others = await together(scene, [("PUT", "/v1/keys", upload(number, number)) for number in range(2, 8)])
    assert {status for status, _ in others} <= {200, 409}, others
    assert 200 in {status for status, _ in others}
    _, found = await scene.node.request("GET", "/v1/users/ann/keys", "bob", "phone")
    (device,) = [device for device in found["devices"] if device["device"] == "ann/phone"]
    shown = upload(device["signedPreKey"]["id"], device["registrationId"])
    assert device["identityKey"] == shown["identityKey"]
    assert device["signedPreKey"] == shown["signedPreKey"]
    _, claimed = await scene.node.request(
        "POST", "/v1/keys/claim", "bob", "phone", {"devices": ["ann/phone"]}
    )
    one_time = claimed["devices"][0]["oneTimePreKey"]
    assert one_time is None or one_time == shown["oneTimePreKeys"][0]
