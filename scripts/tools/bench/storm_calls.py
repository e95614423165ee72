"""The devices that come back all at once, as the bench asks them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Final, TypeVar

import msgspec

from scripts.tools.bench.crowd_messages import Done, Group, Unable
from scripts.tools.bench.stage import BenchError, helper
from scripts.tools.bench.storm_messages import (
    AnyAnswer,
    Assemble,
    Came,
    Come,
    Lose,
    Post,
    Request,
    Settle,
    Settled,
)

_decode: Final = msgspec.json.Decoder(AnyAnswer).decode

Wanted = TypeVar("Wanted", Done, Came, Settled)


class Devices:
    """Every method raises BenchError when it cannot be carried out."""

    def __init__(self, process: asyncio.subprocess.Process, *, secret: str, audience: str, size: int) -> None:
        self._process = process
        self._secret = secret
        self._audience = audience
        self._size = size

    async def assemble(self, groups: list[Group]) -> None:
        """Tells them who they are: the first thing."""
        await self._ask(
            Assemble(secret=self._secret, audience=self._audience, groups=groups, size=self._size), Done
        )

    async def come(self, *, senders: bool, ports: Sequence[int], at_once: int) -> Came:
        """The senders, or all others, connect and drain."""
        return await self._ask(Come(senders=senders, ports=list(ports), at_once=at_once), Came)

    async def post(self, messages: int) -> None:
        """So many messages into every group, until they are stored."""
        await self._ask(Post(messages=messages), Done)

    async def lose(self, pid: int) -> None:
        """Kills the node to which all but the senders are connected."""
        await self._ask(Lose(pid=pid), Done)

    async def settle(self) -> Settled:
        """What has become of everything."""
        return await self._ask(Settle(), Settled)

    async def _ask(self, request: Request, wanted: type[Wanted]) -> Wanted:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(msgspec.json.encode(request) + b"\n")
            await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise BenchError("the devices' process ended unexpectedly; the lines above say why")
        found = _decode(line)
        if isinstance(found, Unable):
            raise BenchError(found.reason)
        assert isinstance(found, wanted)
        return found


@contextlib.asynccontextmanager
async def devices(secret: str, audience: str, size: int) -> AsyncIterator[Devices]:
    """The process of the devices, ended with the block."""
    async with helper("scripts.tools.bench.storm_devices") as process:
        yield Devices(process, secret=secret, audience=audience, size=size)
