"""What a diagnosis says of a network: its layers' figures, the rules that held, and what may help.

Text and JSON of the whole are made here.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from unrolled.diagnosis.figures import (
    GradientFlow,
    JacobianProfile,
    LagProfile,
    Lyapunov,
    Reach,
    UnitFigures,
    WeightShares,
)
from unrolled.results import Result

KINDS = ("chaotic", "exploding", "vanishing", "saturated", "cut by truncation", "healthy")
"""What a verdict may be, the gravest first."""


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

    def in_words(self) -> Iterator[tuple[str, str]]:
        """The figures, each with its name."""
        flow = self.flow.norms
        yield "gradient flow", f"{flow[0]:.2e} at the first copy, {flow[-1]:.2e} at the last, {max(flow):.2e} at most"
        if self.lag is not None and self.reach is not None:
            yield "reach", f"{self.reach.in_words()}; probes: {self.lag.probes} to a row"
        if self.jacobian is not None:
            yield "Jacobian product", self.jacobian.in_words()
        if self.lyapunov is not None:
            exponents = ", ".join(f"{x:+.3g}" for x in self.lyapunov.exponents)
            yield "Lyapunov exponents", f"{exponents} per step, over {self.lyapunov.steps} steps"
        for share in self.weights:
            yield f"shares of {share.name}", f"norm {share.norm:.2e}, copies agree {share.agreement:.0%}"
        yield from self.units.in_words()


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
        horizon = "" if self.horizon is None else f", horizon {self.horizon}"
        head = f"{self.network}, {self.T} copies, batch {self.B}{horizon}: loss {self.loss:.4g}, "
        lines = [f"{head}gradient norm {self.grad_norm:.3g}", "", str(self.verdict)]
        for layer in self.layers:
            rows = [*layer.in_words(), *((f"no {missing.figure}", missing.why) for missing in layer.missing)]
            width = max(len(name) for name, _ in rows)
            title = ", ".join(filter(None, [layer.name, layer.cell]))
            lines += ["", title, *(f"  {name.ljust(width)}  {figures}" for name, figures in rows)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
