"""Connections to Redis or Valkey, one server or a cluster. Redis is a help and never the truth: calls are short, and what
fails is hardly tried again here."""

from __future__ import annotations

from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisClusterException, RedisError

_CLUSTER: Final = "+cluster://"

# What answers without speaking its language has the driver raise ValueError and TypeError; a connection that ends between its
# steps the last three (uvloop: RuntimeError, when a closed transport is written to).
TROUBLE: Final = (
    RedisError,
    RedisClusterException,
    OSError,
    TimeoutError,
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    LookupError,
)

AnyRedis = Redis | RedisCluster


def is_cluster(url: str) -> bool:
    """Whether a URL names a cluster (``redis+cluster://``, by any of its servers)."""
    return _CLUSTER in url.partition("//")[0] + "//"


def connect(url: str, *, connections: int, seconds: float) -> AnyRedis:
    """A client with at most so many connections (to each server), whose calls take at most ``seconds``. Connects at the first
    use. Raises ValueError for what is no URL of Redis."""
    options: dict[str, Any] = {
        "socket_timeout": seconds,
        "socket_connect_timeout": seconds,
        # Once: of a server that was away every connection that was open is found dead by its next use.
        "retry": Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)),
    }
    if is_cluster(url):
        plain = url.replace(_CLUSTER, "://", 1)
        return RedisCluster.from_url(plain, max_connections=connections, **options)
    pool = BlockingConnectionPool.from_url(url, max_connections=connections, timeout=seconds, **options)
    return Redis(connection_pool=pool)


async def close(redis: AnyRedis) -> None:
    """Closes every connection. May raise what ``TROUBLE`` names."""
    await redis.aclose()
    if isinstance(redis, Redis):
        await redis.connection_pool.disconnect()
    else:
        # The driver leaves them open when it was about to look for the masters anew.
        await redis.nodes_manager.aclose()
        await redis.nodes_manager.aclose("startup_nodes")
