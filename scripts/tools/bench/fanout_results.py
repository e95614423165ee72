"""What ``scripts/bench fanout`` found, and how people see it. Times in ms, rates in deliveries/s."""

from __future__ import annotations

from typing import Final

import msgspec
from rich.table import Table
from rich.text import Text

from scripts.tools.bench.crowd_messages import Said
from scripts.tools.bench.crowds import Window
from scripts.tools.bench.limit import Limit
from scripts.tools.bench.messages import Percentiles
from scripts.tools.bench.report import Check, Screen


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """One message at a time to ``devices`` that are all connected."""

    devices: int
    said: Said
    checks: list[Check]


class Sustained(msgspec.Struct, frozen=True, kw_only=True):
    """``groups`` of ``devices`` recipients each, with ``senders`` in a closed loop of ``window`` messages each."""

    groups: int
    devices: int
    senders: int
    window: int
    measured: Window
    per_frame: float
    reached_ms: Percentiles
    ratio: float | None = None
    checks: list[Check]


class Huge(msgspec.Struct, frozen=True, kw_only=True):
    """One message at a time to a group of ``devices``, ``online`` of them connected."""

    devices: int
    online: int
    said: Said
    checks: list[Check]


class Neighbours(msgspec.Struct, frozen=True, kw_only=True):
    """One-to-one traffic at ``asked_rate`` messages/s, alone and beside a group of ``devices`` at full rate. The ratios are
    of the delivery times' medians and 99th percentiles; ``late`` sends were due and not made."""

    asked_rate: float
    devices: int
    alone_ms: Percentiles
    beside_ms: Percentiles
    ratio_p50: float
    ratio_p99: float
    late: int
    group: Window
    checks: list[Check]


class Reconnect(msgspec.Struct, frozen=True, kw_only=True):
    """``devices`` connect at once to the same ``messages`` that wait for all of them. ``seconds`` to the last ``drained``;
    ``cpu`` is CPU seconds by process; ``setting`` what the relay was told in addition."""

    devices: int
    messages: int
    setting: str | None
    seconds: float
    cpu: dict[str, float]
    checks: list[Check]

    @property
    def cost(self) -> float:
        """CPU seconds of relay and mongod."""
        return self.cpu.get("relay", 0.0) + self.cpu.get("mongod", 0.0)


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """How many times more the setting of ``--compare`` takes."""

    setting: str
    seconds_ratio: float
    cpu_ratio: float


class Goal(msgspec.Struct, frozen=True):
    """What the relay should reach on two cores, and what it did."""

    name: str
    wanted: str
    found: str
    met: bool


class Fanout(msgspec.Struct, frozen=True, kw_only=True):
    """The result; a scenario that was not asked for is absent. ``limits`` are the raw cycle before and after, ``steady``
    whether they agree within a fifth. ``ok`` is that everything was accounted for; goals do not count.
    ``relay_log`` are warnings of the relays, of each the last few."""

    command: str = "fanout"
    ok: bool
    limits: list[Limit]
    raw_rate: float | None
    steady: bool | None
    latency: Latency | None = None
    sustained: Sustained | None = None
    inline: Sustained | None = None
    huge: Huge | None = None
    neighbours: Neighbours | None = None
    reconnect: list[Reconnect] = []
    compared: Comparison | None = None
    goals: list[Goal]
    checks: list[Check]
    relay_log: list[str]


_LAST_MS: Final = 150.0
_STORED_MS: Final = 1000.0
_SUSTAINED: Final = 25_000
_INLINE: Final = 15_000
_WORSE: Final = 2.0


def goals(
    latency: Latency | None,
    sustained: Sustained | None,
    inline: Sustained | None,
    huge: Huge | None,
    neighbours: Neighbours | None,
) -> list[Goal]:
    """What of the goals can be judged from these."""
    found = []
    if latency is not None:
        last = latency.said.last_ms.p50
        name = f"one message reaches the last of {latency.devices:,}, median"
        found.append(Goal(name, f"{_LAST_MS:g} ms", f"{last:.1f} ms", last <= _LAST_MS))
    for name, run, wanted in (
        ("deliveries/s into a large group", sustained, _SUSTAINED),
        ("deliveries/s into inline groups", inline, _INLINE),
    ):
        if run is not None:
            rate = run.measured.rate
            found.append(Goal(name, f"{wanted:,}", f"{rate:,.0f}", rate >= wanted))
    if huge is not None:
        stored = huge.said.stored_ms.p50
        name = f"a message for {huge.devices:,} is stored, median"
        found.append(Goal(name, f"{_STORED_MS:g} ms", f"{stored:.1f} ms", stored <= _STORED_MS))
    if neighbours is not None:
        ratio = neighbours.ratio_p50
        name = "one to one beside a large group, median"
        found.append(Goal(name, f"{_WORSE:g} times", f"{ratio:.2f} times", ratio <= _WORSE))
    return found


