"""What the bench and its load generator tell each other: one JSON object a line, orders in, news out."""

from __future__ import annotations

from typing import Literal

import msgspec

from scripts.tools.bench.processes import Usage

Placement = Literal["first", "same", "apart", "mixed"]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate. ``connections`` opens idle devices instead of pairs. ``rate`` (messages/s, all pairs together)
    makes the loop open. The window lasts ``seconds``, or until ``messages`` were delivered; ``mark`` is the number of
    messages at which memory is noted. ``pids`` are the processes whose use is noted. With ``phases`` the window has so many, each
    ended by a line, the last one by ``seconds`` at the latest. ``more_ports`` are other nodes on the same host, and ``placement``
    says where the two of a pair are connected: both at the first node, both at the same one of all in turn, at two different ones, or as by lot, evenly."""

    host: str
    port: int
    secret: str
    audience: str
    run: str
    connections: int = 0
    pairs: int = 0
    window: int = 4
    size: int = 200
    warmup: float = 0
    seconds: float = 0
    messages: int | None = None
    mark: int | None = None
    rate: float | None = None
    phases: int = 0
    more_ports: list[int] = []
    placement: Placement = "first"
    pids: dict[str, int] = {}


class News(msgspec.Struct, tag_field="event", frozen=True, kw_only=True):
    """Something the load generator tells."""


class Connected(News, tag="connected", frozen=True):
    """Every socket is open and drained."""

    connections: int
    seconds: float


class Progress(News, tag="progress", frozen=True):
    """Once a second. ``rate``: delivered a second since the last one."""

    warm: bool
    delivered: int
    rate: float


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds."""

    count: int
    p50: float
    p90: float
    p99: float
    p999: float
    max: float


class Measured(News, tag="measured", frozen=True):
    """The measured window; ``per_frame`` messages came in one frame on average. ``before`` and ``after`` are the processes at its ends, ``marked`` when ``mark`` was reached;
    ``late`` sends were due in an open loop and had not been made when it ended. ``together_ms`` and ``apart_ms`` are the
    ``delivered_ms`` of pairs at the same node and at two. ``phases_ms``: of the messages that were due in each
    phase, from then to their delivery, however late that was. ``read_bytes`` and ``written_bytes``: by the devices, all in all."""

    seconds: float
    delivered: int
    per_frame: float
    late: int
    stored_ms: Percentiles
    delivered_ms: Percentiles
    together_ms: Percentiles
    apart_ms: Percentiles
    before: dict[str, Usage]
    marked: dict[str, Usage]
    after: dict[str, Usage]
    phases_ms: list[Percentiles] = []
    read_bytes: int = 0
    written_bytes: int = 0


class Counted(News, tag="counted", frozen=True):
    """Everything since the first message, warm-up included. ``repeated``: delivered or stored a second time;
    ``unknown``: named a message that was never sent. ``errors`` are the first few, as people read them."""

    sent: int
    stored: int
    delivered: int
    repeated: int
    unknown: int
    failed: int
    closed: int
    errors: list[str]


class Failed(News, tag="failed", frozen=True):
    """The load could not be generated; one line."""

    reason: str


AnyNews = Connected | Progress | Measured | Counted | Failed
