"""A device with a disk, as the protocol asks of devices: one row an id, the higher ``seq`` wins, withdrawn ones are ignored."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.support.device import Closed, WireDevice
from tests.support.lives import Life

LOST = "lost"
"""The outcome of what was asked of a node that died before it answered."""
_PATIENCE = 8.0


@dataclass(frozen=True, slots=True)
class Row:
    """One message on a disk."""

    conv: str
    seq: int
    sender: str
    kind: str
    body: Any


class Phone:
    """A device. ``known``: whether the relay counts it as a recipient (None: a node died while it arrived)."""

    def __init__(self, user: str, device: str) -> None:
        self.user = user
        self.device = device
        self.key = f"{user}/{device}"
        self.known: bool | None = False
        self.life: Life | None = None
        self.rows: dict[str, Row] = {}
        self.withdrawn: set[tuple[str, str]] = set()
        self.unacknowledged: dict[str, str] = {}
        self.acknowledged: set[str] = set()
        self.acknowledging: set[str] = set()
        self.shown: set[str] = set()
        self.turns = 0
        self.sent: list[tuple[int, int]] = []
        """What was sent for the first time over this connection: which turn it had, and its ``seq``."""
        self.trouble: list[str] = []
        self.is_removed = False
        self.gaps = 0
        """How many times it was told that it has missed messages."""
        self._reads = asyncio.Event()
        self._wire: WireDevice | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiters: dict[tuple[str, str], asyncio.Future[dict[str, Any] | None]] = {}

    @property
    def connected(self) -> bool:
        """Whether it has a connection."""
        return self._wire is not None

    async def connect(self, life: Life) -> bool:
        """Connects, in the place of a connection that it has. False when the node died meanwhile."""
        before, self._wire = self._wire, None
        if self.known is False:
            self.known = None
        try:
            wire = await life.node.connect(self.user, self.device)
        except (aiohttp.ClientError, Closed):
            return False
        finally:
            if before is not None:
                await before.close()
                await self._end_reading()
        self.known = True
        self.gaps += "gap" in wire.welcome
        self._reads.set()
        self.life, self._wire = life, wire
        self.shown = set()
        self.sent = []
        self._reader = asyncio.create_task(self._read(wire), name=f"reader {self.key}")
        return True

    def take_turn(self) -> int:
        """Whose turn it is to be sent."""
        self.turns += 1
        return self.turns

    @property
    def is_slow(self) -> bool:
        """Whether it takes nothing from its connection."""
        return self.connected and not self._reads.is_set()

    def slow_down(self) -> None:
        """Takes nothing any more, until it has something to say."""
        self._reads.clear()

    async def is_shut_out(self, life: Life, token: str) -> bool:
        """Whether a token of this device is refused."""
        headers = {"Authorization": f"Bearer {token}"}
        async with life.node.http.get(life.node.url + "/v1/sync", headers=headers) as answered:
            return answered.status == 401

    async def cut_loose(self) -> bool:
        """It was removed: whether its connection is closed, and it gets nothing more."""
        if self._reader is not None:
            self._reads.set()
            await asyncio.wait({self._reader}, timeout=_PATIENCE)
        closed = self._reader is None or self._reader.done()
        await self.disconnect()
        return closed

    async def disconnect(self) -> None:
        """Closes the connection."""
        wire, self._wire = self._wire, None
        if wire is not None:
            await wire.close()
        await self._end_reading()

    async def cut_off(self) -> None:
        """Its node has died."""
        self._wire = None
        await self._end_reading()

    async def send(self, conv: str, message: dict[str, Any]) -> dict[str, Any] | str:
        """Sends over the connection: the ``stored`` reply, an error code, or ``LOST``."""
        found = await self._ask("id", message["id"], {"t": "send", "conv": conv, **message})
        return _outcome(found)

    async def send_several(self, conv: str, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any] | str]:
        """Sends several in one frame."""
        waiters = [self._waiter("id", one["id"]) for one in messages]
        assert self._wire is not None
        await self._put(*({"t": "send", "conv": conv, **one} for one in messages))
        return [_outcome(await self._answer(waiter)) for waiter in waiters]

    async def status(self, conv: str, message: str) -> dict[str, Any] | None:
        """What the relay says of one own message; None when the node died."""
        ref = uuid.uuid4().hex
        found = await self._ask("ref", ref, {"t": "status", "conv": conv, "ids": [message], "ref": ref})
        return None if found is None else dict(found["items"][0])

    def held(self, conv: str) -> int | None:
        """The highest ``seq`` on the disk of a conversation."""
        return max((row.seq for row in self.rows.values() if row.conv == conv), default=None)

    async def read(self, conv: str, up_to: int) -> str:
        """Marks a conversation as read: ``done``, an error code, or ``LOST``."""
        ref = uuid.uuid4().hex
        found = await self._ask("ref", ref, {"t": "read", "conv": conv, "upTo": up_to, "ref": ref})
        return LOST if found is None else str(found.get("code", found["t"]))

    async def acknowledge(self, ids: Iterable[str], *, over: Life | None = None) -> bool:
        """Acknowledges what is on the disk, over the connection, or over HTTP through a node. Whether that is durable."""
        by_conv: dict[str, list[str]] = {}
        wanted = [one for one in ids if one in self.unacknowledged]
        for message in wanted:
            by_conv.setdefault(self.unacknowledged[message], []).append(message)
        self.acknowledging.update(wanted)
        if over is not None:
            acks = [{"conv": conv, "ids": some} for conv, some in by_conv.items()]
            answered = await self.request(over, "POST", "/v1/acks", {"acks": acks})
            durable = answered is not None and answered[0] == 200
            if answered is not None and not durable:
                self.trouble.append(f"acks over HTTP: {answered}")
        else:
            durable = True
            for conv, some in by_conv.items():
                ref = uuid.uuid4().hex
                asked = {"t": "ack", "conv": conv, "ids": some, "ref": ref}
                found = await self._ask("ref", ref, asked)
                durable = durable and found is not None and found["t"] == "acked"
        if durable:
            self.acknowledged.update(wanted)
            for message in wanted:
                self.unacknowledged.pop(message, None)
        return durable

    async def fetch(self, life: Life) -> None:
        """Takes what waits from ``GET /v1/sync``, page by page."""
        cursor = ""
        while True:
            answered = await self.request(life, "GET", f"/v1/sync?limit=3{cursor}")
            if answered is None:
                return
            status, page = answered
            if status != 200:
                self.trouble.append(f"sync: {answered}")
                return
            for message in page["messages"]:
                self._keep(message)
            if page["next"] is None:
                return
            cursor = f"&cursor={page['next']}"

    async def request(self, life: Life, method: str, path: str, body: Any = None) -> tuple[int, Any] | None:
        """An HTTP request; None when the node died before it answered."""
        if self.known is False:
            self.known = None
        try:
            async with asyncio.timeout(_PATIENCE):
                found = await life.node.request(method, path, self.user, self.device, body)
        except aiohttp.ClientError:
            return None
        self.known = True
        return found

    async def caught_up(self) -> None:
        """Everything that the node has put on the line before now is on the disk."""
        ref = uuid.uuid4().hex
        await self._ask("ref", ref, {"t": "ping", "ref": ref})

    async def _ask(self, field: str, name: str, operation: dict[str, Any]) -> dict[str, Any] | None:
        waiter = self._waiter(field, name)
        await self._put(operation)
        return await self._answer(waiter)

    def _waiter(self, field: str, name: str) -> asyncio.Future[dict[str, Any] | None]:
        waiter: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._waiters[field, name] = waiter
        return waiter

    async def _put(self, *operations: dict[str, Any]) -> None:
        if self._wire is None:
            self._lose()
            return
        self._reads.set()
        try:
            await self._wire.put(*operations)
        except (aiohttp.ClientError, ConnectionError):
            self._lose()

    async def _answer(self, waiter: asyncio.Future[dict[str, Any] | None]) -> dict[str, Any] | None:
        async with asyncio.timeout(_PATIENCE):
            return await waiter

    async def _read(self, wire: WireDevice) -> None:
        try:
            while True:
                await self._reads.wait()
                self._take(await wire.next(600))
        except Closed as closed:
            if self.is_removed and closed.code == 4401:
                return
            if self._wire is wire and self.life is not None and not self.life.dead.is_set():
                self.trouble.append(f"closed with {closed.code}")
        finally:
            self._lose()

    async def _end_reading(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            if not reader.cancelled() and (error := reader.exception()) is not None:
                self.trouble.append(f"reader: {error!r}")

    def _lose(self) -> None:
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters.values():
            if not waiter.done():
                waiter.set_result(None)

    def _take(self, operation: dict[str, Any]) -> None:
        name = operation["t"]
        if name == "msg":
            self.shown.add(operation["id"])
            self._keep(operation)
            return
        waiter = None
        if name in ("stored", "error") and "id" in operation:
            waiter = self._waiters.pop(("id", operation["id"]), None)
        if waiter is None and "ref" in operation:
            waiter = self._waiters.pop(("ref", operation["ref"]), None)
        if waiter is not None and not waiter.done():
            waiter.set_result(operation)
        if name == "error" and waiter is None:
            self.trouble.append(f"error {operation}")

    def _keep(self, message: dict[str, Any]) -> None:
        name, sender = message["id"], f"{message['from']['user']}"
        self.unacknowledged[name] = message["conv"]
        row = self.rows.get(name)
        if (name, sender) not in self.withdrawn and (row is None or message["seq"] > row.seq):
            self.rows[name] = Row(
                message["conv"], message["seq"], sender, message["kind"], message.get("body")
            )
        if message["kind"] == "withdrawn":
            target = message["replyTo"]
            self.withdrawn.add((target, sender))
            found = self.rows.get(target)
            if found is not None and found.sender == sender:
                del self.rows[target]


def _outcome(found: dict[str, Any] | None) -> dict[str, Any] | str:
    if found is None:
        return LOST
    return found if found["t"] == "stored" else str(found["code"])
