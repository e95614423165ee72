"""Pairs of devices that talk: what is sent, what came of it, and how long it took."""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Final

from hdrh.histogram import HdrHistogram

from relay.wire.ids import MESSAGE_ID
from scripts.tools.bench.messages import Percentiles
from scripts.tools.bench.sockets import Error, Msg, Op, Socket, Stored

MOST_OUTSTANDING: Final = 50_000
_SCATTER: Final = 0x9E3779B1  # odd, near 2^32 divided by the golden ratio (Knuth, TAOCP 6.4)
_LONGEST_US: Final = 3_600_000_000
_SHOWN_ERRORS: Final = 5
_FRAME_OPERATIONS: Final = 256
_FRAME_BYTES: Final = 200_000


def message_id(number: int) -> str:
    """The id of the message with this number: a UUID by form. They are counted, so that one look-up suffices, but scattered
    like the random ones of real devices: ids in order would find MongoDB's indexes in a state that they never have."""
    return f"{number * _SCATTER & 0xFFFFFFFF:08x}-0000-4000-8000-{number:012x}"


class Tally:
    """What became of the messages of all pairs. Times are ``perf_counter`` seconds; ``recording`` is on in the measured
    window only. ``enough`` is set when ``wanted`` messages were delivered in it, ``marked`` at ``mark`` of them, and
    ``settled`` once nothing is outstanding after ``stop``. Deliveries to another node than the sender's
    are ``apart_ms``. With ``keep_due`` the times at which messages were due and came are kept,
    until everything has settled."""

    __slots__ = (
        "apart_ms",
        "came",
        "closed",
        "delivered",
        "due",
        "enough",
        "errors",
        "failed",
        "frames",
        "keep_due",
        "mark",
        "marked",
        "next_stop",
        "recorded",
        "recording",
        "repeated",
        "running",
        "sent",
        "settled",
        "stored",
        "stored_ms",
        "together_ms",
        "undelivered",
        "unknown",
        "unstored",
        "wanted",
    )

    def __init__(self, *, mark: int | None = None, wanted: int | None = None, keep_due: bool = False) -> None:
        self.sent = self.stored = self.delivered = self.recorded = self.frames = 0
        self.repeated = self.unknown = self.failed = self.closed = 0
        self.errors: list[str] = []
        self.unstored: dict[str, float] = {}
        self.undelivered: dict[str, float] = {}
        self.stored_ms = array("d")
        self.together_ms = array("d")
        self.apart_ms = array("d")
        self.keep_due = keep_due
        self.due = array("d")
        self.came = array("d")
        self.running = True
        self.recording = False
        self.mark = mark
        self.wanted = wanted
        self.next_stop = min(mark or _LONGEST_US, wanted or _LONGEST_US)
        self.marked = asyncio.Event()
        self.enough = asyncio.Event()
        self.settled = asyncio.Event()

    def stop(self) -> None:
        """Nothing more is sent."""
        self.running = False
        self.look_settled()

    def look_settled(self) -> None:
        """Tells when nothing is outstanding any more."""
        if not self.running and not self.undelivered and not self.unstored:
            self.settled.set()

    def look_stops(self) -> None:
        """Tells when ``mark`` or ``wanted`` is reached."""
        if self.mark is not None and self.recorded >= self.mark:
            self.marked.set()
        if self.wanted is not None and self.recorded >= self.wanted:
            self.enough.set()
        left = [stop for stop in (self.mark, self.wanted) if stop is not None and stop > self.recorded]
        self.next_stop = min(left, default=_LONGEST_US)

    def astray(self, message: str) -> None:
        """A message that nobody waits for came, or came again."""
        number = int(message[24:], 16) if MESSAGE_ID.fullmatch(message) else 0
        if 0 < number <= self.sent and message == message_id(number):
            self.repeated += 1
        else:
            self.unknown += 1

    def refused(self, error: Error) -> None:
        """The relay refused something."""
        self.failed += 1
        if error.id is not None:
            self.unstored.pop(error.id, None)
            self.undelivered.pop(error.id, None)
        self.note(f"{error.code}: {error.message}")
        self.look_settled()

    def note(self, problem: str) -> None:
        """Keeps the first few problems for people."""
        if len(self.errors) < _SHOWN_ERRORS:
            self.errors.append(problem)


