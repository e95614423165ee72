"""Accounts and sessions over HTTP and WebSocket: registration, log-in, renewal, revocation on one node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from argon2 import PasswordHasher

from relay.routing.outbox import Outbox
from relay.security.refresh import begin
from relay.store.embedded import EmbeddedMongo
from relay.store.mongo import PyMongoError
from relay.wire.errors import RelayError
from tests.support.databases import Databases
from tests.support.device import Closed, new_id
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
    somebody,
    watched,
    works,
)
from tests.support.node import SECRET, Node, NodeFactory
from tests.support.waiting import until


@pytest.fixture(scope="module")
async def one_node(
    mongod: EmbeddedMongo, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Node]:
    """A node for all tests of this file that change no setting: it starts once, and so does its hashing process. Every
    test has people of its own."""
    factory = NodeFactory(mongod.uri, tmp_path_factory.mktemp("node"), databases)
    yield await factory.start()
    await factory.close()


@pytest.fixture
async def node(one_node: Node) -> AsyncIterator[Node]:
    """That node; the sockets of a test end with it."""
    yield one_node
    for socket in one_node._devices:
        await socket.close()
    one_node._devices.clear()


async def unwritable(*_: object, **__: object) -> None:
    """An audit trail that cannot be written."""
    raise RelayError("unavailable", "the audit trail cannot be written; try again")


# Registration


async def test_who_registers_is_logged_in_and_can_renew_and_log_out(node: Node) -> None:
    username = somebody()
    made = await register(node, username.title(), name="Ann", phone="+49 (30) 555-0100", device=device(None))
    assert set(made) == {"user", "device", "accessToken", "refreshToken", "expiresIn"}
    assert made["user"] == {"id": made["user"]["id"], "username": username, "name": "Ann"}
    assert made["expiresIn"] == 900
    claims = jwt.decode(made["accessToken"], SECRET, algorithms=["HS256"], audience="relay")
    assert (claims["sub"], claims["dev"]) == (made["user"]["id"], made["device"]["id"])
    assert claims["exp"] - claims["iat"] == 900
    stored = await node.db.users.find_one({"_id": made["user"]["id"]})
    assert stored["phone"] == "+49305550100"
    assert stored["password"].startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    stored = str(await node.db.devices.find({"user": made["user"]["id"]}).to_list())
    for secret in (made["accessToken"].rpartition(".")[2], *made["refreshToken"].split(".")):
        assert secret not in stored
    assert await works(node, made["accessToken"])
    status, renewed = await refresh(node, made["refreshToken"])
    assert status == 200
    assert set(renewed) == {"accessToken", "refreshToken", "expiresIn"}
    assert await works(node, renewed["accessToken"])
    assert await ask(node, "POST", "/v1/auth/logout", token=renewed["accessToken"]) == (200, {"done": True})
    assert not await works(node, renewed["accessToken"])
    assert (await refresh(node, renewed["refreshToken"]))[0] == 401
    assert (await login(node, made, None))[0] == 200


async def test_tokens_and_what_is_personal_stay_in_no_cache(node: Node) -> None:
    ann = await register(node)
    for path, status in (("/v1/me", 200), ("/v1/users/nobody", 404)):
        headers = {"Authorization": f"Bearer {ann['accessToken']}"}
        async with node.http.get(node.url + path, headers=headers) as answer:
            assert (answer.status, answer.headers["Cache-Control"]) == (status, "no-store")
    body = {"refreshToken": ann["refreshToken"]}
    async with node.http.post(node.url + "/v1/auth/refresh", json=body) as answer:
        assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")


async def test_a_user_name_is_given_once_however_it_is_written_and_by_how_many_at_once(node: Node) -> None:
    username = somebody()
    body = {"password": PASSWORD, "device": device()}
    found = await asyncio.gather(
        *(
            ask(node, "POST", "/v1/auth/register", {**body, "username": name})
            for name in (username, username.title(), username.upper())
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
    before = await people_and_devices(node)
    for what, body in BAD.items():
        status, found = await ask(node, "POST", path, body)
        assert status in (400, 413), (what, found)
        assert "hunter2" not in str(found), what
    assert await people_and_devices(node) == before


async def people_and_devices(node: Node) -> tuple[int, int]:
    """How many there are."""
    return await node.db.users.count_documents({}), await node.db.devices.count_documents({})


@pytest.mark.parametrize("username", ["ab", "a" * 33, ".ann", "an n", "änn", "ann\u212a", "ann\n", "a/b"])
async def test_a_user_name_outside_the_alphabet_cannot_be_registered(node: Node, username: str) -> None:
    body = {"username": username, "password": PASSWORD, "device": device()}
    assert (await ask(node, "POST", "/v1/auth/register", body))[0] == 400


@pytest.mark.parametrize("sign", ["\u202e", "\u2066", "\u2028", "\x85", "\x7f", "\n"])
async def test_a_name_that_turns_its_surroundings_around_is_refused_for_people_devices_and_groups(
    node: Node, sign: str
) -> None:
    name = f"Ann{sign}evil"
    body = {"username": somebody(), "password": PASSWORD, "device": device()}
    for bad in ({"name": name}, {"device": device(name=name)}, {"name": "  "}, {"device": device(name=" ")}):
        assert (await ask(node, "POST", "/v1/auth/register", {**body, **bad}))[0] == 400, bad
    known = {"username": "ann", "password": PASSWORD, "device": device(name=name)}
    assert (await ask(node, "POST", "/v1/auth/login", known))[0] == 400
    ann = somebody()
    for bad in ({"name": name}, {"name": " "}):
        group = {"type": "group", "members": [], "name": "Allotment", **bad}
        assert (await node.request("POST", "/v1/conversations", ann, "phone", group))[0] == 400, bad


async def test_phone_numbers_are_international_and_passwords_long_enough(node: Node) -> None:
    bad: list[dict[str, Any]] = [
        {"phone": text} for text in ("030 5550100", "+0301234567", "+49", "+49305550100x", "+" + "9" * 16, "")
    ]
    bad += [{"password": "seven77"}, {"password": "p" * 257}, {"name": ""}, {"name": "a\nb"}]
    for fields in bad:
        body = {"username": "ann", "password": PASSWORD, "device": device(), **fields}
        assert (await ask(node, "POST", "/v1/auth/register", body))[0] in (400, 413), fields
    await register(node, phone="+4930 555-0100", password="eight888", name="Ann \N{SMILING FACE WITH HALO}")


# Log-in


async def test_an_unknown_user_and_a_wrong_password_get_one_answer_for_the_same_work(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await register(node)
    stored = (await node.db.users.find_one({"_id": made["user"]["id"]}))["password"]
    verified = watched(node, monkeypatch)
    wrong = await login(node, made, password="wrong password")
    unknown = await login(node, "nobody")
    strange = await login(node, "no such name!")
    assert wrong == unknown == strange
    assert wrong == (401, {"error": {"code": "unauthorized", "message": "wrong user name or password"}})
    assert verified == [stored, None, None], "for nobody's hash a dummy is verified"


async def test_a_suspended_user_is_told_so_only_with_the_right_password(node: Node) -> None:
    made = await register(node)
    token = made["accessToken"]
    assert await works(node, token)
    await node.db.users.update_one({"_id": made["user"]["id"]}, {"$set": {"suspendedAt": datetime.now(UTC)}})
    refused = await login(node, made, password="wrong password")
    assert refused == await login(node, "nobody", password="wrong password")
    status, found = await login(node, made)
    assert (status, found["error"]["message"]) == (403, "this account is suspended")
    user = made["user"]["id"]
    assert [entry["actor"] for entry in await noted(node, user, "session.refuse")] == [user, "$nobody"]
    assert (await refresh(node, made["refreshToken"]))[0] == 403
    assert await close_code(node, token) == 4401

    await eventually_refused(node, token, "a suspended user's token is refused")


async def test_who_is_being_erased_cannot_log_in_or_renew(node: Node) -> None:
    made = await register(node)
    await node.db.users.update_one({"_id": made["user"]["id"]}, {"$set": {"erasingAt": datetime.now(UTC)}})
    assert (await login(node, made))[1] == (await login(node, "nobody"))[1]
    assert (await refresh(node, made["refreshToken"]))[0] == 401
    assert await close_code(node, made["accessToken"]) == 4401


async def test_a_hash_with_old_parameters_is_made_anew_at_log_in(node: Node) -> None:
    made = await register(node)
    weak = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)
    await node.db.users.update_one({"_id": made["user"]["id"]}, {"$set": {"password": weak}})
    for _ in range(2):
        assert (await login(node, made))[0] == 200
        stored = (await node.db.users.find_one({"_id": made["user"]["id"]}))["password"]
        assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")


async def test_logging_in_on_a_device_ends_its_session_at_once(node: Node) -> None:
    first = await register(node)
    socket = await connect(node, first["accessToken"])
    assert await works(node, first["accessToken"]) and await works(node, first["accessToken"])
    second = await logged_in(node, first)
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
    second = await logged_in(node, first, None)
    assert second["device"]["id"] != "phone"
    await socket.put({"t": "ping"})
    await socket.expect("pong")
    assert await works(node, first["accessToken"])


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
    user = made["user"]["id"]
    assert len(await noted(node, user, "session.reuse")) == 1
    assert len(await noted(node, user, "session.repeat")) == 1, "two in a row are noted once"
    assert (await login(node, made))[0] == 200, "the device itself stays"


async def test_who_renews_in_step_with_somebody_else_is_noted(node: Node) -> None:
    made = await register(node)
    token, user = made["refreshToken"], made["user"]["id"]
    for _ in range(3):
        _, owner = await refresh(node, token)
        status, thief = await refresh(node, token)
        assert (status, thief["refreshToken"]) == (200, owner["refreshToken"])
        token = owner["refreshToken"]
    (entry,) = await noted(node, user, "session.repeat")
    assert (entry["target"], entry["device"], entry["address"]) == (user, "phone", "127.0.0.1")


async def test_who_saw_an_access_token_cannot_end_its_session(node: Node) -> None:
    made = await register(node)
    claims = jwt.decode(made["accessToken"], SECRET, algorithms=["HS256"], audience="relay")
    stored = await node.db.devices.find_one({"_id": f"{made['user']['id']}/phone"})
    for known in (claims["sid"], stored["session"]["id"]):
        assert (await refresh(node, f"{known}.{begin().secret}"))[0] == 401
    assert await works(node, made["accessToken"])
    assert (await refresh(node, made["refreshToken"]))[0] == 200


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


async def test_a_socket_ends_with_its_token_unless_it_is_renewed(node: Node) -> None:
    made = await register(node)
    kept, left = await logged_in(node, made, "kept"), await logged_in(node, made, "left")
    short = {"aud": "relay", "iat": int(time.time()), "exp": int(time.time()) + 2}

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
    ann = somebody()
    old = minted(ann, -2)
    socket = await node.connect(ann)
    await socket.put({"t": "auth", "token": old, "ref": "old"})
    assert (await socket.expect("error", ref="old"))["code"] == "unauthorized"


async def test_a_socket_is_not_renewed_by_a_newer_token_of_a_suspended_user(node: Node) -> None:
    ann = somebody()
    socket = await connect(node, minted(ann, -2))
    assert await node.relay.context.people.suspend(ann)
    # Before anybody looks for what has ended.
    await socket.put({"t": "auth", "token": minted(ann, 3), "ref": "newer"})
    assert await socket.closed(1) == 4401
    with pytest.raises(Closed):
        await socket.expect("authed")


async def test_a_socket_is_not_renewed_while_the_store_is_silent_but_stays(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = somebody()
    socket = await connect(node, minted(ann, -2))

    async def silent(*_: object, **__: object) -> None:
        raise PyMongoError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(node.relay.context.accounts, "standing", silent)
        await socket.put({"t": "auth", "token": minted(ann, 0), "ref": "one"})
        assert (await socket.expect("error", ref="one"))["code"] == "unavailable"
    await socket.put({"t": "auth", "token": minted(ann, 0), "ref": "two"})
    await socket.expect("authed", ref="two")


# Devices and revocation


async def test_devices_are_listed_with_who_asks_and_who_is_connected(node: Node) -> None:
    made = await register(node)
    tablet = await logged_in(node, made, "tablet", platform="android")
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
    ann, _ = await register(node), await register(node, device=device("laptop"))
    for name in ("laptop", "unknown", "a%2Fb", "%24ne", "x" * 65, "*"):
        status, found = await ask(node, "DELETE", f"/v1/auth/devices/{name}", token=ann["accessToken"])
        assert (status, found["error"]["code"]) == (404, "not_found"), name
    for method, path in (("GET", ""), ("DELETE", "/phone")):
        assert (await ask(node, method, f"/v1/auth/devices{path}"))[0] == 401
    assert (await ask(node, "POST", "/v1/auth/logout"))[0] == 401


async def test_a_revoked_device_is_shut_out_at_once_and_nobodys_message_waits_for_it(node: Node) -> None:
    ann, other = await register(node), somebody("bob")
    tablet = await logged_in(node, ann, "tablet")
    user = ann["user"]["id"]
    socket = await connect(node, tablet["accessToken"])
    # The second answer comes from what the node remembers of the device.
    assert await works(node, tablet["accessToken"]) and await works(node, tablet["accessToken"])
    await node.connect(other)
    conv = await node.direct(other, user)
    bob = await node.connect(other, "laptop")
    early = await bob.sent(conv)
    assert await awaiting(node, early["id"]) == {f"{other}/phone", f"{user}/phone", f"{user}/tablet"}
    for _ in range(2):
        answer = await ask(node, "DELETE", "/v1/auth/devices/tablet", token=ann["accessToken"])
        assert answer == (200, {"done": True}), "a repetition is not told that it never was"
    assert await awaiting(node, early["id"]) == {f"{other}/phone", f"{user}/phone"}
    assert await socket.closed() == 4401
    assert not await works(node, tablet["accessToken"])
    assert await close_code(node, tablet["accessToken"]) == 4401
    assert (await refresh(node, tablet["refreshToken"]))[0] == 401
    late = await bob.sent(conv)
    assert await awaiting(node, late["id"]) == {f"{other}/phone", f"{user}/phone"}
    _, listed = await ask(node, "GET", "/v1/auth/devices", token=ann["accessToken"])
    assert [item["id"] for item in listed["items"]] == ["phone"]
    assert len(await noted(node, user, "device.revoke")) == 1


async def test_a_revoked_device_whose_socket_is_slow_sends_nothing_more(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, other = await register(node), somebody("bob")
    tablet = await logged_in(node, ann, "tablet")
    conv = await node.direct(other, ann["user"]["id"])
    socket = await connect(node, tablet["accessToken"])
    await socket.expect("drained")
    with monkeypatch.context() as patch:
        # As when the socket does not take what is queued: the goodbye stays behind it.
        patch.setattr(Outbox, "close", lambda _: None)
        answer = await ask(node, "DELETE", "/v1/auth/devices/tablet", token=ann["accessToken"])
        assert answer[0] == 200
        late = await socket.send(conv)
        await asyncio.sleep(0.3)
    assert await socket.closed() in (4401, 1006)
    assert await node.db.messages.find_one({"id": late}) is None


LEFT_OVER = {
    "its removal was not answered": ("sessions", "remove", True),
    "nobody was told": ("invalidation", "tell", False),
    "nothing was released": ("releases", "run", False),
}


@pytest.mark.parametrize("what", LEFT_OVER)
async def test_wherever_a_revocation_dies_the_device_is_shut_out_and_nobodys_message_waits_for_it(
    node: Node, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    port, name, done = LEFT_OVER[what]
    made, other = await register(node), somebody("bob")
    user = made["user"]["id"]
    tablet = await logged_in(node, made, "tablet")
    conv = await node.direct(other, user)
    bob = await node.connect(other)
    message = await bob.sent(conv)
    socket = await connect(node, tablet["accessToken"])
    assert await works(node, made["accessToken"]), "its arrival is noted, and told, before"
    ctx = node.relay.context
    step = getattr(getattr(ctx, port), name)

    async def dies(*arguments: Any, **options: Any) -> None:
        if done:
            await step(*arguments, **options)
        raise PyMongoError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(getattr(ctx, port), name, dies)
        answer = await ask(node, "DELETE", "/v1/auth/devices/tablet", token=made["accessToken"])
        assert answer[0] == 503
    assert await socket.closed(5) == 4401
    await eventually_refused(node, tablet["accessToken"], "its token is refused")
    await node.db.releases.update_many(
        {"mailbox": f"{user}/tablet"}, {"$set": {"dueAt": datetime.now(UTC) - timedelta(seconds=1)}}
    )
    await ctx.releases.run_due()

    # The job may have been faster, and not be done yet.
    async def released() -> bool:
        return await awaiting(node, message["id"]) == {f"{user}/phone"}

    await until(released, 10, "what waited for the tablet is released")


async def test_no_account_is_made_without_an_entry_in_the_trail(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    username = somebody()
    body = {"username": username, "password": PASSWORD, "device": device()}
    with monkeypatch.context() as patch:
        patch.setattr(type(node.relay.context.audit), "record", unwritable)
        assert (await ask(node, "POST", "/v1/auth/register", body))[0] == 503
    assert await node.db.users.find_one({"username": username}) is None
    made = await register(node, username)
    assert len(await noted(node, made["user"]["id"], "account.register")) == 1
    assert (await ask(node, "POST", "/v1/auth/register", body))[0] == 409


async def test_no_device_is_revoked_and_no_session_begins_without_an_entry_in_the_trail(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await register(node)
    user, token = made["user"]["id"], made["accessToken"]
    with monkeypatch.context() as patch:
        patch.setattr(type(node.relay.context.audit), "record", unwritable)
        assert (await login(node, made, "tablet"))[0] == 503
        assert (await ask(node, "DELETE", "/v1/auth/devices/phone", token=token))[0] == 503
        assert await works(node, token)
        assert await node.db.devices.count_documents({"user": user}) == 1
    assert (await ask(node, "DELETE", "/v1/auth/devices/phone", token=token))[0] == 200
    assert len(await noted(node, user, "device.revoke")) == 1
    assert not await works(node, token)


async def test_what_a_revocation_left_when_the_store_fell_silent_is_done_by_its_repetition(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await register(node)
    tablet = await logged_in(node, made, "tablet")
    user = made["user"]["id"]
    assert await works(node, made["accessToken"]) and await works(node, tablet["accessToken"])
    told: list[str] = []
    forgotten: list[str] = []
    tell = node.relay.context.invalidation.tell

    async def telling(*, users: Iterable[str] = (), conversations: Iterable[str] = ()) -> None:
        told.extend(users)
        await tell(users=users, conversations=conversations)

    async def forgets(key: str) -> None:
        forgotten.append(key)
        if len(forgotten) == 2:
            raise PyMongoError("no answer")

    monkeypatch.setattr(node.relay.context.invalidation, "tell", telling)
    monkeypatch.setattr(node.relay.context.keys, "forget", forgets)
    path = "/v1/auth/devices/tablet"
    assert (await ask(node, "DELETE", path, token=made["accessToken"]))[0] == 503
    assert not await works(node, tablet["accessToken"])
    assert told == [user], "nobody's message waits for it, though the answer was an error"
    assert (await ask(node, "DELETE", path, token=made["accessToken"]))[0] == 200
    assert told == [user, user]
    assert forgotten == [f"{user}/tablet"] * 3
    assert len(await noted(node, user, "device.revoke")) == 1


async def test_the_keys_of_a_former_self_are_gone_before_the_new_session_is_there(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await register(node)
    user = made["user"]["id"]
    forgotten: list[str] = []

    async def forgets(key: str) -> None:
        forgotten.append(key)
        if len(forgotten) == 2:
            raise PyMongoError("no answer")

    monkeypatch.setattr(node.relay.context.keys, "forget", forgets)
    # Its answer is an error, and to the repetition the device is no new installation.
    assert (await login(node, made, reset=True))[0] == 503
    assert forgotten == [f"{user}/phone"] * 2
    assert (await login(node, made))[0] == 200


async def test_a_revocation_that_died_half_way_is_finished(node: Node) -> None:
    made, other = await register(node), somebody("bob")
    user = made["user"]["id"]
    await logged_in(node, made, "tablet")
    conv = await node.direct(other, user)
    bob = await node.connect(other)
    message = await bob.sent(conv)
    ctx = node.relay.context
    await ctx.releases.plan(f"{user}/tablet")
    await ctx.sessions.remove(user, "tablet")
    await node.db.releases.update_many({}, {"$set": {"dueAt": datetime.now(UTC) - timedelta(seconds=1)}})
    await ctx.releases.run_due()

    # The job may have been faster, and not be done yet.
    async def released() -> bool:
        return await awaiting(node, message["id"]) == {f"{user}/phone"}

    await until(released, 10, "what waited for the tablet is released")


async def test_a_removed_device_that_logs_in_again_learns_that_it_missed_something(node: Node) -> None:
    ann = await register(node)
    tablet = await logged_in(node, ann, "tablet")
    await ask(node, "DELETE", "/v1/auth/devices/tablet", token=ann["accessToken"])
    again = await logged_in(node, ann, "tablet")
    assert not await works(node, tablet["accessToken"])
    socket = await connect(node, again["accessToken"])
    assert socket.welcome["gap"]["why"] == "reset"


async def test_a_reset_releases_what_waited_for_the_former_self(node: Node) -> None:
    ann, other = await register(node), somebody("bob")
    user = ann["user"]["id"]
    conv = await node.direct(other, user)
    bob = await node.connect(other)
    early = await bob.sent(conv)
    assert await awaiting(node, early["id"]) == {f"{user}/phone"}
    old = await connect(node, ann["accessToken"])
    await old.expect("msg")
    again = await logged_in(node, ann, reset=True)
    assert await old.closed() == 4401
    assert await awaiting(node, early["id"]) == set()
    late = await bob.sent(conv)
    socket = await connect(node, again["accessToken"])
    assert socket.welcome["gap"]["why"] == "reset"
    found = await socket.expect("msg")
    assert found["id"] == late["id"], "only what came after the reset"


async def test_what_ends_in_the_store_closes_sockets_here_within_five_seconds(node: Node) -> None:
    names = ("removed", "suspended", "barred", "erased", "good")
    people = {name: await register(node) for name in names}
    users = {name: made["user"]["id"] for name, made in people.items()}
    # A token newer than whatever ends now: its device does not end, its user does.
    people["barred"] |= {"accessToken": minted(users["barred"], 3, "new")}
    tokens = {name: made["accessToken"] for name, made in people.items()}
    sockets = {name: await connect(node, token) for name, token in tokens.items()}
    now = datetime.now(UTC)
    await node.relay.context.sessions.remove(users["removed"], "phone")
    assert await node.relay.context.people.suspend(users["suspended"])
    await node.db.users.update_one({"_id": users["barred"]}, {"$set": {"suspendedAt": now}})
    await node.db.users.update_one({"_id": users["erased"]}, {"$set": {"erasingAt": now}})
    for name in names[:-1]:
        assert await sockets[name].closed(5) == 4401, name
        assert not await works(node, tokens[name]), name
    await sockets["good"].put({"t": "ping"})
    await sockets["good"].expect("pong")


async def test_nobody_is_created_by_a_token_of_a_session_that_is_not_there(node: Node) -> None:
    issuer = node.relay.context.issuer
    assert issuer is not None
    ann = somebody()
    token = issuer.issue(ann, "phone", "gone")
    assert not await works(node, token)
    assert await close_code(node, token) == 4401
    assert await node.db.users.find_one({"_id": ann}) is None


async def test_two_people_who_registered_can_talk(node: Node) -> None:
    ann, bob = await register(node), await register(node)
    body = {"type": "direct", "members": [bob["user"]["id"]]}
    status, made = await ask(node, "POST", "/v1/conversations", body, ann["accessToken"])
    assert status == 201, made
    here, there = await connect(node, ann["accessToken"]), await connect(node, bob["accessToken"])
    message = new_id()
    await here.put({"t": "send", "id": message, "conv": made["id"], "kind": "text", "body": "hello"})
    await here.expect("stored", id=message)
    found = await there.expect("msg")
    assert (found["id"], found["from"]) == (message, {"user": ann["user"]["id"], "device": "phone"})
