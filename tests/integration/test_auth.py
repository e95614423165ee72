"""Accounts and sessions over HTTP and WebSocket: registration, log-in, renewal, revocation on one node and on two."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from argon2 import PasswordHasher
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from relay.security.refresh import begin
from tests.support.device import Closed, WireDevice, new_id
from tests.support.node import SECRET, Node, NodeFactory
from tests.support.waiting import until

PASSWORD = "correct horse battery"
Answer = tuple[int, Any]


async def ask(node: Node, method: str, path: str, body: Any = None, token: str | None = None) -> Answer:
    """A request with a token of one's own, or without any: status and parsed answer."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with node.http.request(method, node.url + path, json=body, headers=headers) as response:
        return response.status, await response.json()


def device(name: str | None = "phone", **fields: Any) -> dict[str, Any]:
    return {"name": "a device", "platform": "ios", **({} if name is None else {"id": name}), **fields}


async def register(node: Node, username: str = "ann", **fields: Any) -> dict[str, Any]:
    body = {"username": username, "password": PASSWORD, "device": device(), **fields}
    status, found = await ask(node, "POST", "/v1/auth/register", body)
    assert status == 201, found
    return dict(found)


async def login(
    node: Node, name: str | None = "phone", username: str = "ann", password: str = PASSWORD, **fields: Any
) -> Answer:
    body = {"username": username, "password": password, "device": device(name, **fields)}
    return await ask(node, "POST", "/v1/auth/login", body)


async def logged_in(
    node: Node, name: str | None = "phone", username: str = "ann", **fields: Any
) -> dict[str, Any]:
    status, found = await login(node, name, username, **fields)
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
    found.welcome = await found.expect("welcome")
    return found


async def close_code(node: Node, token: str) -> int | None:
    with pytest.raises(Closed) as caught:
        await connect(node, token)
    return caught.value.code


async def awaiting(node: Node, message: str) -> set[str]:
    """Who has not acknowledged a message; nobody when it is gone."""
    document = await node.db.messages.find_one({"id": message})
    return set(document["awaiting"]) if document else set()


class Watched:
    """The node's hasher; notes which hashes are verified."""

    def __init__(self, node: Node) -> None:
        self.passwords = node.relay.context.passwords
        self._hasher: Any = self.passwords._hasher
        self.verified: list[str] = []
        self.delay = 0.0
        self.passwords._hasher = self  # type: ignore[assignment]

    def hash(self, password: str) -> str:
        return str(self._hasher.hash(password))

    def check_needs_rehash(self, hashed: str) -> bool:
        return bool(self._hasher.check_needs_rehash(hashed))

    def verify(self, hashed: str, password: str) -> bool:
        self.verified.append(hashed)
        time.sleep(self.delay)
        return bool(self._hasher.verify(hashed, password))


# Registration


async def test_who_registers_is_logged_in_and_can_renew_and_log_out(node: Node) -> None:
    made = await register(node, "Ann", name="Ann", phone="+49 (30) 555-0100", device=device(None))
    assert set(made) == {"user", "device", "accessToken", "refreshToken", "expiresIn"}
    assert made["user"] == {"id": made["user"]["id"], "username": "ann", "name": "Ann"}
    assert made["expiresIn"] == 900
    claims = jwt.decode(made["accessToken"], SECRET, algorithms=["HS256"], audience="relay")
    assert (claims["sub"], claims["dev"]) == (made["user"]["id"], made["device"]["id"])
    assert claims["exp"] - claims["iat"] == 900
    stored = await node.db.users.find_one({"_id": made["user"]["id"]})
    assert stored["phone"] == "+49305550100"
    assert stored["password"].startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    for token in (made["accessToken"], made["refreshToken"]):
        assert token.rpartition(".")[2] not in str(await node.db.devices.find().to_list())
    assert await works(node, made["accessToken"])
    status, renewed = await refresh(node, made["refreshToken"])
    assert status == 200
    assert set(renewed) == {"accessToken", "refreshToken", "expiresIn"}
    assert await works(node, renewed["accessToken"])
    assert await ask(node, "POST", "/v1/auth/logout", token=renewed["accessToken"]) == (200, {"done": True})
    assert not await works(node, renewed["accessToken"])
    assert (await refresh(node, renewed["refreshToken"]))[0] == 401
    assert (await login(node, None))[0] == 200


