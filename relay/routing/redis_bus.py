"""The bus over Redis: a directory of devices, a channel for each node, and one for all.

While Redis does not answer nothing gathers; connections are entered into the directory again when it does.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterable
from time import monotonic
from typing import Final, Protocol

import structlog

from relay.metrics import Metrics
from relay.redis_client import TROUBLE, close, connect
from relay.redis_servers import Command, Servers
from relay.routing import hints
from relay.routing.bus import Event
from relay.routing.channels import Channel
from relay.routing.directory import KEPT_SECONDS, Directory, Entry, Line, Outcome, PartAway
from relay.routing.hints import Hint, Parcel, Told
from relay.routing.hub import Hub
from relay.routing.publishing import Publisher
from relay.routing.registrations import Registrations
from relay.tasks import ended
from relay.wire.clock import wall_ms
from relay.wire.envelope import Envelope
from relay.wire.ids import device_key, user_of

ANSWER_SECONDS: Final = 1.0
_CONNECTIONS: Final = 8
_PAUSE_SECONDS: Final = 0.5
_BEAT_SECONDS: Final = 1.0
_FIRST_BEAT_SECONDS: Final = 0.05
_STALE_MS: Final = 5000
_CLOSE_POLLS: Final = 100
# Leaves a mark that lasts as long as a line of the directory. Answers with the time, seconds and microseconds, and with what was
# there before; a server that takes no writes still has a time.
_BEAT_SCRIPT: Final = """
local before = redis.pcall('SET', KEYS[1], '1', 'GET', 'EX', ARGV[1])
if type(before) == 'table' then before = '?' end
local time = redis.call('TIME')
return {time[1], time[2], before}
"""
_UNWRITTEN: Final = b"?"

log = structlog.get_logger(__name__)


class Receiver(Protocol):
    """What is done with the hints of other nodes."""

    def take(self, node: str, hints: Iterable[Hint]) -> None:
        """Hints that are not old. Never raises."""


class RedisBus:
    """``node`` is this node's id, ``prefix`` what all names in Redis begin with. ``start`` and ``close`` it. ``resumed`` is called when hints may have been lost, and come again; ``is_dead`` says which nodes' devices are not online, whatever the directory says."""

    def __init__(
        self,
        url: str,
        hub: Hub,
        metrics: Metrics,
        *,
        node: str,
        prefix: str,
        is_dead: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Connects at the start. Raises ValueError for what is no URL of Redis."""
        self._redis = connect(url, connections=_CONNECTIONS, seconds=ANSWER_SECONDS)
        self._node = node
        self._prefix = prefix
        self._is_dead = is_dead
        self._dropped = metrics.bus_dropped
        self._servers = Servers(self._redis, seconds=ANSWER_SECONDS, back=lambda: self._came_back())
        self._directory = Directory(self._redis, prefix=prefix, node=node, servers=self._servers)
        self._serial = 0
        self._registrations = Registrations(
            self._directory,
            hub,
            seconds=ANSWER_SECONDS,
            works=lambda: self._works,
            fails=self._fails,
            noted=self._noted,
        )
        self._channels = [Channel(self._redis, name, self._take) for name in (self._channel(node), self._all)]
        self._receiver: Receiver | None = None
        self.resumed: Callable[[], None] = _nothing
        self._works = True
        # Since others were last told that it may be.
        self._may_be_lost = False
        self._ask_at = 0.0
        self._ahead = 0.0
        # Whether Redis has said that it keeps the mark of a beat.
        self._marked = False
        self._publisher = Publisher(
            self._servers,
            self._directory,
            node=node,
            channel=self._channel,
            all_nodes=self._all,
            now=self._now,
            fails=self._fails,
            lost=self._dropped.inc,
        )
        self._numbers = 0
        self._unconfirmed: dict[int, tuple[set[str], asyncio.Future[bool]]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._again: asyncio.Task[None] | None = None

    # -- life

    @property
    def tells(self) -> bool:
        """Whether Redis answered last."""
        return self._works

    @property
    def shared(self) -> bool:
        """Whether Redis answered last, and its channels are heard, but for those in a part of it that does not answer."""
        return self._works and all(
            channel.heard or not self._servers.answers(channel.name) for channel in self._channels
        )

    @property
    def _whole(self) -> bool:
        return self._works and all(channel.heard for channel in self._channels)

    @property
    def problem(self) -> str | None:
        """What does not work, for people."""
        if self._works and self._servers.partial:
            return "part of Redis does not answer; devices that it knows of get other nodes' messages by the sweep"
        if self._whole:
            return None
        if self._works:
            return "this node does not hear what others tell; its devices get messages of other nodes by the sweep"
        return "it does not carry what nodes tell each other; other nodes' devices get messages by the sweep"

    async def start(self, receiver: Receiver) -> None:
        """Listens, and waits until it hears itself, for at most a second or two."""
        self._receiver = receiver
        self._servers.start()
        self._tasks = [asyncio.create_task(channel.run(), name=channel.name) for channel in self._channels]
        self._tasks += [
            asyncio.create_task(self._publisher.run(), name="bus publish"),
            asyncio.create_task(self._registrations.run(), name="bus directory"),
            asyncio.create_task(self._beat_all(), name="bus beat"),
            asyncio.create_task(self._registrations.renew(), name="bus renew"),
        ]
        try:
            async with asyncio.timeout(2 * ANSWER_SECONDS):
                await asyncio.gather(*(channel.ready.wait() for channel in self._channels))
        except TimeoutError:
            log.warning("Redis does not answer; other nodes are not told of messages")

    async def close(self) -> None:
        """Ends, after what is to be said has been, for at most a second."""
        for _ in range(_CLOSE_POLLS):
            if not (self._works and (self._registrations or not self._publisher.idle)):
                break
            await asyncio.sleep(ANSWER_SECONDS / _CLOSE_POLLS)
        await ended(self._tasks if self._again is None else [*self._tasks, self._again])
        self._registrations.close()
        await self._servers.close()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await close(self._redis)
        except TROUBLE:
            return

    # -- what is told

    def expect(self, users: Iterable[str]) -> None:
        """See ``Bus``."""
        if self._works:
            self._publisher.expect(users)

    def deliver(self, envelope: Envelope, keys: list[str]) -> None:
        """See ``Bus``."""
        if self._takes(len(keys), envelope.size):
            self._publisher.gathered.messages.append((envelope, keys))

    def release(self, doc_id: str, key: str) -> None:
        """See ``Bus``."""
        if self._takes(1):
            self._publisher.gathered.released.append((doc_id, key))

    def tell(self, event: Event, users: list[str], frame: str, but: str | None) -> None:
        """See ``Bus``."""
        if users and self._takes(len(users), len(frame)):
            self._publisher.gathered.told.append(Told(event, frame, users, but))

    def tell_device(self, key: str, frame: str) -> None:
        """See ``Bus``."""
        if self._takes(1, len(frame)):
            self._publisher.gathered.told.append(Told("keys", frame, [user_of(key)], only=key))

    def seen(self, user: str, moment: int) -> None:
        """See ``Bus``."""
        seen = self._publisher.gathered.seen
        if user in seen or self._takes(1):
            seen[user] = max(moment, seen.get(user, 0))

    def recheck(self, users: list[str]) -> None:
        """See ``Bus``."""
        self._announce(hints.Recheck(users))

    def quiet(self, user: str, quiet: bool, moment: int) -> None:
        """See ``Bus``."""
        self._announce(hints.Quiet(user, quiet, moment))

    def ended(self, key: str) -> None:
        """See ``Bus``."""
        self._announce(hints.Ended(key))

    def confirm(self, node: str, numbers: list[int]) -> None:
        """What that node has changed is believed here no more."""
        if self._takes(1):
            self._publisher.gathered.for_node.append((node, hints.Confirmed(self._node, numbers)))

    def missed(self, node: str, key: str) -> None:
        """The device with this key is at that node, and messages may have gone into the connection that it had here."""
        if self._takes(1):
            self._publisher.gathered.for_node.append((node, hints.Missed(key)))

    def confirmed(self, node: str, numbers: Iterable[int]) -> None:
        """Another node has confirmed."""
        for number in numbers:
            found = self._unconfirmed.get(number)
            if found is not None:
                found[0].discard(node)
                if not found[0] and not found[1].done():
                    found[1].set_result(True)

    async def invalidate(
        self, others: Collection[str], conversations: list[str], users: list[str], seconds: float
    ) -> bool:
        """See ``Bus``."""
        if not self._whole:
            return False
        self._numbers += 1
        number = self._numbers
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._unconfirmed[number] = (set(others), done)
        try:
            self._announce(hints.Changed(self._node, number, conversations, users))
            async with asyncio.timeout(seconds):
                return await done
        except TimeoutError:
            return False
        finally:
            del self._unconfirmed[number]

    # -- the directory

    async def enter(self, user: str, device: str) -> int:
        """See ``Bus``."""
        serial = self._next_serial()
        await self._registrations.enter(user, device, serial)
        return serial

    def _next_serial(self) -> int:
        """By the clock of Redis while it is known: numbers of all nodes say which connection of a device is the younger."""
        now = self._now() or wall_ms()
        self._serial = max(self._serial + 1, now << 10)
        return self._serial

    def leave(self, user: str, device: str, serial: int) -> None:
        """See ``Bus``."""
        self._registrations.note(Entry("leave", user, device, serial))

    def silent(self, user: str, device: str, serial: int, silent: bool) -> None:
        """See ``Bus``."""
        self._registrations.note(Entry("keep", user, device, serial, silent))

    async def online(self, users: Collection[str]) -> dict[str, set[str]] | None:
        """See ``Bus``."""
        if not users:
            return {}
        if not self._works:
            return None
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                found = await self._directory.find(list(users))
        except PartAway:
            return None
        except TROUBLE as error:
            self._fails(error)
            return None
        online: dict[str, set[str]] = {}
        for user, lines in found.items():
            for line in lines:
                if line.node != self._node and not line.silent and not self._is_dead(line.node):
                    online.setdefault(user, set()).add(line.device)
        return online

    def _noted(self, entry: Entry, outcome: Outcome) -> None:
        key = device_key(entry.user, entry.device)
        before = outcome.before
        if outcome.written:
            if before is not None and before.node != self._node:
                self._replace(before, key)
            if entry.way == "late":
                # When it came nobody could be told.
                self.seen(entry.user, 0)
        elif before is not None and entry.way in ("keep", "late") and before.node != self._node:
            # The device has connected elsewhere since; the message that said so is lost or under way.
            self._hand(before.node, [hints.Replaced(key, entry.serial)])

    def _replace(self, before: Line, key: str) -> None:
        if self._takes(1):
            self._publisher.gathered.for_node.append((before.node, hints.Replaced(key, before.serial)))

    # -- channels

    @property
    def _all(self) -> str:
        return f"{self._prefix}:all"

    def _channel(self, node: str) -> str:
        return f"{self._prefix}:node:{node}"

    def _announce(self, hint: Hint) -> None:
        if self._takes(1):
            self._publisher.gathered.for_all.append(hint)

    def _takes(self, items: int, size: int = 0) -> bool:
        if not self._works:
            return False
        if not self._publisher.gathered.takes(items, size):
            self._dropped.inc(items)
            return False
        self._publisher.wake()
        return True

    def _fails(self, error: BaseException) -> None:
        self._may_be_lost = True
        self._ask_at = monotonic() + _PAUSE_SECONDS * random.uniform(0.5, 1.5)
        if self._works:
            self._works = False
            self._dropped.inc(self._publisher.forget())
            log.warning("Redis does not answer; other nodes are told nothing", error=type(error).__name__)

    async def _beat_all(self) -> None:
        """Each channel is heard at least once a second, or it does not work; and Redis is asked for its time."""
        while True:
            try:
                if self._works or monotonic() >= self._ask_at:
                    async with asyncio.timeout(ANSWER_SECONDS):
                        forgotten = await self._beat()
                    if not self._works:
                        self._works = True
                        log.info("Redis answers again; other nodes are told")
                        self._came_back()
                    elif forgotten:
                        log.info("Redis has lost what it knew; who is connected is entered again")
                        self._came_back()
            except TROUBLE as error:
                self._fails(error)
            except Exception as error:
                log.exception("the bus did not beat")
                self._fails(error)
            for channel in self._channels:
                if channel.came_back():
                    self._may_be_lost = True
                    self._came_back()
            # A node that starts waits until it hears itself.
            begun = all(channel.ready.is_set() for channel in self._channels) or not self._works
            begun = begun or self._servers.partial
            await asyncio.sleep(_BEAT_SECONDS * random.uniform(0.8, 1.0) if begun else _FIRST_BEAT_SECONDS)

    def _came_back(self) -> None:
        if self._again is None or self._again.done():
            self._again = asyncio.create_task(self._registrations.renew_all(), name="bus enter again")
        self.resumed()

    async def _beat(self) -> bool:
        """Whether Redis has lost what it was told by the beat before."""
        beat = hints.encode(Parcel(self._node, 0, [hints.Beat()]))
        # At most once a beat, however often it flaps; a beat that fails makes it true again.
        is_back, self._may_be_lost = self._may_be_lost, False
        asked = monotonic()
        own = self._channel(self._node)
        commands: list[Command] = [
            # Of the server that carries this node's channel.
            ("EVAL", _BEAT_SCRIPT, 1, own, KEPT_SECONDS),
            ("SPUBLISH", own, beat),
        ]
        if self._channels[1].quiet_for(_BEAT_SECONDS):
            commands.append(("SPUBLISH", self._all, beat))
        if is_back:
            # Apart from others: an older node drops the whole parcel.
            commands.append(("SPUBLISH", self._all, hints.encode(Parcel(self._node, 0, [hints.Back()]))))
        answers = await self._servers.ask(commands)
        if is_back and isinstance(answers[-1], Exception):
            self._may_be_lost = True
        if isinstance(answers[0], Exception):
            return False
        seconds, microseconds, before = answers[0]
        took = monotonic() - asked
        self._ahead = int(seconds) + int(microseconds) / 1_000_000 - (asked + took / 2)
        forgotten, self._marked = self._marked and before is None, before != _UNWRITTEN
        return forgotten

    def _now(self) -> int:
        return int((monotonic() + self._ahead) * 1000) if self._ahead else 0

    def _take(self, data: bytes) -> None:
        try:
            parcel = hints.decode(data)
        except hints.Unreadable:
            log.warning("what another node told cannot be read")
            return
        now = self._now()
        if parcel.at and now and now - parcel.at > _STALE_MS:
            self._dropped.inc(len(parcel.hints))
            return
        self._hand(parcel.node, parcel.hints)

    def _hand(self, node: str, its: Iterable[Hint]) -> None:
        if self._receiver is not None:
            self._receiver.take(node, its)


def _nothing() -> None:
    return None
