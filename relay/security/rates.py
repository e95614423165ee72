"""Rate limits: how often something may be asked for.

``Rates`` counts what is asked over HTTP and at the door; ``MessageRates`` is the message path's own.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import islice
from math import ceil
from time import monotonic
from typing import Any, Final

import structlog
from limits import RateLimitItem, parse
from limits.aio.storage import RedisClusterStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import RedisCluster
from redis.exceptions import NoScriptError

from relay.redis_client import TROUBLE, AnyRedis, close, connect
from relay.redis_servers import Servers
from relay.wire.errors import RelayError
from relay.wire.limits import Limit

OFF: Final = "off"
_WHAT: Final = {
    "login_address": "log-ins from this address",
    "login_account": "log-ins to this account",
    "register": "registrations from this address",
    "refresh": "renewals from this address",
    "connect": "connections from this address",
    "search": "searches",
    "search_phone": "searches by phone number",
    "search_phone_address": "searches by phone number from this address",
    "key_claim": "keys claimed of this device",
    "key_claim_pair": "keys that you claimed of this device",
    "key_claim_caller": "keys claimed",
    "key_change": "changes of keys",
    "contact_change": "blocks and unblocks",
    "profile_change": "changes of the profile",
    "conversation": "new conversations",
    "conversation_change": "changes of groups",
    "presence": "watch lists",
    "report": "reports",
    "export": "exports",
    "message": "messages",
}
_LIMITS: Final = {"message": Limit.MESSAGE_RATE}
_REDIS_SECONDS: Final = 0.2
_REDIS_PAUSE: Final = 1.0
_REDIS_CONNECTIONS: Final = 16
_REDIS_PREFIX: Final = "relay:rates"
_PROBE: Final = parse("1000000/minute")
_MAX_KEYS: Final = 100_000
# A refused device is refused for so long, at least: what it sent right behind must not be taken before what was refused.
_PAUSE_SECONDS: Final = 1.0
_MIN_BUCKETS: Final = 10_000
_MAX_BUCKETS: Final = 1_000_000

log = structlog.get_logger(__name__)


class Rates:
    """Named limits, counted in this process, or in Redis when there is one, so that nodes share them.

    The algorithm is the sliding window counter: the count of the running window, and that of the one before weighted by how
    much of it still lies within a window's length. It takes two numbers a key whatever the limit (a log of every moment
    would keep 1,000 of them an address for 1,000 connections in 10 s) and lets no second burst through at the seam of two
    windows, as fixed ones do; over the length of a window at most twice the limit passes, and then spread out. In Redis
    windows run by its clock, so that nodes' clocks need not agree.

    Redis gets 200 ms. When it is late or away this process counts by itself and asks it again about once a second (after
    0.5 to 1.5 s). Of a cluster that goes for each master and what it counts.
    Counts in this process are of at most 100,000 keys a rule: then those untouched for longest are forgotten, and only those
    of that rule. Else whoever may ask for much under one rule could have the counts of another forgotten.
    """

    def __init__(self, rules: Mapping[str, str], *, redis_url: str | None) -> None:
        """``rules`` are like ``20/minute``, ``1000/10 seconds`` or ``off``; ``redis_url`` is ``redis://``, ``rediss://`` or
        ``unix://``, with name and password if need be. Connects at the first check. Raises ValueError."""
        self._rules = {name: None if rule == OFF else parse(rule) for name, rule in rules.items()}
        self._here = {name: _Windows(_MAX_KEYS) for name in self._rules}
        self._redis = None if redis_url is None else _Redis(redis_url)

    @property
    def shared(self) -> bool:
        """Whether Redis counted last: False while it is away, and when there is none."""
        return self._redis is not None and self._redis.working

    async def reaches_redis(self) -> bool:
        """Whether Redis counts now, which is found out by counting; True when there is none, False when a master of
        a cluster does not. Takes some 200 ms at most."""
        if self._redis is None:
            return True
        await self._redis.look()
        await self._redis.take(_PROBE, "probe", "probe")
        return self._redis.working

    async def check(self, name: str, key: str, cost: int = 1) -> None:
        """Counts ``cost`` (one or more) for ``key``, which may be any text. Raises RelayError ``rate_limited`` when that is
        too many (nothing is counted then), and KeyError for a name that has no rule. What costs more than the rule allows
        altogether is refused always."""
        rule = self._rules[name]
        if rule is None:
            return
        # A digest: keys come from outside, in any length, and are nobody's business in Redis.
        digest = sha256(key.encode(errors="surrogatepass")).hexdigest()
        wait = None if self._redis is None else await self._redis.take(rule, name, digest, cost)
        if wait is None:
            wait = self._here[name].take(rule, digest, monotonic(), cost)
        if wait > 0:
            what = _WHAT.get(name, name)
            raise RelayError(
                "rate_limited",
                f"too many {what}; try again in {ceil(wait)} s",
                retry_after=max(1, ceil(wait * 1000)),
                limit=_LIMITS.get(name, Limit.REQUEST_RATE),
            )

    async def close(self) -> None:
        """Closes the connections to Redis."""
        if self._redis is not None:
            await self._redis.close()


