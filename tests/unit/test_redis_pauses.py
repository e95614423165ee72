"""For how long a node leaves a Redis in peace that does not answer: no two nodes for the same time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from relay.metrics import Metrics
from relay.routing import redis_bus
from relay.routing.hub import Hub
from relay.routing.redis_bus import RedisBus
from relay.security import rates
from relay.security.rates import Rates
from relay.store import hot_redis
from relay.store.hot_redis import HotRedis
from tests.support.process import free_port

NODES = 40
NOW = 1000.0


async def of_the_bus(url: str) -> float:
    bus = RedisBus(url, Hub(), Metrics(), node="n1", prefix="relay:test")
    bus._fails(ConnectionError())
    return bus._ask_at - NOW


async def of_hot_messages(url: str) -> float:
    hot = HotRedis(url, 1 << 20)
    assert await hot.find([("talk message", 1)]) == {}
    await hot.close()
    return hot._ask_at - NOW


async def of_rates(url: str) -> float:
    limits = Rates({"search": "5/minute"}, redis_url=url)
    await limits.check("search", "ann")
    await limits.close()
    assert not limits.shared
    assert limits._redis is not None
    return limits._redis._ask_at - NOW


async def of_rates_that_ask_once_more(url: str) -> float:
    limits = Rates({"search": "5/minute"}, redis_url=url)
    assert limits._redis is not None
    limits._redis._answers = False
    for _ in range(2):
        await limits.check("search", "ann")
    await limits.close()
    return limits._redis._ask_at - NOW


@pytest.mark.parametrize(
    ("pause", "seconds"),
    [(of_the_bus, 0.5), (of_hot_messages, 1.0), (of_rates, 1.0), (of_rates_that_ask_once_more, 1.0)],
)
async def test_nodes_that_lost_redis_at_one_moment_do_not_all_ask_again_at_another(
    monkeypatch: pytest.MonkeyPatch, pause: Callable[[str], Awaitable[float]], seconds: float
) -> None:
    for module in (redis_bus, hot_redis, rates):
        monkeypatch.setattr(module, "monotonic", lambda: NOW)
    url = f"redis://127.0.0.1:{free_port()}"
    pauses = [await pause(url) for _ in range(NODES)]
    assert all(0.5 * seconds <= one <= 1.5 * seconds for one in pauses)
    assert max(pauses) - min(pauses) > 0.2 * seconds
