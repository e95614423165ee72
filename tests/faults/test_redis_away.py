"""Redis dies, forgets everything, stands still, or does not reach one node, under a moderate load: what that changes, and what it does
not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic

import pytest

from tests.faults.conftest import Processes
from tests.support.device import WireDevice
from tests.support.node import SECRET, Node
from tests.support.partition import partition
from tests.support.process import Mongods
from tests.support.valkey import open_valkey
from tests.support.waiting import until

SWEEP = 5.0
# Between nodes, whatever Redis does.
LIMIT = SWEEP + 5
TALKS = 3
RATE = 8.0
CALM_SECONDS = 8.0
PAUSE_SECONDS = 30.0
CUT_SECONDS = 15.0
FORGOTTEN_SECONDS = 5.0
# Than before and afterwards: what went through a sweep, or waited for Redis, would be far beyond.
SLOWER = 8.0


Act = Callable[[], Awaitable[None] | None]


@dataclass(slots=True)
class Said:
    """One message, with the moments of its life as its devices saw it; 0 for what has not happened."""

    made: float
    stored: float = 0.0
    received: float = 0.0


class Talk:
    """One device that sends at a steady rate, whatever the relay does, to another, which acknowledges all it gets."""

    def __init__(self, conv: str, sender: WireDevice, reader: WireDevice) -> None:
        self._conv = conv
        self._sender = sender
        self._reader = reader
        self.said: dict[str, Said] = {}
        self.errors: list[str] = []
        self._speaking = asyncio.create_task(self._speak())
        self._tasks = [
            self._speaking,
            *map(asyncio.create_task, (self._hear_answers(), self._hear_messages())),
        ]

    async def _speak(self) -> None:
        due = monotonic()
        while True:
            due += 1 / RATE
            await asyncio.sleep(due - monotonic())
            made = monotonic()
            self.said[await self._sender.send(self._conv)] = Said(made)

    async def _hear_answers(self) -> None:
        while True:
            frame = await self._sender.next(120)
            if frame["t"] == "stored":
                self.said[frame["id"]].stored = monotonic()
            elif frame["t"] == "error":
                self.errors.append(frame["code"])

    async def _hear_messages(self) -> None:
        while True:
            frame = await self._reader.next(120)
            if frame["t"] == "msg":
                said = self.said[frame["id"]]
                said.received = said.received or monotonic()
                await self._reader.ack(self._conv, frame["id"], durable=False)

    async def finish(self) -> None:
        """Sends nothing more. Raises what has ended it early."""
        if not self._speaking.done():
            self._speaking.cancel()
        await asyncio.wait([self._speaking])
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def close(self) -> None:
        """Ends it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Talks:
    """Some between devices of one node, ``near``, and some between those of two, ``far``."""

    def __init__(self) -> None:
        self.near: list[Talk] = []
        self.far: list[Talk] = []

    async def begin(self, one: Node, two: Node) -> None:
        for number in range(TALKS):
            for name, at, to in (("a", one, one), ("b", two, two), ("c", one, two), ("d", two, one)):
                sender, reader = await at.connect(f"{name}{number}"), await to.connect(f"{name}to{number}")
                conv = await at.direct(sender.user, reader.user)
                (self.near if at is to else self.far).append(Talk(conv, sender, reader))

    @property
    def all(self) -> list[Talk]:
        return self.near + self.far

    async def settled(self, seconds: float) -> None:
        """Ends the sending, and waits until everything is stored and received."""
        for talk in self.all:
            await talk.finish()

        async def complete() -> bool:
            return all(said.stored and said.received for talk in self.all for said in talk.said.values())

        await until(complete, seconds, "everything is stored and received")

    def stored(self, start: float, end: float) -> float:
        """How many messages were stored in a second."""
        return sum(start <= said.stored < end for said in _of(self.all)) / (end - start)


def _of(talks: Iterable[Talk]) -> list[Said]:
    return [said for talk in talks for said in talk.said.values()]


def times(talks: Iterable[Talk], start: float, end: float) -> list[float]:
    """Seconds from making a message to its arrival, of those that were made then and have arrived."""
    found = [said.received - said.made for said in _of(talks) if said.received and start <= said.made < end]
    assert found
    return found


