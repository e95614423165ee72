"""A bounded load that survives faults as a good client does, remembers everything, and settles the account afterwards.

Each pair is one sender and one recipient in a conversation of their own; every other recipient has two devices, so that
both ways of ending a message are taken. Each group is one sender and a number of recipients with one device. Senders keep what is not ``stored`` and send it again, with the same id and
``again``, after every reconnection; recipients acknowledge everything they get.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.support.device import new_id
from tests.support.node import Node
from tests.support.process import ledger_of
from tests.support.waiting import until

BURST = 5
WINDOW = 40
LOST = (aiohttp.ClientError, ConnectionError, OSError, TimeoutError)


class Gone(Exception):
    """The socket is closed."""


class Message:
    """One message that a sender has made. ``answers`` are the ``(seq, at)`` of every ``stored`` it got."""

    __slots__ = ("answers", "body", "conv", "id", "made", "resend_at", "sender", "took")

    def __init__(self, sender: str, conv: str, body: str) -> None:
        self.id = new_id()
        self.sender = sender
        self.conv = conv
        self.body = body
        self.made = time.monotonic()
        self.took = 0.0
        self.resend_at: float | None = None
        self.answers: list[tuple[int, int]] = []

    def operation(self, *, again: bool = False) -> dict[str, Any]:
        found = {"t": "send", "id": self.id, "conv": self.conv, "kind": "text", "body": self.body}
        return {**found, "again": True} if again else found


class Load:
    """``start`` it, do harm, then ``settle`` and ``verify``. ``rate`` is messages a second of each sender. Every connection is
    to ``node``, or to any of ``nodes``, which share its database; the ledger is looked at when ``node`` is the only one.
    ``groups`` is how many recipients each group has."""

    def __init__(
        self,
        node: Node,
        *,
        pairs: int = 6,
        rate: float = 100,
        name: str = "",
        nodes: Sequence[Node] = (),
        groups: Sequence[int] = (),
    ) -> None:
        self._node = node
        self._nodes = nodes or [node]
        self._pairs = pairs
        self._groups = groups
        self._rate = rate
        self._name = name
        self._tasks: list[asyncio.Task[None]] = []
        self._senders: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._recipients: dict[str, list[str]] = {}
        self.homes: dict[str, list[Node]] = {}
        """By which node each device was welcomed, one after the other."""
        self._at: dict[str, Node] = {}
        self.messages: dict[str, Message] = {}
        self.received: dict[str, dict[str, list[int]]] = {}
        self.bodies_differ: list[str] = []
        self.refused: list[dict[str, Any]] = []
        self.reconnections = 0
        self.retryable = 0

    async def start(self) -> None:
        """Connects everybody and begins to send."""
        pairs = [f"{self._name}to{number}" for number in range(self._pairs)]
        crowds = [
            [f"{self._name}crowd{number}m{member}" for member in range(count)]
            for number, count in enumerate(self._groups)
        ]
        keys = [f"{to}/phone" for to in pairs] + [f"{to}/tablet" for to in pairs[1::2]]
        keys += [f"{member}/phone" for crowd in crowds for member in crowd]
        waiting: list[asyncio.Event] = []
        for key in keys:
            connected = asyncio.Event()
            waiting.append(connected)
            self.received[key] = {}
            self._tasks.append(asyncio.create_task(self._receive(key, connected), name=f"load {key}"))
        async with asyncio.timeout(20 + len(keys) / 20):
            await asyncio.gather(*(event.wait() for event in waiting))
        for number, to in enumerate(pairs):
            sender = f"{self._name}from{number}"
            conv = await self._node.direct(sender, to)
            self._begin(sender, conv, [key for key in keys if key.startswith(f"{to}/")])
        for number, crowd in enumerate(crowds):
            sender = f"{self._name}speaker{number}"
            conv = await self._node.group(sender, crowd, announced=True)
            self._begin(sender, conv, [f"{member}/phone" for member in crowd])

    def _begin(self, sender: str, conv: str, keys: list[str]) -> None:
        self._recipients[conv] = keys
        self._senders.append(asyncio.create_task(self._send(sender, conv), name=f"load {sender}"))

    @property
    def stored(self) -> list[Message]:
        """The messages that were answered with ``stored``."""
        return [message for message in self.messages.values() if message.answers]

    @property
    def deliveries(self) -> int:
        """How many deliveries those are: a message for three devices is three."""
        return sum(len(self._recipients[message.conv]) for message in self.stored)

    def p99(self) -> float:
        """Seconds from making a message to its ``stored``, at 99 %."""
        times = sorted(message.took for message in self.stored)
        return times[len(times) * 99 // 100] if times else 0.0

    async def stored_since(self, count: int, seconds: float) -> None:
        """Waits until more than ``count`` messages are stored: the relay works (again)."""

        async def more() -> bool:
            return len(self.stored) > count

        await until(more, seconds, f"more than {count} messages are stored")

    async def settle(self, seconds: float = 20) -> None:
        """Stops sending and waits until all is answered, received and gone; AssertionError tells what is not."""
        try:
            self.finish()
            await self.all_received(seconds)

            async def all_gone() -> bool:
                return not await self._node.db.messages.count_documents({})

            await until(all_gone, seconds, "nothing is left in messages")
        finally:
            await self.close()

    def finish(self) -> None:
        """Makes no more messages."""
        self._stopping.set()

    async def all_received(self, seconds: float) -> None:
        """Waits until every message that was made is stored and received; AssertionError tells what is not."""
        _, late = await asyncio.wait(self._senders, timeout=seconds)
        unanswered = [m for m in self.messages.values() if not m.answers]
        assert not late, f"{len(unanswered)} of {len(self.messages)} messages were never answered"
        for task in self._senders:
            task.result()

        async def complete() -> bool:
            return not self.missing()

        with contextlib.suppress(AssertionError):
            await until(complete, seconds, "everything is received")
        missing = self.missing()
        assert not missing, f"{len(missing)} deliveries are missing, such as {missing[:3]}"

    async def close(self) -> None:
        """Ends every connection."""
        tasks = [*self._senders, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def missing(self) -> list[tuple[str, str]]:
        """(device, id) of what is stored and not received."""
        return [
            (key, message.id)
            for message in self.stored
            for key in self._recipients[message.conv]
            if message.id not in self.received[key]
        ]

    async def verify(self) -> str:
        """Asserts what the relay promises of everything that was sent; returns one line of figures."""
        assert not self.refused, f"messages were refused for good: {self.refused[:3]}"
        assert not self.bodies_differ, f"messages arrived changed: {self.bodies_differ[:3]}"
        repeated = 0
        for message in self.messages.values():
            first = set(message.answers)
            assert len(first) == 1, f"{message.id} has the answers {first}"
            (seq, _), *_ = first
            for key in self._recipients[message.conv]:
                seqs = self.received[key][message.id]
                repeated += len(seqs) - 1
                assert max(seqs) == seq, f"{message.id} is stored as {seq}, {key} holds {max(seqs)}"
        for key, held in self.received.items():
            strangers = held.keys() - self.messages.keys()
            assert not strangers, f"{key} received what was never sent: {sorted(strangers)[:3]}"
        await self._resend(random.sample(self.stored, min(10, len(self.stored))))
        assert await self._node.db.messages.count_documents({}) == 0
        if len(self._nodes) == 1:
            await self._balances()
        return (
            f"{len(self.messages)} messages, {repeated} redelivered, {self.reconnections} reconnections, "
            f"{self.retryable} told to try again, p99 {self.p99() * 1000:.0f} ms"
        )

    async def _balances(self) -> None:
        async def balanced() -> bool:
            return (await ledger_of(self._node))["waiting"] == 0

        with contextlib.suppress(AssertionError):
            await until(balanced, 3, "the ledger is balanced")
        ledger = await ledger_of(self._node)
        assert ledger["waiting"] == 0, f"nothing waits in the store, but by the ledger: {ledger}"

    async def _resend(self, messages: list[Message]) -> None:
        for message in messages:
            device = await self._node.connect(message.sender)
            answer = await device.sent(message.conv, message.body, id=message.id, again=True)
            await device.close()
            assert (answer["seq"], answer["at"]) == message.answers[0]

    @asynccontextmanager
    async def _socket(self, key: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        user, _, device = key.partition("/")
        headers = self._node.headers(user, device)
        node = random.choice(self._nodes)
        async with asyncio.timeout(10):
            socket = await self._node.http.ws_connect(node.url + "/v1/ws", headers=headers, max_msg_size=0)
        self._at[key] = node
        try:
            yield socket
        finally:
            # What a killed peer leaves open must not hold the test up.
            with contextlib.suppress(*LOST):
                async with asyncio.timeout(1):
                    await socket.close()

    async def _send(self, sender: str, conv: str) -> None:
        open_: dict[str, Message] = {}
        while not self._stopping.is_set() or open_:
            try:
                async with self._socket(f"{sender}/phone") as socket:
                    await _put(socket, [message.operation(again=True) for message in open_.values()])
                    await self._talk(socket, sender, conv, open_)
            except (Gone, *LOST):
                self.reconnections += 1
                await asyncio.sleep(random.uniform(0.05, 0.2))

    async def _talk(
        self, socket: aiohttp.ClientWebSocketResponse, sender: str, conv: str, open_: dict[str, Message]
    ) -> None:
        pause = BURST / self._rate
        due = time.monotonic() + random.uniform(0, pause)
        while not self._stopping.is_set() or open_:
            now = time.monotonic()
            if now >= due and not self._stopping.is_set():
                due = now + pause
                fresh: list[Message] = []
                while len(open_) < WINDOW and len(fresh) < BURST:
                    message = Message(sender, conv, f"{sender} {len(self.messages)}")
                    self.messages[message.id] = open_[message.id] = message
                    fresh.append(message)
                await _put(socket, [message.operation() for message in fresh])
            again = [m for m in open_.values() if m.resend_at is not None and m.resend_at <= now]
            for message in again:
                message.resend_at = None
            await _put(socket, [message.operation(again=True) for message in again])
            for frame in await _frames(socket, max(0.01, min(0.1, due - now))):
                if frame["t"] == "welcome":
                    self._welcomed(f"{sender}/phone")
                elif frame["t"] == "msg":
                    # A group tells its maker, too, that it was made.
                    await _put(socket, [{"t": "ack", "conv": frame["conv"], "ids": [frame["id"]]}])
                self._answered(frame, open_)

    def _answered(self, frame: dict[str, Any], open_: dict[str, Message]) -> None:
        found = self.messages.get(frame.get("id", ""))
        if found is None:
            return
        if frame["t"] == "stored":
            if not found.answers:
                found.took = time.monotonic() - found.made
            found.answers.append((frame["seq"], frame["at"]))
            open_.pop(found.id, None)
        elif frame["t"] == "error" and frame["retry"]:
            self.retryable += 1
            found.resend_at = time.monotonic() + min(frame.get("retryAfter", 500), 500) / 1000
        elif frame["t"] == "error":
            self.refused.append(frame)
            open_.pop(found.id, None)

    async def _receive(self, key: str, connected: asyncio.Event) -> None:
        while True:
            try:
                async with self._socket(key) as socket:
                    while True:
                        held: dict[str, list[str]] = {}
                        for frame in await _frames(socket, 1):
                            if frame["t"] == "welcome":
                                connected.set()
                                self._welcomed(key)
                            elif frame["t"] == "msg":
                                if frame["kind"] != "system":
                                    self._keep(key, frame)
                                held.setdefault(frame["conv"], []).append(frame["id"])
                        await _put(
                            socket, [{"t": "ack", "conv": conv, "ids": ids} for conv, ids in held.items()]
                        )
            except (Gone, *LOST):
                await asyncio.sleep(random.uniform(0.05, 0.2))

    def _welcomed(self, key: str) -> None:
        self.homes.setdefault(key, []).append(self._at[key])

    def _keep(self, key: str, frame: dict[str, Any]) -> None:
        self.received[key].setdefault(frame["id"], []).append(frame["seq"])
        sent = self.messages.get(frame["id"])
        if sent is not None and (sent.body, sent.conv) != (frame["body"], frame["conv"]):
            self.bodies_differ.append(frame["id"])


async def _put(socket: aiohttp.ClientWebSocketResponse, operations: list[dict[str, Any]]) -> None:
    if operations:
        await socket.send_str(json.dumps(operations))


async def _frames(socket: aiohttp.ClientWebSocketResponse, seconds: float) -> list[dict[str, Any]]:
    """The operations of the next frame; none when there is none within ``seconds``. Raises Gone."""
    try:
        async with asyncio.timeout(seconds):
            message = await socket.receive()
    except TimeoutError:
        return []
    if message.type is not aiohttp.WSMsgType.TEXT:
        raise Gone
    value = json.loads(message.data)
    return value if isinstance(value, list) else [value]
