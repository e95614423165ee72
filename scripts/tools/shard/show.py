"""How a cluster looks to operators."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scripts.tools.admin.show import printable, table
from scripts.tools.shard.findings import Finding
from scripts.tools.shard.layout import Cluster, Found, Held, share

_COLUMNS: Final = (
    *("collection", "sharded by", "shard"),
    *("ranges", "conversations", "documents", "size", "to be removed"),
)
_FIRST_NUMBER: Final = 3


def cluster(found: Cluster, said: Sequence[Finding], *, ranges: bool) -> None:
    """All of it: shards, collections by shard, zones, what there is to do."""
    heading(f"{found.database}, on {_number(len(found.shards), 'shard')} of MongoDB {found.version}")
    balancer = {"off": "off", "moving": "on, moving a range"}.get(found.balancer, "on")
    rest = (
        "there is no database yet"
        if found.primary is None
        else f"what is not sharded lies on {found.primary}"
    )
    print(f"balancer: {balancer}; {printable(rest)}")
    heading("\nshards")
    rows = [
        [shard.name, shard.host, "being removed" if shard.draining else "takes data", " ".join(shard.zones)]
        for shard in found.shards
    ]
    table(("shard", "servers", "state", "zones"), rows, empty="there are none")
    heading("\ncollections")
    _numbers(_COLUMNS, [row for one in found.collections for row in _collection(found, one)])
    zones = [
        [one.wanted.name, zoned.zone, zoned.span, " ".join(sorted(found.in_zone(zoned.zone))) or "no shard"]
        for one in found.collections
        for zoned in one.zones
    ]
    if zones:
        heading("\nzones")
        table(("collection", "zone", "range", "shards"), zones, empty="")
    if ranges:
        heading("\nranges")
        table(
            ("collection", "range", "shard"),
            [[one.wanted.name, row.span, row.shard] for one in found.collections for row in one.ranges],
            empty="nothing is sharded",
        )
    heading("")
    if not any(one.wrong for one in said):
        _colored("everything is as it should be", "green")
    for one in said:
        _colored(f"{'wrong' if one.wrong else 'note'}: {one.what}", "red" if one.wrong else "yellow")
        print(f"  {'do' if one.wrong else 'if need be'}: {printable(one.do)}")


def as_value(found: Cluster, said: Sequence[Finding]) -> dict[str, Any]:
    """The same for machines. Bounds are text; null is the end of the range."""
    return {
        "database": found.database,
        "version": found.version,
        "primary": found.primary,
        "balancer": found.balancer,
        "shards": [
            {
                "name": shard.name,
                "servers": shard.host,
                "zones": list(shard.zones),
                "removing": shard.draining,
            }
            for shard in found.shards
        ],
        "collections": {
            one.wanted.name: {
                "namespace": one.wanted.namespace,
                "key": None if one.key is None else dict(one.key),
                "shards": {
                    name: {
                        "ranges": sum(row.shard == name for row in one.ranges),
                        "share": _share(one, name),
                        "documents": None if held is None else held.documents,
                        "bytes": None if held is None else held.size,
                        "toBeRemoved": None if held is None else held.orphans,
                    }
                    for name, held in _by_shard(found, one)
                },
                "ranges": [
                    {"min": _end(row.span.low), "max": _end(row.span.high), "shard": row.shard}
                    for row in one.ranges
                ],
                "zones": [
                    {"min": _end(zoned.span.low), "max": _end(zoned.span.high), "zone": zoned.zone}
                    for zoned in one.zones
                ],
            }
            for one in found.collections
        },
        "findings": [{"wrong": one.wrong, "what": one.what, "do": one.do} for one in said],
    }


def heading(text: str) -> None:
    """A line above something."""
    if sys.stdout.isatty():
        Console(highlight=False).print(Text(printable_lines(text), style="bold"))
    else:
        print(printable_lines(text))


def printable_lines(text: str) -> str:
    """Like ``printable``, and may begin with a line break."""
    return "\n".join(map(printable, text.split("\n")))


def _numbers(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table whose columns from the fourth on are numbers."""
    if not sys.stdout.isatty():
        table(columns, rows, empty="")
        return
    found = Table(box=None, header_style="bold", pad_edge=False)
    for place, name in enumerate(columns):
        found.add_column(name, justify="left" if place < _FIRST_NUMBER else "right", overflow="fold")
    for row in rows:
        found.add_row(*("" if value is None else Text(printable(str(value))) for value in row))
    Console(highlight=False).print(found)


def _colored(text: str, color: str) -> None:
    if sys.stdout.isatty():
        Console(highlight=False).print(Text(printable(text), style=color))
    else:
        print(printable(text))


def _collection(found: Cluster, one: Found) -> list[list[Any]]:
    rows: list[list[Any]] = []
    piped = not sys.stdout.isatty()
    for name, held in _by_shard(found, one):
        part = _share(one, name)
        rows.append(
            [
                "" if rows and not piped else one.wanted.name,
                "" if rows and not piped else ("not sharded" if one.key is None else ", ".join(one.key)),
                name,
                sum(row.shard == name for row in one.ranges) if one.key is not None else None,
                None if part is None else f"{part:.1%}",
                "?" if held is None else f"{held.documents:,}",
                "?" if held is None else _size(held.size),
                f"{held.orphans:,}" if held is not None and held.orphans else None,
            ]
        )
    return rows


def _by_shard(found: Cluster, one: Found) -> list[tuple[str, Held | None]]:
    nothing = Held(0, 0, 0)
    if one.key is None:
        names = [found.primary or "none"]
    else:
        names = [shard.name for shard in found.shards]
    return [(name, None if one.held is None else one.held.get(name, nothing)) for name in names]


def _share(one: Found, shard: str) -> float | None:
    if not one.wanted.spread or not one.is_right:
        return None
    return round(share(row.span for row in one.ranges if row.shard == shard), 6)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _end(bound: Any) -> str | None:
    return bound if isinstance(bound, str) else None


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
