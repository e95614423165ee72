"""Nodes in this process that die, between any two writes to the database, with nothing flushed.

A life is one run of a node. Everything it does runs in its own context, so its writes and its tasks are known: when it dies
what it was about to write is never written, what MongoDB is at is let through and never answered, its sockets are cut off and
its tasks are gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any, Final
from weakref import WeakSet

import pytest
from motor.motor_asyncio import AsyncIOMotorCollection

from relay import app
from relay.jobs import sweep
from relay.jobs.supervisor import Job
from relay.routing import invalidation
from relay.session.web import Runner
from relay.store import audience, revisions
from relay.store.batcher import Batcher
from relay.wire.clock import SEQ_BITS, Clock
from tests.support.node import Node, NodeFactory

LEASE: Final = 0.02
_SLOW_MS: Final = 60_000
_WRITES: Final = (
    "insert_one",
    "insert_many",
    "update_one",
    "update_many",
    "replace_one",
    "delete_one",
    "delete_many",
    "bulk_write",
    "find_one_and_update",
)
_LIFE: ContextVar[Life | None] = ContextVar("life", default=None)


class Life:
    """One run of a node. Jobs do not run by themselves: ``job`` runs one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.node: Node
        self.runner: Runner
        self.jobs: dict[str, Job] = {}
        self.tasks: WeakSet[asyncio.Task[Any]] = WeakSet()
        self.dead = asyncio.Event()
        self.writes = 0
        self._in_flight: set[asyncio.Future[Any]] = set()
        self._fuse: tuple[int, bool] | None = None

    def dies(self, at: int, *, after: bool) -> None:
        """It dies at its ``at``-th write from now (0: the next), before or after MongoDB has done it."""
        self._fuse = (self.writes + at, after)

    async def job(self, name: str) -> None:
        """One round of a job."""
        await asyncio.create_task(_awaited(self.jobs[name].run()), context=self._context())

    async def idle(self) -> None:
        """Waits until nothing is queued or being written, and every connection has got what it has credit for."""
        async with asyncio.timeout(10):
            while self._in_flight or self._queued() or self._draining():
                await asyncio.sleep(0.002)

    async def kill(self) -> None:
        """It dies now, if it has not."""
        self.dead.set()
        while self._in_flight:
            await asyncio.wait(set(self._in_flight))
        for site in list(self.runner.sites):
            server = getattr(site, "_server", None)
            if server is not None:
                server.close()
        for protocol in list(self.runner.server.connections if self.runner.server is not None else ()):
            if protocol.transport is not None:
                protocol.transport.abort()
        async with asyncio.timeout(10):
            while alive := [task for task in self.tasks if not task.done()]:
                for task in alive:
                    task.cancel()
                await asyncio.wait(alive, timeout=0.2)
        self.node.relay.context.passwords.close()

    async def write(self, begin: Callable[[], Awaitable[Any]]) -> Any:
        """A write of this life."""
        number = self.writes
        self.writes += 1
        fatal = self._fuse is not None and number >= self._fuse[0]
        if self.dead.is_set() or (fatal and self._fuse is not None and not self._fuse[1]):
            self.dead.set()
            await _for_ever()
        future = asyncio.ensure_future(begin())
        self._in_flight.add(future)
        future.add_done_callback(self._ended)
        try:
            return await asyncio.shield(future)
        finally:
            if fatal:
                self.dead.set()
            if self.dead.is_set() and future.done():
                await _for_ever()

    def _ended(self, future: asyncio.Future[Any]) -> None:
        self._in_flight.discard(future)
        if not future.cancelled():
            future.exception()

    def _queued(self) -> int:
        context = self.node.relay.context
        lanes: list[Batcher[Any]] = [*context.sends.queues(), *context.endings.queues()]
        fanout = context.metrics.registry.get_sample_value("relay_queue_items", {"queue": "fanout"})
        return sum(len(one._queue) + one._flying for one in lanes) + int(fanout or 0)

    def _draining(self) -> bool:
        return any(
            one.delivery.behind and one.delivery._credit is None for one in self.node.relay.context.hub
        )

    def doubts_its_books(self) -> bool:
        """Whether it has asked for a recount since the last time."""
        ledger = self.node.relay.context.ledger
        mistrusted, ledger.mistrusted = ledger.mistrusted, False
        return mistrusted

    def part(self, job: str) -> Any:
        """What carries out a job."""
        return self.jobs[job].run.__self__  # type: ignore[attr-defined]  # every job is a method

    def _context(self) -> Any:
        context = copy_context()
        context.run(_LIFE.set, self)
        return context


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work


async def _for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def begin(factory: NodeFactory, name: str, **settings: Any) -> Life:
    """Starts a node. What it believes of recipients, and what others wait for it, lasts for ``LEASE`` seconds."""
    life = Life(name)
    starting = factory.start(**settings)
    life.node = await asyncio.create_task(starting, context=life._context())
    # It is killed, not stopped.
    factory._nodes.remove(life.node)
    life.node.relay.context.invalidation.lease = 1.5 * LEASE
    return life


def task_factory(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    """Makes the loop's tasks, and notes whose they are."""
    task = asyncio.Task(work, loop=loop, **options)
    context = options.get("context")
    life = _LIFE.get() if context is None else context.run(_LIFE.get)
    if life is not None:
        life.tasks.add(task)
    return task


@contextmanager
def mortal() -> Iterator[None]:
    """While this lasts nodes may be begun as lives."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _WRITES:
            patch.setattr(AsyncIOMotorCollection, name, _gated(getattr(AsyncIOMotorCollection, name)))
        patch.setattr(app, "Clock", _Clocks)
        patch.setattr(app, "Supervisor", _Jobs)
        patch.setattr(app, "Runner", _Doors)
        # Some hundred nodes start: what is garbage must not be kept for ever.
        patch.setattr(app, "gc", SimpleNamespace(collect=int, freeze=int, set_threshold=lambda *_: None))
        patch.setattr(audience, "LEASE_SECONDS", LEASE)
        patch.setattr(invalidation, "LEASE_SECONDS", LEASE)
        patch.setattr(revisions, "_REPAIRED", timedelta(0))
        patch.setattr(sweep, "_GRACE_MS", -1000)
        yield


def _gated(method: Callable[..., Any]) -> Callable[..., Any]:
    def write(collection: Any, *arguments: Any, **options: Any) -> Any:
        life = _LIFE.get()
        if life is None:
            return method(collection, *arguments, **options)
        return life.write(partial(method, collection, *arguments, **options))

    return write


class _Jobs:
    """Jobs that are run when a test says so."""

    def __init__(self, jobs: list[Job]) -> None:
        life = _LIFE.get()
        assert life is not None
        life.jobs = {job.name: job for job in jobs}

    def start(self) -> None:
        """Starts none."""

    async def stop(self) -> None:
        """There is nothing to stop."""


class _Clocks(Clock):
    """The nodes' orders differ: what ``west`` numbers by itself comes before what ``east`` has numbered."""

    __slots__ = ("_slow",)

    def __init__(self) -> None:
        super().__init__()
        life = _LIFE.get()
        self._slow = _SLOW_MS << SEQ_BITS if life is not None and life.name == "west" else 0

    def next(self, floor: int = 0) -> int:
        """As a node's whose clock is slow."""
        return max(super().next() - self._slow, floor)


class _Doors(Runner):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        life = _LIFE.get()
        assert life is not None
        life.runner = self
