"""What this node tells others, on its way: looked up, and published.

Whatever is to be told gathers while the last group is on its way; each turn is one round trip. It publishes what is known to
concern which node, and looks up the rest, which the next turn publishes. A message that is being committed is looked up
meanwhile, so that it goes out in the turn after its commit; that turn looks up its devices once more, and who has come in between
is told in the next one. So whoever was entered before that second question gets it, and all others drain it.
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
from relay.wire.ids import user_of

_SECONDS: Final = 2.0
_PARCELS: Final = 500
_FRESH_SECONDS: Final = 1.0
_KEPT_SECONDS: Final = 5.0
_MOST_KEPT: Final = 20_000

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
        self._whereabouts = Whereabouts()

    @property
    def idle(self) -> bool:
        """Whether all has been told."""
        return not (self.gathered.items or self._ready)

    def wake(self) -> None:
        """Something has gathered."""
        self._wake.set()

    def expect(self, users: Iterable[str]) -> None:
        """Messages for these may have to be told in a moment."""
        if self._whereabouts.want(users):
            self._wake.set()

    def forget(self) -> int:
        """Drops whatever is to be told. Returns how much that is, what is on its way not counted."""
        dropped = self.gathered.items
        self.gathered, self._ready, self._whereabouts = Gathered(), [], Whereabouts()
        return dropped

    async def run(self) -> None:
        """Tells, over and over."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while not self.idle or self._whereabouts.wanted:
                try:
                    await self._turn()
                except TROUBLE as error:
                    self._fails(error)
                except Exception:
                    log.exception("what was to be told to other nodes is lost")

    async def _turn(self) -> None:
        began = self._now()
        whereabouts = self._whereabouts
        group, self.gathered = self.gathered, Gathered()
        out, self._ready = self._ready, []
        known = whereabouts.known(user_of(key) for _, keys in group.messages for key in keys)
        early, rest = group.split(known)
        out += self._packed(early, known, began)
        asked = list(dict.fromkeys([*group.users(), *whereabouts.take_wanted()]))
        lines, unknown = await self._exchange(out, asked)
        whereabouts.note([user for user in asked if user not in unknown], lines)
        if missed := rest.count(unknown):
            self._lost(missed)
        self._ready += self._packed(rest, lines, began)
        self._ready += self._packed(early.only_messages(), _came(known, lines), began)

    def _packed(self, group: Gathered, lines: Lines, at: int) -> list[_Payload]:
        parcels, for_all = group.sort(lines, self._node)
        out = [
            (self._channel(node), payload)
            for node, its in parcels.items()
            for payload in packed(self._node, at, its)
        ]
        return out + [(self._all, payload) for payload in packed(self._node, at, for_all)]

    async def _exchange(self, out: Sequence[_Payload], users: Sequence[str]) -> Found:
        """Publishes, and looks up where the devices of these users are."""
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

    def want(self, users: Iterable[str]) -> bool:
        """Asks for those that are not known afresh, as long as there is room. True when somebody is to be asked for."""
        freshest = monotonic() - _FRESH_SECONDS
        for user in users:
            found = self._found.get(user)
            if (found is None or found[1] < freshest) and len(self.wanted) < _MOST_KEPT:
                self.wanted[user] = None
        return bool(self.wanted)

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
