"""What this node tells others, on its way: looked up, and published.

Whatever is to be told gathers while the last group is on its way; each turn is one round trip. A group is published at once when it
is remembered where all its people are, and looked up for the next turn to publish when it is not. Either way the directory is
asked once about it, after its messages are committed: who had come by then gets them, and everybody else drains them. What was
published from memory is asked about a moment later, together with what came after it.

Messages that are being committed for people who are not remembered ride on such a question, and so go out in the turn after their
commit. They are never a reason to ask by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Final

import structlog

from relay.redis_client import TROUBLE
from relay.redis_servers import Command, Servers
from relay.routing.directory import Directory, Found, Line
from relay.routing.gathering import Gathered, Lines, packed
from relay.routing.hints import Hint
from relay.wire.envelope import Envelope
from relay.wire.ids import user_of

_SECONDS: Final = 2.0
_PARCELS: Final = 500
# So long may it take until one who has just come is told what was published a moment before.
_LATER_SECONDS: Final = 0.02
_KEPT_SECONDS: Final = 30.0
_MOST_KEPT: Final = 20_000
# Nobody who is asked for with a question of others' may make it a long one.
_MOST_WANTED: Final = 1000

log = structlog.get_logger(__name__)
_Payload = tuple[str, bytes]


class Publisher:
    """``channel`` names that of a node, ``all_nodes`` is the one that everybody hears; ``now`` is the time that is written on
    parcels (ms), ``fails`` is told when Redis does not answer, ``lost`` how much could not be told because only a part of it does
    not. What ``gathered`` holds is told soon after ``wake``."""

    def __init__(
        self,
        servers: Servers,
        directory: Directory,
        *,
        node: str,
        channel: Callable[[str], str],
        all_nodes: str,
        now: Callable[[], int],
        fails: Callable[[BaseException], None],
        lost: Callable[[int], None],
    ) -> None:
        self._servers = servers
        self._directory = directory
        self._node = node
        self._channel = channel
        self._all = all_nodes
        self._now = now
        self._fails = fails
        self._lost = lost
        self.gathered = Gathered()
        self._wake = asyncio.Event()
        # Those of the last turn, whose devices were looked up by it.
        self._ready: list[_Payload] = []
        # Published from memory, and what that was.
        self._told = Gathered()
        self._told_to: dict[str, Sequence[Line]] = {}
        self._reminder: asyncio.TimerHandle | None = None
        self._under_way = False
        self._whereabouts = Whereabouts()

    @property
    def idle(self) -> bool:
        """Whether all has been told."""
        return not (self.gathered.items or self._ready or self._told.messages or self._under_way)

    def wake(self) -> None:
        """Something has gathered."""
        self._wake.set()

    def expect(self, users: Iterable[str]) -> None:
        """Messages for these may have to be told in a moment."""
        self._whereabouts.want(users)
        if self._due():
            self._wake.set()

    def forget(self) -> int:
        """Drops whatever is to be told. Returns how much that is, what is on its way not counted."""
        dropped = self.gathered.items
        self.gathered, self._ready, self._whereabouts = Gathered(), [], Whereabouts()
        self._take_told()
        return dropped

    async def run(self) -> None:
        """Tells, over and over."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.gathered.items or self._ready or self._due():
                self._under_way = True
                try:
                    await self._turn()
                except TROUBLE as error:
                    self._fails(error)
                except Exception:
                    log.exception("what was to be told to other nodes is lost")
                finally:
                    self._under_way = False

    def _due(self) -> bool:
        """Whether what was published from memory is to be asked about now."""
        return bool(self._told.messages) and (self._reminder is None or bool(self._whereabouts.wanted))

    async def _turn(self) -> None:
        began = self._now()
        whereabouts = self._whereabouts
        group, self.gathered = self.gathered, Gathered()
        out, self._ready = self._ready, []
        known = whereabouts.known(user_of(key) for _, keys in group.messages for key in keys)
        early, rest = group.split(known)
        out += self._packed([(early, known)], began)
        if early.messages:
            self._ask_later(early.messages, known)
        told, told_to, asked = self._questions(rest)
        lines, unknown = await self._exchange(out, asked)
        whereabouts.note([user for user in asked if user not in unknown], lines)
        if missed := rest.count(unknown):
            self._lost(missed)
        # In the order of their commits, for who has moved.
        self._ready += self._packed([(told, _came(told_to, lines)), (rest, lines)], began)

    def _ask_later(self, messages: Iterable[tuple[Envelope, list[str]]], known: Lines) -> None:
        if not self._told.messages:
            self._reminder = asyncio.get_running_loop().call_later(_LATER_SECONDS, self._remind)
        self._told.messages += messages
        # Nothing was learned since the first of them: that of one user is the same for all.
        self._told_to.update(known)

    def _remind(self) -> None:
        self._reminder = None
        self._wake.set()

    def _take_told(self) -> tuple[Gathered, Lines]:
        told, self._told = self._told, Gathered()
        told_to, self._told_to = self._told_to, {}
        if self._reminder is not None:
            self._reminder.cancel()
            self._reminder = None
        return told, told_to

    def _questions(self, rest: Gathered) -> tuple[Gathered, Lines, list[str]]:
        """What was told that is asked about now, to where, and all users who are asked for in this turn."""
        users = rest.users()
        if not (users or self._due()):
            return Gathered(), {}, []
        told, told_to = self._take_told()
        asked = dict.fromkeys([*users, *told.users(), *self._whereabouts.take_wanted()])
        return told, told_to, list(asked)

    def _packed(self, groups: Iterable[tuple[Gathered, Lines]], at: int) -> list[_Payload]:
        parcels: dict[str, list[Hint]] = {}
        for_all: list[Hint] = []
        for group, lines in groups:
            by_node, everywhere = group.sort(lines, self._node)
            for node, its in by_node.items():
                parcels.setdefault(node, []).extend(its)
            for_all += everywhere
        out = [
            (self._channel(node), payload)
            for node, its in parcels.items()
            for payload in packed(self._node, at, its)
        ]
        return out + [(self._all, payload) for payload in packed(self._node, at, for_all)]

    async def _exchange(self, out: Sequence[_Payload], users: Sequence[str]) -> Found:
        """Publishes, and looks up where the devices of these users are, if there is anything to do."""
        if not (out or users):
            return Found({}, frozenset())
        for start in range(0, len(out) - _PARCELS, _PARCELS):
            await self._send(out[start : start + _PARCELS], ())
        rest = len(out) % _PARCELS or _PARCELS
        return await self._send(out[-rest:], users)

    async def _send(self, out: Sequence[_Payload], users: Sequence[str]) -> Found:
        commands: list[Command] = [("SPUBLISH", channel, payload) for channel, payload in out]
        async with asyncio.timeout(_SECONDS):
            answers = await self._servers.ask(commands + self._directory.questions(users))
        if unheard := sum(isinstance(answer, Exception) for answer in answers[: len(out)]):
            self._lost(unheard)
        return self._directory.found(users, answers[len(out) :])


