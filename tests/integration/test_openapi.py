"""``/openapi.json``: valid, complete, and what it says is what is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from openapi_spec_validator import validate
from pydantic import BaseModel

from handlers.http.openapi import TAGS, codes_of, document
from handlers.http.routes import ROUTES
from relay.wire.codec import decode_send
from relay.wire.errors import CODES
from tests.support.device import new_id
from tests.support.node import Node, NodeFactory

DOCUMENT = document(ROUTES)
KEY = {"id": 1, "key": "a2V5", "signature": "c2ln"}
PASSWORD = "correct horse battery staple"
# Answers that are no JSON, or whose JSON has a description of its own.
OTHERWISE = {("GET", "/metrics"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/asyncapi.json")}


async def description(node: Node) -> dict[str, Any]:
    async with node.http.get(node.url + "/openapi.json") as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        found: dict[str, Any] = await answer.json()
        return found


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def problems(schema: dict[str, Any], value: Any) -> list[str]:
    validator = Draft202012Validator({**schema, "components": DOCUMENT["components"]})
    return [error.message for error in validator.iter_errors(value)]


class Checked:
    """Requests whose answers are checked against the description; ``seen`` notes route and status."""

    def __init__(self, node: Node, document: dict[str, Any]) -> None:
        self.node = node
        self.document = document
        self.seen: set[tuple[str, str, int]] = set()

    async def ask(
        self,
        method: str,
        route: str,
        path: str = "",
        body: Any = None,
        user: str = "ann",
        device: str = "phone",
    ) -> Any:
        headers = self.node.headers(user, device) if user else {}
        url = self.node.url + (path or route)
        async with self.node.http.request(method, url, json=body, headers=headers) as answer:
            self.seen.add((method, route, answer.status))
            described = self.document["paths"][route][method.lower()]["responses"]
            assert str(answer.status) in described, (method, route, answer.status, await answer.text())
            found = described[str(answer.status)]
            assert list(found["content"]) == [answer.content_type]
            assert set(found.get("headers", {})) - {"Retry-After"} <= set(answer.headers)
            if answer.content_type != "application/json":
                return await answer.read()
            value = await answer.json()
            schema = found["content"]["application/json"]["schema"]
            assert problems(schema, value) == [], (method, route, answer.status)
            return value


async def test_the_description_is_valid_openapi_with_unique_operation_ids(node: Node) -> None:
    found = await description(node)
    validate(found)
    assert found == json.loads(json.dumps(DOCUMENT))
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(names) == len(set(names))


def test_every_route_is_described_and_nothing_else() -> None:
    assert {(method, path) for method, path, _ in operations()} == {
        (route.method, route.path) for route in ROUTES if not route.hidden
    }
    for route in ROUTES:
        if route.hidden:
            continue
        operation = DOCUMENT["paths"][route.path][route.method.lower()]
        assert (operation.get("security") == []) == route.open, route.path
        assert ("401" in operation["responses"]) or route.open, route.path
        assert {int(status) for status in operation["responses"]} == {
            *route.answers,
            *(CODES[code].status for code in codes_of(route)),
        }


def test_every_operation_says_what_it_does_and_takes() -> None:
    unsaid: list[tuple[str, ...]] = []
    for method, path, operation in operations():
        if len(operation["description"]) < 10 or not operation["summary"] or operation["tags"][0] not in TAGS:
            unsaid.append((method, path))
        for parameter in operation.get("parameters", ()):
            if not parameter.get("description"):
                unsaid.append((method, path, parameter["name"]))
        for status, answer in operation["responses"].items():
            if not answer["description"]:
                unsaid.append((method, path, status))
    assert unsaid == []
    assert [tag["name"] for tag in DOCUMENT["tags"]] == [name for name in TAGS if name in used_tags()]
    assert all(tag["description"] for tag in DOCUMENT["tags"])


def used_tags() -> set[str]:
    return {operation["tags"][0] for _, _, operation in operations()}


def test_errors_name_their_codes_and_headers() -> None:
    for method, path, operation in operations():
        for status, answer in operation["responses"].items():
            for code, example in (
                answer.get("content", {}).get("application/json", {}).get("examples", {}).items()
            ):
                assert CODES[code].status == int(status), (method, path)
                assert problems(answer["content"]["application/json"]["schema"], example["value"]) == []
                other = {"error": {"code": "unheard", "message": "x"}}
                assert problems(answer["content"]["application/json"]["schema"], other)
            if status == "429":
                assert "Retry-After" in answer["headers"], (method, path)
            if status == "401":
                assert "WWW-Authenticate" in answer["headers"], (method, path)


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.request], ids=lambda one: f"{one.method} {one.path}"
)
def test_the_example_of_a_request_is_one(route: Any) -> None:
    content = DOCUMENT["paths"][route.path][route.method.lower()]["requestBody"]["content"][
        "application/json"
    ]
    example = content["example"]
    assert problems(content["schema"], example) == []
    if issubclass(route.request, BaseModel):
        route.request.model_validate(example)
    else:
        decode_send(example)


def test_the_example_of_an_answer_is_one() -> None:
    without = []
    for method, path, operation in operations():
        for status, answer in operation["responses"].items():
            content = answer.get("content", {}).get("application/json", {})
            if status < "300" and (method, path) not in OTHERWISE and content:
                if "example" not in content:
                    without.append((method, path))
                else:
                    assert problems(content["schema"], content["example"]) == [], (method, path, status)
    assert without == []


async def test_who_registers_with_the_example_logs_in_with_the_example(node: Node) -> None:
    for path, status in (("/v1/auth/register", 201), ("/v1/auth/login", 200)):
        body = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
        async with node.http.post(node.url + path, json=body) as answer:
            assert answer.status == status, await answer.text()


def test_the_examples_of_answers_agree_with_themselves() -> None:
    for method, path, operation in operations():
        for answer in operation["responses"].values():
            for one in parts(answer.get("content", {}).get("application/json", {}).get("example")):
                if "memberCount" in one:
                    assert one["type"] == "group", (method, path)
                    assert one["memberCount"] == len(one["members"]), (method, path)
                    assert one["me"]["role"] in [member["role"] for member in one["members"]], (method, path)
                if "profile" in one:
                    assert one["profile"]["id"] == one["user"], (method, path)
                    assert one["listed"], (method, path)


def parts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(one)


async def test_every_route_answers_as_described(node: Node) -> None:
    checked = Checked(node, await description(node))
    ask = checked.ask
    for path in ("/v1/info", "/livez", "/readyz", "/metrics", "/openapi.json", "/asyncapi.json", "/docs"):
        await ask("GET", path, user="")
    await accounts(checked)
    conv = await conversations(checked)
    await messages(checked, conv)
    await people(checked)
    await keys(checked)
    await ask("GET", "/v1/me/export")
    await ask("DELETE", "/v1/me", user="dan")
    reached = {(method, route) for method, route, status in checked.seen if status < 300}
    assert {(method, path) for method, path, _ in operations()} - reached == set()


async def accounts(checked: Checked) -> None:
    ask = checked.ask
    device = {"id": "phone", "name": "phone", "platform": "web"}
    login = {"username": "eve.example", "password": PASSWORD, "device": device}
    made = await ask("POST", "/v1/auth/register", body=login, user="")
    await ask("POST", "/v1/auth/login", body={**login, "device": {**device, "id": "tablet"}}, user="")
    await ask("POST", "/v1/auth/refresh", body={"refreshToken": made["refreshToken"]}, user="")
    headers = {"Authorization": f"Bearer {made['accessToken']}"}
    async with checked.node.http.get(checked.node.url + "/v1/auth/devices", headers=headers) as answer:
        assert len((await answer.json())["items"]) == 2
    await ask("GET", "/v1/auth/devices")
    await ask("GET", "/v1/auth/devices", user="ann", device="old")
    await ask("DELETE", "/v1/auth/devices/{device}", "/v1/auth/devices/old")
    await ask("POST", "/v1/auth/logout", user="fay")


async def conversations(checked: Checked) -> str:
    ask = checked.ask
    for user in ("bob", "cleo", "dan"):
        await ask("GET", "/v1/sync", user=user)
    direct = await ask("POST", "/v1/conversations", body={"type": "direct", "members": ["bob"]})
    await ask("POST", "/v1/conversations", body={"type": "direct", "members": ["bob"]})
    group = await ask("POST", "/v1/conversations", body={"type": "group", "members": ["bob"], "name": "g"})
    route = "/v1/conversations/{id}"
    path = f"/v1/conversations/{group['id']}"
    await ask("GET", "/v1/conversations")
    await ask("GET", "/v1/conversations", "/v1/conversations?limit=1&q=g")
    await ask("GET", route, path)
    await ask("PATCH", route, path, {"name": "renamed"})
    await ask("PATCH", f"{route}/me", f"{path}/me", {"pinned": True})
    await ask("GET", f"{route}/members", f"{path}/members?limit=1")
    await ask("POST", f"{route}/members", f"{path}/members", {"users": ["cleo", "dan"]})
    await ask("PATCH", f"{route}/members/{{user}}", f"{path}/members/cleo", {"role": "moderator"})
    await ask("DELETE", f"{route}/members/{{user}}", f"{path}/members/cleo")
    await ask("GET", f"{route}/devices", f"{path}/devices")
    await ask("DELETE", route, path)
    first = await ask("GET", "/v1/changes")
    await ask("GET", "/v1/changes", f"/v1/changes?since={first['next']}")
    return str(direct["id"])


async def messages(checked: Checked, conv: str) -> None:
    ask = checked.ask
    body: dict[str, Any] = {"id": new_id(), "conv": conv, "kind": "text", "body": {"a": 1}, "media": ["m"]}
    await ask("POST", "/v1/messages", body=body)
    sealed = {"sealed": {"bob/phone": "YQ=="}, "body": None, "replyTo": body["id"]}
    await ask("POST", "/v1/messages", body={**body, "id": new_id(), **sealed})
    route = "/v1/conversations/{id}/messages"
    page = await ask("GET", route, f"/v1/conversations/{conv}/messages", user="bob")
    assert len(page["items"]) == 2
    page = await ask("GET", "/v1/sync", "/v1/sync?limit=1", user="bob")
    assert page["next"]
    await ask("POST", "/v1/acks", body={"acks": [{"conv": conv, "ids": [body["id"]]}]}, user="bob")


async def people(checked: Checked) -> None:
    ask = checked.ask
    await ask(
        "PATCH", "/v1/me", body={"name": "Ann", "about": "here", "preferences": {"whoMayAdd": "contacts"}}
    )
    await ask("GET", "/v1/me")
    await ask("PUT", "/v1/me/push", body={"provider": "fcm", "token": "t"})
    await ask("DELETE", "/v1/me/push")
    await ask("GET", "/v1/users", "/v1/users?q=eve")
    await ask("GET", "/v1/users/{id}", "/v1/users/bob")
    await ask("GET", "/v1/me/searches")
    await ask("DELETE", "/v1/me/searches")
    await ask("POST", "/v1/contacts", body={"user": "bob", "name": "Bob"})
    await ask("POST", "/v1/contacts", body={"user": "bob", "name": "Bobby"})
    await ask("GET", "/v1/contacts")
    await ask("GET", "/v1/contacts/online")
    await ask("PATCH", "/v1/contacts/{user}", "/v1/contacts/bob", {"blocked": True})
    await ask("GET", "/v1/contacts", "/v1/contacts?blocked=true")
    await ask("DELETE", "/v1/contacts/{user}", "/v1/contacts/bob")
    await ask("POST", "/v1/reports", body={"user": "bob", "reason": "spam"})


async def keys(checked: Checked) -> None:
    ask = checked.ask
    body = {"identityKey": "aWQ=", "signedPreKey": KEY, "oneTimePreKeys": [{"id": 1, "key": "a2V5"}]}
    await ask("PUT", "/v1/keys", body=body)
    await ask("GET", "/v1/keys/count")
    await ask("GET", "/v1/users/{id}/keys", "/v1/users/ann/keys", user="bob")
    await ask("POST", "/v1/keys/claim", body={"devices": ["ann/phone", "bob/none"]}, user="bob")
    await ask("PUT", "/v1/keys", body={**body, "lastResort": KEY, "kemPreKeys": [KEY]})
    await ask("POST", "/v1/keys/claim", body={"devices": ["ann/phone"]}, user="bob")


async def test_every_error_answers_as_described(node: Node) -> None:
    checked = Checked(node, await description(node))
    ask = checked.ask
    await ask("POST", "/v1/conversations", body={"type": "x"})
    await ask("POST", "/v1/conversations", body={"type": "group", "members": [], "name": "n" * 300_000})
    await ask("GET", "/v1/conversations", "/v1/conversations?limit=0")
    await ask("GET", "/v1/sync", "/v1/sync?limit=0")
    for route in (
        "/v1/conversations/{id}",
        "/v1/conversations/{id}/devices",
        "/v1/conversations/{id}/messages",
    ):
        await ask("GET", route, route.replace("{id}", "absent"))
    conv = await node.direct("ann", "bob")
    body: dict[str, Any] = {"id": new_id(), "conv": conv, "kind": "text", "body": "x"}
    await ask("POST", "/v1/messages", body=body)
    for change in (
        {"kind": "system"},
        {"conv": "absent"},
        {"body": "x" * 70_000},
        {"sealed": {"cleo/phone": "YQ=="}, "id": new_id()},
    ):
        await ask("POST", "/v1/messages", body={**body, **change})
    await ask("POST", "/v1/messages", body=body, user="bob")
    await ask(
        "POST",
        "/v1/messages",
        body={"id": new_id(), "conv": conv, "kind": "withdrawn", "replyTo": body["id"]},
        user="bob",
    )
    await ask("POST", "/v1/acks", body={})
    await ask("POST", "/v1/acks", body={"acks": [], "x": "n" * 300_000})
    for protected in ROUTES:
        if not protected.open:
            path = protected.path.translate({ord("{"): "", ord("}"): ""})
            await ask(protected.method, protected.path, path, body={}, user="")
    assert {status for _, _, status in checked.seen} == {201, 400, 401, 403, 404, 409, 413}


async def test_a_store_that_does_not_answer_is_an_error_that_every_route_describes(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(commit_timeout_seconds=0.3, send_deadline_seconds=0.6)
    checked = Checked(node, await description(node))
    conv = await node.direct("ann", "bob")
    await checked.ask("GET", "/v1/sync")
    checked.seen.clear()
    failing = {
        "failCommands": ["find", "insert", "aggregate", "update", "delete", "findAndModify"],
        "errorCode": 50,
        "appName": "relay",
    }
    admin = node.db.client.admin
    await admin.command({"configureFailPoint": "failCommand", "mode": "alwaysOn", "data": failing})
    silent = {"/livez", "/readyz", "/metrics", "/v1/info", "/docs", "/openapi.json", "/asyncapi.json"}
    undescribed = []
    try:
        for method, path, operation in operations():
            if path in silent:
                continue
            url = path.replace("/conversations/{id}", f"/conversations/{conv}")
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    url = url.replace("{" + parameter["name"] + "}", "bob")
            body = (
                operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
            )
            try:
                await checked.ask(method, path, url + "?q=eve" * (path == "/v1/users"), body)
            except AssertionError as problem:
                undescribed.append(str(problem).partition("\n")[0])
    finally:
        await admin.command({"configureFailPoint": "failCommand", "mode": "off"})
    assert undescribed == []
    answered = {(method, path): status for method, path, status in checked.seen if status != 503}
    # A refresh token that has not the form of one is refused without asking the store.
    assert answered == {("POST", "/v1/auth/refresh"): 401}


async def test_the_limit_of_a_page_is_the_one_described(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    found = {}
    for _, path, operation in operations():
        for parameter in operation.get("parameters", ()):
            if parameter["name"] == "limit":
                most = parameter["schema"]["maximum"]
                url = path.replace("{id}", conv)
                more = "&q=eve" if path == "/v1/users" else ""
                found[path] = [
                    (await node.request("GET", f"{url}?limit={limit}{more}", "ann", "phone"))[0]
                    for limit in (most, most + 1)
                ]
    assert len(found) >= 7
    assert found == {path: [200, 400] for path in found}
