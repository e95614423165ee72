"""One message for many devices: how fast, how many, at what cost, and what it does to others. Each scenario has a relay of
its own on the same mongod, and every delivery is accounted for at its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from scripts.tools.bench import fanout_results, live
from scripts.tools.bench import limit as raw
from scripts.tools.bench.crowd_messages import Settled
from scripts.tools.bench.crowds import Venue, Window, venue
from scripts.tools.bench.fanout_results import (
    Comparison,
    Fanout,
    Huge,
    Latency,
    Neighbours,
    Reconnect,
    Sustained,
)
from scripts.tools.bench.limit import Limit
from scripts.tools.bench.messages import Counted, Measured
from scripts.tools.bench.processes import spent, usages
from scripts.tools.bench.report import Check, Screen, Show
from scripts.tools.bench.stage import BenchError, load_generator, raise_file_limit


class Scenario(StrEnum):
    """What can be measured."""

    LATENCY = "latency"
    SUSTAINED = "sustained"
    INLINE = "inline"
    HUGE = "huge"
    NEIGHBOURS = "neighbours"
    RECONNECT = "reconnect"


_STEADY: Final = 1.2
# So that the acknowledgements of one message are mostly committed before the next is timed.
_PAUSE: Final = 0.1
_HUGE_MESSAGES: Final = 10
_SPARE_FILES: Final = 300
_PREFIX: Final = "RELAY_"


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for. ``devices`` are the recipients of a large group, ``huge_devices`` those of the huge one, of which
    ``online`` are connected. ``compare`` is a setting, NAME=VALUE, with which ``reconnect`` is run once more."""

    scenarios: Sequence[Scenario] = tuple(Scenario)
    devices: int = 1000
    messages: int = 50
    senders: int = 4
    window: int = 4
    inline_groups: int = 16
    inline_devices: int = 64
    huge_devices: int = 10_000
    online: int = 1000
    pairs: int = 50
    rate: float = 200
    seconds: float = 10
    warmup: float = 3
    size: int = 200
    limit_seconds: float = 10
    compare: str | None = None
    mongo_uri: str | None = None


async def run(options: Options, screen: Screen) -> Fanout:
    """Everything that was asked for. Raises BenchError and what mongod and the driver raise."""
    compare = _setting(options.compare)
    widest = max(options.devices, options.inline_groups * (options.inline_devices + 1), options.online)
    raise_file_limit(widest + 2 * options.pairs + _SPARE_FILES)
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-")))
        uri, mongo_pids = await stack.enter_async_context(live.database(options.mongo_uri, directory))
        work = _Work(options, screen, uri, {"bench": os.getpid(), **mongo_pids}, directory)
        limits = await work.raw_cycle()
        chosen = options.scenarios
        latency = await work.latency() if Scenario.LATENCY in chosen else None
        sustained = await work.sustained() if Scenario.SUSTAINED in chosen else None
        inline = await work.inline() if Scenario.INLINE in chosen else None
        huge = await work.huge() if Scenario.HUGE in chosen else None
        neighbours = await work.neighbours() if Scenario.NEIGHBOURS in chosen else None
        reconnect = []
        if Scenario.RECONNECT in chosen:
            reconnect.append(await work.reconnect(None))
            if compare is not None:
                reconnect.append(await work.reconnect(compare))
        limits += await work.raw_cycle()
    rates = [limit.rate for limit in limits]
    mean = sum(rates) / len(rates) if rates else None
    checks: list[Check] = []
    for one in (latency, sustained, inline, huge, neighbours, *reconnect):
        checks += [] if one is None else one.checks
    return Fanout(
        ok=all(check.ok for check in checks),
        limits=limits,
        raw_rate=mean,
        steady=max(rates) <= min(rates) * _STEADY if rates else None,
        latency=latency,
        sustained=_to_raw(sustained, mean),
        inline=_to_raw(inline, mean),
        huge=huge,
        neighbours=neighbours,
        reconnect=reconnect,
        compared=_compared(reconnect),
        goals=fanout_results.goals(latency, sustained, inline, huge, neighbours),
        checks=checks,
        relay_log=work.relay_log,
    )


