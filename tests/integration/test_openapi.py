"""``/openapi.json``: valid, complete, and what it says is what is answered."""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from openapi_spec_validator import validate

from handlers.http.routes import ROUTES
from tests.support.device import new_id
from tests.support.node import Node, NodeFactory


async def description(node: Node) -> dict[str, Any]:
    async with node.http.get(node.url + "/openapi.json") as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        found: dict[str, Any] = await answer.json()
        return found


class Checked:
    """Requests whose answers are checked against the description; ``seen`` notes route and status."""

    def __init__(self, node: Node, document: dict[str, Any]) -> None:
        self.node = node
        self.document = document
        self.seen: set[tuple[str, str, int]] = set()

    async def ask(self, method: str, route: str, path: str = "", body: Any = None, user: str = "ann") -> Any:
        headers = self.node.headers(user, "phone") if user else {}
        url = self.node.url + (path or route)
        async with self.node.http.request(method, url, json=body, headers=headers) as answer:
            self.seen.add((method, route, answer.status))
            described = self.document["paths"][route][method.lower()]["responses"]
            assert str(answer.status) in described, (method, route, answer.status)
            media = described[str(answer.status)]["content"]
            assert list(media) == [answer.content_type]
            if answer.content_type != "application/json":
                return await answer.text()
            value = await answer.json()
            schema = media["application/json"]["schema"]
            validator = Draft202012Validator({**schema, "components": self.document["components"]})
            problems = [error.message for error in validator.iter_errors(value)]
            assert problems == [], (method, route, answer.status)
            return value


async def test_the_description_is_valid_openapi_with_unique_operation_ids(node: Node) -> None:
    document = await description(node)
    validate(document)
    names = [op["operationId"] for path in document["paths"].values() for op in path.values()]
    assert len(names) == len(set(names))
    for path in document["paths"].values():
        for op in path.values():
            assert op["summary"]


async def test_every_route_is_described_and_nothing_else(node: Node) -> None:
    document = await description(node)
    described = {(method.upper(), path) for path, ops in document["paths"].items() for method in ops}
    assert described == {(route.method, route.path) for route in ROUTES}
    for route in ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        assert (operation.get("security") == []) == route.open, route.path
        assert ("401" in operation["responses"]) != route.open, route.path


async def test_every_route_answers_as_described(node: Node) -> None:
    ask = Checked(node, await description(node)).ask
    made = await ask("POST", "/v1/conversations", body={"type": "direct", "members": ["bob"]})
    await ask("POST", "/v1/conversations", body={"type": "direct", "members": ["bob"]})
    conv = made["id"]
    await ask("GET", "/v1/sync", user="bob")
    body: dict[str, Any] = {"id": new_id(), "conv": conv, "kind": "text", "body": {"a": 1}, "media": ["m"]}
    await ask("POST", "/v1/messages", body=body)
    sealed = {"sealed": {"bob/phone": "YQ=="}, "body": None, "replyTo": body["id"]}
    await ask("POST", "/v1/messages", body={**body, "id": new_id(), **sealed})
    await ask("GET", "/v1/conversations")
    await ask("GET", "/v1/conversations/{id}", f"/v1/conversations/{conv}")
    await ask("GET", "/v1/conversations/{id}/devices", f"/v1/conversations/{conv}/devices")
    page = await ask(
        "GET", "/v1/conversations/{id}/messages", f"/v1/conversations/{conv}/messages", user="bob"
    )
    assert len(page["items"]) == 2
    page = await ask("GET", "/v1/sync", "/v1/sync?limit=1", user="bob")
    assert page["next"]
    await ask("POST", "/v1/acks", body={"acks": [{"conv": conv, "ids": [body["id"]]}]}, user="bob")
    for path in ("/v1/info", "/livez", "/readyz", "/metrics", "/openapi.json"):
        await ask("GET", path, user="")


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
            path = protected.path.replace("{id}", "x")
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
    try:
        undescribed = []
        for method, route, body in (
            ("GET", "/v1/sync", None),
            ("GET", "/v1/conversations", None),
            ("GET", "/v1/conversations/{id}", None),
            ("GET", "/v1/conversations/{id}/messages", None),
            ("POST", "/v1/conversations", {"type": "group", "members": []}),
            ("POST", "/v1/messages", {"id": new_id(), "conv": conv, "kind": "text", "body": "x"}),
            ("POST", "/v1/acks", {"acks": [{"conv": conv, "ids": [new_id()]}]}),
        ):
            try:
                await checked.ask(method, route, route.replace("{id}", conv), body)
            except AssertionError as problem:
                undescribed.append(str(problem).partition("\n")[0])
    finally:
        await admin.command({"configureFailPoint": "failCommand", "mode": "off"})
    assert {status for _, _, status in checked.seen} == {503}
    assert undescribed == []


async def test_the_limit_of_a_page_is_the_one_described(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    found = {}
    for path, operations in (await description(node))["paths"].items():
        for parameter in operations.get("get", {}).get("parameters", ()):
            if parameter["name"] == "limit":
                most = parameter["schema"]["maximum"]
                url = path.replace("{id}", conv)
                found[path] = [
                    (await node.request("GET", f"{url}?limit={limit}", "ann", "phone"))[0]
                    for limit in (most, most + 1)
                ]
    assert len(found) == 3
    assert found == {path: [200, 400] for path in found}
