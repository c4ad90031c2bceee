"""What a page shows of one run: plain numbers and text, no tensors. Renderers know nothing else."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unrolled.errors import OptionError
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
        levels: `entries` bytes for each copy, from 0 to 254; `MISSING` for what is not there.
        decades: 0 for a linear scale, where an entry is `(byte / 127 - 1) * scale`; otherwise how many powers of ten
            lie between the largest value and zero: its size is `scale * 10 ** (decades * (|byte / 127 - 1| - 1))`.
    """

    name: str
    role: str
    entries: int
    of: int
    scale: float
    levels: bytes
    decades: int = 0

    @classmethod
    def encoded(cls, name: str, role: str, values: np.ndarray, size: int) -> Strip:
        """A strip of some values, those of gradients on a logarithmic scale, so that what vanishes is seen.

        Args:
            name: as a picture calls it.
            role: what it is to a copy; see the attribute.
            values: the entries that are shown, `[T, entries]`; NaN for what is not there.
            size: how many entries there are.
        """
        finite = np.isfinite(values)
        scale = float(np.abs(values[finite]).max()) if finite.any() else 0.0
        shares = values[finite] / (scale or 1.0)
        decades = 12 if "gradient" in role else 0
        if decades:
            sizes = np.abs(shares)
            logs = np.log10(sizes, where=sizes > 0, out=np.full_like(sizes, -np.inf))
            shares = np.sign(shares) * np.maximum(1 + logs / decades, 0)
        levels = np.full(values.shape, MISSING, dtype=np.uint8)
        levels[finite] = np.rint((shares + 1) * 127).astype(np.uint8)
        return cls(name, role, values.shape[1], size, scale, levels.tobytes(), decades)

    def to_dict(self) -> dict[str, Any]:
        """Plain text and numbers; the levels in base64."""
        return dataclasses.asdict(self) | {"levels": base64.b64encode(self.levels).decode("ascii")}


@dataclass(frozen=True)
class Series:
    """One line of a chart, or its points.

    Attributes:
        name: as a legend calls it.
        y: a number for each position along x, None where the line is broken.
        lower: the lower edge of a band around the line, or empty.
        upper: the upper edge.
    """

    name: str
    y: tuple[float | None, ...]
    lower: tuple[float | None, ...] = ()
    upper: tuple[float | None, ...] = ()

    @classmethod
    def of(cls, name: str, *lines: Sequence[float], above: float = -math.inf) -> Series:
        """A line, and the edges of its band; broken where a number is not finite, or not above a bound."""
        return cls(name, *(tuple(float(y) if math.isfinite(y) and y > above else None for y in ys) for ys in lines))


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

    def chart(self, key: str) -> Chart:
        """The chart of that key, which in a network of several layers has the layer's number after it: 'flow 0'.

        Raises:
            OptionError: if there is none.
        """
        many = len(self.layers) > 1
        charts = {f"{c.key} {n}" if many else c.key: c for n, layer in enumerate(self.layers) for c in layer.charts}
        charts |= {chart.key: chart for chart in self.charts}
        if key not in charts:
            known = ", ".join(map(repr, charts)) or "none"
            raise OptionError(f"chart must be one of {known}, got {key!r}; those of gradients need loss=")
        return charts[key]

    def to_dict(self) -> dict[str, Any]:
        """Plain text and numbers, as JSON takes them."""
        layers = [
            dataclasses.asdict(dataclasses.replace(layer, strips=()))
            | {"strips": [strip.to_dict() for strip in layer.strips]}
            for layer in self.layers
        ]
        return dataclasses.asdict(dataclasses.replace(self, layers=())) | {"layers": layers}
