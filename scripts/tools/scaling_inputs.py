"""``docs/scaling.toml``: every figure of the scaling model, where it comes from, and the stages it is worked out for."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

FILE: Final = Path(__file__).resolve().parents[2] / "docs" / "scaling.toml"

Kind = Literal["measured", "assumed", "setting"]
_KINDS: Final = ("measured", "assumed", "setting")


class InputError(Exception):
    """The file cannot be used; one line for people."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure; ``source`` is the bench that measured it and when, or why it is assumed."""

    name: str
    value: float
    unit: str
    kind: Kind
    source: str


@dataclass(frozen=True, slots=True)
class Stage:
    """So many people with a device each, so many of them connected, and messages a second at the busiest."""

    name: str
    devices: int
    connected: int
    messages: float


@dataclass(frozen=True, slots=True)
class Lever:
    """Something that can be changed: figures that are so many times what they were then, and figures that have other values."""

    name: str
    built: bool
    factors: Mapping[str, float]
    values: Mapping[str, float]
    carries: bool = False
    """Whether it is what the last stage takes."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Nodes under one-to-one messages, all recipients connected, at any of them: ``requests`` of MongoDB, ``publications`` and CPU (µs,
    without what nodes take at rest) for a message."""

    nodes: float
    rate: float
    commit_ms: float
    requests: float
    publications: float
    relay: float
    mongod: float


@dataclass(frozen=True, slots=True)
class Inputs:
    """All figures, by name."""

    figures: Mapping[str, Figure]
    stages: tuple[Stage, ...]
    levers: tuple[Lever, ...]
    observed: tuple[Observed, ...]
    sizes: tuple[int, ...] = ()

    def __getitem__(self, name: str) -> float:
        """A figure's value. Raises InputError."""
        try:
            return self.figures[name].value
        except KeyError:
            raise InputError(f"docs/scaling.toml has no figure {name}") from None

    def __iter__(self) -> Iterator[Figure]:
        """Figures in the order of the file."""
        return iter(self.figures.values())

    @property
    def between(self) -> list[Stage]:
        """The ``sizes``: a tenth of the devices connected, a message a second for each hundred."""
        return [
            Stage(f"{size / 1e6:g} M" if size >= 1e6 else f"{size / 1e3:g} k", size, size // 10, size / 100)
            for size in self.sizes
        ]

    def pulled(self, lever: Lever) -> Inputs:
        """With the figures of a lever. Raises InputError."""
        factors = {name: self[name] * factor for name, factor in lever.factors.items()}
        return self.changed(factors | dict(lever.values))

    def changed(self, values: Mapping[str, float]) -> Inputs:
        """With other values of some figures. Raises InputError."""
        figures = dict(self.figures)
        for name, value in values.items():
            self[name]
            figures[name] = replace(figures[name], value=value)
        return replace(self, figures=figures)


def load(file: Path = FILE) -> Inputs:
    """Raises InputError, and OSError."""
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
        figures = {
            name: Figure(name, float(row["value"]), row["unit"], row["kind"], row["source"])
            for name, row in found["figures"].items()
        }
        stages = tuple(
            Stage(row["name"], int(row["devices"]), int(row["connected"]), float(row["messages"]))
            for row in found["stages"]
        )
        levers = tuple(
            Lever(
                row["name"],
                bool(row["built"]),
                dict(row.get("factors", {})),
                dict(row.get("values", {})),
                bool(row.get("carries")),
            )
            for row in found["levers"]
        )
        observed = tuple(
            Observed(**{name: float(value) for name, value in row.items()}) for row in found["observed"]
        )
        sizes = tuple(int(size) for size in found.get("sizes", {}).get("devices", ()))
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file.name} cannot be read: {type(error).__name__}: {error}") from None
    inputs = Inputs(figures, stages, levers, observed, sizes)
    for figure in inputs:
        if figure.kind not in _KINDS or not figure.source.strip() or not figure.unit:
            raise InputError(
                f"{file.name}: {figure.name} needs a unit, a source, and a kind of {', '.join(_KINDS)}"
            )
    for lever in levers:
        inputs.pulled(lever)
    return inputs
