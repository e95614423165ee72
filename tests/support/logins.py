"""People with passwords, and tokens of other issuers: registration, log-in, renewal over HTTP, and sockets."""

from __future__ import annotations

import time
import uuid
from typing import Any

import pytest

from relay.security.tokens import mint
from tests.support.device import Closed, WireDevice
from tests.support.node import SECRET, Node
from tests.support.waiting import until

PASSWORD = "correct horse battery"
Answer = tuple[int, Any]


def somebody(name: str = "ann") -> str:
    """A user name, or the id of a user of another issuer, that no other test uses."""
    return f"{name}-{uuid.uuid4().hex[:12]}"


async def ask(node: Node, method: str, path: str, body: Any = None, token: str | None = None) -> Answer:
    """A request with a token of one's own, or without any: status and parsed answer."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with node.http.request(method, node.url + path, json=body, headers=headers) as response:
        return response.status, await response.json()


def device(name: str | None = "phone", **fields: Any) -> dict[str, Any]:
    return {"name": "a device", "platform": "ios", **({} if name is None else {"id": name}), **fields}


async def register(node: Node, username: str | None = None, **fields: Any) -> dict[str, Any]:
    body = {"username": username or somebody(), "password": PASSWORD, "device": device(), **fields}
    status, found = await ask(node, "POST", "/v1/auth/register", body)
    assert status == 201, found
    return dict(found)


async def login(
    node: Node,
    who: str | dict[str, Any],
    name: str | None = "phone",
    password: str = PASSWORD,
    **fields: Any,
) -> Answer:
    """``who``: a user name, or what registration answered."""
    username = who if isinstance(who, str) else who["user"]["username"]
    body = {"username": username, "password": password, "device": device(name, **fields)}
    return await ask(node, "POST", "/v1/auth/login", body)


async def logged_in(
    node: Node, who: str | dict[str, Any], name: str | None = "phone", **fields: Any
) -> dict[str, Any]:
    status, found = await login(node, who, name, **fields)
    assert status == 200, found
    return dict(found)


async def refresh(node: Node, token: str) -> Answer:
    return await ask(node, "POST", "/v1/auth/refresh", {"refreshToken": token})


async def works(node: Node, token: str) -> bool:
    status, _ = await ask(node, "GET", "/v1/auth/devices", token=token)
    assert status in (200, 401)
    return status == 200


async def connect(node: Node, token: str, user: str = "", name: str = "phone") -> WireDevice:
    socket = await node.http.ws_connect(
        node.url + "/v1/ws", headers={"Authorization": f"Bearer {token}"}, protocols=("relay.v1",)
    )
    found = WireDevice(socket, user, name)
    node._devices.append(found)
    # Beside another node a new device waits for that one's leases.
    found.welcome = await found.expect("welcome", seconds=12)
    return found


async def close_code(node: Node, token: str) -> int | None:
    with pytest.raises(Closed) as caught:
        await connect(node, token)
    return caught.value.code


async def awaiting(node: Node, message: str) -> set[str]:
    """Who has not acknowledged a message; nobody when it is gone."""
    document = await node.db.messages.find_one({"id": message})
    return set(document["awaiting"]) if document else set()


async def noted(node: Node, user: str, act: str) -> list[dict[str, Any]]:
    """The entries of this act about a user in the audit trail, newest first."""
    return await node.relay.context.audit.page(limit=100, user=user, act=act)


def minted(user: str, seconds: float, name: str = "phone") -> str:
    """A token of another issuer, issued so many seconds from now."""
    return mint(SECRET, user, name, audience="relay", lifetime=600, now=time.time() + seconds)


async def eventually_refused(node: Node, token: str, what: str) -> float:
    """Waits until HTTP refuses a token; how long that took."""
    began = time.monotonic()

    async def refused() -> bool:
        return not await works(node, token)

    await until(refused, 5, what)
    return time.monotonic() - began


def watched(node: Node, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Notes which hashes the node verifies from now on."""
    passwords, verified = node.relay.context.passwords, list[str | None]()
    verify = passwords.verify

    async def noting(hashed: str | None, password: str) -> bool:
        verified.append(hashed)
        return await verify(hashed, password)

    monkeypatch.setattr(passwords, "verify", noting)
    return verified
