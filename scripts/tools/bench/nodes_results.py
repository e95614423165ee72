"""What ``scripts/bench nodes`` found, and how people see it. Times in ms, rates in messages/s, CPU in µs a message."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

import msgspec
from rich.table import Table
from rich.text import Text

from scripts.tools.bench.disk import Kept
from scripts.tools.bench.messages import Percentiles
from scripts.tools.bench.nodes_costs import Costs, Idle
from scripts.tools.bench.relay_metrics import Commits
from scripts.tools.bench.report import Check, Screen
from scripts.tools.bench.sites import Run, Use
from scripts.tools.bench.storm_messages import Came

_WORKERS: Final = 0.9
_HOP_MS: Final = 3.0
_SHARDS: Final = 1.4
_STORM_SECONDS: Final = 20.0
_STORM_P99: Final = 3.0


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One of two things that are compared, over all rounds in turn: medians, but for the lists, which have a value for each round.
    ``late`` sends were due in an open loop and not made, ``again`` messages were delivered a second time."""

    name: str
    rates: list[float]
    rate: float
    p50s: list[float]
    p50: float
    p99s: list[float]
    p99: float
    late: int
    again: int
    per_frame: float
    device_bytes: float
    cpu_us: dict[str, float]
    processes: dict[str, float]
    use: Use
    commits: dict[str, Commits]


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """``first`` and ``second`` in turn, under the same load. ``asked_rate`` is an open loop's. ``ratio`` is the median over the rounds
    of what the scenario is about: of rates (workers), of CPU of relay and mongod (shards). ``cpu_ratio`` is that of the CPU of everything but forwarders for a
    message: it says more than rates where something else uses the machine."""

    pairs: int
    window: int
    asked_rate: float | None
    rounds: int
    seconds: float
    first: Side
    second: Side
    ratio: float
    cpu_ratio: float
    checks: list[Check]


class Hop(msgspec.Struct, frozen=True, kw_only=True):
    """Half of the pairs are at the same node, half at two, in the same window: delivery times of both, for each round. ``more_p50`` and
    ``more_p99`` are the medians over the rounds of what another node adds, in ms. ``run`` is the whole load."""

    pairs: int
    asked_rate: float
    rounds: int
    seconds: float
    same: list[Percentiles]
    another: list[Percentiles]
    more_p50: float
    more_p99: float
    run: Side
    checks: list[Check]


class Storm(msgspec.Struct, frozen=True, kw_only=True):
    """``devices`` come back at once, each to ``messages`` that wait. ``before_ms`` and ``during_ms`` are the delivery times of others'
    messages, at ``asked_rate``, before and until the last had drained. ``killed``: their node was killed, and they came to the
    other one. ``cpu`` is CPU seconds of the storm by process, a share of the others' messages included; ``again`` messages
    were delivered a second time."""

    killed: bool
    devices: int
    messages: int
    asked_rate: float
    came: Came
    before_ms: Percentiles
    during_ms: Percentiles
    ratio_p99: float
    again: int
    late: int
    cpu: dict[str, float]
    checks: list[Check]


class Goal(msgspec.Struct, frozen=True):
    """What is asked for, and what was found."""

    name: str
    wanted: str
    found: str
    met: bool


class Nodes(msgspec.Struct, frozen=True, kw_only=True):
    """The result; a scenario that was not asked for is absent. ``ok`` is that everything was accounted for; goals do not count.
    ``relay_log`` are warnings of the relays, of each the last few."""

    command: str = "nodes"
    ok: bool
    workers: Compared | None = None
    hop: Hop | None = None
    shards: Compared | None = None
    storm: Storm | None = None
    kill: Storm | None = None
    costs: Costs | None = None
    idle: Idle | None = None
    disk: Kept | None = None
    goals: list[Goal]
    checks: list[Check]
    relay_log: list[str]


def side(name: str, runs: Sequence[Run]) -> Side:
    """The rounds of one thing together."""
    rates = [run.rate for run in runs]
    p50s = [run.measured.delivered_ms.p50 for run in runs]
    p99s = [run.measured.delivered_ms.p99 for run in runs]
    uses = [msgspec.structs.asdict(run.use) for run in runs]
    return Side(
        name=name,
        rates=rates,
        rate=_middle(rates),
        p50s=p50s,
        p50=_middle(p50s),
        p99s=p99s,
        p99=_middle(p99s),
        late=sum(run.measured.late for run in runs),
        again=sum(run.counts.repeated for run in runs),
        per_frame=_middle([run.measured.per_frame for run in runs]),
        device_bytes=_middle([run.device_bytes for run in runs]),
        cpu_us={kind: _middle([run.cpu_us[kind] for run in runs]) for kind in runs[0].cpu_us},
        processes={name: _middle([run.processes[name] for run in runs]) for name in runs[0].processes},
        use=Use(**{name: _middle([use[name] for use in uses]) for name in uses[0]}),
        commits=runs[-1].commits,
    )