def show(found: Fanout, screen: Screen) -> None:
    """A table for people, goals and checks."""
    table = Table(title="Fan-out", title_justify="left", title_style="bold", show_lines=True)
    for column in ("scenario", "load", "found"):
        table.add_column(column, overflow="fold")
    if found.raw_rate is not None:
        moved = (
            "" if found.steady else "  [yellow](moved by more than a fifth: ratios are unreliable)[/yellow]"
        )
        table.add_row("raw cycle", "before and after", f"{found.raw_rate:,.0f}/s{moved}")
    if found.latency is not None:
        load = f"1 message at a time to {found.latency.devices:,} devices"
        table.add_row("latency", load, _said(found.latency.said))
    for name, run in (("sustained", found.sustained), ("inline", found.inline)):
        if run is not None:
            table.add_row(name, *_sustained(run))
    if found.huge is not None:
        load = f"1 message at a time to {found.huge.devices:,} devices, {found.huge.online:,} connected"
        table.add_row("huge", load, _said(found.huge.said))
    if found.neighbours is not None:
        table.add_row("neighbours", *_neighbours(found.neighbours))
    for one in found.reconnect:
        load = f"{one.devices:,} devices, the same {one.messages:,} messages" + (
            f", {one.setting}" if one.setting else ""
        )
        cpu = "  ".join(f"{name} {seconds:.2f} s" for name, seconds in one.cpu.items())
        table.add_row("reconnect", load, f"[bold]{one.seconds:.2f} s[/bold] to the last one\nCPU {cpu}")
    if found.compared is not None:
        text = (
            f"{found.compared.seconds_ratio:.2f} times the time, {found.compared.cpu_ratio:.2f} times the CPU"
        )
        table.add_row("", found.compared.setting, text)
    screen.out.print(table)
    for goal in found.goals:
        text = f"{'met   ' if goal.met else 'missed'}  {goal.name}: {goal.found} (goal {goal.wanted})"
        screen.out.print(Text(text, style="green" if goal.met else "yellow"))
    screen.checks([check for check in found.checks if not check.ok])
    for line in found.relay_log[:5]:
        screen.out.print(Text(f"relay's log: {line[:300]}", style="yellow"))
    if found.ok:
        screen.out.print(
            Text(f"ok      all {len(found.checks)} checks: nothing lost, doubled or left", style="green")
        )


def _said(said: Said) -> str:
    rows = [
        ("last one after", said.last_ms),
        ("first one after", said.first_ms),
        ("stored after", said.stored_ms),
    ]
    return "\n".join(
        f"{name} [bold]p50 {times.p50:.1f}[/bold]  p99 {times.p99:.1f}  max {times.max:.1f} ms"
        for name, times in rows
        if times.count
    )


def _sustained(run: Sustained) -> tuple[str, str]:
    groups = f"{run.groups} groups of {run.devices:,}" if run.groups > 1 else f"a group of {run.devices:,}"
    load = f"{groups} devices, {run.senders} senders with a window of {run.window}"
    ratio = "" if run.ratio is None else f", [bold]{run.ratio:.2f}[/bold] of the raw cycle"
    cpu = "  ".join(f"{name} {value:.1f} µs" for name, value in run.measured.cpu_us.items())
    return load, (
        f"[bold]{run.measured.rate:,.0f} deliveries/s[/bold]{ratio}, {run.per_frame:.1f} in a frame\n"
        f"last one after p50 {run.reached_ms.p50:.1f}  p99 {run.reached_ms.p99:.1f} ms\nCPU {cpu}"
    )


def _neighbours(run: Neighbours) -> tuple[str, str]:
    load = f"one to one at {run.asked_rate:,.0f}/s, alone and beside a group of {run.devices:,}"
    late = f"\n[red]{run.late:,} due and not sent[/red]" if run.late else ""
    alone, beside = run.alone_ms, run.beside_ms
    return load, (
        f"p50 {alone.p50:.1f} to {beside.p50:.1f} ms: [bold]{run.ratio_p50:.2f}[/bold] times\n"
        f"p99 {alone.p99:.1f} to {beside.p99:.1f} ms: [bold]{run.ratio_p99:.2f}[/bold] times\n"
        f"the group meanwhile: {run.group.rate:,.0f} deliveries/s{late}"
    )
