"""``scripts/scaling``: works out from measured costs what larger installations take, and keeps docs/scaling.md true to it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from scripts.tools.scaling_inputs import FILE, InputError, Inputs, Lever, load
from scripts.tools.scaling_model import UNDIVIDED, Plan, plan, predicted

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
BEGIN: Final = "<!-- from scripts/scaling; do not edit -->"
END: Final = "<!-- end of scripts/scaling -->"
_UNITS: Final = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table as people see it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that was worked out. ``pulled`` has the last stage with each lever; ``sizes`` those between, as it stands and with
    the lever that carries the last; ``without`` the last with that lever, but without a part of it, by the part's name."""

    inputs: Inputs
    plans: Sequence[Plan]
    pulled: Sequence[Plan]
    sizes: Sequence[tuple[Plan, Plan]]
    without: Sequence[tuple[str, Plan]]


def work_out(inputs: Inputs) -> Result:
    """All stages, and all levers at the last one. Raises InputError."""
    last = inputs.stages[-1]
    carrying = [lever for lever in inputs.levers if lever.carries]
    carried = inputs.pulled(carrying[0]) if carrying else inputs
    return Result(
        inputs,
        [plan(inputs, stage) for stage in inputs.stages],
        [plan(inputs.pulled(lever), last) for lever in inputs.levers],
        [(plan(inputs, stage), plan(carried, stage)) for stage in inputs.between],
        [
            (lever.name, plan(carried.changed({name: inputs[name] for name in lever.values}), last))
            for lever in inputs.levers
            if _is_part(lever, carrying)
        ],
    )


def _is_part(lever: Lever, carrying: Sequence[Lever]) -> bool:
    return any(lever.values and lever.values.items() < whole.values.items() for whole in carrying)


def rounded(value: float) -> str:
    """Two digits, with thousands as people write them."""
    if value == 0:
        return "0"
    digits = float(f"{value:.2g}")
    return f"{digits:,.0f}" if digits >= 10 else f"{digits:g}"


def sized(value: float) -> str:
    """Bytes, or bytes a second, in two digits."""
    for factor, name in _UNITS:
        if value >= factor:
            return f"{rounded(value / factor)} {name}B"
    return f"{rounded(value)} B"


_ROWS: Final[Sequence[tuple[str, Callable[[Plan], str]]]] = (
    ("devices", lambda one: f"{one.stage.devices:,}"),
    ("connected", lambda one: f"{one.stage.connected:,}"),
    ("messages/s, at the busiest", lambda one: f"{one.stage.messages:,.0f}"),
    ("deliveries/s", lambda one: rounded(one.deliveries)),
    ("**relay nodes** (processes, a core each)", lambda one: f"**{one.nodes:,}**"),
    (
        "devices connected to a node · its memory",
        lambda one: f"{rounded(one.node_connections)} · {sized(one.node_memory)}",
    ),
    ("messages in a group commit", lambda one: rounded(one.send_group)),
    ("calls of MongoDB a message", lambda one: rounded(one.requests)),
    (
        "CPU of relays: µs a message · cores",
        lambda one: f"{rounded(one.relay_us)} · {rounded(one.relay_cores)}",
    ),
    ("**shards** (replica sets)", lambda one: f"**{one.shards:,}**"),
    (
        "CPU of primaries: µs a message · cores",
        lambda one: f"{rounded(one.mongod_us)} · {rounded(one.mongod_cores)}",
    ),
    ("connections to MongoDB, at most", lambda one: f"{one.mongo_connections:,}"),
    ("**Redis servers** (a core each)", lambda one: f"**{one.redis:,}**"),
    (
        "CPU of Redis in cores · memory of the directory",
        lambda one: f"{rounded(one.redis_cores)} · {sized(one.redis_memory)}",
    ),
    (
        "publications: a message · a second",
        lambda one: f"{rounded(one.publications_each)} · {rounded(one.publications)}",
    ),
    (
        "channel `all`: published · handed out a second · cores of its one server",
        lambda one: " · ".join(map(rounded, (one.told, one.told_all, one.channel_cores))),
    ),
    ("confirmations of changes a second", lambda one: rounded(one.confirmations)),
    (
        "recipients that are not known: share of questions · conversations in one",
        lambda one: f"{one.miss_share:.0%} · {rounded(one.round_conversations)}",
    ),
    (
        "control collections: calls a second · cores of the primary shard",
        lambda one: f"{rounded(one.control_calls)} · {rounded(one.control_cores)}",
    ),
    ("cores of each shard for what all are asked", lambda one: rounded(one.each_shard_cores)),
    (
        "network: devices · Redis · MongoDB, a second",
        lambda one: " · ".join(map(sized, (one.device_network, one.redis_network, one.mongo_network))),
    ),
    ("messages that wait", lambda one: rounded(one.kept_messages)),
    ("disk of one replica of all shards: messages that wait", lambda one: sized(one.kept_disk)),
    ("… fates", lambda one: sized(one.fates_disk)),
    ("… oplog of a day, uncompressed", lambda one: sized(one.oplog_disk)),
    ("… messages, if nobody fetched any for 30 days", lambda one: sized(one.kept_most_disk)),
    ("**more machines suffice**", lambda one: "**yes**" if not one.broken else f"**no**: {_over(one)}"),
)


