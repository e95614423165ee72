"""Devices that come back all at once, a process of its own. Requests on standard input, answers on standard output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from time import perf_counter
from typing import Final

from relay.security.tokens import mint
from scripts.tools.bench.asked import GiveUp, serve
from scripts.tools.bench.crowd_messages import Answer, Done, Group
from scripts.tools.bench.groups import DEVICE, user_name
from scripts.tools.bench.pairs import message_id, percentiles
from scripts.tools.bench.sockets import Drained, Error, Msg, Op, Receiver, Socket, Stored, connect
from scripts.tools.bench.storm_messages import (
    AnyRequest,
    Assemble,
    Came,
    Come,
    Lose,
    Post,
    Settle,
    Settled,
)

_SHOWN_ERRORS: Final = 5
_TOKEN_SECONDS: Final = 24 * 3600
_COME_SECONDS: Final = 120.0
_POST_SECONDS: Final = 60.0
_LOSE_SECONDS: Final = 20.0
# As a device waits after a refusal, at first.
_AGAIN_SECONDS: Final = (0.2, 1.0)


class Message:
    """``seen`` has a place for every member of the group."""

    __slots__ = ("seen", "stored")

    def __init__(self, members: int) -> None:
        self.seen = bytearray(members)
        self.stored = False


class Device:
    """One device, at ``place`` in its group."""

    __slots__ = ("connected", "drained", "group", "place", "socket", "storm", "waited")

    def __init__(self, storm: Storm, group: Group, place: int) -> None:
        self.storm = storm
        self.group = group
        self.place = place
        self.socket: Socket | None = None
        self.connected = self.drained = 0.0
        self.waited: asyncio.Future[int] | None = None

    def make(self, receiver: Receiver, host: str, port: int, token: str) -> Socket:
        """A socket that it has at once: what waits may come together with the answer to the upgrade."""
        self.socket = Socket(receiver, host, port, token)
        return self.socket

    def received(self, ops: list[Op]) -> None:
        """One frame: what came is acknowledged together."""
        storm = self.storm
        came = []
        for op in ops:
            if isinstance(op, Msg):
                came.append(op.id)
                storm.take(op.id, self.place)
            elif isinstance(op, Stored):
                storm.stored_one(op.id)
            elif isinstance(op, Drained):
                if self.waited is not None and not self.waited.done():
                    self.drained = perf_counter()
                    self.waited.set_result(op.count)
            elif isinstance(op, Error):
                storm.failed += 1
                storm.note(f"{op.code}: {op.message}")
        if came and self.socket is not None:
            ids = '","'.join(came)
            self.socket.send(f'{{"t":"ack","conv":"{self.group.conversation}","ids":["{ids}"]}}')

    def lost(self, reason: str) -> None:
        """The connection ended: an attempt that failed, or an end that was asked for, or a fault."""
        self.socket = None
        if self.waited is not None and not self.waited.done():
            self.waited.set_exception(ConnectionError(reason))
            return
        self.storm.lost_one(reason)


class Storm:
    """All devices, and what became of every message."""

    def __init__(self, wanted: Assemble) -> None:
        self._wanted = wanted
        self._groups = wanted.groups
        self._senders = [Device(self, group, 0) for group in wanted.groups]
        self._others = [
            Device(self, group, place) for group in wanted.groups for place in range(1, group.count)
        ]
        self._messages: dict[str, Message] = {}
        self._unstored = 0
        self._all_stored = asyncio.Event()
        self._to_lose = 0
        self._all_lost = asyncio.Event()
        self._again = 0
        self.sent = self.stored = self.delivered = self.repeated = self.unknown = self.failed = (
            self.closed
        ) = 0
        self.errors: list[str] = []

    async def come(self, wanted: Come) -> Came:
        """Connects devices. Raises GiveUp when that takes too long."""
        devices = self._senders if wanted.senders else self._others
        order = self._wanted
        tokens = [
            mint(
                order.secret,
                user_name(device.group.first + device.place),
                DEVICE,
                audience=order.audience,
                lifetime=_TOKEN_SECONDS,
            )
            for device in devices
        ]
        self._again = 0
        turns = asyncio.Semaphore(wanted.at_once)
        began = perf_counter()
        try:
            async with asyncio.timeout(_COME_SECONDS), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        self._come(device, token, wanted.ports[place % len(wanted.ports)], turns),
                        name=f"device {place}",
                    )
                    for place, (device, token) in enumerate(zip(devices, tokens, strict=True))
                ]
        except TimeoutError:
            missing = sum(not device.drained for device in devices)
            raise GiveUp(
                f"{missing} of {len(devices)} devices did not drain within {_COME_SECONDS:g} s"
                + "".join(f"; {text}" for text in self.errors)
            ) from None
        return Came(
            devices=len(devices),
            messages=sum(task.result() for task in tasks),
            seconds=max((device.drained for device in devices), default=began) - began,
            connected_ms=percentiles([device.connected - began for device in devices]),
            drained_ms=percentiles([device.drained - began for device in devices]),
            again=self._again,
        )

    async def _come(self, device: Device, token: str, port: int, turns: asyncio.Semaphore) -> int:
        async with turns:
            while True:
                device.drained = 0.0
                device.waited = asyncio.get_running_loop().create_future()
                try:
                    await connect(device, "127.0.0.1", port, token, make=device.make)
                    device.connected = perf_counter()
                    return await device.waited
                except OSError as error:
                    if not device.waited.cancel():
                        # Retrieved, so that nobody complains that it was not.
                        device.waited.exception()
                    self._again += 1
                    self.note(str(error))
                    await asyncio.sleep(random.uniform(*_AGAIN_SECONDS))

    async def post(self, wanted: Post) -> None:
        """Every sender sends. Raises GiveUp."""
        self._all_stored.clear()
        for device in self._senders:
            if device.socket is None:
                raise GiveUp(
                    "a sender has lost its connection" + "".join(f"; {text}" for text in self.errors)
                )
            self.post_from(device, wanted.messages)
        try:
            await asyncio.wait_for(self._all_stored.wait(), _POST_SECONDS)
        except TimeoutError:
            raise GiveUp(
                f"{self._unstored} messages are not stored after {_POST_SECONDS:g} s"
                + "".join(f"; {text}" for text in self.errors)
            ) from None

    def post_from(self, device: Device, messages: int) -> None:
        """One device, which is connected, sends so many messages in one frame."""
        frames = []
        for _ in range(messages):
            self.sent += 1
            self._unstored += 1
            name = message_id(self.sent)
            message = self._messages[name] = Message(device.group.count)
            message.seen[device.place] = 1
            frames.append(
                f'{{"t":"send","id":"{name}","conv":"{device.group.conversation}","kind":"text",'
                f'"body":"{"x" * self._wanted.size}"}}'
            )
        assert device.socket is not None
        device.socket.send(f"[{','.join(frames)}]")

    async def lose(self, wanted: Lose) -> None:
        """Kills their node, and waits until the others have lost their connections. Raises GiveUp, and OSError when there is no such
        process."""
        self._to_lose = sum(device.socket is not None for device in self._others)
        os.kill(wanted.pid, signal.SIGKILL)
        if self._to_lose:
            self._all_lost.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_lost.wait(), _LOSE_SECONDS)
        if self._to_lose:
            raise GiveUp(f"{self._to_lose} connections to a dead node are still open")

    def lost_one(self, reason: str) -> None:
        """A connection ended that had drained."""
        if self._to_lose:
            self._to_lose -= 1
            if not self._to_lose:
                self._all_lost.set()
            return
        self.closed += 1
        self.note(reason)

    def take(self, name: str, place: int) -> None:
        """A delivery."""
        message = self._messages.get(name)
        if message is None:
            self.unknown += 1
        elif message.seen[place]:
            self.repeated += 1
        else:
            message.seen[place] = 1
            self.delivered += 1

    def stored_one(self, name: str) -> None:
        """A message is durable."""
        message = self._messages.get(name)
        if message is None or message.stored:
            self.unknown += 1
            return
        message.stored = True
        self.stored += 1
        self._unstored -= 1
        if not self._unstored:
            self._all_stored.set()

    def note(self, problem: str) -> None:
        """Keeps the first few problems for people."""
        if len(self.errors) < _SHOWN_ERRORS:
            self.errors.append(problem)

    def settled(self) -> Settled:
        """What has become of everything."""
        return Settled(
            sent=self.sent,
            stored=self.stored,
            delivered=self.delivered,
            missing=sum(message.seen.count(0) for message in self._messages.values()),
            repeated=self.repeated,
            unknown=self.unknown,
            failed=self.failed,
            closed=self.closed,
            errors=self.errors,
        )

    def close(self) -> None:
        """Closes every connection."""
        for device in (*self._senders, *self._others):
            if device.socket is not None:
                device.socket.close()


class Process:
    """What is asked, carried out."""

    def __init__(self) -> None:
        self._storm: Storm | None = None

    async def answer(self, request: AnyRequest) -> Answer:
        """The answer. Raises GiveUp and OSError."""
        if isinstance(request, Assemble):
            self._storm = Storm(request)
            return Done()
        storm = self._storm
        assert storm is not None
        match request:
            case Come():
                return await storm.come(request)
            case Post():
                await storm.post(request)
                return Done()
            case Lose():
                await storm.lose(request)
                return Done()
            case Settle():
                return storm.settled()

    def close(self) -> None:
        """Closes every connection."""
        if self._storm is not None:
            self._storm.close()


if __name__ == "__main__":
    process = Process()
    sys.exit(serve(AnyRequest, process.answer, process.close))