def _middle(values: Sequence[float]) -> float:
    return float(median(values))


def goals(found: Nodes) -> list[Goal]:
    """What of the goals can be judged."""
    made = []
    if found.workers is not None:
        ratio = found.workers.ratio
        name = "two nodes with Redis against one, messages/s"
        made.append(Goal(name, f"at least {_WORKERS:g}", f"{ratio:.2f}", ratio >= _WORKERS))
    if found.hop is not None:
        more = found.hop.more_p50
        name = "another node, median"
        made.append(Goal(name, f"at most {_HOP_MS:g} ms more", f"{more:+.1f} ms", more <= _HOP_MS))
    if found.shards is not None:
        ratio = found.shards.ratio
        name = "two shards against a replica set, CPU of relay and mongod for a message"
        made.append(Goal(name, f"at most {_SHARDS:g}", f"{ratio:.2f}", ratio <= _SHARDS))
    for one in (found.storm, found.kill):
        if one is None:
            continue
        where = "to a node after the other's death" if one.killed else "to two nodes"
        name, seconds = f"{one.devices:,} devices at once {where}, all drained", one.came.seconds
        made.append(Goal(name, f"{_STORM_SECONDS:g} s", f"{seconds:.1f} s", seconds <= _STORM_SECONDS))
        name = f"others' messages meanwhile ({where}), 99 %"
        made.append(
            Goal(name, f"{_STORM_P99:g} times", f"{one.ratio_p99:.1f} times", one.ratio_p99 <= _STORM_P99)
        )
    return made


def show(found: Nodes, screen: Screen) -> None:
    """A table for people, goals and checks."""
    table = Table(title="Several nodes", title_justify="left", title_style="bold", show_lines=True)
    for column in ("scenario", "load", "found"):
        table.add_column(column, overflow="fold")
    if found.hop is not None:
        table.add_row("hop", *_hop(found.hop))
    for name, one in (("workers", found.workers), ("shards", found.shards)):
        if one is not None:
            table.add_row(
                name, _load(one), f"{_headline(name, one)}\n{_side(one.first)}\n{_side(one.second)}"
            )
    for name, storm in (("storm", found.storm), ("kill", found.kill)):
        if storm is not None:
            table.add_row(name, *_storm(storm))
    if found.costs is not None:
        table.add_row("costs", *_costs(found.costs))
    if found.idle is not None:
        idle = found.idle
        cpu = "  ".join(f"{kind} {value:.1f}" for kind, value in idle.cpu_us.items())
        table.add_row(
            "idle",
            f"{idle.devices:,} devices that only listen, {idle.seconds:.0f} s",
            f"CPU {cpu} µs a second for each device\n"
            f"Redis {idle.redis_calls:.3f} calls, MongoDB {idle.mongo_requests:.4f} requests a second for each",
        )
    if found.disk is not None:
        kept = found.disk
        table.add_row(
            "disk",
            f"{kept.messages:,} messages that wait for one device each, and as many fates",
            f"on disk with indexes: a message [bold]{kept.message:,.0f} bytes[/bold] (document {kept.document:,.0f}), "
            f"a fate [bold]{kept.fate:,.0f} bytes[/bold]\noplog: {kept.oplog:,.0f} bytes a message, uncompressed",
        )
    screen.out.print(table)
    if found.shards is not None:
        screen.out.print(
            "The forwarders are the tests' stand-in for a router (mongos) and are not counted; the router's own work is done by the "
            "shards, and is."
        )
    for goal in found.goals:
        text = f"{'met   ' if goal.met else 'missed'}  {goal.name}: {goal.found} (goal {goal.wanted})"
        screen.out.print(Text(text, style="green" if goal.met else "yellow"))
    screen.checks([check for check in found.checks if not check.ok])
    for line in found.relay_log[:5]:
        screen.out.print(Text(f"relay's log: {line[:300]}", style="yellow"))
    if found.ok:
        screen.out.print(Text(f"ok      all {len(found.checks)} checks: nothing lost or left", style="green"))


