"""What people see: progress while it runs, tables at the end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Final

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from scripts.tools.bench.limit import Limit
    from scripts.tools.bench.live import Live
    from scripts.tools.bench.memory import Idle, Soak

_PLAIN_SECONDS: Final = 5.0
_MEGABYTE: Final = 1_000_000

Show = Callable[[str], None]


class Check(msgspec.Struct, frozen=True):
    """Something that must be true after a run."""

    name: str
    ok: bool
    found: str

    @classmethod
    def that(cls, name: str, ok: bool, found: str) -> Check:
        """A checked fact with what was found."""
        return cls(name, ok, found)


class Screen:
    """Progress goes to standard error; tables to standard output, unless the JSON goes there."""

    def __init__(self, *, json_on_stdout: bool) -> None:
        self._progress = Console(stderr=True, highlight=False)
        self.out = self._progress if json_on_stdout else Console(highlight=False)

    @contextlib.contextmanager
    def working(self, doing: str) -> Iterator[Show]:
        """Shows what is going on: a line that changes on terminals, else a plain line every 5 s at most."""
        if self._progress.is_terminal:
            with self._progress.status(doing) as status:
                yield status.update
            return
        print(doing, file=sys.stderr, flush=True)
        last = monotonic()

        def show(text: str) -> None:
            nonlocal last
            if monotonic() - last >= _PLAIN_SECONDS:
                last = monotonic()
                print(text, file=sys.stderr, flush=True)

        yield show

    def limit(self, found: Limit) -> None:
        """The raw cycle."""
        table = _table("MongoDB's raw cycle: insert and delete")
        _limit_rows(table, found)
        self.out.print(table)

    def live(self, found: Live, title: str = "Live traffic, one to one") -> None:
        """A live run and its checks."""
        table = _table(title)
        loop = (
            f"window of {found.window}"
            if found.asked_rate is None
            else f"open loop, {found.asked_rate:,.0f}/s asked"
        )
        table.add_row("load", f"{found.pairs} pairs, {found.size} bytes, {loop}, {found.seconds:.1f} s")
        table.add_row("messages/s", f"[bold]{found.rate:,.0f}[/bold]")
        if found.late:
            table.add_row("due and not sent", f"[red]{found.late:,}[/red]")
        for limit in found.limits:
            _limit_rows(table, limit)
        if found.ratio is not None:
            note = (
                ""
                if found.steady
                else "  [yellow](the raw cycle moved by more than a fifth: unreliable)[/yellow]"
            )
            table.add_row("ratio to the raw cycle", f"[bold]{found.ratio:.2f}[/bold]{note}")
        for name, times in (("delivered after", found.delivered_ms), ("stored after", found.stored_ms)):
            text = f"p50 {times.p50:.1f}  p90 {times.p90:.1f}  p99 {times.p99:.1f}  p99.9 {times.p999:.1f}  max {times.max:.1f} ms"
            table.add_row(name, text)
        table.add_row("CPU per message", _cpu(found.cpu_us))
        table.add_row("cores busy", _cores(found.cores))
        table.add_row("messages in a frame", f"{found.per_frame:.1f}")
        for queue, commits in found.commits.items():
            table.add_row(
                f"commits of {queue}",
                f"{commits.groups:,}, {commits.items:.0f} items and {commits.ms:.1f} ms on average",
            )
        if found.relay_rss:
            table.add_row(
                "relay's memory", "  ".join(f"{name} {_mb(size)}" for name, size in found.relay_rss.items())
            )
        self.out.print(table)
        self.checks(found.checks)
        for line in found.relay_log[:5]:
            self.out.print(Text(f"relay's log: {line[:300]}", style="yellow"))

    def idle(self, found: Idle) -> None:
        """Idle connections."""
        table = _table("Idle connections")
        table.add_row(
            "connections", f"{found.connections:,}, at {found.connects_per_second:,.0f}/s (new devices)"
        )
        table.add_row("relay's memory", f"{_mb(found.rss_before)} before, {_mb(found.rss_after)} after")
        table.add_row("each", f"[bold]{found.bytes_per_connection / 1000:.1f} kB[/bold]")
        self.out.print(table)
        self.checks(found.checks)

    def soak(self, found: Soak) -> None:
        """Memory over many messages."""
        self.live(found.live, "Live traffic, at length")
        growth = "unknown" if found.growth_percent is None else f"{found.growth_percent:+.1f} %"
        self.out.print(f"relay's memory since {found.mark:,} messages: [bold]{growth}[/bold]")

    def checks(self, checks: list[Check]) -> None:
        """What must be true, and whether it was."""
        for check in checks:
            if check.ok:
                self.out.print(Text(f"ok      {check.name} ({check.found})", style="green"))
            else:
                self.out.print(Text(f"FAILED  {check.name}: {check.found}", style="bold red"))


def write_json(result: msgspec.Struct, target: str, directory: Path) -> None:
    """Writes a result for machines; ``-`` is standard output, a relative path counts from ``directory``. Raises OSError."""
    text = msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n"
    if target == "-":
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
    else:
        (directory / target).write_bytes(text)


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _limit_rows(table: Table, found: Limit) -> None:
    how = f"{found.cycles} cycles of {found.batch} under way, {found.size} bytes, {found.seconds:.1f} s"
    table.add_row("raw cycle/s", f"{found.rate:,.0f}  ({how})")
    table.add_row("", f"{_cpu(found.cpu_us)}  (cores busy: {_cores(found.cores)})")


def _cpu(by_process: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.1f} µs" for name, value in by_process.items())


def _cores(by_process: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.2f}" for name, value in by_process.items())


def _mb(size: int) -> str:
    return f"{size / _MEGABYTE:.1f} MB"
