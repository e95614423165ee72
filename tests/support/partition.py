"""A proxy in front of a TCP server that a test makes lose what passes, in one direction or both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_CHUNK = 65_536
_SUBSCRIBES = b"SSUBSCRIBE"


class Partition:
    """Listens on ``port`` and passes bytes on to the server's. What is held back is not lost, as TCP would not lose it: it arrives
    when the partition ends."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self._server_port = port
        self._up = asyncio.Event()
        self._down = asyncio.Event()
        self._subscriptions = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.heal()

    def cut(self, *, up: bool = True, down: bool = True) -> None:
        """Holds back what goes to the server (``up``), and what comes from it (``down``). Connections stay open."""
        if up:
            self._up.clear()
        if down:
            self._down.clear()

    def cut_subscriptions(self) -> None:
        """Holds back what goes over connections, open or new, on which somebody has subscribed; all others work."""
        self._subscriptions.clear()

    def heal(self) -> None:
        """Lets everything pass again."""
        self._up.set()
        self._down.set()
        self._subscriptions.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            subscribed = asyncio.Event()
            to, out = await asyncio.open_connection("127.0.0.1", self._server_port)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pass_on(reader, out, self._up, subscribed))
                    both.create_task(self._pass_on(to, writer, self._down, subscribed))
            finally:
                out.close()
        except (OSError, asyncio.CancelledError, ExceptionGroup):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        open_: asyncio.Event,
        subscribed: asyncio.Event,
    ) -> None:
        while data := await reader.read(_CHUNK):
            if open_ is self._up and _SUBSCRIBES in data.upper():
                subscribed.set()
            await open_.wait()
            if subscribed.is_set():
                await self._subscriptions.wait()
            writer.write(data)
            await writer.drain()
        raise _Ended


class _Ended(Exception):
    """One side has closed: the other side's connection ends, too."""


@asynccontextmanager
async def partition(port: int) -> AsyncIterator[Partition]:
    """A proxy in front of that port on loopback."""
    found = Partition(port)
    await found._open()
    try:
        yield found
    finally:
        with contextlib.suppress(OSError):
            await found._close()
