"""A small relay in memory that speaks the protocol over real sockets, with faults on request.

It stores by (conversation, id), keeps what each device has not acknowledged, delivers it again on every connection, and
remembers fates for resends. Tokens are ``user/device``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import WSMsgType, web

Operation = dict[str, Any]
Key = tuple[str, str]


@dataclass
class Line:
    """One open socket of a device."""

    key: str
    socket: web.WebSocketResponse
    pushed: set[Key] = field(default_factory=set)
    unacknowledged_at_connect: set[Key] = field(default_factory=set)
    counted: int = 0
    drained: bool = False


class Peer:
    """``members`` maps a conversation to the device keys in it. Faults are plain attributes, changed at any time."""

    def __init__(self, members: dict[str, list[str]], *, port: int = 0) -> None:
        self.members = members
        self.port = port
        self.seq = 1000
        self.messages: dict[Key, Operation] = {}
        self.fates: dict[Key, Operation] = {}
        self.waiting: dict[str, dict[Key, None]] = {}
        self.lines: dict[str, Line] = {}
        self.received: list[tuple[str, Operation]] = []
        self.frames: list[tuple[str, int, int]] = []
        self.connects: list[tuple[str, float]] = []
        self.tokens: list[str] = []
        self.heartbeat = 25_000
        self.limits = {"frame": 262_144, "body": 65_536, "ops": 256}
        self.features: list[str] = []
        self.refuse_tokens: set[str] = set()
        self.mute = False
        self.answer: Callable[[Operation], Operation | None] = lambda _: None
        self.lose_replies = 0
        self.hold_replies = False
        self.close_on_connect: list[int] = []
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/v1/ws", self._serve)
        app.router.add_post("/v1/conversations", self._create)
        self._runner = web.AppRunner(app, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        for line in list(self.lines.values()):
            await line.socket.close(code=1012)
        if self._runner is not None:
            await self._runner.cleanup()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that a received operation or a new connection makes true."""
        async with self._changed:
            await self._changed.wait_for(condition)

    def sent(self, kind: str) -> list[Operation]:
        """The received operations of one type, of all devices."""
        return [operation for _, operation in self.received if operation["t"] == kind]

    async def post(
        self, conv: str, message: str, body: object, *, user: str = "bob", device: str = "one", **more: Any
    ) -> None:
        """A message of somebody else arrives at the relay."""
        await self._store(
            f"{user}/{device}",
            {"id": message, "conv": conv, "kind": "text", "body": body, **more},
            seq=more.pop("seq", None),
        )

    async def push(self, key: str, *operations: Operation) -> None:
        """Says something to one device."""
        await self.lines[key].socket.send_str(json.dumps(list(operations)))

    async def drop(self, key: str, code: int) -> None:
        """Closes a device's connection."""
        await self.lines[key].socket.close(code=code)

    async def _create(self, request: web.Request) -> web.Response:
        token = request.headers["Authorization"].removeprefix("Bearer ")
        if token in self.refuse_tokens:
            return web.json_response(
                {"error": {"code": "unauthorized", "message": "token expired"}}, status=401
            )
        body = await request.json()
        users = {token.partition("/")[0], *body["members"]}
        conv = "c-" + "-".join(sorted(users))
        self.members.setdefault(conv, [token])
        return web.json_response({"id": conv, "type": body["type"]}, status=201)

    async def _serve(self, request: web.Request) -> web.WebSocketResponse:
        token = request.headers["Authorization"].removeprefix("Bearer ")
        socket = web.WebSocketResponse(protocols=("relay.v1",), autoping=False, timeout=0.5)
        await socket.prepare(request)
        self.tokens.append(token)
        key = token.removesuffix("+new")
        self.connects.append((key, asyncio.get_running_loop().time()))
        if token in self.refuse_tokens:
            await socket.close(code=4401)
        elif self.close_on_connect:
            await socket.close(code=self.close_on_connect.pop(0))
        else:
            await self._converse(key, socket)
        await self._notify()
        return socket

    async def _converse(self, key: str, socket: web.WebSocketResponse) -> None:
        line = Line(key, socket)
        replaced = self.lines.get(key)
        if replaced is not None:
            await replaced.socket.close(code=4409)
        self.lines[key] = line
        user, _, device = key.partition("/")
        welcome = {
            "t": "welcome",
            "features": self.features,
            "v": 1,
            "user": user,
            "device": device,
            "heartbeat": self.heartbeat,
            "limits": self.limits,
        }
        await socket.send_str(json.dumps(welcome))
        line.unacknowledged_at_connect = set(self.waiting.get(key, ()))
        await self._notify()
        await self._deliver(line)
        await self._maybe_drained(line)
        async for frame in socket:
            if frame.type is not WSMsgType.TEXT or self.mute:
                continue
            value = json.loads(frame.data)
            operations = value if isinstance(value, list) else [value]
            self.frames.append((key, len(operations), len(frame.data.encode())))
            replies = []
            for operation in operations:
                self.received.append((key, operation))
                replies += await self._answer(line, operation)
            if replies and not self.hold_replies and not socket.closed:
                await socket.send_str(json.dumps(replies))
            await self._maybe_drained(line)
            await self._notify()
        if self.lines.get(key) is line:
            del self.lines[key]

    async def _answer(self, line: Line, operation: Operation) -> list[Operation]:
        special = self.answer(operation)
        if special is not None:
            return [special]
        if operation["t"] == "ping":
            return [{"t": "pong", "time": 1}]
        if operation["t"] == "ack":
            mine = self.waiting.setdefault(line.key, {})
            for message in operation["ids"]:
                key = (operation["conv"], message)
                mine.pop(key, None)
                if key in line.unacknowledged_at_connect:
                    line.unacknowledged_at_connect.discard(key)
                    line.counted += 1
                if key in self.messages and not any(key in held for held in self.waiting.values()):
                    self.fates[key] = self.messages.pop(key)
            return []
        if operation["t"] == "send":
            found = await self._store(line.key, operation)
            if self.lose_replies:
                self.lose_replies -= 1
                await line.socket.close(code=1012)
                return []
            return [
                {
                    "t": "stored",
                    "conv": found["conv"],
                    "id": found["id"],
                    "seq": found["seq"],
                    "at": found["at"],
                }
            ]
        return []

    async def _store(self, sender: str, operation: Operation, seq: int | None = None) -> Operation:
        key = (operation["conv"], operation["id"])
        held = self.messages.get(key) or (self.fates.get(key) if operation.get("again") else None)
        if held is not None:
            return held
        self.seq = max(self.seq, operation.get("after", 0)) + 1
        user, _, device = sender.partition("/")
        copied = ("id", "conv", "kind", "body", "replyTo", "media")
        message: Operation = {
            **{name: operation[name] for name in copied if name in operation},
            "t": "msg",
            "seq": seq or self.seq,
            "at": 1_700_000_000_000 + self.seq,
            "from": {"user": user, "device": device},
        }
        self.messages[key] = message
        for member in self.members[operation["conv"]]:
            if member != sender:
                self.waiting.setdefault(member, {})[key] = None
        for line in list(self.lines.values()):
            await self._deliver(line)
        return message

    async def _deliver(self, line: Line) -> None:
        fresh = [key for key in self.waiting.get(line.key, ()) if key not in line.pushed]
        line.pushed.update(fresh)
        for start in range(0, len(fresh), 100):
            if not line.socket.closed:
                await line.socket.send_str(
                    json.dumps([self.messages[key] for key in fresh[start : start + 100]])
                )

    async def _maybe_drained(self, line: Line) -> None:
        if not line.drained and not line.unacknowledged_at_connect and not line.socket.closed:
            line.drained = True
            await line.socket.send_str(json.dumps({"t": "drained", "count": line.counted}))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