async def test_a_user_name_is_given_once_however_it_is_written_and_by_how_many_at_once(node: Node) -> None:
    body = {"username": "ann", "password": PASSWORD, "device": device()}
    found = await asyncio.gather(
        *(
            ask(node, "POST", "/v1/auth/register", {**body, "username": name})
            for name in ("ann", "Ann", "ANN")
        )
    )
    assert sorted(status for status, _ in found) == [201, 409, 409]
    taken = next(answer for status, answer in found if status == 409)
    assert taken == {"error": {"code": "conflict", "message": "this user name is taken"}}


GOOD_DEVICE = device()
BAD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a name that is an operator": {"username": {"$ne": ""}, "password": PASSWORD, "device": GOOD_DEVICE},
    "a password that is an operator": {"username": "ann", "password": {"$gt": ""}, "device": GOOD_DEVICE},
    "a device id that is an operator": {
        "username": "ann",
        "password": PASSWORD,
        "device": {**GOOD_DEVICE, "id": {"$ne": None}},
    },
    "a device id with a slash": {"username": "ann", "password": PASSWORD, "device": device("a/b")},
    "a name that is a list": {"username": ["ann"], "password": PASSWORD, "device": GOOD_DEVICE},
    "an empty name": {"username": "", "password": PASSWORD, "device": GOOD_DEVICE},
    "an empty password": {"username": "ann", "password": "", "device": GOOD_DEVICE},
    "a huge name": {"username": "a" * 70_000, "password": PASSWORD, "device": GOOD_DEVICE},
    "a huge password": {"username": "ann", "password": "hunter2" * 10_000, "device": GOOD_DEVICE},
    "a zero byte": {"username": "ann", "password": "hunter2hunter2\0", "device": GOOD_DEVICE},
    "no device": {"username": "ann", "password": PASSWORD},
    "a device that is text": {"username": "ann", "password": PASSWORD, "device": "phone"},
    "a device without a name": {"username": "ann", "password": PASSWORD, "device": {"platform": "ios"}},
    "reset that is a number": {"username": "ann", "password": PASSWORD, "device": device(reset=1)},
    "an unknown field": {"username": "ann", "password": PASSWORD, "device": GOOD_DEVICE, "admin": True},
    "a password that is a number": {"username": "ann", "password": 12345678, "device": GOOD_DEVICE},
}


@pytest.mark.parametrize("path", ["/v1/auth/register", "/v1/auth/login"])
async def test_bad_requests_are_refused_without_showing_the_password(node: Node, path: str) -> None:
    for what, body in BAD.items():
        status, found = await ask(node, "POST", path, body)
        assert status in (400, 413), (what, found)
        assert "hunter2" not in str(found), what
    assert await node.db.users.count_documents({}) == 0
    assert await node.db.devices.count_documents({}) == 0


@pytest.mark.parametrize("username", ["ab", "a" * 33, ".ann", "an n", "änn", "ann\u212a", "ann\n", "a/b"])
async def test_a_user_name_outside_the_alphabet_cannot_be_registered(node: Node, username: str) -> None:
    body = {"username": username, "password": PASSWORD, "device": device()}
    assert (await ask(node, "POST", "/v1/auth/register", body))[0] == 400


async def test_phone_numbers_are_international_and_passwords_long_enough(node: Node) -> None:
    bad: list[dict[str, Any]] = [
        {"phone": text} for text in ("030 5550100", "+0301234567", "+49", "+49305550100x", "+" + "9" * 16, "")
    ]
    bad += [{"password": "seven77"}, {"password": "p" * 257}, {"name": ""}, {"name": "a\nb"}]
    for fields in bad:
        body = {"username": "ann", "password": PASSWORD, "device": device(), **fields}
        assert (await ask(node, "POST", "/v1/auth/register", body))[0] in (400, 413), fields
    await register(node, phone="+4930 555-0100", password="eight888", name="Ann \N{SMILING FACE WITH HALO}")


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
    await register(await nodes.start())
    closed = await nodes.start(registration=False)
    body = {"username": "bob", "password": PASSWORD, "device": device()}
    assert (await ask(closed, "POST", "/v1/auth/register", body))[0] == 403
    assert (await login(closed))[0] == 200


# Log-in


