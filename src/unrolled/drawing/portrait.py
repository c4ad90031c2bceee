"""What a page shows of one run: plain numbers and text, no tensors. Renderers know nothing else."""

from __future__ import annotations

import base64
import dataclasses
from dataclasses import dataclass
from typing import Any

from unrolled.plan.report import PlannedOperation

MISSING = 255
"""The byte of an entry that is not there: a copy in which the row has ended, or a number that is not finite."""


@dataclass(frozen=True)
class Strip:
    """One tensor over all copies, one row of the batch, eight bits an entry.

    Attributes:
        name: as a picture calls it: 'x', 'h', 'dL/dh'.
        role: 'input', 'state', 'output', or one of these with ' gradient' after it.
        entries: how many entries of a copy are shown.
        of: how many there are.
        scale: the largest absolute value.
        decades: 0 for a linear scale, where an entry is `(byte / 127 - 1) * scale`; otherwise how many powers of ten
            lie between the largest value and zero: its size is `scale * 10 ** (decades * (|byte / 127 - 1| - 1))`.
        levels: `entries` bytes for each copy, from 0 to 254; `MISSING` for what is not there.
    """

    name: str
    role: str
    entries: int
    of: int
    scale: float
    levels: bytes
    decades: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain text and numbers; the levels in base64."""
        return dataclasses.asdict(self) | {"levels": base64.b64encode(self.levels).decode("ascii")}


@dataclass(frozen=True)
class Series:
    """One line of a chart, or its points; `lower` and `upper` are a band around it, or empty."""

    name: str
    y: tuple[float | None, ...]
    lower: tuple[float | None, ...] = ()
    upper: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A chart and what it shows.

    Attributes:
        key: a short name, for files and links.
        title: its title.
        x_title: what lies along x, with its unit.
        y_title: what lies along y, with its unit.
        x: the positions along x.
        series: the lines.
        sentence: what is seen, with its figures.
        by_copy: whether x counts copies, so that a copy can be chosen in it.
        log_x: whether x is logarithmic.
        log_y: whether y is.
        share: whether y is a share, from 0 to 1.
        points: whether points are drawn instead of lines.
        labels: a text for each position, or empty.
        chosen: the position that is marked, or None.
    """

    key: str
    title: str
    x_title: str
    y_title: str
    x: tuple[float, ...]
    series: tuple[Series, ...]
    sentence: str
    by_copy: bool = False
    log_x: bool = False
    log_y: bool = False
    share: bool = False
    points: bool = False
    labels: tuple[str, ...] = ()
    chosen: int | None = None


@dataclass(frozen=True)
class Layer:
    """One network of those that a page shows: a layer, a direction, or the only one.

    Attributes:
        name: 'layer 1, backwards'; the cell's name where there is one network.
        cell: the cell's name.
        engine: what runs it, and why no faster one.
        reverse: whether the last copy comes first.
        operations: the inside of the cell, in order; none where the step could not be recorded.
        results: what leaves a step, by name: which operation made it, or which tensor it is.
        strips: what goes in and out of its copies.
        charts: its figures over copies and lags.
        figures: those that are single numbers, each with its name, in words.
        missing: what could not be measured, and why.
    """

    name: str
    cell: str
    engine: str
    reverse: bool
    operations: tuple[PlannedOperation, ...]
    results: tuple[tuple[str, int | str], ...]
    strips: tuple[Strip, ...]
    charts: tuple[Chart, ...]
    figures: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Portrait:
    """All that a page shows.

    Attributes:
        title: the network's name.
        T: copies.
        B: rows of the batch.
        row: the row that strips show.
        layers: its networks, in the order in which they run.
        charts: figures of the whole network.
        verdict: kind, and findings with their remedies; None without a loss.
        notes: what was left out, and how to have it.
    """

    title: str
    T: int
    B: int
    row: int
    layers: tuple[Layer, ...]
    charts: tuple[Chart, ...] = ()
    verdict: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain text and numbers, as JSON takes them."""
        layers = [{**_shallow(layer), "strips": [strip.to_dict() for strip in layer.strips]} for layer in self.layers]
        return {**dataclasses.asdict(dataclasses.replace(self, layers=())), "layers": layers}


def _shallow(layer: Layer) -> dict[str, Any]:
    return dataclasses.asdict(dataclasses.replace(layer, strips=()))