class Pair:
    """A sending and a receiving device of one direct conversation. ``closed_loop``: a delivery causes the next send. ``apart``: they are
    connected to different nodes."""

    __slots__ = ("_ack", "_chunk", "_head", "_tail", "_tally", "recipient", "sender")

    def __init__(
        self, tally: Tally, conversation: str, size: int, *, closed_loop: bool, apart: bool = False
    ) -> None:
        self._tally = tally
        self._head = '{"t":"send","id":"'
        self._tail = f'","conv":"{conversation}","kind":"text","body":"{"x" * size}"}}'
        self._ack = f'{{"t":"ack","conv":"{conversation}","ids":["'
        self._chunk = max(1, min(_FRAME_OPERATIONS, _FRAME_BYTES // (size + 256)))
        self.sender = Sender(tally)
        self.recipient = Recipient(self, tally, closed_loop=closed_loop, apart=apart)

    def send(self, times: Sequence[float]) -> None:
        """Sends one message for each intended time, in one frame where they fit."""
        for start in range(0, len(times), self._chunk):
            self._send_frame(times[start : start + self._chunk])

    def _send_frame(self, times: Iterable[float]) -> None:
        tally = self._tally
        number = tally.sent
        head, tail = self._head, self._tail
        unstored, undelivered = tally.unstored, tally.undelivered
        frames = []
        for intended in times:
            number += 1
            message = message_id(number)
            frames.append(head + message + tail)
            unstored[message] = undelivered[message] = intended
        tally.sent = number
        self.sender.write(frames[0] if len(frames) == 1 else "[" + ",".join(frames) + "]")

    def acknowledge(self, messages: Sequence[str]) -> None:
        """Everything of one frame in one acknowledgement."""
        self.recipient.write(self._ack + '","'.join(messages) + '"]}')


class End:
    """One device of a pair: where its socket is attached."""

    __slots__ = ("_tally", "socket", "write")

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def attach(self, socket: Socket) -> None:
        """The connection is ready."""
        self.socket = socket
        self.write = socket.send

    def lost(self, reason: str) -> None:
        """The connection ended; the messages on it stay unaccounted for."""
        self._tally.closed += 1
        self._tally.note(reason)


class Sender(End):
    """Hears what is stored."""

    __slots__ = ()

    def received(self, ops: list[Op]) -> None:
        """One frame."""
        tally = self._tally
        now = perf_counter()
        recording = tally.recording
        for op in ops:
            if isinstance(op, Stored):
                intended = tally.unstored.pop(op.id, None)
                if intended is None:
                    tally.astray(op.id)
                    continue
                tally.stored += 1
                if recording:
                    tally.stored_ms.append(now - intended)
            elif isinstance(op, Error):
                tally.refused(op)
        if not tally.running:
            tally.look_settled()


class Recipient(End):
    """Hears what is delivered, acknowledges it, and lets the sender go on."""

    __slots__ = ("_closed_loop", "_pair", "_times")

    def __init__(self, pair: Pair, tally: Tally, *, closed_loop: bool, apart: bool) -> None:
        super().__init__(tally)
        self._times = tally.apart_ms if apart else tally.together_ms
        self._pair = pair
        self._closed_loop = closed_loop

    def received(self, ops: list[Op]) -> None:
        """One frame."""
        tally = self._tally
        now = perf_counter()
        messages: list[str] = []
        came = 0
        for op in ops:
            if isinstance(op, Msg):
                message = op.id
                messages.append(message)
                intended = tally.undelivered.pop(message, None)
                if intended is None:
                    tally.astray(message)
                    continue
                came += 1
                if tally.recording:
                    self._times.append(now - intended)
                if tally.keep_due:
                    tally.due.append(intended)
                    tally.came.append(now)
            elif isinstance(op, Error):
                tally.refused(op)
        if not messages:
            return
        self._pair.acknowledge(messages)
        tally.delivered += came
        if tally.recording:
            tally.recorded += came
            tally.frames += 1
            if tally.recorded >= tally.next_stop:
                tally.look_stops()
        if not tally.running:
            tally.look_settled()
        elif self._closed_loop and came:
            self._pair.send((now,) * came)


class Pacer:
    """An open loop: ``rate`` messages/s over all pairs in turn, each with the time it was due, whether or not the relay
    keeps up. Sends are made every millisecond; they wait while MOST_OUTSTANDING are under way or a socket is full."""

    def __init__(self, pairs: Sequence[Pair], tally: Tally, rate: float) -> None:
        self._pairs = pairs
        self._tally = tally
        self._rate = rate
        self._start = perf_counter()
        self._made = 0
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(0.001, self._tick)

    @property
    def late(self) -> int:
        """How many sends are due and not made."""
        return max(0, int((perf_counter() - self._start) * self._rate) - self._made)

    def stop(self) -> None:
        """Nothing more is sent."""
        self._timer.cancel()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(0.001, self._tick)
        room = MOST_OUTSTANDING - len(self._tally.undelivered)
        due: dict[int, list[float]] = {}
        count = len(self._pairs)
        made = self._made
        for number in range(made, made + min(self.late, room)):
            turn = number % count
            if self._pairs[turn].sender.socket.slow:
                break
            due.setdefault(turn, []).append(self._start + number / self._rate)
            self._made += 1
        for turn, times in due.items():
            self._pairs[turn].send(times)


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """Of durations in seconds."""
    histogram = HdrHistogram(1, _LONGEST_US, 3)
    for microseconds, count in Counter(max(1, round(value * 1e6)) for value in seconds).items():
        histogram.record_value(microseconds, count)

    def at(percent: float) -> float:
        return float(histogram.get_value_at_percentile(percent)) / 1000 if seconds else 0.0

    return Percentiles(
        count=len(seconds),
        p50=at(50),
        p90=at(90),
        p99=at(99),
        p999=at(99.9),
        max=max(seconds, default=0.0) * 1000,
    )