class Whereabouts:
    """Where the devices of users were when they were last asked for, not long ago: nothing to rely on."""

    def __init__(self) -> None:
        self.wanted: dict[str, None] = {}
        # With the time of the answer; the oldest comes first.
        self._found: dict[str, tuple[Sequence[Line], float]] = {}

    def want(self, users: Iterable[str]) -> None:
        """These are to be asked for unless they are known, as long as there is room."""
        oldest = monotonic() - _KEPT_SECONDS
        for user in users:
            found = self._found.get(user)
            if (found is None or found[1] < oldest) and len(self.wanted) < _MOST_WANTED:
                self.wanted[user] = None

    def take_wanted(self) -> dict[str, None]:
        """Who is to be asked for, in the turn that begins."""
        wanted, self.wanted = self.wanted, {}
        return wanted

    def known(self, users: Iterable[str]) -> dict[str, Sequence[Line]]:
        """Where those of them are who were asked for lately."""
        oldest = monotonic() - _KEPT_SECONDS
        known = {}
        for user in users:
            found = self._found.get(user)
            if found is not None and found[1] >= oldest:
                known[user] = found[0]
        return known

    def note(self, users: Iterable[str], lines: Lines) -> None:
        """What the directory has answered about these."""
        now = monotonic()
        for user in users:
            self._found.pop(user, None)
            self._found[user] = (lines.get(user, ()), now)
            self.wanted.pop(user, None)
        while len(self._found) > _MOST_KEPT or (self._found and self._oldest() < now - _KEPT_SECONDS):
            del self._found[next(iter(self._found))]

    def _oldest(self) -> float:
        return next(iter(self._found.values()))[1]


def _came(known: Lines, lines: Lines) -> dict[str, Sequence[Line]]:
    """Those of ``lines`` that lead to where ``known`` does not."""
    came: dict[str, Sequence[Line]] = {}
    for user, before in known.items():
        now = lines.get(user, ())
        if now and now != before:
            old = {(line.device, line.node) for line in before}
            new = [line for line in now if (line.device, line.node) not in old]
            if new:
                came[user] = new
    return came
