"""Accounts and sessions on nodes of their own: other settings, limits, and two nodes on one database."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from config.settings import Settings
from relay.security.refresh import begin
from tests.support.device import Closed
from tests.support.logins import (
    PASSWORD,
    ask,
    awaiting,
    close_code,
    connect,
    device,
    eventually_refused,
    logged_in,
    login,
    minted,
    noted,
    refresh,
    register,
    watched,
    works,
)
from tests.support.node import Node, NodeFactory


async def test_a_relay_whose_tokens_come_from_elsewhere_has_no_accounts(
    nodes: NodeFactory, tmp_path: Path
) -> None:
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    path = tmp_path / "issuer.pem"
    path.write_bytes(
        key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    node = await nodes.start(jwt_secret=None, jwt_public_key_file=path)
    body = {"username": "ann", "password": PASSWORD, "device": device()}
    for name in ("register", "login"):
        status, found = await ask(node, "POST", f"/v1/auth/{name}", body)
        assert (status, found["error"]["code"]) == (403, "forbidden")
    assert (await refresh(node, str(begin())))[0] == 403


async def test_registration_can_be_closed_while_people_still_log_in(nodes: NodeFactory) -> None:
    closed = await nodes.start(registration=False)
    await closed.relay.context.sessions.register("ann", PasswordHasher().hash(PASSWORD))
    body = {"username": "bob", "password": PASSWORD, "device": device()}
    assert (await ask(closed, "POST", "/v1/auth/register", body))[0] == 403
    assert (await login(closed, "ann"))[0] == 200


async def test_there_are_no_more_devices_than_allowed(nodes: NodeFactory) -> None:
    node = await nodes.start(max_devices=2)
    made = await register(node)
    await logged_in(node, made, "tablet")
    status, found = await login(node, made, "laptop")
    assert (status, found["error"]["code"]) == (409, "conflict")
    assert len(await noted(node, made["user"]["id"], "session.open")) == 2
    await logged_in(node, made, "tablet")
    assert (await ask(node, "DELETE", "/v1/auth/devices/tablet", token=made["accessToken"]))[0] == 200
    await logged_in(node, made, "laptop")
    await asyncio.gather(*(login(node, made, f"d{number}") for number in range(4)))
    _, listed = await ask(node, "GET", "/v1/auth/devices", token=made["accessToken"])
    assert len(listed["items"]) == 2


async def test_a_storm_of_log_ins_is_bounded_and_told_to_come_back(nodes: NodeFactory) -> None:
    node = await nodes.start(password_queue=3)
    made = await register(node)
    found = await asyncio.gather(*(login(node, "nobody", f"d{number}") for number in range(20)))
    statuses = [status for status, _ in found]
    assert statuses.count(401) >= 4
    assert statuses.count(503) >= 10
    assert set(statuses) == {401, 503}
    assert (await login(node, made))[0] == 200, "afterwards there is room"


async def test_log_ins_over_the_limit_of_an_account_cost_no_work(
    nodes: NodeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await nodes.start(rate_login_account="2/minute")
    await register(node, "ann")
    verified = watched(node, monkeypatch)
    found = [await login(node, name, password="wrong password") for name in ("ann", "ANN", "Ann")]
    assert [status for status, _ in found] == [401, 401, 429]
    assert len(verified) == 2
    assert (await login(node, "bob"))[0] == 401


async def test_the_phones_behind_one_address_can_all_renew_their_sessions(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_refresh=Settings.model_fields["rate_refresh"].default)
    found = [(await refresh(node, str(begin())))[0] for _ in range(200)]
    assert set(found) == {401}, "unknown tokens, but not too many"


async def test_one_address_asks_and_connects_only_so_often(nodes: NodeFactory) -> None:
    limits = {
        "rate_login_address": ("2/minute", "/v1/auth/login"),
        "rate_register": ("3/minute", "/v1/auth/register"),
        "rate_refresh": ("4/minute", "/v1/auth/refresh"),
    }
    rates: dict[str, Any] = {setting: rate for setting, (rate, _) in limits.items()}
    node = await nodes.start(rate_connect="2/minute", **rates)
    for rate, path in limits.values():
        for expected in [400] * int(rate[0]) + [429]:
            async with node.http.post(node.url + path, json={}) as response:
                assert response.status == expected, path
                assert ("Retry-After" in response.headers) == (expected == 429)
    # Sockets are upgraded first: browsers see no status.
    for user in ("ann", "bob"):
        await node.connect(user)
    with pytest.raises(Closed) as caught:
        await node.connect("cleo")
    assert caught.value.code == 4429


@pytest.fixture
async def two_nodes(nodes: NodeFactory, monkeypatch: pytest.MonkeyPatch) -> tuple[Node, Node]:
    """Two nodes on one database. These tests are about tokens, not about recipients: a change does not wait until the other
    node's leases have run out."""
    here, there = await nodes.start(), await nodes.start()
    for found in (here, there):
        monkeypatch.setattr(found.relay.context.invalidation, "lease", 0.0)
    return here, there


async def test_a_revocation_holds_on_another_node_within_five_seconds(two_nodes: tuple[Node, Node]) -> None:
    here, there = two_nodes
    ann = await register(here)
    tablet = await logged_in(here, ann, "tablet")
    socket = await connect(there, tablet["accessToken"])
    phone = await connect(there, ann["accessToken"])
    assert await works(there, tablet["accessToken"]) and await works(there, tablet["accessToken"])
    began = time.monotonic()
    await ask(here, "DELETE", "/v1/auth/devices/tablet", token=ann["accessToken"])
    assert await close_code(there, tablet["accessToken"]) == 4401, "a new connection asks the store"
    assert await socket.closed(5) == 4401
    await eventually_refused(there, tablet["accessToken"], "the other node refuses the token")
    assert time.monotonic() - began < 5
    await phone.put({"t": "ping"})
    await phone.expect("pong")
    assert await works(there, ann["accessToken"])


async def test_under_auto_provision_a_revoked_device_comes_back_only_with_a_newer_token(
    two_nodes: tuple[Node, Node],
) -> None:
    here, there = two_nodes
    old, laptop = minted("ann", -2, "tablet"), minted("ann", -2, "laptop")
    sockets = [await connect(here, old), await connect(there, laptop)]
    conv = await here.direct("bob", "ann")
    bob = await here.connect("bob")
    message = await bob.sent(conv)
    assert await works(there, old)
    for name in ("tablet", "laptop"):
        assert (await here.request("DELETE", f"/v1/auth/devices/{name}", "ann", "phone"))[0] == 200
    assert not await works(here, old)
    assert await sockets[0].closed() == 4401
    assert await sockets[1].closed(5) == 4401
    # The phone came only to revoke the others.
    assert await awaiting(here, message["id"]) <= {"ann/phone"}
    await eventually_refused(there, old, "the other node refuses the token")
    for node in (here, there):
        assert await close_code(node, old) == 4401
    # A token says in whole seconds when it was issued.
    again = await connect(there, minted("ann", 2, "tablet"))
    assert again.welcome["gap"]["why"] == "reset"
    assert await close_code(here, old) == 4401, "the older token stays bad"
