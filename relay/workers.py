"""Several workers on one port, and the small supervisor that starts them, starts dead ones again and drains them one by one.

Every worker is a whole node, a process of its own that listens on the same port (SO_REUSEPORT; the kernel spreads new
connections over them). The supervisor serves nobody: it owns the MongoDB and the Valkey that the workers share when none are
configured, the secrets are made before the first worker starts, and what it starts ends with it, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

import structlog

from config.settings import Settings
from relay.app import database
from relay.configured import (
    LOOPBACK,
    StartError,
    cannot_listen,
    keys_of,
    make_data_dir,
    pseudonyms_of,
    url_of,
)
from relay.store.embedded_valkey import HOT_BYTES, EmbeddedError, EmbeddedValkey
from relay.worker import Worker, gone, killed

Welcome = Callable[[str, bool], None]

FIRST_BACKOFF: Final = 0.5
LAST_BACKOFF: Final = 30.0
STEADY: Final = 60.0
"""A worker that lived for so long, in seconds, is started again without regard to how often it had died before."""
STOP_MARGIN: Final = 5.0
"""What a worker has beyond RELAY_DRAIN_SECONDS to end, in seconds; then it is killed."""
HURRY_SECONDS: Final = 2.0
START_SECONDS: Final = 180.0
# A worker that exits so has said why; the same would happen to the next one.
_REFUSALS: Final = (1, 2)

log = structlog.get_logger(__name__)


class _RefusedError(Exception):
    """A worker that never listened has ended by itself, and said why; the code it exited with."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


async def serve(settings: Settings, welcome: Welcome) -> int:
    """Runs ``settings.workers`` workers until SIGTERM or SIGINT; SIGHUP replaces them one by one. Returns the exit code.
    Raises StartError.

    ``welcome`` is called once, when all listen, with the URL and whether their MongoDB is the relay's own. A worker that
    cannot start ends everything with its exit code."""
    workers = Workers(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, workers.ask)
    loop.add_signal_handler(signal.SIGHUP, workers.hang_up)
    asked = asyncio.create_task(workers.asked.wait(), name="signal")
    starting = asyncio.create_task(workers.start(), name="start")
    served = False
    try:
        await _first(asked, starting)
        if not starting.done():
            return 0
        served = starting.exception() is None
        welcome(*starting.result())
        await _first(asked, workers.fault)
        return 1 if workers.fault.done() else 0
    except _RefusedError as error:
        return error.code
    finally:
        asked.cancel()
        starting.cancel()
        await asyncio.wait({starting})
        await workers.stop()
        if served:
            log.info("stopped")