async def test_an_unknown_user_and_a_wrong_password_get_one_answer_for_the_same_work(node: Node) -> None:
    made = await register(node)
    stored = (await node.db.users.find_one({"_id": made["user"]["id"]}))["password"]
    watched = Watched(node)
    wrong = await login(node, password="wrong password")
    unknown = await login(node, username="nobody")
    strange = await login(node, username="no such name!")
    assert wrong == unknown == strange
    assert wrong == (401, {"error": {"code": "unauthorized", "message": "wrong user name or password"}})
    known, *dummies = watched.verified
    assert known == stored
    assert len(dummies) == 2
    for dummy in dummies:
        assert dummy != stored
        assert dummy.split("$")[:4] == stored.split("$")[:4], "the same parameters"


async def test_a_suspended_user_is_told_so_only_with_the_right_password(node: Node) -> None:
    made = await register(node)
    token = made["accessToken"]
    assert await works(node, token)
    await node.db.users.update_one({"_id": made["user"]["id"]}, {"$set": {"suspendedAt": datetime.now(UTC)}})
    assert (await login(node, password="wrong password"))[0] == 401
    status, found = await login(node)
    assert (status, found["error"]["message"]) == (403, "this account is suspended")
    assert (await refresh(node, made["refreshToken"]))[0] == 403
    assert await close_code(node, token) == 4401

    async def refused() -> bool:
        return not await works(node, token)

    await until(refused, 5, "a suspended user's token is refused")


async def test_who_is_being_erased_cannot_log_in_or_renew(node: Node) -> None:
    made = await register(node)
    await node.db.users.update_one({"_id": made["user"]["id"]}, {"$set": {"erasingAt": datetime.now(UTC)}})
    assert (await login(node))[1] == (await login(node, username="nobody"))[1]
    assert (await refresh(node, made["refreshToken"]))[0] == 401
    assert await close_code(node, made["accessToken"]) == 4401


async def test_a_hash_with_old_parameters_is_made_anew_at_log_in(node: Node) -> None:
    made = await register(node)
    weak = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)
    await node.db.users.update_one({"_id": made["user"]["id"]}, {"$set": {"password": weak}})
    for _ in range(2):
        assert (await login(node))[0] == 200
        stored = (await node.db.users.find_one({"_id": made["user"]["id"]}))["password"]
        assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")


async def test_logging_in_on_a_device_ends_its_session_at_once(node: Node) -> None:
    first = await register(node)
    socket = await connect(node, first["accessToken"])
    assert await works(node, first["accessToken"]) and await works(node, first["accessToken"])
    second = await logged_in(node)
    assert second["device"]["id"] == "phone"
    assert await socket.closed() == 4401
    assert not await works(node, first["accessToken"])
    assert await close_code(node, first["accessToken"]) == 4401
    assert (await refresh(node, first["refreshToken"]))[0] == 401
    assert await works(node, second["accessToken"])
    await connect(node, second["accessToken"])


async def test_another_device_leaves_the_first_alone(node: Node) -> None:
    first = await register(node)
    socket = await connect(node, first["accessToken"])
    second = await logged_in(node, None)
    assert second["device"]["id"] != "phone"
    await socket.put({"t": "ping"})
    await socket.expect("pong")
    assert await works(node, first["accessToken"])


async def test_there_are_no_more_devices_than_allowed(nodes: NodeFactory) -> None:
    node = await nodes.start(max_devices=2)
    made = await register(node)
    await logged_in(node, "tablet")
    status, found = await login(node, "laptop")
    assert (status, found["error"]["code"]) == (409, "conflict")
    await logged_in(node, "tablet")
    assert (await ask(node, "DELETE", "/v1/auth/devices/tablet", token=made["accessToken"]))[0] == 200
    await logged_in(node, "laptop")
    await asyncio.gather(*(login(node, f"d{number}", username="ann") for number in range(4)))
    _, listed = await ask(node, "GET", "/v1/auth/devices", token=made["accessToken"])
    assert len(listed["items"]) == 2


async def test_a_storm_of_log_ins_is_bounded_and_told_to_come_back(nodes: NodeFactory) -> None:
    node = await nodes.start(password_queue=3)
    await register(node)
    Watched(node).delay = 0.05
    found = await asyncio.gather(*(login(node, f"d{number}", username="nobody") for number in range(20)))
    statuses = [status for status, _ in found]
    assert statuses.count(401) >= 4
    assert statuses.count(503) >= 10
    assert set(statuses) == {401, 503}
    assert (await login(node))[0] == 200, "afterwards there is room"


