"""The load generator, a process of its own: takes an Order on standard input, tells News on standard output.

It holds its connections until standard input ends, so that what is still under way can be looked at. A line ends a phase.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
from collections.abc import Coroutine
from itertools import pairwise
from time import perf_counter
from typing import Any, Final, TypeVar

import aiohttp
import msgspec
import uvloop

from relay.security.tokens import mint
from scripts.tools.bench.messages import (
    Connected,
    Counted,
    Failed,
    Measured,
    News,
    Order,
    Percentiles,
    Progress,
)
from scripts.tools.bench.pairs import Pacer, Pair, Tally, percentiles
from scripts.tools.bench.processes import Usage, transferred, usages
from scripts.tools.bench.sockets import Drained, Op, Socket, connect

_AT_ONCE: Final = 64
_GRACE_SECONDS: Final = 5.0
_READY_SECONDS: Final = 60.0
_TOKEN_SECONDS: Final = 24 * 3600
_DEVICE: Final = "bench"

Result = TypeVar("Result")


class GiveUp(Exception):
    """The load cannot be generated; one line."""


class Idle:
    """A device that only listens."""

    __slots__ = ("drained", "lost_because")

    def __init__(self) -> None:
        self.drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost_because: str | None = None

    def received(self, ops: list[Op]) -> None:
        """One frame."""
        if not self.drained.done() and any(type(op) is Drained for op in ops):
            self.drained.set_result(None)

    def lost(self, reason: str) -> None:
        """The connection ended."""
        self.lost_because = reason
        if not self.drained.done():
            self.drained.set_exception(ConnectionError(reason))


class Door:
    """Where sockets come from, a bounded number at once."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self.sockets: list[Socket] = []

    def token(self, user: str) -> str:
        """An access token of this user's device."""
        order = self._order
        return mint(order.secret, user, _DEVICE, audience=order.audience, lifetime=_TOKEN_SECONDS)

    async def enter(self, user: str, port: int | None = None) -> tuple[Socket, Idle]:
        """A connection that has drained, to the first node unless ``port`` says another. Raises OSError."""
        order = self._order
        async with self._turns:
            idle = Idle()
            socket = await connect(idle, order.host, port or order.port, self.token(user))
            self.sockets.append(socket)
            async with asyncio.timeout(_READY_SECONDS):
                await idle.drained
            return socket, idle

    def close(self) -> None:
        """Closes every socket."""
        for socket in self.sockets:
            socket.close()