class _Place:
    """One worker's place, and the process that has it now. Whoever changes that holds ``turn``; ``begun`` is set when one
    has listened."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.turn = asyncio.Lock()
        self.begun = asyncio.Event()
        self.worker: Worker


class Workers:
    """The supervisor. ``fault`` is done when it can go on no longer."""

    def __init__(self, settings: Settings) -> None:
        self.asked = asyncio.Event()
        self.fault: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settings = settings
        self._hurried = asyncio.Event()
        self._renewal = asyncio.Event()
        self._on_terminal = _has_terminal()
        self._environment: dict[str, str] = {}
        self._places: list[_Place] = []
        self._living: set[Worker] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._beneath = contextlib.AsyncExitStack()

    def ask(self) -> None:
        """SIGTERM and SIGINT: to stop; said again, to hurry."""
        if self.asked.is_set():
            self._hurried.set()
        self.asked.set()

    def hang_up(self) -> None:
        """SIGHUP: to replace the workers, or, when the terminal that this was started on has gone, to stop."""
        if self._on_terminal and not _has_terminal():
            self.ask()
        else:
            self._renewal.set()

    async def start(self) -> tuple[str, bool]:
        """Starts what the workers share, then them; all listen when this returns, at this URL, on a MongoDB of the relay's
        own or not. Raises StartError and _RefusedError."""
        settings = self._settings
        # What n processes would make at the same moment is made before there are any.
        keys_of(settings)
        pseudonyms_of(settings)
        port = await self._hold_ports()
        given = {"RELAY_WORKERS": "1", "RELAY_PORT": str(port)}
        embedded, given["RELAY_MONGO_URI"] = await database(settings, self._beneath)
        if settings.redis_url is None:
            given["RELAY_REDIS_URL"] = await self._valkey()
            share = min(settings.hot_redis_bytes, HOT_BYTES // settings.workers)
            given["RELAY_HOT_REDIS_BYTES"] = str(share)
        kept = {name: value for name, value in os.environ.items() if name.upper() not in given}
        self._environment = {**kept, **given}
        # The first prepares the database, and alone says what is wrong.
        await self._fill([1])
        await self._fill(range(2, settings.workers + 1))
        self._run(self._renew(), "renewal")
        return url_of(settings.host, port), embedded is not None

    async def stop(self) -> None:
        """Drains the workers one after the other, for at most twice the time that one may take, then ends what they share.
        Those that are left when that time is half over, or when somebody hurries, are drained together."""
        await _ended(self._tasks)
        loop = asyncio.get_running_loop()
        limit = self._settings.drain_seconds + STOP_MARGIN
        half = loop.time() + limit
        hurry = asyncio.create_task(self._hurried.wait(), name="hurry")
        try:
            for worker in sorted(self._living, key=lambda worker: worker.number):
                if hurry.done() or loop.time() >= half:
                    break
                log.info("draining a worker", worker=worker.number)
                worker.signal(signal.SIGTERM)
                await _first(worker.exit, hurry, seconds=limit)
            for worker in self._living:
                worker.signal(signal.SIGTERM)
            end = loop.time() + limit
            while self._living and loop.time() < end and not hurry.done():
                await _first(hurry, *(worker.exit for worker in self._living), seconds=end - loop.time())
            if hurry.done():
                await gone(self._living, HURRY_SECONDS)
            await killed(self._living)
        finally:
            hurry.cancel()
            await self._beneath.aclose()

    async def _hold_ports(self) -> int:
        """Sees that nobody else has the ports, and keeps them while no worker listens. Returns the port to serve."""
        settings = self._settings
        port = await _hold(self._beneath, settings.host, settings.port, "RELAY_PORT")
        if settings.worker_port:
            for number in range(settings.workers):
                await _hold(self._beneath, LOOPBACK, settings.worker_port + number, "RELAY_WORKER_PORT")
        return port

    async def _valkey(self) -> str:
        make_data_dir(self._settings.data_dir)
        valkey = EmbeddedValkey(self._settings.data_dir / "valkey")
        try:
            url = await valkey.start()
        except EmbeddedError as error:
            raise StartError(str(error)) from None
        self._beneath.push_async_callback(valkey.stop)
        return url

    async def _fill(self, numbers: Iterable[int]) -> None:
        """Starts the workers of these numbers, and returns when all listen. Raises StartError and _RefusedError."""
        places = [_Place(number) for number in numbers]
        try:
            for place in places:
                place.worker = self._spawn(place)
        except OSError as error:
            raise StartError(f"a worker cannot be started: {error.strerror or error}") from None
        self._places += places
        keeping = [self._run(self._keep(place), f"worker {place.number}") for place in places]
        begun = asyncio.gather(*(place.begun.wait() for place in places))
        try:
            await _first(begun, *keeping)
            for task in keeping:
                if task.done():
                    task.result()
        finally:
            begun.cancel()

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._faulty)
        self._tasks.append(task)
        return task

    def _spawn(self, place: _Place) -> Worker:
        """A new process for the place. Raises OSError."""
        worker = Worker(place.number, self._environment)
        self._living.add(worker)
        worker.exit.add_done_callback(lambda _: self._living.discard(worker))
        worker.ready.add_done_callback(lambda ready: place.begun.set() if ready.result() else None)
        return worker

    async def _keep(self, place: _Place) -> None:
        """Starts a worker again whenever it has died. Raises _RefusedError when there never was one that listened."""
        delay = FIRST_BACKOFF
        while True:
            worker = place.worker
            await asyncio.wait({worker.exit})
            async with place.turn:
                if place.worker is not worker:
                    continue
                code = worker.exit.result()
                if not place.begun.is_set() and code in _REFUSALS:
                    raise _RefusedError(code)
                if worker.lived >= STEADY:
                    delay = FIRST_BACKOFF
                wait = delay * random.uniform(0.5, 1.5)
                delay = min(2 * delay, LAST_BACKOFF)
                log.error(
                    "a worker ended; it is started again",
                    worker=place.number,
                    pid=worker.pid,
                    code=code,
                    retry_in_s=round(wait, 2),
                )
                await asyncio.sleep(wait)
                with contextlib.suppress(OSError):
                    place.worker = self._spawn(place)
                # Without a new one the old one's end is found again, and the next try comes later.

    async def _renew(self) -> None:
        """Replaces the workers, one by one, each time that somebody asks for it."""
        while True:
            await self._renewal.wait()
            self._renewal.clear()
            log.info("replacing the workers")
            for place in self._places:
                # What one cannot do the next cannot either: those that there are serve on.
                if not await self._replace(place):
                    break
            else:
                log.info("replaced the workers", workers=len(self._places))

    async def _replace(self, place: _Place) -> bool:
        """The old one is drained when the new one listens; it stays when the new one does not."""
        async with place.turn:
            old = place.worker
            try:
                new = self._spawn(place)
            except OSError as error:
                log.error("a worker cannot be started; the old one goes on", reason=error.strerror)
                return False
            await asyncio.wait({new.ready}, timeout=START_SECONDS)
            if not (new.ready.done() and new.ready.result()):
                log.error("the new worker did not start; the old one goes on", worker=place.number)
                await killed([new])
                return False
            place.worker = new
        log.info("draining a worker", worker=old.number, pid=old.pid)
        old.signal(signal.SIGTERM)
        await gone([old], self._settings.drain_seconds + STOP_MARGIN)
        await killed([old])
        return True

    def _faulty(self, task: asyncio.Task[None]) -> None:
        """A task that keeps workers must not end by itself."""
        if task.cancelled() or self.fault.done():
            return
        error = task.exception()
        if not isinstance(error, _RefusedError):
            log.critical("the supervisor of the workers failed", task=task.get_name(), error=repr(error))
        self.fault.set_result(None)


async def _first(*awaited: asyncio.Future[Any], seconds: float | None = None) -> None:
    """Waits until one of these is done, or for so long."""
    await asyncio.wait(awaited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


async def _ended(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _hold(stack: contextlib.AsyncExitStack, host: str, port: int, setting: str) -> int:
    """Binds the port, which workers can share, without listening there. Raises StartError when somebody else has it."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            target = (address[0], port, *address[2:])
            # Another relay's workers would let this one in: whether they are there shows without SO_REUSEPORT only.
            with socket.socket(family, kind, protocol) as probe:
                _bind(probe, target, shared=False)
            held = stack.enter_context(socket.socket(family, kind, protocol))
            _bind(held, target, shared=True)
            port = int(held.getsockname()[1])
    except OSError as error:
        raise StartError(cannot_listen(host, port, error, setting)) from None
    return port


def _bind(sock: socket.socket, address: tuple[object, ...], *, shared: bool) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(address)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
