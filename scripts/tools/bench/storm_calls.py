"""The devices that come back all at once, as the bench asks them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from scripts.tools.bench.asked import Helper
from scripts.tools.bench.crowd_messages import Done, Group
from scripts.tools.bench.stage import helper
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


class Devices:
    """Every method raises BenchError when it cannot be carried out."""

    def __init__(self, process: asyncio.subprocess.Process, *, secret: str, audience: str, size: int) -> None:
        self._helper = Helper[Request](process, "the devices' process", AnyAnswer)
        self._secret = secret
        self._audience = audience
        self._size = size

    async def assemble(self, groups: list[Group]) -> None:
        """Tells them who they are: the first thing."""
        await self._helper.ask(
            Assemble(secret=self._secret, audience=self._audience, groups=groups, size=self._size), Done
        )

    async def come(self, *, senders: bool, ports: Sequence[int], at_once: int) -> Came:
        """The senders, or all others, connect and drain."""
        return await self._helper.ask(Come(senders=senders, ports=list(ports), at_once=at_once), Came)

    async def post(self, messages: int) -> None:
        """So many messages into every group, until they are stored."""
        await self._helper.ask(Post(messages=messages), Done)

    async def lose(self, pid: int) -> None:
        """Kills the node to which all but the senders are connected."""
        await self._helper.ask(Lose(pid=pid), Done)

    async def settle(self) -> Settled:
        """What has become of everything."""
        return await self._helper.ask(Settle(), Settled)


@contextlib.asynccontextmanager
async def devices(secret: str, audience: str, size: int) -> AsyncIterator[Devices]:
    """The process of the devices, ended with the block."""
    async with helper("scripts.tools.bench.storm_devices") as process:
        yield Devices(process, secret=secret, audience=audience, size=size)