class Phases:
    """When the phases of a window ended; ``over`` after so many."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self.ends: list[float] = []
        self.over = asyncio.Event()

    def end(self) -> None:
        """One has ended."""
        self.ends.append(perf_counter())
        if len(self.ends) >= self._wanted:
            self.over.set()


class Load:
    """One run of pairs."""

    def __init__(self, order: Order, door: Door, phases: Phases) -> None:
        self._order = order
        self._door = door
        self._phases = phases
        self._pids = {**order.pids, "load": os.getpid()}
        self.tally = Tally(mark=order.mark, wanted=order.messages, keep_due=bool(order.phases))
        self._pairs: list[Pair] = []

    async def prepare(self) -> None:
        """Connects every device and makes the conversations."""
        started = perf_counter()
        async with asyncio.TaskGroup() as group, aiohttp.ClientSession() as http:
            making = [
                group.create_task(self._pair(http, n), name=f"pair {n}") for n in range(self._order.pairs)
            ]
            await asyncio.wait(making)
        self._pairs = [task.result() for task in making]
        tell(Connected(connections=len(self._door.sockets), seconds=perf_counter() - started))
        # Nothing here makes cycles from now on, and a collection would show up as latency.
        gc.collect()
        gc.freeze()
        gc.disable()

    async def run(self) -> Measured:
        """Warm-up and window; returns when everything under way has arrived, or 5 s after the end."""
        order, tally = self._order, self.tally
        pacer = None if order.rate is None else Pacer(self._pairs, tally, order.rate)
        progress = asyncio.create_task(self._progress(), name="progress")
        marking = asyncio.create_task(self._mark(), name="mark")
        try:
            if pacer is None:
                for pair in self._pairs:
                    pair.send((perf_counter(),) * order.window)
            await asyncio.sleep(order.warmup)
            bytes_before = transferred(os.getpid())
            before, started = usages(self._pids), perf_counter()
            tally.recording = True
            ending = self._phases.over if order.phases else tally.enough
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), order.seconds)
            tally.recording = False
            after, ended = usages(self._pids), perf_counter()
            bytes_after = transferred(os.getpid())
            late = 0
            if pacer is not None:
                late = pacer.late
                pacer.stop()
            tally.stop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(tally.settled.wait(), _GRACE_SECONDS)
            return Measured(
                seconds=ended - started,
                delivered=tally.recorded,
                per_frame=tally.recorded / max(1, tally.frames),
                late=late,
                stored_ms=percentiles(tally.stored_ms),
                delivered_ms=percentiles([*tally.together_ms, *tally.apart_ms]),
                apart_ms=percentiles(tally.apart_ms),
                together_ms=percentiles(tally.together_ms),
                before=before,
                marked=marking.result() if marking.done() else {},
                after=after,
                phases_ms=self._by_phase(started, ended),
                read_bytes=bytes_after[0] - bytes_before[0],
                written_bytes=bytes_after[1] - bytes_before[1],
            )
        finally:
            for task in (progress, marking):
                task.cancel()
            await asyncio.gather(progress, marking, return_exceptions=True)

    def _by_phase(self, started: float, ended: float) -> list[Percentiles]:
        if not self._order.phases:
            return []
        bounds = [started, *self._phases.ends[: self._order.phases - 1], ended]
        times = list(zip(self.tally.due, self.tally.came, strict=True))
        return [
            percentiles([came - due for due, came in times if first <= due < last])
            for first, last in pairwise(bounds)
        ]

    def counted(self) -> Counted:
        """What became of everything that was sent."""
        tally = self.tally
        return Counted(
            sent=tally.sent,
            stored=tally.stored,
            delivered=tally.delivered,
            repeated=tally.repeated,
            unknown=tally.unknown,
            failed=tally.failed,
            closed=tally.closed,
            errors=tally.errors,
        )

    async def _pair(self, http: aiohttp.ClientSession, number: int) -> Pair:
        order = self._order
        names = [f"bench-{order.run}-{number}-{part}" for part in ("from", "to")]
        places = ports(order, number)
        (sending, _), (receiving, _) = [
            await self._door.enter(name, port) for name, port in zip(names, places, strict=True)
        ]
        url = f"http://{order.host}:{order.port}/v1/conversations"
        headers = {"Authorization": f"Bearer {self._door.token(names[0])}"}
        async with http.post(url, json={"type": "direct", "members": [names[1]]}, headers=headers) as answer:
            if answer.status not in (200, 201):
                raise GiveUp(f"the relay made no conversation: {answer.status} {(await answer.text())[:200]}")
            conversation = (await answer.json())["id"]
        pair = Pair(
            self.tally,
            conversation,
            order.size,
            closed_loop=order.rate is None,
            apart=places[0] != places[1],
        )
        pair.sender.attach(sending)
        pair.recipient.attach(receiving)
        sending.listen(pair.sender)
        receiving.listen(pair.recipient)
        return pair

    async def _mark(self) -> dict[str, Usage]:
        await self.tally.marked.wait()
        return usages(self._pids)

    async def _progress(self) -> None:
        tally = self.tally
        known, since = tally.delivered, perf_counter()
        while True:
            await asyncio.sleep(1)
            now = perf_counter()
            tell(
                Progress(
                    warm=tally.recording,
                    delivered=tally.delivered,
                    rate=(tally.delivered - known) / (now - since),
                )
            )
            known, since = tally.delivered, now


def ports(order: Order, number: int) -> tuple[int, int]:
    """Where the sender and the recipient of a pair are connected."""
    nodes = [order.port, *order.more_ports]
    count = len(nodes)
    sender = number % count
    match order.placement:
        case "first":
            return order.port, order.port
        case "same":
            recipient = sender
        case "apart":
            recipient = (sender + 1) % count
        case "mixed":
            recipient = (number // count) % count
    return nodes[sender], nodes[recipient]


async def open_idle(order: Order, door: Door) -> list[Idle]:
    """Opens idle connections. Raises OSError."""
    started = perf_counter()
    names = (f"bench-{order.run}-{number}" for number in range(order.connections))
    opened: list[Idle] = []

    async def work() -> None:
        for name in names:
            opened.append((await door.enter(name))[1])

    async with asyncio.TaskGroup() as group:
        for number in range(min(_AT_ONCE, order.connections)):
            group.create_task(work(), name=f"connect {number}")
    tell(Connected(connections=len(opened), seconds=perf_counter() - started))
    return opened


async def generate(order: Order, phases: Phases, dismissed: asyncio.Task[None]) -> None:
    """The whole run; ``dismissed`` is done when the bench wants it to end. Raises OSError and GiveUp."""
    door = Door(order)
    try:
        if order.connections:
            devices = await _unless(dismissed, open_idle(order, door))
            await dismissed
            tell(_counted_idle(devices))
            return
        load = Load(order, door, phases)
        await _unless(dismissed, load.prepare())
        tell(await _unless(dismissed, load.run()))
        await dismissed
        tell(load.counted())
    finally:
        door.close()
        # Connections say goodbye on the next turn.
        await asyncio.sleep(0.05)


def _counted_idle(devices: list[Idle]) -> Counted:
    reasons = [device.lost_because for device in devices if device.lost_because is not None]
    return Counted(
        sent=0,
        stored=0,
        delivered=0,
        repeated=0,
        unknown=0,
        failed=0,
        closed=len(reasons),
        errors=reasons[:5],
    )


async def _unless(dismissed: asyncio.Task[None], work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``. Raises GiveUp when the bench is gone before."""
    task = asyncio.create_task(work, name="load")
    try:
        await asyncio.wait({task, dismissed}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GiveUp("the bench has ended")
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def tell(news: News) -> None:
    """One line to the bench."""
    sys.stdout.buffer.write(msgspec.json.encode(news) + b"\n")
    sys.stdout.buffer.flush()


async def _main() -> int:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    order = msgspec.json.decode(await reader.readline(), type=Order)
    phases = Phases(order.phases)
    dismissed = asyncio.create_task(_heed(reader, phases), name="dismissal")
    code = 0
    try:
        await generate(order, phases, dismissed)
    except* (OSError, GiveUp, TimeoutError, aiohttp.ClientError) as problems:
        tell(Failed(reason=_first(problems)))
        code = 1
    finally:
        dismissed.cancel()
        await asyncio.gather(dismissed, return_exceptions=True)
    return code


async def _heed(reader: asyncio.StreamReader, phases: Phases) -> None:
    while await reader.readline():
        phases.end()


def _first(problems: BaseExceptionGroup[Any]) -> str:
    problem: BaseException = problems
    while isinstance(problem, BaseExceptionGroup):
        problem = problem.exceptions[0]
    return " ".join(str(problem).split()) or type(problem).__name__


def main() -> int:
    """The process; its exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_main())


if __name__ == "__main__":
    sys.exit(main())