async def names_bus(node: Node, wanted: bool, seconds: float) -> None:
    """``/readyz`` comes to name the bus as a problem, or no more, and says all the time that the node is ready."""

    async def so() -> bool:
        async with node.http.get(node.url + "/readyz") as response:
            assert response.status == 200
            return ("bus" in (await response.json()).get("problems", {})) is wanted

    await until(so, seconds, f"readyz names the bus: {wanted}")


@asynccontextmanager
async def talking(one: Node, two: Node) -> AsyncIterator[Talks]:
    talks = Talks()
    try:
        await talks.begin(one, two)
        # The first messages warm the caches.
        await asyncio.sleep(2)
        yield talks
    finally:
        for talk in talks.all:
            await talk.close()


@dataclass(slots=True)
class Window:
    """The moments of one fault."""

    calm: float
    begun: float
    over: float
    resumed: float
    end: float

    def check(self, talks: Talks) -> str:
        """Asserts what a fault may change and what not. Returns the figures."""
        before, rate = talks.stored(self.calm, self.begun), talks.stored(self.begun, self.over)
        calm = times(talks.near, self.calm, self.begun) + times(talks.near, self.resumed, self.end)
        usual = median(calm)
        near = median(times(talks.near, self.begun, self.over))
        far = max(times(talks.far, self.begun, self.over))
        again, ever = (
            median(times(talks.far, self.resumed, self.end)),
            median(times(talks.far, self.calm, self.begun)),
        )
        figures = (
            f"stored {before:.0f}/s, {rate:.0f}/s meanwhile; in a node {usual * 1000:.1f} ms, {near * 1000:.1f} ms meanwhile; "
            f"between nodes {ever * 1000:.1f} ms, {far:.1f} s at most meanwhile, {again * 1000:.1f} ms again"
        )
        assert rate >= 0.8 * before, figures
        assert near <= SLOWER * usual, figures
        assert far <= LIMIT, figures
        assert again <= SLOWER * max(ever, usual), figures
        return figures


async def do(act: Act) -> None:
    awaited = act()
    if awaited is not None:
        await awaited


async def watched(fail: Act, heal: Act, seconds: float, affected: Sequence[Node]) -> Window:
    """What happens before, during and after a fault of so many seconds, of which these nodes speak."""
    calm = monotonic()
    await asyncio.sleep(CALM_SECONDS)
    begun = monotonic()
    await do(fail)
    try:
        await asyncio.gather(*(names_bus(node, True, 10) for node in affected))
        await asyncio.sleep(begun + seconds - monotonic())
    finally:
        over = monotonic()
        await do(heal)
    await asyncio.gather(*(names_bus(node, False, 15) for node in affected))
    await asyncio.sleep(over + LIMIT - monotonic())
    resumed = monotonic()
    await asyncio.sleep(CALM_SECONDS)
    return Window(calm, begun, over, resumed, monotonic())


@pytest.mark.faults
@pytest.mark.timeout(420)
async def test_while_redis_is_away_all_but_delivery_between_nodes_is_as_ever_and_that_takes_a_sweep(
    mongods: Mongods, processes: Processes, tmp_path: Path
) -> None:
    uri = await mongods.start_set(1)
    settings = {"mongo_uri": uri, "pseudonym_key": SECRET, "sweep_seconds": SWEEP, "drain_seconds": 2}
    async with open_valkey(tmp_path) as valkey, partition(valkey.port) as proxy:
        one = processes(redis_url=valkey.url, **settings)
        two = processes(redis_url=f"redis://127.0.0.1:{proxy.port}", **settings)
        await one.start()
        await two.start()
        async with talking(one, two) as talks:
            windows = [
                await watched(valkey.pause, valkey.resume, PAUSE_SECONDS, [one, two]),
                await watched(valkey.kill, valkey.start, CUT_SECONDS, [one, two]),
                await watched(partial(valkey.command, "FLUSHALL"), proxy.heal, FORGOTTEN_SECONDS, []),
                await watched(partial(proxy.cut, up=False), proxy.heal, CUT_SECONDS, [two]),
                await watched(partial(proxy.cut, down=False), proxy.heal, CUT_SECONDS, [two]),
                await watched(proxy.cut_subscriptions, proxy.heal, CUT_SECONDS, [two]),
            ]
            await talks.settled(LIMIT)
            for window in windows:
                print(window.check(talks))
            assert not [talk.errors for talk in talks.all if talk.errors]

        async def gone() -> bool:
            return bool(await one.db.messages.count_documents({}) == 0)

        await until(gone, LIMIT, "nothing is left")
