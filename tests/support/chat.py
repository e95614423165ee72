"""Two people who keep chatting while a test does something nasty next to them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.node import Node


class Chat:
    """How the conversation goes: ``turns`` messages went all the way (stored, delivered, acknowledged)."""

    def __init__(self, conv: str) -> None:
        self.conv = conv
        self.turns = 0
        self._turned = asyncio.Event()

    def turned(self) -> None:
        """Counts one message."""
        self.turns += 1
        self._turned.set()

    async def goes_on(self, turns: int = 2, seconds: float = 3) -> None:
        """Waits until so many more messages went all the way. Raises TimeoutError."""
        wanted = self.turns + turns
        async with asyncio.timeout(seconds):
            while self.turns < wanted:
                self._turned.clear()
                await self._turned.wait()


@asynccontextmanager
async def chatting(node: Node, pause: float = 0.005) -> AsyncIterator[Chat]:
    """Lets two people chat for as long as the block runs, and fails when one message takes longer than three seconds
    or anything but a plain chat is heard. The last thing checked is that they still do."""
    name = uuid.uuid4().hex[:8]
    writer, reader = f"writer-{name}", f"reader-{name}"
    chat = Chat(await node.direct(writer, reader))
    one, other = await node.connect(writer), await node.connect(reader)

    async def run() -> None:
        while True:
            message = await one.send(chat.conv, f"turn {chat.turns}")
            heard = await other.expect("msg", 3)
            assert (heard["id"], heard["body"]) == (message, f"turn {chat.turns}")
            await other.ack(chat.conv, message)
            await one.expect("stored", 3, id=message)
            await one.expect("receipt", 3, ids=[message])
            chat.turned()
            await asyncio.sleep(pause)

    task = asyncio.create_task(run(), name="chat")
    try:
        yield chat
        if task.done():
            await task
        await chat.goes_on()
    finally:
        failure = task.exception() if task.done() and not task.cancelled() else None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if failure is not None:
        raise failure
