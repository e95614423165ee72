"""The device's database off the event loop: one thread, one writer, a bounded queue before it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, ParamSpec, Self, TypeVar

from relay.client.database import Committed, Database, Incoming, Waiting
from relay.client.errors import StorageError
from relay.client.values import Draft, Message

QUEUE: Final = 64
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Storage:
    """An async context manager over one file; calls take effect in the order they were made.

    Each writing method is one durable transaction (WAL, ``synchronous=FULL``): when it returns, a power cut loses nothing of
    it; when it raises StorageError, nothing of it was kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database: Database | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._room = asyncio.Semaphore(QUEUE)

    async def __aenter__(self) -> Self:
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="relay-client-storage")
        try:
            self._database = await asyncio.get_running_loop().run_in_executor(thread, Database, self.path)
        except Exception:
            thread.shutdown()
            raise
        self._thread = thread
        return self

    async def __aexit__(self, *_: object) -> None:
        database, thread = self._open()
        self._database = self._thread = None
        await asyncio.get_running_loop().run_in_executor(thread, database.close)
        thread.shutdown()

    async def outbox_state(self) -> tuple[int, int]:
        """How many messages wait to be sent, and the highest outbox position ever given."""
        return await self._run(self._open()[0].outbox_state)

    async def enqueue(self, drafts: Sequence[tuple[Draft, str]], at: int, limit: int) -> int:
        """Queues drafts with their encoded operations; how many were new. Raises OutboxFull and keeps none."""
        return await self._run(self._open()[0].enqueue, drafts, at, limit)

    async def waiting(
        self, after: int, limit: int, limit_bytes: int, without: Sequence[str]
    ) -> list[Waiting]:
        """The next rows of the outbox behind position ``after``, in order, without those conversations."""
        return await self._run(self._open()[0].waiting, after, limit, limit_bytes, without)

    async def commit(self, incoming: Incoming) -> Committed:
        """Everything of the received frames in one transaction; acknowledge when this has returned."""
        return await self._run(self._open()[0].commit, incoming)

    async def own(self, user: str, device: str) -> None:
        """Binds the file to this device. Raises WrongDatabase when it is another's."""
        await self._run(self._open()[0].own, user, device)

    async def read_info(self, name: str) -> str | None:
        """A value of the application's own, or None."""
        return await self._run(self._open()[0].read_info, name)

    async def write_info(self, name: str, value: str) -> None:
        """Keeps a value of the application's own, durably."""
        await self._run(self._open()[0].write_info, name, value)

    async def history(self, conv: str, after: tuple[int, str] = (-1, ""), limit: int = 1000) -> list[Message]:
        """A page of a conversation behind (seq, id) ``after``; own messages once the relay stored them."""
        return await self._run(self._open()[0].history, conv, after, limit)

    async def unsent(self, conv: str) -> list[Message]:
        """Own messages of a conversation that the relay has not stored: queued ones in order, then failed ones."""
        return await self._run(self._open()[0].unsent, conv)

    async def conversations(self) -> list[tuple[str, int]]:
        """Every conversation seen with the highest ``seq`` held in it."""
        return await self._run(self._open()[0].conversations)

    async def receipts(self, conv: str, message: str) -> list[tuple[str, str, int]]:
        """(user, device, at) of every device known to hold an own message."""
        return await self._run(self._open()[0].receipts, conv, message)

    def _open(self) -> tuple[Database, ThreadPoolExecutor]:
        if self._database is None or self._thread is None:
            raise StorageError(f"the database {self.path} is not open")
        return self._database, self._thread

    async def _run(
        self, work: Callable[_Arguments, _Result], *values: _Arguments.args, **named: _Arguments.kwargs
    ) -> _Result:
        await self._room.acquire()
        try:
            job = asyncio.get_running_loop().run_in_executor(self._open()[1], lambda: work(*values, **named))
        except Exception:
            self._room.release()
            raise
        job.add_done_callback(lambda _: self._room.release())
        return await job
