"""A device that speaks the protocol frame by frame, for tests that look at the wire itself."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import deque
from typing import Any

import aiohttp

from relay.wire.server_frames import check_server_frame


def new_id() -> str:
    """A message id."""
    return str(uuid.uuid4())


class Closed(Exception):
    """The relay closed the socket; ``code`` is the close code."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"closed with {code}")
        self.code = code


class WireDevice:
    """One connected socket. Operations of array frames are handed out one by one."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, user: str, device: str) -> None:
        self.socket = socket
        self.user = user
        self.device = device
        self.key = f"{user}/{device}"
        self.welcome: dict[str, Any] = {}
        self._queue: deque[dict[str, Any]] = deque()

    async def put(self, *operations: dict[str, Any]) -> None:
        """Sends one operation, or several as one array frame."""
        await self.socket.send_str(json.dumps(operations[0] if len(operations) == 1 else list(operations)))

    async def send(self, conv: str, body: Any = "hello", **fields: Any) -> str:
        """Sends a text message without waiting; returns its id."""
        message = fields.pop("id", None) or new_id()
        await self.put({"t": "send", "id": message, "conv": conv, "kind": "text", "body": body, **fields})
        return str(message)

    async def sent(self, conv: str, body: Any = "hello", **fields: Any) -> dict[str, Any]:
        """Sends a text message and waits for its ``stored``."""
        message = await self.send(conv, body, **fields)
        return await self.expect("stored", id=message)

    async def ack(self, conv: str, *messages: str, durable: bool = True) -> None:
        """Acknowledges, and waits until that is durable."""
        ref = uuid.uuid4().hex
        await self.put({"t": "ack", "conv": conv, "ids": list(messages), **({"ref": ref} if durable else {})})
        if durable:
            await self.expect("acked", ref=ref)

    async def next(self, seconds: float = 5) -> dict[str, Any]:
        """The next operation from the relay. Raises Closed and TimeoutError."""
        while not self._queue:
            async with asyncio.timeout(seconds):
                message = await self.socket.receive()
            if message.type is not aiohttp.WSMsgType.TEXT:
                raise Closed(self.socket.close_code)
            value = json.loads(message.data)
            operations = value if isinstance(value, list) else [value]
            for operation in operations:
                check_server_frame(operation)
            self._queue.extend(operations)
        return self._queue.popleft()

    async def expect(self, name: str, seconds: float = 5, **fields: Any) -> dict[str, Any]:
        """The next operation of this name with these fields; others before it are kept for later. Raises Closed and
        TimeoutError."""
        kept: list[dict[str, Any]] = []
        try:
            while True:
                found = await self.next(seconds)
                if found["t"] == name and all(found.get(field) == value for field, value in fields.items()):
                    return found
                kept.append(found)
        finally:
            self._queue.extendleft(reversed(kept))

    async def nothing(self, name: str, seconds: float = 0.3) -> None:
        """Fails when an operation of this name arrives within ``seconds``."""
        try:
            found = await self.expect(name, seconds)
        except TimeoutError:
            return
        raise AssertionError(f"unexpected {found}")

    async def closed(self, seconds: float = 5) -> int | None:
        """Waits for the relay to close the socket; the close code."""
        try:
            while True:
                await self.next(seconds)
        except Closed as closed:
            return closed.code

    async def close(self) -> None:
        """Closes the socket from this side."""
        await self.socket.close()
