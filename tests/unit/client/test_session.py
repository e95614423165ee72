"""The session of a device against a relay that loses answers, refuses and ends sessions; tokens renewed in place."""

from __future__ import annotations

import asyncio
import base64
import json
import stat
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSMsgType, web

from relay.client import (
    Device,
    Disconnected,
    Event,
    Message,
    RequestFailed,
    Session,
    SessionEnded,
    Stopped,
    StorageError,
    Tuning,
)
from relay.client.tokens import expiry
from relay.wire.errors import CODES, Code

PASSWORD = "correct horse battery"
FAST = Tuning(backoff=(0.01, 0.05), connect=5, answer=5)


def jwt(name: str, lifetime: float) -> str:
    claims = json.dumps({"sub": "u1", "exp": time.time() + lifetime, "name": name}).encode()
    return f"x.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.x"


class Accounts:
    """The part of a relay that a session talks to. It rotates refresh tokens ``r1``, ``r2``… and repeats a successor for the
    former token; faults are plain attributes."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.current = 0
        self.lifetime = 900.0
        self.lose_answers = 0
        self.refuse: Code | None = None
        self.slow = 0.0
        self.patience = "7"
        self.on_answer: Callable[[], None] = lambda: None
        self.given: list[str] = []
        self.dead: set[str] = set()
        self.frames: list[dict[str, Any]] = []
        self.connects: list[str] = []
        self.url = ""

    async def start(self) -> web.AppRunner:
        app = web.Application()
        for path in ("register", "login"):
            app.router.add_post(f"/v1/auth/{path}", self._sign_in)
        app.router.add_post("/v1/auth/refresh", self._refresh)
        app.router.add_get("/v1/me", self._me)
        app.router.add_get("/v1/ws", self._socket)
        runner = web.AppRunner(app, shutdown_timeout=0.2)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def count(self) -> Counter[str]:
        return Counter(path for path, _ in self.asked)

    async def _sign_in(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        self.asked.append((request.path, wanted))
        if self.refuse is not None or wanted["password"] != PASSWORD:
            return self._error(self.refuse or "unauthorized", "wrong user name or password")
        self.current += 1
        device = wanted["device"].get("id", "given")
        who = {"user": {"id": "u1", "username": wanted["username"]}, "device": {"id": device}}
        status = 201 if request.path.endswith("register") else 200
        return web.json_response({**who, **self._tokens()}, status=status)

    async def _refresh(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        self.asked.append((request.path, wanted))
        await asyncio.sleep(self.slow)
        if self.refuse is not None:
            return self._error(self.refuse, "no")
        if wanted["refreshToken"] == f"r{self.current}":
            self.current += 1
        elif wanted["refreshToken"] != f"r{self.current - 1}":
            self.refuse = "unauthorized"
            return self._error("unauthorized", "reuse")
        if self.lose_answers:
            self.lose_answers -= 1
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(self._tokens())

    async def _me(self, request: web.Request) -> web.Response:
        if _bearer(request) in self.dead:
            return self._error("unauthorized", "expired")
        return web.json_response({"token": _bearer(request)})

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(autoping=False, timeout=0.5)
        await socket.prepare(request)
        token = _bearer(request)
        self.connects.append(token)
        if token in self.dead:
            await socket.close(code=4401)
            return socket
        welcome = {
            "t": "welcome",
            "v": 1,
            "user": "u1",
            "device": "given",
            "time": time.time_ns() // 1_000_000,
        }
        await socket.send_json(welcome)
        while True:
            until = expiry(token)
            assert until is not None
            try:
                frame = await socket.receive(timeout=max(0.01, until - time.time()))
            except TimeoutError:
                await socket.close(code=4401)
                return socket
            if frame.type is not WSMsgType.TEXT:
                return socket
            operation = json.loads(frame.data)
            self.frames.append(operation)
            if operation["t"] == "auth":
                token = operation["token"]
                await socket.send_json({"t": "authed", "exp": 1})

    def _tokens(self) -> dict[str, object]:
        access = jwt(f"a{len(self.given)}", self.lifetime)
        self.given.append(access)
        self.on_answer()
        return {"accessToken": access, "refreshToken": f"r{self.current}", "expiresIn": self.lifetime}

    def _error(self, code: Code, message: str) -> web.Response:
        return web.json_response(
            {"error": {"code": code, "message": message}},
            status=CODES[code].status,
            headers={"Retry-After": self.patience},
        )


def _bearer(request: web.Request) -> str:
    return request.headers["Authorization"].removeprefix("Bearer ")


@pytest.fixture
async def relay() -> AsyncIterator[Accounts]:
    accounts = Accounts()
    runner = await accounts.start()
    yield accounts
    await runner.cleanup()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "ann.session"


def kept(path: Path) -> Any:
    return json.loads(path.read_text())


async def test_logging_in_keeps_who_it_is_and_the_refresh_token_for_its_owner_alone(
    relay: Accounts, path: Path
) -> None:
    session = await Session.sign_in(relay.url + "/", path, "ann", PASSWORD)
    assert (session.user, session.device, session.url) == ("u1", "given", relay.url)
    assert kept(path) == {"url": relay.url, "user": "u1", "device": "given", "refreshToken": "r1"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [item.name for item in path.parent.iterdir()] == ["ann.session"]
    assert await session() == relay.given[0]
    assert relay.count() == {"/v1/auth/login": 1}
    assert PASSWORD not in path.read_text() and relay.given[0] not in path.read_text()


async def test_registering_makes_the_account_with_its_name_and_the_device_asked_for(
    relay: Accounts, path: Path
) -> None:
    session = await Session.sign_in(
        relay.url, path, "ann", PASSWORD, register=True, name="Ann", device="phone", reset=True
    )
    assert session.device == "phone"
    ((asked, body),) = relay.asked
    assert asked == "/v1/auth/register"
    assert body == {
        "username": "ann",
        "password": PASSWORD,
        "name": "Ann",
        "device": {"id": "phone", "name": "terminal", "platform": "python", "reset": True},
    }


async def test_a_wrong_password_is_told_in_the_relays_words_and_leaves_no_file(
    relay: Accounts, path: Path
) -> None:
    with pytest.raises(RequestFailed, match=r"^wrong user name or password$") as caught:
        await Session.sign_in(relay.url, path, "ann", "wrong")
    assert (caught.value.status, caught.value.code, caught.value.retry) == (401, "unauthorized", False)
    assert not path.exists()


async def test_a_relay_that_asks_for_patience_says_how_long(relay: Accounts, path: Path) -> None:
    relay.refuse = "rate_limited"
    with pytest.raises(RequestFailed) as caught:
        await Session.sign_in(relay.url, path, "ann", PASSWORD)
    assert (caught.value.retry, caught.value.retry_after) == (True, 7000)


async def test_a_later_run_goes_on_without_a_password(relay: Accounts, path: Path) -> None:
    await Session.sign_in(relay.url, path, "ann", PASSWORD)
    again = Session.load(path)
    assert again is not None
    assert (again.user, again.device, again.ended) == ("u1", "given", False)
    assert await again() == relay.given[1]
    assert kept(path)["refreshToken"] == "r2"
    assert Session.load(path.with_name("other")) is None


async def test_an_access_token_is_given_until_it_has_a_minute_left(
    relay: Accounts, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("relay.client.session.time.monotonic", lambda: now)
    session = await Session.sign_in(relay.url, path, "ann", PASSWORD)
    now += 839
    assert await session() == relay.given[0]
    now += 1
    assert await session() == relay.given[1]


async def test_one_refresh_serves_all_who_ask_at_once(relay: Accounts, path: Path) -> None:
    await Session.sign_in(relay.url, path, "ann", PASSWORD)
    session = Session.load(path)
    assert session is not None
    relay.slow = 0.05
    found = await asyncio.gather(*(session() for _ in range(20)))
    assert set(found) == {relay.given[1]}
    assert relay.count()["/v1/auth/refresh"] == 1


async def test_a_lost_answer_is_asked_for_again_with_the_same_token(relay: Accounts, path: Path) -> None:
    session = await Session.sign_in(relay.url, path, "ann", PASSWORD)
    session.refused(await session())
    relay.lose_answers = 1
    await session()
    assert [body["refreshToken"] for asked, body in relay.asked if asked.endswith("refresh")] == ["r1", "r1"]
    assert kept(path)["refreshToken"] == "r2"


async def test_an_answer_lost_for_good_leaves_the_former_token_which_works_later(
    relay: Accounts, path: Path
) -> None:
    session = await Session.sign_in(relay.url, path, "ann", PASSWORD)
    session.refused(await session())
    relay.lose_answers = 2
    with pytest.raises(RequestFailed) as caught:
        await session()
    assert (caught.value.code, caught.value.retry) == ("unreachable", True)
    assert kept(path)["refreshToken"] == "r1"
    assert await session() == relay.given[-1]
    assert kept(path)["refreshToken"] == "r2"


async def test_the_new_refresh_token_is_on_disk_before_the_access_token_is_given(
    relay: Accounts, path: Path
) -> None:
    session = await Session.sign_in(relay.url, path, "ann", PASSWORD)
    session.refused(await session())
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="session file"):
        await session()
    path.rmdir()
    path.write_text(json.dumps({"url": relay.url, "user": "u1", "device": "given", "refreshToken": "r1"}))
    held = set(relay.given)

    def in_the_way() -> None:
        # Between the question and the answer the place to write to is lost.
        path.unlink()
        path.mkdir()

    relay.on_answer = in_the_way
    with pytest.raises(StorageError, match="cannot write the session file"):
        await session()
    relay.on_answer = lambda: None
    path.rmdir()
    path.write_text(json.dumps({"url": relay.url, "user": "u1", "device": "given", "refreshToken": "r1"}))
    assert await session() not in held
    assert kept(path)["refreshToken"] == "r2"


async def test_two_processes_with_one_file_go_on_with_one_session(relay: Accounts, path: Path) -> None:
    one = await Session.sign_in(relay.url, path, "ann", PASSWORD)
    other = Session.load(path)
    assert other is not None
    for _ in range(3):
        for session in (one, other):
            session.refused(await session())
            await session()
    assert not one.ended
    assert relay.refuse is None


async def test_an_ended_session_says_so_in_one_line_and_is_not_tried_again(
    relay: Accounts, path: Path
) -> None:
    session = await Session.sign_in(relay.url, path, "ann", PASSWORD)
    session.refused(await session())
    relay.refuse = "unauthorized"
    for _ in range(2):
        with pytest.raises(SessionEnded, match="this device is logged out") as caught:
            await session()
        assert "\n" not in str(caught.value)
    assert relay.count()["/v1/auth/refresh"] == 1
    again = Session.load(path)
    assert again is not None
    assert (again.ended, again.device) == (True, "given")
    relay.refuse = None
    session = await Session.sign_in(relay.url, path, "ann", PASSWORD, device=again.device)
    assert not session.ended and not again.ended


@pytest.mark.parametrize("code", ["unavailable", "rate_limited", "forbidden"])
async def test_only_a_refusal_of_the_token_ends_a_session(relay: Accounts, path: Path, code: Code) -> None:
    session = await Session.sign_in(relay.url, path, "ann", PASSWORD)
    session.refused(await session())
    relay.refuse = code
    with pytest.raises(RequestFailed) as caught:
        await session()
    assert caught.value.code == code
    assert not session.ended
    relay.refuse = None
    assert await session() == relay.given[-1]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"url": 1, "user": "a", "device": "b"}', "null", "\x00"])
async def test_a_file_that_is_no_session_is_refused_with_its_name(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(StorageError, match=r"ann\.session"):
        Session.load(path)


async def test_a_device_renews_its_socket_in_place_before_the_token_expires(
    relay: Accounts, path: Path
) -> None:
    relay.lifetime = 1.5
    session = await Session.sign_in(relay.url, path, "ann", PASSWORD)
    events: list[Event] = []
    async with Device(relay.url, path.with_name("d"), session, on_event=events.append, tuning=FAST):
        await asyncio.sleep(3.2)
    renewals = [frame["token"] for frame in relay.frames if frame["t"] == "auth"]
    assert len(relay.connects) == 1
    assert len(renewals) >= 2 and set(renewals) <= set(relay.given)
    assert [event for event in events if isinstance(event, Disconnected)] == []


async def test_a_token_that_the_relay_refuses_before_its_time_is_replaced(
    relay: Accounts, path: Path
) -> None:
    session = await Session.sign_in(relay.url, path, "ann", PASSWORD)
    relay.dead.add(relay.given[0])
    async with Device(relay.url, path.with_name("d"), session, tuning=FAST) as ann:
        assert await ann.request("GET", "/v1/me") == {"token": relay.given[1]}
        while relay.connects[-1:] != [relay.given[1]]:
            await asyncio.sleep(0.01)
    assert not session.ended


async def test_a_device_whose_session_ended_stops_with_that_error(relay: Accounts, path: Path) -> None:
    session = await Session.sign_in(relay.url, path, "ann", PASSWORD)
    relay.dead.add(relay.given[0])
    relay.refuse = "unauthorized"
    events: list[Event] = []
    heard: list[Message] = []
    async with Device(
        relay.url, path.with_name("d"), session, on_event=events.append, on_message=heard.append, tuning=FAST
    ) as ann:
        with pytest.raises(SessionEnded):
            await ann.stopped()
    assert isinstance(events[-1], Stopped)
    assert relay.count()["/v1/auth/refresh"] == 1


async def test_a_device_goes_on_asking_a_relay_that_cannot_renew_now(relay: Accounts, path: Path) -> None:
    await Session.sign_in(relay.url, path, "ann", PASSWORD)
    session = Session.load(path)
    assert session is not None
    relay.refuse, relay.patience = "unavailable", "0"
    refusals: list[Event] = []

    def count(event: Event) -> None:
        if isinstance(event, Disconnected):
            refusals.append(event)
            relay.refuse = None if len(refusals) >= 3 else relay.refuse

    async with Device(relay.url, path.with_name("d"), session, on_event=count, tuning=FAST):
        while not relay.connects:
            await asyncio.sleep(0.01)
    assert len(refusals) == 3
    assert relay.connects == [relay.given[-1]]


@pytest.mark.parametrize(
    "token", ["ann/phone", "a.b", "a.!.c", "a.bnVsbA.c", "a.e30.c", f"x.{'W' * 9}.y", "x.eyJleHAiOiJhIn0.y"]
)
def test_a_token_that_tells_no_expiry_has_none(token: str) -> None:
    assert expiry(token) is None