class _Windows:
    """Sliding window counters in this process.

    The library's own storage walks over all its keys at every count (measured: 1.6 ms of the event loop at 20,000 keys).
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: OrderedDict[str, tuple[int, int, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def take(self, rule: RateLimitItem, key: str, now: float, cost: int = 1) -> float:
        """0 when there was room, and ``cost`` is counted; else the seconds until there is."""
        seconds = rule.get_expiry()
        window, elapsed = divmod(now, seconds)
        number = int(window)
        at, previous, current = self._counts.pop(key, (number, 0, 0))
        if at != number:
            previous, current = (current if at == number - 1 else 0), 0
        left = seconds - elapsed
        if int(previous * left / seconds) + current + cost <= rule.amount:
            wait = 0.0
            current += cost
        else:
            wait = _wait(rule, previous, left, current, left, cost)
        self._counts[key] = (number, previous, current)
        if len(self._counts) > self._most:
            self._counts.popitem(last=False)
        return wait


def _wait(
    rule: RateLimitItem, previous: int, previous_left: float, current: int, current_left: float, cost: int
) -> float:
    """Seconds until ``cost`` more fits. ``previous_left``: until the count before weighs nothing; ``current_left``: until the
    running one becomes the one before. At the very moment it does not fit yet, hence a millisecond more."""
    seconds = rule.get_expiry()
    room = rule.amount - current - cost
    if previous and room >= 0:
        left = previous_left - seconds * (room + 1) / previous
    else:
        # When the running window has become the one before, it still weighs, and less with time.
        spare = rule.amount - cost + 1
        left = current_left + max(0.0, seconds - seconds * max(0, spare) / max(1, current))
    return max(0.0, left) + 0.001


class _Redis:
    """The same counters in Redis, by the library's scripts."""

    def __init__(self, url: str) -> None:
        self._redis = connect(url, connections=_REDIS_CONNECTIONS, seconds=_REDIS_SECONDS)
        self._servers = Servers(self._redis, seconds=_REDIS_SECONDS)
        self._storage = _storage(self._redis, self._servers)
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)
        self._ask_at = 0.0
        self._answers = True

    @property
    def working(self) -> bool:
        """Whether it answered last, every master of a cluster."""
        return self._answers and not self._servers.partial

    async def look(self) -> None:
        """Finds out which masters of a cluster answer."""
        await self._servers.look()

    async def take(self, rule: RateLimitItem, name: str, digest: str, cost: int = 1) -> float | None:
        """As ``_Windows.take``; None when Redis cannot say."""
        now = monotonic()
        if not self._answers:
            if now < self._ask_at:
                return None
            self._ask_at = _after_a_pause(now)
        # Both windows of it have this name, in braces, in theirs: of a cluster one master has them.
        slot = rule.key_for(name, digest)
        if not self._servers.answers(slot):
            return None
        try:
            async with asyncio.timeout(_REDIS_SECONDS):
                wait = await self._take(rule, name, digest, cost)
        except TROUBLE as error:
            if not self._servers.answers(slot):
                return None
            self._ask_at = _after_a_pause(monotonic())
            if self._answers:
                self._answers = False
                log.warning("Redis does not count; this node counts by itself", error=type(error).__name__)
            return None
        if not self._answers:
            self._answers = True
            log.info("Redis counts again")
        return wait

    async def _take(self, rule: RateLimitItem, name: str, digest: str, cost: int) -> float:
        if await self._limiter.hit(rule, name, digest, cost=cost):
            return 0.0
        seconds = rule.get_expiry()
        previous, previous_left, current, current_left = await self._storage.get_sliding_window(
            rule.key_for(name, digest), seconds
        )
        # Redis keeps a count for two windows.
        return _wait(rule, previous, previous_left, current, current_left - seconds, cost)

    async def close(self) -> None:
        await self._servers.close()
        try:
            async with asyncio.timeout(_REDIS_SECONDS):
                await close(self._redis)
        except TROUBLE:
            return