async def test_log_ins_over_the_limit_of_an_account_cost_no_work(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_login_account="2/minute")
    await register(node)
    watched = Watched(node)
    found = [await login(node, username=name, password="wrong password") for name in ("ann", "ANN", "Ann")]
    assert [status for status, _ in found] == [401, 401, 429]
    assert len(watched.verified) == 2
    assert (await login(node, username="bob"))[0] == 401


@pytest.mark.parametrize(
    ("setting", "path"),
    [
        ("rate_login_address", "/v1/auth/login"),
        ("rate_register", "/v1/auth/register"),
        ("rate_refresh", "/v1/auth/refresh"),
    ],
)
async def test_one_address_asks_only_so_often(nodes: NodeFactory, setting: str, path: str) -> None:
    node = await nodes.start(**{setting: "2/minute"})
    for expected in (400, 400, 429):
        async with node.http.post(node.url + path, json={}) as response:
            assert response.status == expected
            assert ("Retry-After" in response.headers) == (expected == 429)


async def test_too_many_connections_of_one_address_are_upgraded_and_closed_with_4429(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(rate_connect="2/minute")
    for user in ("ann", "bob"):
        await node.connect(user)
    with pytest.raises(Closed) as caught:
        await node.connect("cleo")
    assert caught.value.code == 4429


# Renewal


async def test_an_answer_that_got_lost_is_repeated_and_an_older_token_ends_the_session(node: Node) -> None:
    made = await register(node)
    _, second = await refresh(node, made["refreshToken"])
    for _ in range(2):
        status, again = await refresh(node, made["refreshToken"])
        assert (status, again["refreshToken"]) == (200, second["refreshToken"])
    _, third = await refresh(node, second["refreshToken"])
    socket = await connect(node, third["accessToken"])
    assert await works(node, third["accessToken"]) and await works(node, third["accessToken"])
    status, found = await refresh(node, made["refreshToken"])
    assert (status, found["error"]["code"]) == (401, "unauthorized")
    assert await socket.closed() == 4401
    assert not await works(node, third["accessToken"])
    assert (await refresh(node, third["refreshToken"]))[0] == 401
    entry = await node.db.audit.find_one({"act": "session.reuse"})
    assert entry is not None
    assert (await login(node))[0] == 200, "the device itself stays"


async def test_renewals_at_once_agree(node: Node) -> None:
    made = await register(node)
    found = await asyncio.gather(*(refresh(node, made["refreshToken"]) for _ in range(10)))
    assert {status for status, _ in found} == {200}
    tokens = {answer["refreshToken"] for _, answer in found}
    assert len(tokens) == 1
    assert (await refresh(node, tokens.pop()))[0] == 200


@pytest.mark.parametrize("token", [{"$ne": ""}, 5, None, "", "x" * 300, ["a"]])
async def test_what_is_no_refresh_token_is_refused(node: Node, token: Any) -> None:
    assert (await ask(node, "POST", "/v1/auth/refresh", {"refreshToken": token}))[0] == 400
    assert (await refresh(node, "a.b"))[0] == 401
    assert (await refresh(node, str(begin())))[0] == 401


async def test_a_socket_ends_with_its_token_unless_it_is_renewed(nodes: NodeFactory) -> None:
    node = await nodes.start(access_token_seconds=10)
    made = await register(node)
    kept, left = await logged_in(node, "kept"), await logged_in(node, "left")
    short = {"aud": "relay", "iat": int(time.time()), "exp": int(time.time()) + 3}

    def short_token(session: dict[str, Any]) -> str:
        claims = jwt.decode(session["accessToken"], SECRET, algorithms=["HS256"], audience="relay")
        return jwt.encode({**claims, **short}, SECRET, algorithm="HS256")

    first, second = await connect(node, short_token(kept)), await connect(node, short_token(left))
    for wrong in (made["accessToken"], node.token(made["user"]["id"], "kept")):
        await first.put({"t": "auth", "token": wrong, "ref": "wrong"})
        assert (await first.expect("error", ref="wrong"))["code"] == "unauthorized"
    _, renewed = await refresh(node, kept["refreshToken"])
    await first.put({"t": "auth", "token": renewed["accessToken"], "ref": "right"})
    assert (await first.expect("authed", ref="right"))["exp"] > time.time() + 5
    assert await second.closed(6) == 4401
    await first.put({"t": "ping"})
    await first.expect("pong")


async def test_a_socket_is_not_renewed_by_an_older_token(node: Node) -> None:
    old = node.token("ann", "phone")
    await asyncio.sleep(1.1)
    socket = await node.connect("ann")
    await socket.put({"t": "auth", "token": old, "ref": "old"})
    assert (await socket.expect("error", ref="old"))["code"] == "unauthorized"


# Devices and revocation


async def test_devices_are_listed_with_who_asks_and_who_is_connected(node: Node) -> None:
    made = await register(node)
    tablet = await logged_in(node, "tablet", platform="android")
    await connect(node, tablet["accessToken"])
    status, listed = await ask(node, "GET", "/v1/auth/devices", token=made["accessToken"])
    assert status == 200
    assert listed["next"] is None
    phone, second = listed["items"]
    assert (phone["id"], phone["current"], phone["online"]) == ("phone", True, False)
    assert (second["id"], second["current"], second["online"]) == ("tablet", False, True)
    assert (second["name"], second["platform"]) == ("a device", "android")
    assert abs(second["createdAt"] - time.time() * 1000) < 60_000
    assert second["lastSeen"] >= second["createdAt"]


async def test_devices_of_others_and_unknown_ones_look_the_same(node: Node) -> None:
    ann, _ = await register(node), await register(node, "bob", device=device("laptop"))
    for name in ("laptop", "unknown", "a%2Fb", "%24ne", "x" * 65, "*"):
        status, found = await ask(node, "DELETE", f"/v1/auth/devices/{name}", token=ann["accessToken"])
        assert (status, found["error"]["code"]) == (404, "not_found"), name
    for method, path in (("GET", ""), ("DELETE", "/phone")):
        assert (await ask(node, method, f"/v1/auth/devices{path}"))[0] == 401
    assert (await ask(node, "POST", "/v1/auth/logout"))[0] == 401


async def test_a_revoked_device_is_shut_out_at_once_and_nobodys_message_waits_for_it(node: Node) -> None:
    ann = await register(node)
    tablet = await logged_in(node, "tablet")
    user = ann["user"]["id"]
    socket = await connect(node, tablet["accessToken"])
    # The second answer comes from what the node remembers of the device.
    assert await works(node, tablet["accessToken"]) and await works(node, tablet["accessToken"])
    await node.connect("bob")
    conv = await node.direct("bob", user)
    bob = await node.connect("bob", "laptop")
    early = await bob.sent(conv)
    assert await awaiting(node, early["id"]) == {"bob/phone", f"{user}/phone", f"{user}/tablet"}
    for _ in range(2):
        answer = await ask(node, "DELETE", "/v1/auth/devices/tablet", token=ann["accessToken"])
        assert answer == (200, {"done": True}), "a repetition is not told that it never was"
    assert await awaiting(node, early["id"]) == {"bob/phone", f"{user}/phone"}
    assert await socket.closed() == 4401
    assert not await works(node, tablet["accessToken"])
    assert await close_code(node, tablet["accessToken"]) == 4401
    assert (await refresh(node, tablet["refreshToken"]))[0] == 401
    late = await bob.sent(conv)
    assert await awaiting(node, late["id"]) == {"bob/phone", f"{user}/phone"}
    _, listed = await ask(node, "GET", "/v1/auth/devices", token=ann["accessToken"])
    assert [item["id"] for item in listed["items"]] == ["phone"]
    assert await node.db.audit.count_documents({"act": "device.revoke"}) == 1


async def test_a_revocation_that_died_half_way_is_finished(node: Node) -> None:
    user = (await register(node))["user"]["id"]
    await logged_in(node, "tablet")
    conv = await node.direct("bob", user)
    bob = await node.connect("bob")
    message = await bob.sent(conv)
    ctx = node.relay.context
    await ctx.releases.plan(f"{user}/tablet")
    await ctx.sessions.remove(user, "tablet")
    await node.db.releases.update_many({}, {"$set": {"dueAt": datetime.now(UTC) - timedelta(seconds=1)}})
    await ctx.releases.run_due()
    assert await awaiting(node, message["id"]) == {f"{user}/phone"}


async def test_a_removed_device_that_logs_in_again_learns_that_it_missed_something(node: Node) -> None:
    ann = await register(node)
    tablet = await logged_in(node, "tablet")
    await ask(node, "DELETE", "/v1/auth/devices/tablet", token=ann["accessToken"])
    again = await logged_in(node, "tablet")
    assert not await works(node, tablet["accessToken"])
    socket = await connect(node, again["accessToken"])
    assert socket.welcome["gap"]["why"] == "reset"


async def test_a_reset_releases_what_waited_for_the_former_self(node: Node) -> None:
    ann = await register(node)
    user = ann["user"]["id"]
    conv = await node.direct("bob", user)
    bob = await node.connect("bob")
    early = await bob.sent(conv)
    assert await awaiting(node, early["id"]) == {f"{user}/phone"}
    old = await connect(node, ann["accessToken"])
    await old.expect("msg")
    again = await logged_in(node, reset=True)
    assert await old.closed() == 4401
    assert await awaiting(node, early["id"]) == set()
    late = await bob.sent(conv)
    socket = await connect(node, again["accessToken"])
    assert socket.welcome["gap"]["why"] == "reset"
    found = await socket.expect("msg")
    assert found["id"] == late["id"], "only what came after the reset"


async def eventually_refused(node: Node, token: str, what: str) -> float:
    """Waits until HTTP refuses a token; how long that took."""
    began = time.monotonic()

    async def refused() -> bool:
        return not await works(node, token)

    await until(refused, 5, what)
    return time.monotonic() - began


async def test_a_revocation_holds_on_another_node_within_five_seconds(nodes: NodeFactory) -> None:
    here, there = await nodes.start(), await nodes.start()
    ann = await register(here)
    tablet = await logged_in(here, "tablet")
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
    nodes: NodeFactory,
) -> None:
    here, there = await nodes.start(), await nodes.start()
    old, laptop = here.token("ann", "tablet"), here.token("ann", "laptop")
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
    assert await awaiting(here, message["id"]) == set()
    await eventually_refused(there, old, "the other node refuses the token")
    for node in (here, there):
        assert await close_code(node, old) == 4401
    await asyncio.sleep(1.1)
    again = await connect(there, there.token("ann", "tablet"))
    assert again.welcome["gap"]["why"] == "reset"
    assert await close_code(here, old) == 4401, "the older token stays bad"


