"""Which acts are in the audit trail: every endpoint that changes something stands in the table, with what is recorded of it."""

from __future__ import annotations

from typing import Any, Final

from handlers.http.routes import ROUTES
from tests.support.device import new_id
from tests.support.logins import PASSWORD, device, register, somebody
from tests.support.node import Node

KEY: Final = "BU6pMRmRvJ7P0bnEkEgcOBoqQNOj8C1rk9mrqGmnbJdb"
KEYS: Final[dict[str, Any]] = {
    "identityKey": KEY,
    "registrationId": 7,
    "signedPreKey": {"id": 1, "key": KEY, "signature": KEY},
    "oneTimePreKeys": [{"id": 1, "key": KEY}],
}
# In this order, on a new account and its phone. `{…}` is what came before. What concerns only how a person's own list looks,
# what is handed out to whoever may ask, and messages are no acts of the trail.
TABLE: Final[list[tuple[str, Any, list[str]]]] = [
    (
        "POST /v1/auth/register",
        {"username": "{name}", "password": PASSWORD, "device": device("phone")},
        ["account.register", "session.open"],
    ),
    (
        "POST /v1/auth/login",
        {"username": "{name}", "password": PASSWORD, "device": device("tablet")},
        ["session.open"],
    ),
    ("POST /v1/auth/refresh", {"refreshToken": "{refresh}"}, []),
    ("DELETE /v1/auth/devices/tablet", None, ["device.revoke"]),
    ("PATCH /v1/me", {"name": "Somebody"}, ["profile.change"]),
    ("PUT /v1/me/push", {"provider": "fcm", "token": "one"}, ["push.set"]),
    ("DELETE /v1/me/push", None, ["push.unset"]),
    ("DELETE /v1/me/searches", None, []),
    ("PUT /v1/keys", KEYS, ["keys.publish"]),
    ("POST /v1/keys/claim", {"devices": ["{friend}/phone"]}, []),
    ("POST /v1/contacts", {"user": "{friend}"}, []),
    ("PATCH /v1/contacts/{friend}", {"blocked": True}, ["contact.block"]),
    ("PATCH /v1/contacts/{friend}", {"blocked": False}, ["contact.unblock"]),
    ("PATCH /v1/contacts/{friend}", {"name": "old friend"}, []),
    ("DELETE /v1/contacts/{friend}", None, []),
    ("POST /v1/reports", {"user": "{friend}", "reason": "spam"}, ["report.add"]),
    ("POST /v1/conversations", {"type": "direct", "members": ["{friend}"]}, []),
    ("POST /v1/conversations", {"type": "group", "members": [], "name": "us"}, ["conversation.create"]),
    ("PATCH /v1/conversations/{id}", {"name": "all of us"}, ["conversation.change"]),
    ("PATCH /v1/conversations/{id}/me", {"pinned": True}, []),
    ("POST /v1/conversations/{id}/members", {"users": ["{friend}"]}, ["member.add"]),
    ("PATCH /v1/conversations/{id}/members/{friend}", {"role": "moderator"}, ["member.role"]),
    ("DELETE /v1/conversations/{id}/members/{friend}", None, ["member.remove"]),
    ("POST /v1/messages", {"id": new_id(), "conv": "{id}", "kind": "text", "body": "x"}, []),
    ("POST /v1/acks", {"acks": [{"conv": "{id}", "ids": [new_id()]}]}, []),
    ("DELETE /v1/conversations/{id}", None, ["conversation.dissolve"]),
    ("GET /v1/me/export", None, ["me.export"]),
    ("POST /v1/auth/logout", None, ["device.revoke"]),
    (
        "POST /v1/auth/login",
        {"username": "{name}", "password": PASSWORD, "device": device("phone")},
        ["session.open"],
    ),
    ("DELETE /v1/me", None, ["me.erase"]),
]


def filled(value: Any, names: dict[str, str]) -> Any:
    """The same with what came before in place of its name."""
    match value:
        case str():
            for name, found in names.items():
                value = value.replace(f"{{{name}}}", found)
            return value
        case dict():
            return {key: filled(one, names) for key, one in value.items()}
        case list():
            return [filled(one, names) for one in value]
        case _:
            return value


def endpoint(line: str) -> str:
    """The route that a line of the table asks."""
    method, _, path = line.partition(" ")
    for route in ROUTES:
        if route.method == method and matches(route.path, path):
            return f"{method} {route.path}"
    raise AssertionError(f"{line} is no route")


def matches(route: str, path: str) -> bool:
    parts, found = route.split("/"), path.split("/")
    return len(parts) == len(found) and all(
        part == one or part.startswith("{") for part, one in zip(parts, found, strict=True)
    )


def test_every_endpoint_that_changes_something_stands_in_the_table() -> None:
    changing = {f"{route.method} {route.path}" for route in ROUTES if route.method != "GET"}
    assert {endpoint(line) for line, _, _ in TABLE} == changing | {"GET /v1/me/export"}


async def test_what_is_done_is_recorded_as_the_table_says(node: Node) -> None:
    friend = await register(node)
    names = {"name": somebody(), "friend": friend["user"]["id"]}
    token = ""
    for line, body, acts in TABLE:
        method, _, path = line.partition(" ")
        seen = await node.db.audit.count_documents({})
        async with node.http.request(
            method,
            node.url + filled(path, names),
            json=filled(body, names),
            headers={"Authorization": f"Bearer {token}"} if token else {},
        ) as response:
            assert response.status in (200, 201), (line, await response.text())
            found = await response.json() if response.content_type == "application/json" else {}
            await response.read()
        rows = await node.db.audit.find({}, {"act": 1}).sort("_id", 1).skip(seen).to_list(None)
        assert [row["act"] for row in rows] == acts, line
        if found.get("device", {}).get("id") == "phone":
            token, names["refresh"] = found["accessToken"], found["refreshToken"]
        if path == "/v1/conversations":
            names["id"] = found["id"]
    assert (await node.relay.context.audit.verify()).holds