def _after_a_pause(now: float) -> float:
    # Many nodes lose Redis at one moment, and must not all ask again at another.
    return now + _REDIS_PAUSE * random.uniform(0.5, 1.5)


class _Script:
    """A script of the library's, run by the master of a cluster that has its keys: the driver loads it into all of them first, or
    fails when one is dead."""

    def __init__(self, servers: Servers, script: Any) -> None:
        self._servers = servers
        self._script = script

    async def __call__(self, keys: Sequence[str], args: Sequence[Any]) -> Any:
        rest = (len(keys), *keys, *args)
        (answer,) = await self._servers.ask([("EVALSHA", self._script.sha, *rest)])
        if isinstance(answer, NoScriptError):
            (answer,) = await self._servers.ask([("EVAL", self._script.script, *rest)])
        if isinstance(answer, Exception):
            raise answer
        return answer


def _storage(redis: AnyRedis, servers: Servers) -> RedisStorage:
    if isinstance(redis, RedisCluster):
        clustered = RedisClusterStorage(
            "async+redis+cluster://127.0.0.1:6379", implementation="redispy", key_prefix=_REDIS_PREFIX
        )
        # The library would make a client of its own from an address, without the options of ours.
        bridge: Any = clustered.bridge
        bridge.storage = redis
        bridge.register_scripts()
        for name in ("lua_sliding_window", "lua_acquire_sliding_window"):
            setattr(bridge, name, _Script(servers, getattr(bridge, name)))
        return clustered
    return RedisStorage(
        "async+redis://",
        implementation="redispy",
        key_prefix=_REDIS_PREFIX,
        connection_pool=redis.connection_pool,  # type: ignore[arg-type]  # documented, but not in its annotation
    )


class MessageRates:
    """Token buckets of the message path, one for each device: ``rate`` messages a second, ``burst`` at once; rate 0: no
    limit.

    A bucket is one number, the moment when it is full again (the "virtual scheduling" form of the leaky bucket, ITU-T
    I.371), or, negative, the moment until which its device is refused. Nothing remembers a bucket that is full.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._interval = 1 / rate if rate > 0 else 0.0
        self._slack = (burst - 1) * self._interval
        self._pause = max(_PAUSE_SECONDS, self._interval)
        self._full_at: dict[str, float] = {}
        self._room = _MIN_BUCKETS

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, key: str, now: float) -> float:
        """0.0 when this device may send one more message, which is counted; else the seconds until it may. ``now`` is
        positive and never falls (``time.monotonic``).

        A device that is refused stays refused for that long, a second or more, and comes back to what has gathered
        meanwhile: were single messages taken in between, they would overtake those refused before them.
        """
        if not self._interval:
            return 0.0
        full_at = self._full_at.get(key, now)
        if full_at < 0:
            if now < -full_at:
                return -full_at - now
            full_at = -full_at - self._pause + self._slack
        if full_at < now:
            full_at = now
        if full_at - now > self._slack:
            self._full_at[key] = -(now + self._pause)
            return self._pause
        self._full_at[key] = full_at + self._interval
        if len(self._full_at) > self._room:
            self._forget(now)
        return 0.0

    def _forget(self, now: float) -> None:
        """Drops the buckets that are full again; of too many that are not, the oldest tenth."""
        longest = self._slack - self._pause
        self._full_at = {
            key: at
            for key, at in self._full_at.items()
            if at > now or (at < 0 and (-at > now or -at + longest > now))
        }
        spare = len(self._full_at) - _MAX_BUCKETS
        if spare > 0:
            for key in list(islice(self._full_at, spare + _MAX_BUCKETS // 10)):
                del self._full_at[key]
        self._room = max(_MIN_BUCKETS, min(2 * len(self._full_at), _MAX_BUCKETS))
