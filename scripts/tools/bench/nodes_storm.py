"""Many devices that come back at once, to two nodes or to the one that is left, while others talk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Final

import aiohttp

from scripts.tools.bench.messages import Measured, Progress
from scripts.tools.bench.nodes_options import Options
from scripts.tools.bench.nodes_results import Storm
from scripts.tools.bench.processes import spent, usages
from scripts.tools.bench.relay_metrics import Scrape
from scripts.tools.bench.report import Check, Show
from scripts.tools.bench.sites import Site, account, read
from scripts.tools.bench.stage import LoadGenerator, load_generator
from scripts.tools.bench.storm_calls import Devices

_MOST_STORM_SECONDS: Final = 150.0


async def storm(two: Site, crowd: Devices, options: Options, show: Show, *, kill: bool) -> Storm:
    """``crowd`` is assembled and not connected. With ``kill`` the second node is killed, with all who come back on it. Raises BenchError
    and what the HTTP client, MongoDB and Redis raise."""
    name = "kill" if kill else "storm"
    ports = two.ports
    async with aiohttp.ClientSession() as http:
        await crowd.come(senders=True, ports=ports[:1] if kill else ports, at_once=64)
        if kill:
            show(f"{name}: {options.devices:,} devices connect to the node that is to die")
            await crowd.come(senders=False, ports=ports[1:], at_once=64)
            # Nobody's messages but those of the devices that come back go by the node that dies.
            two.dead.add(two.nodes[1].pid)
        before = (await read(two, http)).scrapes
        if not kill:
            await crowd.post(options.messages)
        return await _storm(two, crowd, options, http, before, show, kill=kill)


async def _storm(
    two: Site,
    crowd: Devices,
    options: Options,
    http: aiohttp.ClientSession,
    before: Sequence[Scrape],
    show: Show,
    *,
    kill: bool,
) -> Storm:
    name = "kill" if kill else "storm"
    dying = two.nodes[1]
    order = two.order(
        placement="mixed",
        pairs=max(1, options.pairs // 2),
        size=options.size,
        warmup=options.warmup,
        seconds=options.calm + _MOST_STORM_SECONDS,
        rate=options.storm_rate,
        phases=3 if kill else 2,
    )
    async with load_generator(order) as load:
        while not isinstance(news := await load.news(), Progress) or not news.warm:
            show(f"{name}: others begin to talk")
        following = asyncio.create_task(_measured(load), name="news")
        try:
            show(f"{name}: others talk for {options.calm:g} s")
            await asyncio.sleep(options.calm)
            if kill:
                # Its own phase: what is sent meanwhile belongs neither to the calm nor to the storm.
                load.end_phase()
                await _hang_and_die(dying.pid, crowd, options.messages)
            show(f"{name}: {options.devices:,} devices connect at once")
            load.end_phase()
            used = usages(two.pids)
            came = await crowd.come(senders=False, ports=two.ports, at_once=options.at_once)
            cpu = spent(used, usages(two.pids))
            load.end_phase()
            measured = await following
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        settled = await crowd.settle()
        counts, checks = await account(two, http, before, load, others=settled.delivered)
    wanted = options.devices * options.messages
    checks += [
        Check.that(
            "all that waited came",
            settled.delivered == came.messages == wanted and not settled.missing and not settled.unknown,
            f"{settled.delivered:,} of {wanted:,} came, {came.messages:,} drained, {settled.missing:,} missing, "
            f"{settled.repeated:,} again, {settled.unknown:,} unknown",
        ),
        Check.that(
            "no device was refused or lost its connection",
            not settled.failed and not settled.closed,
            f"{settled.failed:,} refused, {settled.closed:,} lost"
            + "".join(f"; {text}" for text in settled.errors),
        ),
    ]
    calm, *_, stormy = measured.phases_ms
    return Storm(
        killed=kill,
        devices=options.devices,
        messages=options.messages,
        asked_rate=options.storm_rate,
        came=came,
        before_ms=calm,
        during_ms=stormy,
        ratio_p99=stormy.p99 / max(calm.p99, 1e-9),
        again=counts.repeated + settled.repeated,
        late=measured.late,
        cpu={process: seconds for process, seconds in cpu.items() if process not in ("bench", "others")},
        checks=[Check(f"{name}: {check.name}", check.ok, check.found) for check in checks],
    )


async def _hang_and_die(pid: int, crowd: Devices, messages: int) -> None:
    """What is sent while a node hangs waits for the devices that are connected to it."""
    os.kill(pid, signal.SIGSTOP)
    try:
        await crowd.post(messages)
        await crowd.lose(pid)
    except BaseException:
        # It would not hear that it is to end.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise


async def _measured(load: LoadGenerator) -> Measured:
    while not isinstance(found := await load.news(), Measured):
        pass
    return found
