"""Passwords: Argon2id in a bounded pool of processes.

A password is the text that a person typed, in Unicode's composed form (NFC): keyboards differ in how they write an accented
letter. Nothing else about it is changed.

Processes, not threads: a thread of low priority that is put aside while it holds the interpreter's lock puts the event loop
aside with it, and one of normal priority takes half a core from it (docs/decisions/0009).

Even so a hash and the writes of a log-in are felt: caches, memory and the disk have no priorities. While messages are under way
each process rests after a hash.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import unicodedata
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from time import perf_counter
from typing import Final, TypeVar, TypeVarTuple

from argon2.exceptions import InvalidHashError

from relay.security import hashing
from relay.wire.errors import RelayError

MIN_PASSWORD: Final = 8
"""The shortest password of a new account, in characters."""
MAX_PASSWORD: Final = 256
"""The longest password that is looked at, in characters."""
_RETRY_MS: Final = 2000
# While messages are under way a process rests for so many times as long as a hash took, and at most so long (s).
_REST: Final = 3.0
_MOST_REST: Final = 0.5
# Who would wait for longer (s) is told to come back: a client that has given up is not worth a hash.
_PATIENCE: Final = 20.0

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class Passwords:
    """Hashes and checks passwords: ``processes`` at once, at most ``queue`` waiting, and no more than some 20 s. The processes
    start with the first password and come back when one is killed. While others are ``busy`` with messages, they rest in between."""

    def __init__(self, *, processes: int, queue: int, busy: Callable[[], bool] = lambda: False) -> None:
        self._processes = processes
        self._most = processes + queue
        self._busy = busy
        self._under_way = 0
        self._slots = asyncio.Semaphore(processes)
        # How long a password has lately kept its process, with the rest after it (s).
        self._lately = 0.0
        self._closed = threading.Event()
        self._pool: ProcessPoolExecutor | None = None

    async def hash(self, password: str) -> str:
        """The hash to store, with its salt and parameters. Raises RelayError ``unavailable`` when too many wait."""
        return await self._run(hashing.make, _composed(password))

    async def verify(self, hashed: str | None, password: str) -> bool:
        """Whether this is the password. ``hashed`` is None for an unknown user: the answer is no, after the same work.

        Raises RelayError ``unavailable`` when too many wait."""
        return await self._run(hashing.matches, hashed, _composed(password))

    def needs_rehash(self, hashed: str) -> bool:
        """Whether a hash was made with other parameters than today's."""
        try:
            return hashing.HASHER.check_needs_rehash(hashed)
        except InvalidHashError:
            return True

    def close(self) -> None:
        """Ends the processes at once; what waits, and what is being hashed, is refused."""
        self._closed.set()
        pool, self._pool = self._pool, None
        if pool is None:
            return
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        # On a busy machine they might not get the time to end by themselves, and they hold nothing.
        for process in processes:
            process.kill()

    async def _run(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        waiting = self._under_way - self._processes + 1
        if (
            self._closed.is_set()
            or self._under_way >= self._most
            or waiting * self._lately / self._processes > _PATIENCE
        ):
            raise _overrun()
        self._under_way += 1
        try:
            await self._slots.acquire()
            began = perf_counter()
            try:
                return await self._hand_over(work, *arguments)
            finally:
                self._rest(perf_counter() - began)
        finally:
            self._under_way -= 1

    async def _hand_over(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        # Closed while this waited.
        if self._closed.is_set():
            raise _overrun()
        pool = self._started()
        try:
            return await asyncio.wrap_future(pool.submit(work, *arguments))
        except BrokenProcessPool:
            # Somebody killed a process: the next one gets a new pool.
            if self._pool is pool:
                self._pool = None
            raise _overrun() from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed.is_set() and (task is None or not task.cancelling()):
                raise _overrun() from None
            raise

    def _rest(self, took: float) -> None:
        rest = 0.0 if self._closed.is_set() or not self._busy() else min(_REST * took, _MOST_REST)
        self._lately += (took + rest - self._lately) / 4
        if rest:
            asyncio.get_running_loop().call_later(rest, self._slots.release)
        else:
            self._slots.release()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # A forked process would share this one's threads' locks and sockets.
            self._pool = ProcessPoolExecutor(
                self._processes,
                multiprocessing.get_context("spawn"),
                initializer=hashing.start,
                initargs=(os.getpid(),),
            )
        return self._pool


def _overrun() -> RelayError:
    return RelayError("unavailable", "too many people are logging in; try again", retry_after=_RETRY_MS)


def _composed(password: str) -> str:
    return unicodedata.normalize("NFC", password)
