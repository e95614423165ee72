"""One sharded channel of Redis, listened to for as long as the node lives."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

import structlog
from redis.asyncio import RedisCluster

from relay.redis_client import TROUBLE, AnyRedis

_POLL_SECONDS: Final = 1.0
_SILENT_SECONDS: Final = 4.0
_NO_WAIT_SECONDS: Final = 0.02
_FIRST_DELAY: Final = 0.1
_LAST_DELAY: Final = 2.0

log = structlog.get_logger(__name__)


class Channel:
    """Hands every message to ``take``. Something must be published on it every second or so: when it is silent for four, the
    subscription is lost, whatever its connection says, and is made anew."""

    def __init__(self, redis: AnyRedis, name: str, take: Callable[[bytes], None]) -> None:
        self._redis = redis
        self.name = name
        self._take = take
        self._heard_at = 0.0
        # When it was last known not to work, until it works again.
        self._lost_at: float | None = None
        self.ready = asyncio.Event()

    @property
    def heard(self) -> bool:
        """Whether something came lately."""
        return monotonic() - self._heard_at < _SILENT_SECONDS

    def quiet_for(self, seconds: float) -> bool:
        """Whether nothing came for so long."""
        return monotonic() - self._heard_at >= seconds

    def came_back(self) -> bool:
        """Whether it works again after it did not; True once."""
        if not self.heard:
            self._lose(self._heard_at)
            return False
        if self._lost_at is None or self._heard_at <= self._lost_at:
            return False
        self._lost_at = None
        return True

    def _lose(self, at: float) -> None:
        if self.ready.is_set():
            self._lost_at = at

    async def run(self) -> None:
        """Listens."""
        delay = _FIRST_DELAY
        while True:
            began = self._heard_at
            try:
                await self._listen()
            except TROUBLE as error:
                self._lose(monotonic())
                log.debug("a channel is not heard", error=type(error).__name__)
            except Exception:
                self._lose(monotonic())
                log.exception("a channel is not heard")
            if self._heard_at > began:
                delay = _FIRST_DELAY
            await asyncio.sleep(delay * random.uniform(0.5, 1.5))
            delay = min(2 * delay, _LAST_DELAY)

    async def _listen(self) -> None:
        pubsub: Any = self._redis.pubsub(ignore_subscribe_messages=True)
        clustered = isinstance(self._redis, RedisCluster)
        try:
            async with asyncio.timeout(_SILENT_SECONDS):
                await pubsub.ssubscribe(self.name)
            get = pubsub.get_sharded_message if clustered else pubsub.get_message
            began = monotonic()
            while True:
                asked = monotonic()
                message = await get(timeout=_POLL_SECONDS)
                if message is not None and message["type"] == "smessage":
                    self._heard_at = monotonic()
                    self.ready.set()
                    self._take(message["data"])
                elif monotonic() - max(began, self._heard_at) > _SILENT_SECONDS:
                    raise TimeoutError
                elif monotonic() - asked < _NO_WAIT_SECONDS:
                    # A cluster's client that has lost its server, or moves to another, answers without waiting.
                    await asyncio.sleep(_NO_WAIT_SECONDS)
        finally:
            await _close(pubsub)


async def _close(pubsub: Any) -> None:
    try:
        async with asyncio.timeout(_POLL_SECONDS):
            await pubsub.aclose()
    except TROUBLE:
        return
