"""What was measured, as plain numbers: frozen dataclasses of floats, no tensors. Made in this room, drawn in others.

A lag counts copies: what has lag k has passed k copies on its way back. All norms are Euclidean. Shape letters do not
occur, since nothing here has a shape: a figure over time is a tuple with one number for each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from unrolled.diagnosis.unit_results import UnitFigures
from unrolled.results import Result, plain

KINDS = ("chaotic", "exploding", "vanishing", "saturated", "cut by truncation", "healthy")
"""What a verdict may be, the gravest first."""


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
class Remedy(Result):
    """Something that may help this network.

    Attributes:
        text: what to do, as a call where there is one.
        apply: does it to the network that was diagnosed, in place; None where it needs another network or loop.
    """

    text: str
    apply: Callable[[], None] | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The text."""
        return {"text": self.text}


@dataclass(frozen=True)
class Finding(Result):
    """One rule that held.

    Attributes:
        kind: one of `KINDS`.
        sentence: what was found, with its figures.
        remedies: what may help, the simplest first.
        layer: of which layer; empty for a network of one cell.
    """

    kind: str
    sentence: str
    remedies: tuple[Remedy, ...] = ()
    layer: str = ""


@dataclass(frozen=True)
class Verdict(Result):
    """What the figures say, by the rules of `diagnosis/verdict.py`.

    Attributes:
        findings: the rules that held, the gravest first; a healthy network has one, of kind 'healthy'.
    """

    findings: tuple[Finding, ...]

    @property
    def kind(self) -> str:
        """That of the gravest finding."""
        return self.findings[0].kind

    @property
    def healthy(self) -> bool:
        """Whether no rule held that says otherwise."""
        return self.kind == "healthy"

    def to_dict(self) -> dict[str, Any]:
        """`kind` and `findings`."""
        return {"kind": self.kind} | super().to_dict()

    def __str__(self) -> str:
        lines = []
        for finding in self.findings:
            where = f" ({finding.layer})" if finding.layer else ""
            lines.append(f"{finding.kind}{where}: {finding.sentence}")
            lines += [f"  - {remedy.text}" for remedy in finding.remedies]
        return "\n".join(lines)


@dataclass(frozen=True)
class Missing(Result):
    """A figure that could not be measured.

    Attributes:
        figure: the attribute that is None or empty for it.
        why: the reason, and what to do about it.
    """

    figure: str
    why: str


@dataclass(frozen=True)
class LayerDiagnosis(Result):
    """The figures of one cell: of a network, or of one layer and direction.

    Attributes:
        name: 'layer 0', 'layer 1, backwards'; empty for a network of one cell.
        cell: the cell's name.
        flow: gradients by step.
        lag: gradients by distance; None where the loss reaches no output or state of this cell.
        reach: what follows from `lag`.
        weights: each parameter's gradient by copy.
        jacobian: Jacobian products.
        lyapunov: Lyapunov exponents.
        units: units and gates.
        missing: what could not be measured, and why.
    """

    name: str
    cell: str
    flow: GradientFlow
    lag: LagProfile | None
    reach: Reach | None
    weights: tuple[WeightShares, ...]
    jacobian: JacobianProfile | None
    lyapunov: Lyapunov | None
    units: UnitFigures
    missing: tuple[Missing, ...] = ()


@dataclass(frozen=True)
class Diagnosis(Result):
    """Everything that `diagnose` measured; `print` it for the verdict and the figures.

    Attributes:
        network: the network's name.
        T: steps, of the longest row.
        B: rows.
        horizon: how many copies gradients flow back through in training; None for all.
        loss: its value.
        grad_norm: the norm of all parameters' gradients together.
        layers: one for each layer and direction, in the order in which they run.
        verdict: what follows.
    """

    network: str
    T: int
    B: int
    horizon: int | None
    loss: float
    grad_norm: float
    layers: tuple[LayerDiagnosis, ...]
    verdict: Verdict

    def __str__(self) -> str:
        from unrolled.diagnosis.telling import told  # which imports the results

        return told(self)

    def _repr_html_(self) -> str:
        from unrolled.diagnosis.telling import told_as_html

        return told_as_html(self)
