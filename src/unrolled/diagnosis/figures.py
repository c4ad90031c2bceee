"""Figures: what was measured, as plain numbers: frozen dataclasses of floats, no tensors.

A lag counts copies: what has lag k has passed k copies on its way back. All norms are Euclidean. Shape letters do not
occur, since nothing here has a shape: a figure over time is a tuple with one number for each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unrolled.results import Result, plain


@dataclass(frozen=True)
class GradientFlow(Result):
    """|dL/dstate_t|: the loss's whole gradient by the state that each copy receives.

    Attributes:
        norms: for each step t the norm over all rows that are alive.
        lower: for each step the lower quartile over these rows of the row's own norm.
        median: the median.
        upper: the upper quartile.
    """

    norms: tuple[float, ...]
    lower: tuple[float, ...]
    median: tuple[float, ...]
    upper: tuple[float, ...]


@dataclass(frozen=True)
class LagProfile(Result):
    """|d loss_t / d state_s| over the lag t - s, quartiles over rows and probes.

    The loss at t is what the loss takes of the output of copy t (and of a row's last state where it takes that): its
    gradient there, sent back through earlier copies alone. In a stack it is what arrives at that layer's output.

    Attributes:
        lags: 1, 2, ...: how many copies the gradient has passed; the state is the one that the last of them received.
        lower: for each lag the lower quartile of the norm.
        median: the median.
        upper: the upper quartile.
        kept: for each lag the median of the norm as a share of what the same row and probe had at lag 1.
        counts: how many pairs of row and probe have this lag.
        probes: how many probes a row has at most.
        steps: at which steps there are probes, in order.
    """

    lags: tuple[int, ...]
    lower: tuple[float, ...]
    median: tuple[float, ...]
    upper: tuple[float, ...]
    kept: tuple[float, ...]
    counts: tuple[int, ...]
    probes: int
    steps: tuple[int, ...]

    @property
    def rate(self) -> float:
        """The slope of the line through the logarithms of what is kept; minus infinity if nothing is after one copy.

        Only numbers that the dtype's smallest ones do not distort are taken.
        """
        points = [(n, math.log(x)) for n, x in zip(self.lags, self.kept, strict=True) if 1e-30 < x < 1e30]
        if len(points) < 2:
            return -math.inf if len(self.lags) > 1 and self.kept[1] == 0 else 0.0
        mean_n, mean_x = (sum(column) / len(points) for column in zip(*points, strict=True))
        over = sum((n - mean_n) ** 2 for n, _ in points)
        return sum((n - mean_n) * (x - mean_x) for n, x in points) / over


@dataclass(frozen=True)
class Reach(Result):
    """How far back gradients reach, read off a lag profile.

    Attributes:
        tenth: the first lag at which a tenth or less is kept of what there was at lag 1; None if that is farther than
            was measured.
        hundredth: the same for a hundredth.
        thousandth: the same for a thousandth.
        rate: growth of the logarithm per step, fitted to what is kept; below zero for gradients that vanish.
        measured: the largest lag measured.
    """

    tenth: int | None
    hundredth: int | None
    thousandth: int | None
    rate: float
    measured: int

    @property
    def halving(self) -> float:
        """In how many steps gradients halve; infinite where they do not."""
        return math.log(2) / -self.rate if self.rate < 0 else math.inf

    @property
    def doubling(self) -> float:
        """In how many steps gradients double; infinite where they do not."""
        return math.log(2) / self.rate if self.rate > 0 else math.inf

    @classmethod
    def of(cls, profile: LagProfile) -> Reach:
        """Read it off what is kept at each lag."""

        def fallen_to(share: float) -> int | None:
            return next((lag for lag, kept in zip(profile.lags, profile.kept, strict=True) if kept <= share), None)

        return cls(fallen_to(0.1), fallen_to(0.01), fallen_to(0.001), profile.rate, profile.lags[-1])

    def in_words(self) -> str:
        """How far they reach, and by what rate they fall or grow."""
        if self.measured == 1:
            return "the loss takes something at the first copy alone"
        shares = {"a tenth": self.tenth, "a hundredth": self.hundredth, "a thousandth": self.thousandth}
        fallen = [f"{share} after {lag} copies" for share, lag in shares.items() if lag is not None]
        rate = f"halving in {self.halving:.3g} steps" if self.rate < 0 else f"doubling in {self.doubling:.3g} steps"
        return f"{', '.join(fallen) or f'more than a tenth after all {self.measured} copies'}; {rate}"

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, `halving` and `doubling` among them."""
        return super().to_dict() | {"halving": plain(self.halving), "doubling": plain(self.doubling)}


@dataclass(frozen=True)
class WeightShares(Result):
    """One parameter's gradient by copy.

    Attributes:
        name: the parameter.
        norm: that of the whole gradient, over all copies.
        norms: that of each copy's own share.
        cosines: the cosine between each copy's share and the sum of all; 0 where either is zero.
        agreement: the norm of the sum over the sum of the norms: 1 where all copies agree, near 0 where they cancel.
    """

    name: str
    norm: float
    norms: tuple[float, ...]
    cosines: tuple[float, ...]
    agreement: float


@dataclass(frozen=True)
class JacobianProfile(Result):
    """The Jacobian products d state_t / d state_s from each row's first copy on, over the lag.

    Attributes:
        lags: how many copies: all of a short sequence, else some evenly on a logarithmic scale.
        norm: for each lag the median over rows of the Frobenius norm.
        lower: the lower quartile over rows of the leading singular value.
        median: the median of the leading singular value.
        upper: its upper quartile.
        rows: how many rows were measured.
        size: how many entries a row's state has.
        tangents: how many tangents were sent along; with as many as `size` the figures are exact, with fewer the norm
            is an estimate and the singular value a bound from below.
    """

    lags: tuple[int, ...]
    norm: tuple[float, ...]
    lower: tuple[float, ...]
    median: tuple[float, ...]
    upper: tuple[float, ...]
    rows: int
    size: int
    tangents: int

    def in_words(self) -> str:
        """The leading singular value over a short, a middle and the longest lag."""
        some = dict.fromkeys((0, len(self.lags) // 2, len(self.lags) - 1))
        values = ", ".join(f"{self.median[n]:.2e} over {self.lags[n]}" for n in some)
        exact = (
            "exact" if self.tangents == self.size else f"bounds from below, {self.tangents} of {self.size} directions"
        )
        return f"leading singular value {values} ({exact})"


@dataclass(frozen=True)
class Lyapunov(Result):
    """The leading Lyapunov exponents of a trajectory, in nats per step, the largest first.

    Attributes:
        exponents: the mean over rows.
        errors: the standard error of that mean; 0 for one row.
        steps: over how many steps growth was measured, in the longest row.
        burn_in: how many steps before these only turned the tangents.
        rows: how many rows were measured.
    """

    exponents: tuple[float, ...]
    errors: tuple[float, ...]
    steps: int
    burn_in: int
    rows: int


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

    def in_words(self) -> str:
        """How much of it is saturated."""
        dead = f", {self.dead} of {self.units} units always" if self.dead else ""
        return f"{self.share:.0%} saturated ({self.low:.0%} low, {self.high:.0%} high){dead}"


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
        norms: for each step the mean over rows of the norm of what the copy passes on.
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

    def in_words(self) -> Iterator[tuple[str, str]]:
        """The figures, each with its name."""
        for gate in self.gates:
            yield f"{gate.name} ({gate.operation})", gate.in_words()
        for memory in self.memory:
            kept = f"which keeps {memory.mean:.3g} of the state"
            yield "memory", f"{memory.steps:.3g} steps by the {memory.gate} gate, {kept}"
        for state in self.states:
            first, last = state.norms[0], state.norms[-1]
            yield f"norm of {state.name}", f"{first:.3g} at the first copy, {last:.3g} at the last"
        for radius in self.radii:
            yield f"radius of {radius.name}", f"{radius.value:.3g}"
