"""Connections of devices whose tokens have been ended at another node."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from relay.routing.hub import Hub
from relay.store.accounts import Standing
from relay.store.mongo import PyMongoError, brief
from relay.tasks import ended
from relay.wire import errors

_SECONDS: Final = 5.0

log = structlog.get_logger(__name__)


class CutOffs:
    """Looks at what the store says of a device that another node tells of, as it may have logged in again, and closes its
    connection when its token is not good any more. What is lost on the way the job ``revocations`` finds. ``forget`` drops
    what is remembered of a device's standing, ``standing`` asks for it."""

    def __init__(
        self,
        hub: Hub,
        forget: Callable[[str], None],
        standing: Callable[[str, str], Awaitable[Standing | None]],
    ) -> None:
        self._hub = hub
        self._forget = forget
        self._standing = standing
        # At most one for each connection of this node.
        self._asked: dict[str, None] = {}
        self._task: asyncio.Task[None] | None = None

    def take(self, key: str) -> None:
        """The tokens of the device with this key are not what they were."""
        self._forget(key)
        if self._hub.get(key) is None:
            return
        self._asked[key] = None
        if self._task is None:
            self._task = asyncio.create_task(self._look(), name="cut off")

    async def close(self) -> None:
        """Looks at nothing more."""
        if self._task is not None:
            await ended([self._task])

    async def _look(self) -> None:
        try:
            while self._asked:
                key = next(iter(self._asked))
                del self._asked[key]
                connection = self._hub.get(key)
                if connection is None:
                    continue
                async with asyncio.timeout(_SECONDS):
                    standing = await self._standing(connection.user, connection.device)
                # One that has taken its place meanwhile has been let in since, and may not be known to what was read.
                if self._hub.get(key) is not connection:
                    continue
                if standing is None or not standing.accepts(connection.issued, connection.session):
                    connection.shut(errors.UNAUTHORIZED)
        except (PyMongoError, TimeoutError) as error:
            self._asked.clear()
            log.warning("whose tokens were ended elsewhere is looked up again soon", error=brief(error))
        finally:
            self._task = None
