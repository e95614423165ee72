"""Passwords: Argon2id in a bounded pool of threads.

A password is the text that a person typed, in Unicode's composed form (NFC): keyboards differ in how they write an accented
letter. Nothing else about it is changed.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import unicodedata
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from argon2.low_level import Type

from relay.wire.errors import RelayError

MIN_PASSWORD: Final = 8
"""The shortest password of a new account, in characters."""
MAX_PASSWORD: Final = 256
"""The longest password that is looked at, in characters."""

# OWASP's Password Storage Cheat Sheet, Argon2id: 19 MiB, 2 passes, 1 lane.
_MEMORY_KIB: Final = 19_456
_PASSES: Final = 2
_LANES: Final = 1
# Of the 20 steps that the scheduler knows: a storm of log-ins gets what messages leave over.
_NICENESS: Final = 10
_RETRY_MS: Final = 2000

Result = TypeVar("Result")


class Passwords:
    """Hashes and checks passwords off the event loop: ``threads`` at once, at most ``queue`` waiting."""

    def __init__(self, *, threads: int, queue: int) -> None:
        self._hasher = PasswordHasher(
            time_cost=_PASSES, memory_cost=_MEMORY_KIB, parallelism=_LANES, type=Type.ID
        )
        self._most = threads + queue
        self._under_way = 0
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="password", initializer=_step_back)
        # A hash with the parameters of all others, of a password that nobody knows.
        self._dummy: Future[str] = self._pool.submit(self._hasher.hash, secrets.token_urlsafe(32))

    async def hash(self, password: str) -> str:
        """The hash to store, with its salt and parameters. Raises RelayError ``unavailable`` when too many wait."""
        return await self._run(lambda: self._hasher.hash(_composed(password)))

    async def verify(self, hashed: str | None, password: str) -> bool:
        """Whether this is the password. ``hashed`` is None for an unknown user: the answer is no, after the same work.

        Raises RelayError ``unavailable`` when too many wait."""
        return await self._run(lambda: self._verify(hashed, _composed(password)))

    def needs_rehash(self, hashed: str) -> bool:
        """Whether a hash was made with other parameters than today's."""
        try:
            return self._hasher.check_needs_rehash(hashed)
        except InvalidHashError:
            return True

    def close(self) -> None:
        """Ends the threads; what waits is refused. Takes as long as one hash."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def _verify(self, hashed: str | None, password: str) -> bool:
        try:
            self._hasher.verify(self._dummy.result() if hashed is None else hashed, password)
        except (Argon2Error, InvalidHashError):
            return False
        return hashed is not None

    async def _run(self, work: Callable[[], Result]) -> Result:
        if self._closed.is_set() or self._under_way >= self._most:
            raise _busy()
        self._under_way += 1
        try:
            return await asyncio.wrap_future(self._pool.submit(work))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed.is_set() and (task is None or not task.cancelling()):
                raise _busy() from None
            raise
        finally:
            self._under_way -= 1


def _busy() -> RelayError:
    return RelayError("unavailable", "too many people are logging in; try again", retry_after=_RETRY_MS)


def _composed(password: str) -> str:
    return unicodedata.normalize("NFC", password)


def _step_back() -> None:
    # On Linux a thread has a priority of its own. Lowering it needs no right, but a sandbox may forbid the call.
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    except OSError:
        return