def sheets(result: Result) -> list[Sheet]:
    """What is shown: the stages, what breaks first, the levers, the model beside what was measured, and the figures."""
    plans = result.plans
    names = [one.stage.name for one in plans]
    stages = Sheet("What it takes", ["", *names], [[name, *map(show, plans)] for name, show in _ROWS])
    return [
        stages,
        _breaks(plans),
        _sizes(result),
        _levers(result),
        _without(result),
        _fit(result.inputs),
        _figures(result.inputs),
    ]


def _breaks(plans: Sequence[Plan]) -> Sheet:
    """What the load of each stage would need of what the stage before has."""
    rows = []
    for name in plans[0].limits:
        row = [name]
        for before, after in pairwise(plans):
            needed, has = after.limits[name][0], before.limits[name][1]
            row.append(f"{rounded(needed / has)} times")
        rows.append(row)
    columns = [f"{before.stage.name} → {after.stage.name}" for before, after in pairwise(plans)]
    first = ["**breaks first**"]
    for before, after in pairwise(plans):
        worst = max(after.limits, key=lambda name: after.limits[name][0] / before.limits[name][1])
        needed = after.limits[worst][0] / before.limits[worst][1]
        first.append(f"**{worst}**" if needed > 1 else "nothing")
    return Sheet(
        "What breaks first on the way",
        ["the next load, on what the stage before has", *columns],
        [*rows, first, ["**no machines mend**", *(_over(after) or "nothing" for after in plans[1:])]],
    )


def _over(one: Plan) -> str:
    return ", ".join(f"{name} {_times(one, name)} times" for name in one.broken)


def _times(one: Plan, name: str) -> str:
    needed, has = one.limits[name]
    return rounded(needed / has)


def _sizes(result: Result) -> Sheet:
    """Of each limit that more machines do not move, how much of it is used."""
    rows = []
    for both in result.sizes:
        rows.append(
            [
                both[0].stage.name,
                " · ".join(f"{one.nodes:,}" for one in both),
                " · ".join(f"{one.shards:,}" for one in both),
                *(" · ".join(_times(one, name) for one in both) for name in UNDIVIDED),
                "**yes**" if not both[0].broken else "**no**",
            ]
        )
    columns = ["devices", "nodes", "shards", *UNDIVIDED, "carried as it stands"]
    return Sheet(
        "How far it goes: as it stands · with what carries it; limits are kept up to 1", columns, rows
    )


def _levers(result: Result) -> Sheet:
    last = result.plans[-1]

    def row(name: str, built: str, one: Plan) -> list[str]:
        return [
            name,
            built,
            f"{one.nodes:,}",
            f"{one.shards:,}",
            f"{one.redis:,}",
            rounded(one.relay_us),
            rounded(one.mongod_us),
            sized(one.kept_disk + one.fates_disk),
            *(_times(one, name) for name in UNDIVIDED),
        ]

    rows = [row("as above", "", last)]
    for lever, one in zip(result.inputs.levers, result.pulled, strict=True):
        rows.append(row(lever.name, "yes" if lever.built else "no", one))
    columns = ["", "there today", "nodes", "shards", "Redis", "relay µs", "mongod µs", "disk", *UNDIVIDED]
    return Sheet(f"Levers, at {last.stage.name}", columns, rows)


def _without(result: Result) -> Sheet:
    rows = [
        [
            name,
            f"{one.nodes:,}",
            f"{one.shards:,}",
            f"{one.redis:,}",
            *(_times(one, limit) for limit in UNDIVIDED),
        ]
        for name, one in result.without
    ]
    columns = ["without", "nodes", "shards", "Redis", *UNDIVIDED]
    return Sheet(f"What carries {result.plans[-1].stage.name}, but for one part", columns, rows)


