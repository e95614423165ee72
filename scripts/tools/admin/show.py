"""What operators see: tables on terminals, tab-separated lines in pipes, JSON when asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def as_json(value: Any) -> None:
    """A value for machines."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def line(text: str) -> None:
    """A line of the answer."""
    print(printable(text))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str) -> None:
    """Rows under their headings; ``empty`` is said, to standard error, when there are none."""
    if not rows:
        print(empty, file=sys.stderr)
        return
    cells = [["" if value is None else printable(str(value)) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for row in cells:
            print("\t".join(row))
        return
    found = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        found.add_column(name, overflow="fold")
    for row in cells:
        found.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(found)


def facts(pairs: Mapping[str, Any]) -> None:
    """Names and values, those that there are."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        if value not in (None, ""):
            line(f"{name:<{width}}  {value}")


def moment(milliseconds: int | None) -> str:
    """A time for people: UTC, to the second."""
    if milliseconds is None:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def printable(text: str) -> str:
    """Other people's text, which must neither drive the terminal nor break a line in two."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
