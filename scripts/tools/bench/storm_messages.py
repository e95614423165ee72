"""What the bench asks of devices that come back all at once, and what they answer: one JSON object a line, each request answered
once."""

from __future__ import annotations

import msgspec

from scripts.tools.bench.crowd_messages import Answer, Done, Group, Unable
from scripts.tools.bench.messages import Percentiles


class Request(msgspec.Struct, tag_field="do", frozen=True, kw_only=True):
    """Something the devices are asked to do."""


class Assemble(Request, tag="assemble", frozen=True):
    """The first request: who there is. The first member of each group sends, the others come back. Answered by Done."""

    secret: str
    audience: str
    groups: list[Group]
    size: int


class Come(Request, tag="come", frozen=True):
    """The senders, or all others, connect to these nodes in turn, ``at_once`` at a time. Answered by Came when each has drained."""

    senders: bool
    ports: list[int]
    at_once: int


class Post(Request, tag="post", frozen=True):
    """Each sender sends so many messages to its group. Answered by Done when all are stored."""

    messages: int


class Lose(Request, tag="lose", frozen=True):
    """Kills the node to which all others are connected; that they lose their connections is no fault. Answered by Done when they have."""

    pid: int


class Settle(Request, tag="settle", frozen=True):
    """Answered by Settled."""


AnyRequest = Assemble | Come | Post | Lose | Settle


class Came(Answer, tag="came", frozen=True):
    """From the request until a device was connected, and until it had drained; ``seconds`` until the last one had. ``again``
    connections were refused or cut, and tried again."""

    devices: int
    messages: int
    seconds: float
    connected_ms: Percentiles
    drained_ms: Percentiles
    again: int


class Settled(Answer, tag="settled", frozen=True):
    """Everything so far; deliveries but for ``sent`` and ``stored``, which are messages. ``errors`` are the first few."""

    sent: int
    stored: int
    delivered: int
    missing: int
    repeated: int
    unknown: int
    failed: int
    closed: int
    errors: list[str]


AnyAnswer = Done | Came | Settled | Unable
