"""Figures of units and gates, as plain numbers; see `results`."""

from __future__ import annotations

from dataclasses import dataclass

from unrolled.results import Result


@dataclass(frozen=True)
class Gate(Result):
    """One gate or activation of the cell. Saturated is where the slope is under a tenth of its steepest.

    Attributes:
        name: 'forget', ...; for cells of others the operation and its number among these: 'sigmoid 1'.
        operation: 'sigmoid', 'tanh' or 'relu'.
        units: how many entries a row has of it.
        saturated: for each step the share of entries (rows times units) that are saturated.
        low: the share of all entries that are saturated at the low end (0, -1).
        high: the same at the high end (1); 0 for relu.
        mean: for each step the mean.
        dead: how many units are saturated in every row at every step.
    """

    name: str
    operation: str
    units: int
    saturated: tuple[float, ...]
    low: float
    high: float
    mean: tuple[float, ...]
    dead: int

    @property
    def share(self) -> float:
        """The share of all entries that are saturated."""
        return self.low + self.high


@dataclass(frozen=True)
class EffectiveMemory(Result):
    """How many steps a gate that keeps the state keeps it: 1 / (1 - mean f).

    Attributes:
        gate: its name.
        mean: of what is kept, over all rows, steps and units.
        steps: 1 / (1 - mean); infinite where everything is kept.
        lower: the lower quartile over units of each unit's own memory.
        median: the median.
        upper: the upper quartile.
    """

    gate: str
    mean: float
    steps: float
    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class StateNorm(Result):
    """The norm of one leaf of the state over time.

    Attributes:
        name: the leaf: 'h', 'c', or its path in the state's tree.
        norms: for each step the mean over rows of the norm of what the copy hands on.
    """

    name: str
    norms: tuple[float, ...]


@dataclass(frozen=True)
class SpectralRadius(Result):
    """The largest absolute eigenvalue of a recurrent weight.

    Attributes:
        name: the parameter; for one with several gates the block too: 'weight_hh (forget)'.
        value: the radius.
    """

    name: str
    value: float


@dataclass(frozen=True)
class UnitFigures(Result):
    """Units and gates of one cell.

    Attributes:
        gates: its gates and activations; none where the cell has none, or could not be recorded (see `missing`).
        memory: the effective memory of each gate that keeps the state.
        states: the norms of the state's leaves over time.
        radii: the spectral radii of the recurrent weights.
    """

    gates: tuple[Gate, ...]
    memory: tuple[EffectiveMemory, ...]
    states: tuple[StateNorm, ...]
    radii: tuple[SpectralRadius, ...]

    @property
    def dead(self) -> int:
        """Units of any gate or activation that are saturated in every row at every step."""
        return sum(gate.dead for gate in self.gates)