def _setting(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    name, equals, value = text.partition("=")
    if not equals or not name.startswith(_PREFIX) or name == _PREFIX:
        raise BenchError(f"--compare {text}: give a setting of the relay, as in RELAY_NAME=VALUE")
    return name, value


def _to_raw(run: Sustained | None, raw_rate: float | None) -> Sustained | None:
    if run is None or not raw_rate:
        return run
    return msgspec.structs.replace(run, ratio=run.measured.rate / raw_rate)


def _compared(runs: list[Reconnect]) -> Comparison | None:
    if len(runs) < 2:
        return None
    plain, other = runs
    return Comparison(
        setting=other.setting or "",
        seconds_ratio=other.seconds / max(plain.seconds, 1e-9),
        cpu_ratio=other.cost / max(plain.cost, 1e-9),
    )


@dataclass(frozen=True, slots=True)
class _Work:
    options: Options
    screen: Screen
    uri: str
    pids: dict[str, int]
    directory: Path
    relay_log: list[str] = field(default_factory=list)

    async def raw_cycle(self) -> list[Limit]:
        """Half of the time that was asked for."""
        if not self.options.limit_seconds:
            return []
        how = live.Options(size=self.options.size, cycles=raw.CYCLES_IN_FLIGHT)
        seconds = self.options.limit_seconds / 2
        return [await live.measure_limit(how, self.uri, self.pids, seconds, self.screen)]

    @contextlib.asynccontextmanager
    async def _venue(
        self, sizes: Sequence[int], settings: Mapping[str, str] | None = None
    ) -> AsyncIterator[Venue]:
        async with venue(self.uri, self.pids, self.directory, sizes, self.options.size, settings) as place:
            try:
                yield place
            finally:
                self.relay_log.extend(place.node.complaints)

    async def latency(self) -> Latency:
        """One message at a time, everybody connected."""
        options = self.options
        with self.screen.working(f"latency: a group of {options.devices:,}") as show:
            async with self._venue([options.devices + 1]) as place:
                await place.enter(0, options.devices + 1)
                show(f"latency: {options.messages} messages to {options.devices:,} devices")
                said = await place.say(options.messages, _PAUSE)
                checks = _named("latency", await place.account(await place.stop()))
        return Latency(devices=options.devices, said=said, checks=checks)

    async def sustained(self) -> Sustained:
        """A few senders of one large group."""
        options = self.options
        return await self._loop("sustained", 1, options.devices, options.senders, options.window)

    async def inline(self) -> Sustained:
        """Many groups that are small enough for one document a message; one sender each."""
        options = self.options
        return await self._loop("inline", options.inline_groups, options.inline_devices, 1, options.window)

    async def _loop(self, name: str, groups: int, devices: int, senders: int, window: int) -> Sustained:
        options = self.options
        with self.screen.working(f"{name}: {groups} groups of {devices:,}") as show:
            async with self._venue([devices + 1] * groups) as place:
                await place.enter(0, groups * (devices + 1))
                await place.talk(senders, window)
                measured = await place.window(options.warmup, options.seconds, show, name)
                show(f"{name}: waiting for what is under way")
                settled = await place.stop()
                checks = _named(name, await place.account(settled))
        return Sustained(
            groups=groups,
            devices=devices,
            senders=senders,
            window=window,
            measured=measured,
            per_frame=settled.per_frame,
            reached_ms=settled.reached_ms,
            checks=checks,
        )

    async def huge(self) -> Huge:
        """Most of them are away: what waits for them is accounted for."""
        options = self.options
        online = min(options.online, options.huge_devices)
        with self.screen.working(f"huge: making a group of {options.huge_devices:,}") as show:
            async with self._venue([options.huge_devices + 1]) as place:
                await place.enter(0, online + 1)
                show(
                    f"huge: {_HUGE_MESSAGES} messages to {options.huge_devices:,} devices, {online:,} connected"
                )
                said = await place.say(_HUGE_MESSAGES, _PAUSE)
                show("huge: accounting for what waits")
                checks = await place.account(await place.stop(), absent=options.huge_devices - online)
        return Huge(devices=options.huge_devices, online=online, said=said, checks=_named("huge", checks))

    async def neighbours(self) -> Neighbours:
        """One-to-one traffic in an open loop, alone and beside a large group."""
        options = self.options
        with self.screen.working("neighbours: one-to-one traffic alone") as show:
            async with self._venue([options.devices + 1]) as place:
                await place.enter(0, options.devices + 1)
                alone, first = await self._pairs(place, asyncio.Event())
                show(f"neighbours: beside a group of {options.devices:,} at full rate")
                connected = asyncio.Event()
                async with asyncio.TaskGroup() as both:
                    pairs = both.create_task(self._pairs(place, connected), name="pairs")
                    talking = both.create_task(self._beside(place, connected, show), name="large group")
                (beside, second), (group, settled) = pairs.result(), talking.result()
                others = first.delivered + second.delivered
                checks = [*_pair_checks([first, second]), *await place.account(settled, others=others)]
        before, after = alone.delivered_ms, beside.delivered_ms
        return Neighbours(
            asked_rate=options.rate,
            devices=options.devices,
            alone_ms=before,
            beside_ms=after,
            ratio_p50=_ratio(after.p50, before.p50),
            ratio_p99=_ratio(after.p99, before.p99),
            late=beside.late,
            group=group,
            checks=_named("neighbours", checks),
        )

    async def _beside(self, place: Venue, connected: asyncio.Event, show: Show) -> tuple[Window, Settled]:
        options = self.options
        await connected.wait()
        await place.talk(options.senders, options.window)
        window = await place.window(options.warmup, options.seconds, show, "neighbours")
        # At once: the pairs have a few seconds only for what is still under way.
        return window, await place.stop()

    async def _pairs(self, place: Venue, connected: asyncio.Event) -> tuple[Measured, Counted]:
        options = self.options
        how = live.Options(
            pairs=options.pairs,
            rate=options.rate,
            seconds=options.seconds,
            warmup=options.warmup,
            size=options.size,
        )
        async with load_generator(live.make_order(place.target, how)) as load:
            while not isinstance(measured := await load.news(), Measured):
                connected.set()
            load.dismiss()
            counted = await load.news()
        if not isinstance(counted, Counted):
            raise BenchError("the load generator did not tell its counts")
        return measured, counted

    async def reconnect(self, setting: tuple[str, str] | None) -> Reconnect:
        """Everybody comes back to the same messages."""
        options = self.options
        doing = "reconnect" if setting is None else f"reconnect with {'='.join(setting)}"
        settings = None if setting is None else dict([setting])
        with self.screen.working(f"{doing}: {options.messages} messages while everybody is away") as show:
            async with self._venue([options.devices + 1], settings) as place:
                await place.enter(0, 1)
                await place.say(options.messages, 0)
                show(f"{doing}: {options.devices:,} devices connect")
                before = usages(place.pids)
                entered = await place.enter(1, options.devices)
                cpu = spent(before, usages(place.pids))
                checks = await place.account(await place.stop())
        wanted = options.messages * options.devices
        drained = f"{entered.messages:,} of {wanted:,}"
        checks.append(Check.that("all that waited was drained", entered.messages == wanted, drained))
        return Reconnect(
            devices=options.devices,
            messages=options.messages,
            setting=None if setting is None else "=".join(setting),
            seconds=entered.seconds,
            cpu={name: used for name, used in cpu.items() if name != "bench"},
            checks=_named(doing, checks),
        )


def _pair_checks(runs: Sequence[Counted]) -> list[Check]:
    sent, delivered = sum(run.sent for run in runs), sum(run.delivered for run in runs)
    bad = sum(run.repeated + run.unknown + run.failed + run.closed for run in runs)
    reasons = "".join(f"; {text}" for run in runs for text in run.errors)
    return [
        Check.that(
            "every one-to-one message was delivered exactly once",
            bool(sent) and sent == delivered and not bad,
            f"{delivered:,} of {sent:,}{reasons}",
        )
    ]


def _named(scenario: str, checks: Sequence[Check]) -> list[Check]:
    return [Check(f"{scenario}: {check.name}", check.ok, check.found) for check in checks]


def _ratio(after: float, before: float) -> float:
    return after / before if before else 0.0