def _fit(inputs: Inputs) -> Sheet:
    rows = []
    for seen in inputs.observed:
        said = predicted(inputs, seen)
        rows.append(
            [
                f"{seen.nodes:,.0f}",
                f"{seen.rate:,.0f}",
                *(
                    f"{rounded(getattr(seen, name))} · {rounded(getattr(said, name))}"
                    for name in ("requests", "publications", "relay", "mongod")
                ),
            ]
        )
    columns = ["nodes", "messages/s", "calls of MongoDB a message", "publications", "relay µs", "mongod µs"]
    return Sheet("One to one: measured · simulated", columns, rows)


def _figures(inputs: Inputs) -> Sheet:
    rows = [[figure.name, f"{figure.value:g} {figure.unit}", figure.kind, figure.source] for figure in inputs]
    return Sheet("Figures", ["figure", "value", "", "where from"], rows)


def markdown(found: Sequence[Sheet]) -> str:
    """The tables for the page."""
    parts = []
    for sheet in found:
        lines = [f"### {sheet.title}", "", _line(sheet.columns), "|" + "---|" * len(sheet.columns)]
        parts.append("\n".join([*lines, *map(_line, sheet.rows)]))
    return "\n\n".join(parts)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page(text: str, tables: str) -> str:
    """The page with these tables between its marks. Raises InputError when it has no marks."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise InputError(f"docs/scaling.md must have the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{tables}\n\n{END}{tail}"


def as_data(result: Result) -> dict[str, Any]:
    """For machines: plain numbers, in the units of ``Plan``."""

    def one(found: Plan) -> dict[str, Any]:
        values = {name: getattr(found, name) for name in Plan.__slots__ if name not in ("stage", "limits")}
        stage = found.stage
        return {
            "stage": stage.name,
            "devices": stage.devices,
            "connected": stage.connected,
            "messages": stage.messages,
            **values,
            "limits": {name: {"needed": needed, "has": has} for name, (needed, has) in found.limits.items()},
        }

    return {
        "figures": {
            figure.name: {
                "value": figure.value,
                "unit": figure.unit,
                "kind": figure.kind,
                "source": figure.source,
            }
            for figure in result.inputs
        },
        "stages": [one(found) for found in result.plans],
        "sizes": [{"stands": one(stands), "carried": one(carried)} for stands, carried in result.sizes],
        "levers": [
            {"lever": lever.name, "built": lever.built, **one(found)}
            for lever, found in zip(result.inputs.levers, result.pulled, strict=True)
        ],
    }


@app.command()
def main(
    inputs: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Other figures than docs/scaling.toml.", show_default=False),
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write everything for machines; - is standard output."),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write the tables into docs/scaling.md.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail when docs/scaling.md has other tables.")
    ] = False,
) -> None:
    """Works out from measured costs what larger installations take: nodes, shards, Redis, network and disk. A simulation with a fixed
    seed; every figure that it starts from is in docs/scaling.toml, with its source."""
    here = Path(os.environ.get("SCALING_CALLER_DIRECTORY") or ".")
    try:
        result = work_out(load(FILE if inputs is None else here / inputs))
        found = sheets(result)
        if write or check:
            _keep(markdown(found), check=check)
        elif json_file is not None:
            text = json.dumps(as_data(result), indent=2) + "\n"
            if json_file == "-":
                print(text, end="")
                return
            (here / json_file).write_text(text, encoding="utf-8")
    except InputError as error:
        raise _failure(str(error)) from None
    except OSError as error:
        raise _failure(f"{error.filename}: {error.strerror or error}") from None
    if as_markdown:
        print(markdown(found))
    elif not (write or check):
        _show(found)


def _keep(tables: str, *, check: bool) -> None:
    text = PAGE.read_text(encoding="utf-8")
    made = page(text, tables)
    if not check:
        PAGE.write_text(made, encoding="utf-8")
    elif made != text:
        raise InputError("docs/scaling.md is out of date: run scripts/scaling --write")


def _failure(text: str) -> typer.Exit:
    print(f"scaling: {text}", file=sys.stderr)
    return typer.Exit(1)


def _show(found: Sequence[Sheet]) -> None:
    console = Console(highlight=False)
    for sheet in found:
        table = Table(title=sheet.title, title_justify="left", title_style="bold")
        for place, column in enumerate(sheet.columns):
            table.add_column(column, overflow="fold", justify="left" if place == 0 else "right")
        for row in sheet.rows:
            table.add_row(*(_bold(cell) for cell in row))
        console.print(table)


def _bold(cell: str) -> str:
    plain = cell.replace("[", "\\[").replace("`", "")
    return f"[bold]{plain.replace('**', '')}[/bold]" if plain.startswith("**") else plain


if __name__ == "__main__":
    app(prog_name="scripts/scaling")
