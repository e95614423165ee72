"""Which device is connected to which node, in Redis.

One short text for each user with a connected device: a line for each device. It is changed by a script, so that two nodes at
once cannot lose each other's line, and every line says until when it is good: what a dead node has left goes by itself.
Only the connection that wrote a line takes it away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

from redis.asyncio import RedisCluster
from redis.exceptions import ConnectionError

from relay.redis_client import AnyRedis
from relay.redis_servers import Command, Servers

KEPT_SECONDS: Final = 90
"""A line is good for so long; it is renewed three times as often."""
_MOST_OF_USER: Final = 64
_AT_ONCE: Final = 1000
_SECONDS: Final = 1.0

Way = Literal["enter", "late", "keep", "leave"]

# What is there of the same device is answered. Who enters replaces it; who came while Redis was away, and is late, only what is
# older; and who is kept nothing. Redis's clock judges all lines.
_SCRIPT: Final = """
local now = tonumber(redis.call('TIME')[1])
local way, device, node, serial = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local kept, before, mine, younger = {}, false, false, false
for line in string.gmatch(redis.call('GET', KEYS[1]) or '', '[^\\n]+') do
  local d, n, s, u, f = string.match(line, '^(%S+) (%S+) (%S+) (%S+) (%S+)$')
  if d and tonumber(u) > now then
    if d ~= device then
      kept[#kept + 1] = line
    elseif n == node and s == serial then
      mine = true
    else
      before, younger = line, tonumber(s) > tonumber(serial)
    end
  end
end
local write = way == 'enter' or (way ~= 'leave' and not before) or (way == 'late' and not younger)
if write then
  if #kept >= tonumber(ARGV[6]) then table.remove(kept, 1) end
  kept[#kept + 1] = device .. ' ' .. node .. ' ' .. serial .. ' ' .. (now + tonumber(ARGV[5])) .. ' ' .. ARGV[7]
elseif before then
  kept[#kept + 1] = before
elseif not mine then
  return {0, false}
end
if #kept == 0 then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], table.concat(kept, '\\n'), 'EX', ARGV[5])
end
return {write and 1 or 0, before}
"""


class Line(NamedTuple):
    """One connected device. ``serial`` names its connection on ``node``; ``silent``: it was not heard from for a heartbeat."""

    device: str
    node: str
    serial: int
    silent: bool


class Entry(NamedTuple):
    """A connection of this node, and what to do about its line."""

    way: Way
    user: str
    device: str
    serial: int
    silent: bool = False


class Outcome(NamedTuple):
    """Whether the line is this connection's now, and the line of another connection of the device that was there."""

    written: bool
    before: Line | None


class Found(NamedTuple):
    """Where the devices of users are connected; users without any are absent. Nobody knows about the ``unknown``, whose part of
    Redis does not answer."""

    lines: dict[str, list[Line]]
    unknown: frozenset[str]


class PartAway(ConnectionError):
    """Some of these users are in a part of Redis that does not answer, while others are not."""


class Directory:
    """The directory as one node uses it. Every method raises what ``relay.redis_client.TROUBLE`` names when Redis does not
    answer; ``servers`` are those behind ``redis``, its own when there are none."""

    def __init__(self, redis: AnyRedis, *, prefix: str, node: str, servers: Servers | None = None) -> None:
        self._clustered = isinstance(redis, RedisCluster)
        self._servers = servers or Servers(redis, seconds=_SECONDS)
        self._prefix = prefix
        self._node = node

    async def note(self, entries: Sequence[Entry]) -> list[Outcome | None]:
        """Writes or takes away lines, in one round trip. None: the part of Redis where this one belongs does not answer."""
        if not entries:
            return []
        answers = await self._servers.ask(
            [
                (
                    "EVAL",
                    _SCRIPT,
                    1,
                    self._key(entry.user),
                    entry.way,
                    entry.device,
                    self._node,
                    str(entry.serial),
                    str(KEPT_SECONDS),
                    str(_MOST_OF_USER),
                    "s" if entry.silent else "-",
                )
                for entry in entries
            ]
        )
        return [None if isinstance(answer, Exception) else _outcome(*answer) for answer in answers]

    async def find(self, users: Sequence[str]) -> dict[str, list[Line]]:
        """Where the devices of these users are connected, this node's too; users without any are absent. Raises PartAway when
        that is not known of all."""
        found = self.found(users, await self._servers.ask(self.questions(users)))
        if found.unknown:
            raise PartAway
        return found.lines

    def questions(self, users: Sequence[str]) -> list[Command]:
        """What to ask to learn where these users' devices are; ``found`` reads the answers."""
        keys = [self._key(user) for user in users]
        if self._clustered:
            return [("GET", key) for key in keys]
        return [("MGET", *keys[start : start + _AT_ONCE]) for start in range(0, len(keys), _AT_ONCE)]

    def found(self, users: Sequence[str], answers: Sequence[Any]) -> Found:
        """What the answers to ``questions`` say."""
        values = answers if self._clustered else [one for some in answers for one in some]
        lines: dict[str, list[Line]] = {}
        unknown: list[str] = []
        for user, value in zip(users, values, strict=True):
            if isinstance(value, Exception):
                unknown.append(user)
            elif value:
                lines[user] = [_line(line) for line in value.split(b"\n")]
        return Found(lines, frozenset(unknown))

    def _key(self, user: str) -> str:
        return f"{self._prefix}:at:{user}"


def _outcome(written: int, before: bytes | None) -> Outcome:
    return Outcome(bool(written), None if not before else _line(before))


def _line(text: bytes) -> Line:
    device, node, serial, _, flags = text.decode().split(" ")
    return Line(device, node, int(serial), "s" in flags)
