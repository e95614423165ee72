"""A crowd: many devices in a few groups, a process of its own. Requests on standard input, answers on standard output.

It shares the machine with what it measures. A fan-out brings the same bytes to every device: they are decoded once, and
their acknowledgement is put together once.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from array import array
from time import perf_counter
from typing import Final, TypeVar

from relay.security.tokens import mint
from relay.wire.ids import MESSAGE_ID
from scripts.tools.bench.asked import GiveUp, serve
from scripts.tools.bench.crowd_messages import (
    Answer,
    AnyRequest,
    Done,
    Enter,
    Entered,
    Gather,
    Group,
    Said,
    Say,
    Settled,
    Stop,
    Talk,
)
from scripts.tools.bench.groups import DEVICE, user_name
from scripts.tools.bench.pairs import message_id, percentiles
from scripts.tools.bench.sockets import (
    Drained,
    Error,
    Msg,
    Op,
    Receiver,
    Socket,
    Stored,
    connect,
    decoded,
    text_frame,
)

_AT_ONCE: Final = 64
_REMEMBERED: Final = 1024
_REMEMBERED_BYTES: Final = 65_536
_SHOWN_ERRORS: Final = 5
_READY_SECONDS: Final = 180.0
_REACH_SECONDS: Final = 30.0
_SETTLE_SECONDS: Final = 60.0
_TOKEN_SECONDS: Final = 24 * 3600

Result = TypeVar("Result")


class Message:
    """A message of the crowd. ``seen`` has a place for every member, ``left`` is how many who were connected when it was
    sent still miss it, the sender not among them."""

    __slots__ = ("done", "first", "last", "left", "seen", "sender", "sent", "stored")

    def __init__(self, sender: Member, left: int, done: asyncio.Future[None] | None) -> None:
        self.sender = sender
        self.seen = bytearray(sender.group.count)
        self.seen[sender.place] = 1
        self.left = left
        self.done = done
        self.sent = perf_counter()
        self.stored = self.first = self.last = 0.0


class Known:
    """A frame that has been decoded: its messages, and the frame that acknowledges them."""

    __slots__ = ("acknowledgement", "messages")

    def __init__(self, messages: list[Message], acknowledgement: bytes) -> None:
        self.messages = messages
        self.acknowledgement = acknowledgement


class Line(Socket):
    """A connection that hands its frames on as they are."""

    __slots__ = ("_member",)

    def __init__(self, member: Receiver, host: str, port: int, token: str) -> None:
        super().__init__(member, host, port, token)
        assert isinstance(member, Member)
        self._member = member
        # What waits may come together with the answer to the upgrade, before anybody attaches the socket.
        member.socket = self

    def took(self, payload: bytes) -> None:
        """One text frame has come."""
        self._member.took(payload)


class Member:
    """One device of the crowd, at ``place`` in its group."""

    __slots__ = ("_crowd", "drained", "group", "number", "place", "socket")

    def __init__(self, crowd: Crowd, number: int, group: Group) -> None:
        self._crowd = crowd
        self.number = number
        self.group = group
        self.place = number - group.first
        self.socket: Socket | None = None
        self.drained: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def took(self, payload: bytes) -> None:
        """One frame."""
        crowd = self._crowd
        known = crowd.known.get(payload)
        if known is None:
            known = crowd.read(payload, self)
            if known is None:
                return
        assert self.socket is not None
        self.socket.transport.write(known.acknowledgement)
        now = perf_counter()
        place = self.place
        crowd.frames += 1
        for message in known.messages:
            if message.seen[place]:
                crowd.repeated += 1
                continue
            message.seen[place] = 1
            crowd.delivered += 1
            if not message.first:
                message.first = now
            message.left -= 1
            if not message.left:
                message.last = now
                crowd.reached(message)

    def received(self, ops: list[Op]) -> None:
        """Frames are taken as they are."""
        raise NotImplementedError

    def lost(self, reason: str) -> None:
        """The connection ended; what was under way on it stays unaccounted for."""
        crowd = self._crowd
        crowd.closed += 1
        crowd.note(reason)
        if not self.drained.done():
            self.drained.set_exception(ConnectionError(reason))
            self.drained.exception()


class Crowd:
    """Everybody, and what became of every message. ``known`` are the latest frames that carried nothing but messages."""

    def __init__(self, wanted: Gather) -> None:
        self._wanted = wanted
        self._loop = asyncio.get_running_loop()
        self._body = f'","kind":"text","body":"{"x" * wanted.size}"}}'
        self.members = [
            Member(self, number, group)
            for group in wanted.groups
            for number in range(group.first, group.first + group.count)
        ]
        self._online = {group.conversation: 0 for group in wanted.groups}
        self._messages: dict[str, Message] = {}
        self._talking = False
        self._under_way = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._reached_ms = array("d")
        self.known: dict[bytes, Known] = {}
        self.stored = self.delivered = self.frames = self.repeated = self.unknown = self.failed = (
            self.closed
        ) = 0
        self.errors: list[str] = []

    async def enter(self, wanted: Enter) -> Entered:
        """Connects devices, a bounded number at once. Raises OSError and GiveUp."""
        members = self.members[wanted.first : wanted.first + wanted.count]
        order = self._wanted
        tokens = [
            mint(
                order.secret,
                user_name(member.number),
                DEVICE,
                audience=order.audience,
                lifetime=_TOKEN_SECONDS,
            )
            for member in members
        ]
        waiting = iter(zip(members, tokens, strict=True))

        async def work() -> None:
            for member, token in waiting:
                self.join(member, await connect(member, order.host, order.port, token, make=Line))

        started = perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(min(_AT_ONCE, len(members))):
                group.create_task(work(), name=f"connect {number}")
        try:
            async with asyncio.timeout(_READY_SECONDS):
                drained = [await member.drained for member in members]
        except TimeoutError:
            missing = sum(not member.drained.done() for member in members)
            raise GiveUp(f"{missing} devices did not drain within {_READY_SECONDS:g} s") from None
        seconds = perf_counter() - started
        # Nothing here makes cycles from now on, and a collection would show up as latency.
        gc.collect()
        gc.freeze()
        gc.disable()
        return Entered(connections=len(members), messages=sum(drained), seconds=seconds)

    def join(self, member: Member, socket: Socket) -> None:
        """A device is connected: what is sent from now on it should get."""
        member.socket = socket
        self._online[member.group.conversation] += 1

    async def say(self, wanted: Say) -> Said:
        """One message at a time. Raises GiveUp."""
        sender = self._senders(self._wanted.groups[0], 1)[0]
        said = []
        for _ in range(wanted.messages):
            done: asyncio.Future[None] = self._loop.create_future()
            message = self._send(sender, done)
            try:
                async with asyncio.timeout(_REACH_SECONDS):
                    await done
            except TimeoutError:
                raise GiveUp(
                    f"{message.left} devices did not get a message within {_REACH_SECONDS:g} s"
                    + "".join(f"; {text}" for text in self.errors)
                ) from None
            said.append(message)
            await asyncio.sleep(wanted.pause)
        return Said(
            stored_ms=percentiles([message.stored - message.sent for message in said]),
            first_ms=percentiles([message.first - message.sent for message in said if message.first]),
            last_ms=percentiles([message.last - message.sent for message in said if message.last]),
        )

    def talk(self, wanted: Talk) -> None:
        """Begins the closed loop. Raises GiveUp."""
        self._talking = True
        for group in self._wanted.groups:
            for sender in self._senders(group, wanted.senders):
                for _ in range(wanted.window):
                    self._send(sender, None)

    def silence(self) -> None:
        """Nobody sends any more."""
        self._talking = False

    async def stop(self) -> Settled:
        """Waits for what is under way."""
        self.silence()
        try:
            await asyncio.wait_for(self._quiet.wait(), _SETTLE_SECONDS)
        except TimeoutError:
            self.note(f"{self._under_way} messages are still under way after {_SETTLE_SECONDS:g} s")
        return Settled(
            sent=len(self._messages),
            stored=self.stored,
            delivered=self.delivered,
            missing=sum(message.seen.count(0) for message in self._messages.values()),
            repeated=self.repeated,
            unknown=self.unknown,
            failed=self.failed,
            closed=self.closed,
            per_frame=self.delivered / max(1, self.frames),
            reached_ms=percentiles(self._reached_ms),
            errors=self.errors,
        )

    def close(self) -> None:
        """Closes every connection."""
        for member in self.members:
            if member.socket is not None:
                member.socket.close()

    # -- frames

    def read(self, payload: bytes, member: Member) -> Known | None:
        """Decodes a frame: its messages, None when there are none."""
        ops = decoded(payload)
        came = [op for op in ops if type(op) is Msg]
        if len(came) < len(ops):
            self._hear(ops, member)
        if not came:
            return None
        messages = [self._messages[op.id] for op in came if op.id in self._messages]
        found = Known(messages, _acknowledgement(came))
        if len(messages) < len(came):
            self.unknown += len(came) - len(messages)
        elif len(came) == len(ops) and len(payload) <= _REMEMBERED_BYTES:
            if len(self.known) >= _REMEMBERED:
                self.known.clear()
            self.known[payload] = found
        return found

    def _hear(self, ops: list[Op], member: Member) -> None:
        for op in ops:
            if isinstance(op, Stored):
                message = self._messages.get(op.id)
                if message is None:
                    self.unknown += 1
                elif message.stored:
                    self.repeated += 1
                else:
                    self.stored += 1
                    message.stored = perf_counter()
                    if message.left <= 0:
                        self._done(message)
            elif isinstance(op, Drained):
                if not member.drained.done():
                    member.drained.set_result(op.count)
            elif isinstance(op, Error):
                self._refused(op)

    def reached(self, message: Message) -> None:
        """The last device that was connected has it."""
        if message.stored:
            self._done(message)

    def note(self, problem: str) -> None:
        """Keeps the first few problems for people."""
        if len(self.errors) < _SHOWN_ERRORS:
            self.errors.append(problem)

    def _refused(self, error: Error) -> None:
        self.failed += 1
        problem = f"{error.code}: {error.message}"
        self.note(problem)
        message = self._messages.get(error.id or "")
        if message is None or message.stored:
            return
        self._ended()
        if message.done is not None and not message.done.done():
            message.done.set_exception(GiveUp(problem))

    def _done(self, message: Message) -> None:
        self._ended()
        if message.done is not None:
            if not message.done.done():
                message.done.set_result(None)
            return
        self._reached_ms.append(max(message.last, message.stored) - message.sent)
        if self._talking:
            self._send(message.sender, None)

    def _ended(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._quiet.set()

    def _send(self, sender: Member, done: asyncio.Future[None] | None) -> Message:
        group = sender.group
        message = Message(sender, self._online[group.conversation] - 1, done)
        name = message_id(len(self._messages) + 1)
        self._messages[name] = message
        self._under_way += 1
        self._quiet.clear()
        assert sender.socket is not None
        sender.socket.send(f'{{"t":"send","id":"{name}","conv":"{group.conversation}{self._body}')
        return message

    def _senders(self, group: Group, count: int) -> list[Member]:
        members = self.members[group.first : group.first + group.count]
        found = [member for member in members if member.socket is not None][:count]
        if len(found) < count:
            raise GiveUp(f"{len(found)} devices of a group are connected, {count} are to send")
        return found


def _acknowledgement(came: list[Msg]) -> bytes:
    by_conversation: dict[str, list[str]] = {}
    for op in came:
        if MESSAGE_ID.fullmatch(op.id):
            by_conversation.setdefault(op.conv, []).append(op.id)
    frames = [
        '{"t":"ack","conv":"' + conversation + '","ids":["' + '","'.join(ids) + '"]}'
        for conversation, ids in by_conversation.items()
    ]
    return text_frame(frames[0] if len(frames) == 1 else "[" + ",".join(frames) + "]")


# -- the process


class Process:
    """What is asked, carried out."""

    def __init__(self) -> None:
        self._crowd: Crowd | None = None

    async def answer(self, request: AnyRequest) -> Answer:
        """The answer. Raises GiveUp and OSError."""
        if isinstance(request, Gather):
            self._crowd = Crowd(request)
            return Done()
        crowd = self._crowd
        assert crowd is not None
        match request:
            case Enter():
                return await crowd.enter(request)
            case Say():
                return await crowd.say(request)
            case Talk():
                crowd.talk(request)
                return Done()
            case Stop():
                return await crowd.stop()

    def close(self) -> None:
        """Closes every connection."""
        if self._crowd is not None:
            self._crowd.close()


if __name__ == "__main__":
    process = Process()
    sys.exit(serve(AnyRequest, process.answer, process.close))