def _costs(costs: Costs) -> tuple[str, str]:
    points = "\n".join(
        f"{point.name} at {point.rate:,.0f}/s: {point.mongo_requests:.3f} requests, {point.publications:.3f} publications; "
        f"relay {point.relay:.0f}, mongod {point.mongod:.0f}, valkey {point.valkey:.0f} µs a message"
        for point in costs.points
    )
    return "one node, and two with sender and recipient apart, at several rates, in turn", (
        f"{points}\n[bold]relay[/bold]: {costs.relay_message:.0f} µs a message, {costs.relay_request:.0f} a request of MongoDB, "
        f"{costs.relay_remote:.0f} a message to another node, {costs.relay_publication:.0f} a publication\n"
        f"[bold]mongod[/bold]: {costs.mongod_message:.0f} µs a message, {costs.mongod_request:.0f} a request\n"
        f"[bold]valkey[/bold]: {costs.valkey_publication:.0f} µs a publication, with its look-up"
    )


def _load(one: Compared) -> str:
    loop = f"window of {one.window}" if one.asked_rate is None else f"open loop, {one.asked_rate:,.0f}/s"
    return f"{one.pairs} pairs, {loop}, {one.rounds} times {one.seconds:g} s each, in turn"


def _headline(name: str, one: Compared) -> str:
    if name == "workers":
        return f"[bold]{one.ratio:.2f}[/bold] of the messages/s, {one.cpu_ratio:.2f} times the CPU of everything a message"
    return f"[bold]{one.ratio:.2f}[/bold] times the CPU of relay and mongod"


def _hop(one: Hop) -> tuple[str, str]:
    def times(name: str, its: Sequence[Percentiles]) -> str:
        return f"{name}: p50 {' '.join(f'{one.p50:.1f}' for one in its)}  p99 {' '.join(f'{one.p99:.1f}' for one in its)} ms"

    load = (
        f"{one.pairs} pairs, half of them at one node and half at two, open loop, {one.asked_rate:,.0f}/s, "
        f"{one.rounds} times {one.seconds:g} s"
    )
    return load, (
        f"[bold]{one.more_p50:+.1f} ms[/bold] median, {one.more_p99:+.1f} ms at 99 %\n{times('same node', one.same)}\n"
        f"{times('another node', one.another)}\n{_side(one.run)}"
    )


def _side(side: Side) -> str:
    rounds = " ".join(f"{rate:,.0f}" for rate in side.rates)
    cpu = "  ".join(f"{kind} {value:.0f}" for kind, value in side.cpu_us.items())
    late = f", [red]{side.late:,} due and not sent[/red]" if side.late else ""
    late += f", [yellow]{side.again:,} delivered again[/yellow]" if side.again else ""
    lines = [
        f"[bold]{side.name}[/bold]: {rounds} messages/s, p50 {side.p50:.1f}  p99 {side.p99:.1f} ms{late}",
        f"  CPU {cpu} µs a message",
    ]
    if len(side.processes) > len(side.cpu_us):
        each = "  ".join(f"{name} {value:.0f}" for name, value in sorted(side.processes.items()))
        lines.append(f"  each: {each}")
    if side.use.redis_in:
        use = side.use
        lines.append(
            f"  Redis a message: {use.redis_lookups:.3f} calls to the directory, {use.redis_publications:.3f} publications, "
            f"{use.redis_in:,.0f} bytes in, {use.redis_out:,.0f} out"
        )
    return "\n".join(lines)


def _storm(one: Storm) -> tuple[str, str]:
    how = "after kill -9 of their node, to the other" if one.killed else "to two nodes"
    load = (
        f"{one.devices:,} devices at once {how}, {one.messages} messages wait for each; "
        f"{one.asked_rate:,.0f} messages/s of others"
    )
    came = one.came
    cpu = "  ".join(f"{name} {seconds:.2f}" for name, seconds in one.cpu.items())
    again = f", {came.again:,} connections tried again" if came.again else ""
    late = f"\n[red]{one.late:,} due and not sent[/red]" if one.late else ""
    late += f"\n[yellow]{one.again:,} delivered again[/yellow]" if one.again else ""
    return load, (
        f"[bold]{came.seconds:.1f} s[/bold] until all had drained{again}\n"
        f"connected p50 {came.connected_ms.p50:,.0f}  p99 {came.connected_ms.p99:,.0f} ms, "
        f"drained p50 {came.drained_ms.p50:,.0f}  p99 {came.drained_ms.p99:,.0f} ms\n"
        f"others: p50 {one.before_ms.p50:.1f} to {one.during_ms.p50:.1f}, p99 {one.before_ms.p99:.1f} to "
        f"{one.during_ms.p99:.1f} ms: [bold]{one.ratio_p99:.1f}[/bold] times{late}\n"
        f"CPU {cpu} s"
    )