async def test_a_connection_that_raced_a_revocation_is_found(node: Node) -> None:
    ann = await register(node)
    await logged_in(node, "tablet")
    socket = await connect(node, ann["accessToken"])
    await node.relay.context.sessions.remove(ann["user"]["id"], "phone")
    assert await socket.closed(5) == 4401


async def test_nobody_is_created_by_a_token_of_a_session_that_is_not_there(node: Node) -> None:
    issuer = node.relay.context.issuer
    assert issuer is not None
    token = issuer.issue("ann", "phone", "gone")
    assert not await works(node, token)
    assert await close_code(node, token) == 4401
    assert await node.db.users.count_documents({}) == 0


async def test_a_suspension_closes_the_sockets_of_the_user(node: Node) -> None:
    made = await register(node)
    socket = await connect(node, made["accessToken"])
    people: Any = node.relay.context.people
    suspend: Callable[[str], Awaitable[bool]] = people.suspend
    assert await suspend(made["user"]["id"])
    assert await socket.closed(5) == 4401
    assert not await works(node, made["accessToken"])


async def test_two_people_who_registered_can_talk(node: Node) -> None:
    ann, bob = await register(node), await register(node, "bob")
    body = {"type": "direct", "members": [bob["user"]["id"]]}
    status, made = await ask(node, "POST", "/v1/conversations", body, ann["accessToken"])
    assert status == 201, made
    here, there = await connect(node, ann["accessToken"]), await connect(node, bob["accessToken"])
    message = new_id()
    await here.put({"t": "send", "id": message, "conv": made["id"], "kind": "text", "body": "hello"})
    await here.expect("stored", id=message)
    found = await there.expect("msg")
    assert (found["id"], found["from"]) == (message, {"user": ann["user"]["id"], "device": "phone"})
