"""Commands of many keys to Redis at once, each answered by itself.

One server answers a pipeline, or it does not. Of a cluster each master gets its part of it; the driver's own pipeline of a cluster
fails as a whole when one master does not answer, and closes the connections to all others (redis-py 8.1,
``PipelineStrategy.execute``). A master that does not answer is not asked, and nobody waits for it, until it answers again, which is
found out meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any, Final

import structlog
from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode, PipelineCommand
from redis.cluster import get_node_name
from redis.exceptions import (
    AskError,
    ClusterDownError,
    ConnectionError,
    MaxConnectionsError,
    MovedError,
    NoScriptError,
    RedisClusterException,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from relay.redis_client import TROUBLE, AnyRedis
from relay.tasks import ended

# Of the time that a caller has, a master gets so much: what the others have answered must not be lost with it.
_SHARE: Final = 0.7
_LOOK_SECONDS: Final = 0.5
_ROUND_SECONDS: Final = 2.0
_NAMED_SECONDS: Final = 5.0
_AWAY: Final = (ConnectionError, RedisTimeoutError, ClusterDownError, OSError, TimeoutError)

_FINE: Final = (AskError, TryAgainError, NoScriptError)

log = structlog.get_logger(__name__)

Command = tuple[Any, ...]
"""A command for one slot: the name, the key, what follows; or ``EVAL`` or ``EVALSHA``, the script, how many keys, these, what
follows."""


class Servers:
    """What stands behind a client. ``seconds`` is the time that a caller gives an answer; ``back`` is called when a master of a
    cluster answers again. ``close`` it before the client. Of a single server ``answers`` is always True and ``partial`` False.

    Which masters do not answer is known of those that somebody has asked; of all by ``look``, or from ``start`` on."""

    def __init__(self, redis: AnyRedis, *, seconds: float, back: Callable[[], None] | None = None) -> None:
        self._redis = redis
        self._cluster = redis if isinstance(redis, RedisCluster) else None
        self._seconds = seconds * _SHARE
        self._back = back
        # The masters that do not answer, by name.
        self._away: set[str] = set()
        self._moved = False
        self._failed_at = -_NAMED_SECONDS
        self._always = self._closed = False
        self._doubted = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Looks every two seconds whether all masters answer."""
        self._always = True
        self._watch()

    @property
    def partial(self) -> bool:
        """Whether a master of a cluster does not answer, or has not within the last five seconds."""
        return bool(self._away) or monotonic() - self._failed_at < _NAMED_SECONDS

    def answers(self, key: str) -> bool:
        """Whether the master of this key answers, as far as is known."""
        return not self._away or self._name(key) not in self._away

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The answers, in one round trip to each server; of a cluster an answer is an exception where there is none. Raises what
        ``TROUBLE`` names when nothing is answered: by the one server, or by any master of the cluster."""
        if self._cluster is not None:
            return await self._ask_cluster(self._cluster, commands)
        async with self._redis.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            answers: list[Any] = await pipe.execute()
        return answers

    async def close(self) -> None:
        """Ends."""
        self._closed = True
        if self._watching is not None:
            await ended([self._watching])

    # -- a cluster

    async def _ask_cluster(self, cluster: RedisCluster, commands: Sequence[Command]) -> list[Any]:
        await _get_ready(cluster)
        answers: list[Any] = [None] * len(commands)
        await self._ask_masters(cluster, commands, range(len(commands)), answers)
        moved = await self._redirected(cluster, answers)
        if moved:
            await self._ask_masters(cluster, commands, moved, answers)
        for number, answer in enumerate(answers):
            if isinstance(answer, (AskError, TryAgainError)):
                # Its slot is on its way from one master to another, which is rare and soon over.
                try:
                    answers[number] = await cluster.execute_command(*commands[number])
                except TROUBLE as error:
                    answers[number] = error
        if self._away and self._away.issuperset(node.name for node in cluster.get_primaries()):
            raise next(
                (answer for answer in answers if isinstance(answer, Exception)), ConnectionError("no master")
            )
        return answers

    async def _ask_masters(
        self, cluster: RedisCluster, commands: Sequence[Command], numbers: Iterable[int], answers: list[Any]
    ) -> None:
        parts: dict[str, tuple[ClusterNode, list[int]]] = {}
        for number in numbers:
            try:
                node = _owner(cluster, _key_of(commands[number]))
            except RedisClusterException as error:
                # Nobody serves its slot.
                answers[number] = error
                self._failed_at = monotonic()
                continue
            if node.name in self._away:
                answers[number] = ConnectionError("the master does not answer")
                continue
            parts.setdefault(node.name, (node, []))[1].append(number)

        async def ask(node: ClusterNode, its: list[int]) -> None:
            found = await self._ask_master(node, [commands[number] for number in its])
            for number, answer in zip(its, found, strict=True):
                answers[number] = answer

        await asyncio.gather(*(ask(node, its) for node, its in parts.values()))

    async def _ask_master(self, node: ClusterNode, commands: Sequence[Command]) -> list[Any]:
        try:
            async with asyncio.timeout(self._seconds):
                answers = await _pipelined(node, commands)
                if any(_is_away(answer) and isinstance(answer, ConnectionError) for answer in answers):
                    # Of a server that was away every connection that was open is found dead by its next use.
                    await node.disconnect_free_connections()
                    answers = await _pipelined(node, commands)
        except TROUBLE as error:
            answers = [error] * len(commands)
        for answer in answers:
            if isinstance(answer, Exception) and not isinstance(answer, _FINE):
                self._failed_at = monotonic()
                if _is_away(answer):
                    self._note_away(node.name)
                    break
        return answers

    async def _redirected(self, cluster: RedisCluster, answers: Sequence[Any]) -> list[int]:
        """Which were sent to a master that does not serve their slots any more; now it is known who does."""
        moved = {n: answer for n, answer in enumerate(answers) if isinstance(answer, MovedError)}
        for error in {error.slot_id: error for error in moved.values()}.values():
            await cluster.nodes_manager.move_slot(error)
        if moved:
            self._moved = True
            self._watch()
        return list(moved)

    def _name(self, key: str) -> str | None:
        if self._cluster is None:
            return None
        try:
            return _owner(self._cluster, key).name
        except RedisClusterException:
            return None

    def _note_away(self, name: str, *, known: bool = False) -> None:
        self._failed_at = monotonic()
        if name not in self._away:
            self._away.add(name)
            if not known:
                log.warning("a master of the Redis cluster does not answer", server=name)
        self._watch()

    def _watch(self) -> None:
        self._doubted.set()
        if (
            self._cluster is not None
            and not self._closed
            and (self._watching is None or self._watching.done())
        ):
            self._watching = asyncio.create_task(self._look_after(), name="redis masters")

    async def _look_after(self) -> None:
        """Looks until all is well, or for ever."""
        while self._always or self._away or self._moved:
            self._doubted.clear()
            await self.look()
            if self._away or self._moved:
                await asyncio.sleep(_LOOK_SECONDS * random.uniform(0.8, 1.2))
            elif self._always:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ROUND_SECONDS * random.uniform(0.8, 1.2)):
                        await self._doubted.wait()

    async def look(self) -> None:
        """Finds out which masters there are and which of them answer. Never raises."""
        if self._cluster is None:
            return
        try:
            await self._look(self._cluster)
        except TROUBLE as error:
            log.debug("the masters of the Redis cluster are not known", error=type(error).__name__)
        except Exception:
            log.exception("the masters of the Redis cluster are not known")

    async def _look(self, cluster: RedisCluster) -> None:
        masters = cluster.get_primaries()
        lives = await asyncio.gather(*(self._lives(node) for node in masters))
        living = [node for node, its in zip(masters, lives, strict=True) if its]
        before, self._away = self._away, set()
        for node in masters:
            if node not in living:
                self._note_away(node.name, known=node.name in before)
        if living and (self._away or self._moved):
            async with asyncio.timeout(self._seconds):
                named = await living[0].execute_command("CLUSTER SLOTS")
            serving = {get_node_name(_text(slot[2][0]) or living[0].host, int(slot[2][1])) for slot in named}
            # Not at every look: everybody's connections are made anew by it, those that listen too.
            if self._moved or self._away - serving:
                self._moved = False
                await cluster.nodes_manager.initialize()
                self._away &= {node.name for node in cluster.get_primaries()}
        if before - self._away:
            log.info("masters of the Redis cluster answer again, or others serve for them")
            if self._back is not None:
                self._back()

    async def _lives(self, node: ClusterNode) -> bool:
        try:
            async with asyncio.timeout(self._seconds):
                info = await node.execute_command("CLUSTER INFO")
        except ResponseError:
            # It may not be asked for that.
            return True
        except TROUBLE:
            await node.disconnect_free_connections()
            return False
        return bool(info.get("cluster_state") == "ok")


async def _get_ready(cluster: RedisCluster) -> None:
    try:
        await cluster.initialize()
    except BaseException:
        # The driver asks the first master which commands there are: were it dead, nobody would ever be ready.
        for node in cluster.get_primaries()[:1]:
            cluster.nodes_manager.move_node_to_end_of_cached_nodes(node.name)
        raise


async def _pipelined(node: ClusterNode, commands: Sequence[Command]) -> list[Any]:
    asked = [PipelineCommand(number, *command) for number, command in enumerate(commands)]
    try:
        await node.execute_pipeline(asked)
    except ConnectionError as error:
        return [error] * len(asked)
    return [command.result for command in asked]


def _owner(cluster: RedisCluster, key: str) -> ClusterNode:
    """Raises RedisClusterException."""
    node = cluster.get_node_from_key(key)
    if node is None:
        raise RedisClusterException
    return node


def _key_of(command: Command) -> str:
    return str(command[3] if command[0] in ("EVAL", "EVALSHA") else command[1])


def _is_away(answer: Any) -> bool:
    # The second is this node's own affair: all its connections are in use.
    return isinstance(answer, _AWAY) and not isinstance(answer, MaxConnectionsError)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
