"""The verdict: rules over the figures, each with the remedies that apply to the network.

What no rule finds is not said: a network that no rule catches is healthy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

from torch import nn

from unrolled import remedy
from unrolled.cells.adapted import gates_of
from unrolled.diagnosis.figures import Gate, Reach
from unrolled.diagnosis.results import KINDS, Finding, LayerDiagnosis, Remedy, Verdict


def verdict_of(layers: Sequence[LayerDiagnosis], cells: Sequence[nn.Module], horizon: int | None) -> Verdict:
    """Apply the rules.

    Args:
        layers: the figures, layer by layer.
        cells: the cell of each.
        horizon: how many copies gradients flow back through in training; None for all.
    """
    rules = [_Rules(layer, cell, horizon) for layer, cell in zip(layers, cells, strict=True)]
    found = [finding for layer_rules in rules for finding in layer_rules.findings()]
    if not found and not any(map(_has_gradient, layers)):
        sentence = (
            "no gradient at all reaches any copy: the loss does not change with the outputs, or its slope is zero"
        )
        found = [Finding("vanishing", sentence)]
    if not found:
        sentences = dict.fromkeys(sentence for layer_rules in rules for sentence in layer_rules.what_is_left())
        found = [Finding("healthy", "; ".join(sentences) or "no rule says otherwise")]
    return Verdict(tuple(sorted(found, key=lambda finding: KINDS.index(finding.kind))))


def _has_gradient(layer: LayerDiagnosis) -> bool:
    return layer.lag is not None or any((*layer.flow.norms, *(share.norm for share in layer.weights)))


class _Rules:
    """The rules, for one layer; all thresholds are here.

    Attributes:
        LEFT: vanishing: the share of a gradient below which it counts as gone ...
        QUARTER: ... after this share of the steps that gradients flow back through. Less would call short memories
            healthy that could not link the first half of a sequence to its end; more would ask of every network to
            remember all it has read.
        GROWN: exploding, chaotic: by how much gradients, or tangents, grow over the steps measured. A network at the
            edge (an orthogonal one, a cell that adds up) moves by a small factor either way.
        SURE: chaotic: by how many standard errors a Lyapunov exponent must be above zero.
        BOUNDED: chaotic, and not merely growing: the state's norm grows at less than this share of the exponent.
        SATURATED: saturated: the share of a gate's entries, or of dead units.
        CUT: cut by truncation: the share of a gradient that is left where the horizon ends it.
    """

    LEFT = 0.001
    QUARTER = 0.25
    GROWN = 100.0
    SURE = 2.0
    BOUNDED = 0.5
    SATURATED = 0.5
    CUT = 0.1

    def __init__(self, layer: LayerDiagnosis, cell: nn.Module, horizon: int | None) -> None:
        self.layer, self.cell, self.horizon = layer, cell, horizon
        self.gates = gates_of(cell)

    def findings(self) -> Iterator[Finding]:
        """The rules that hold."""
        for rule in (self._chaotic, self._exploding, self._vanishing, self._saturated, self._cut):
            finding = rule()
            if finding is not None:
                yield finding

    def what_is_left(self) -> Iterator[str]:
        """What is left of a gradient at the distance over which a vanishing one would be gone, by the same rule."""
        reach = self.layer.reach
        if reach is None or reach.measured <= 1:
            return
        flows = self._flows_back(reach)
        if reach.tenth and reach.tenth < flows:
            yield (
                f"a tenth of the gradient is left after {reach.tenth} copies, more than {self.LEFT:g} after a quarter "
                f"of the {flows} that it flows back through"
            )
        else:
            yield f"more than a tenth of the gradient is left after all {flows} copies that it flows back through"

    def _finding(self, kind: str, sentence: str, *remedies: Remedy | None) -> Finding:
        return Finding(kind, sentence, tuple(one for one in remedies if one is not None), self.layer.name)

    def _flows_back(self, reach: Reach) -> int:
        """How many copies gradients flow back through in training, as far as was measured."""
        return min(reach.measured, self.horizon or reach.measured)

    def _chaotic(self) -> Finding | None:
        found = self.layer.lyapunov
        if found is None or not found.exponents or not found.exponents[0] > self.SURE * found.errors[0]:
            return None
        leading = found.exponents[0]
        if leading * found.steps < math.log(self.GROWN) or self._state_growth() > self.BOUNDED * leading:
            return None
        sentence = (
            f"two states that differ a little differ {math.exp(leading):.3g} times as much after each step (leading "
            f"Lyapunov exponent {leading:+.3g} per step, standard error {found.errors[0]:.1g}), in a bounded state"
        )
        shorter = self._shorter(round(math.log(self.GROWN) / leading))
        return self._finding("chaotic", sentence, self._orthogonal(), self._gated(), self._clip(), shorter)

    def _state_growth(self) -> float:
        """The rate at which the state's norm grows over the second half of the steps, per step."""
        states = self.layer.units.states
        whole = [math.hypot(*norms) for norms in zip(*(state.norms for state in states), strict=True)]
        half = whole[len(whole) // 2 :]
        if len(half) < 2 or not half[0] > 0 or not math.isfinite(half[-1]):
            return 0.0 if half and half[-1] == 0 else math.inf
        return math.log(half[-1] / half[0]) / (len(half) - 1) if half[-1] > 0 else 0.0

    def _exploding(self) -> Finding | None:
        lag, reach = self.layer.lag, self.layer.reach
        worst = next((n for n, kept in enumerate(lag.kept) if kept >= self.GROWN), None) if lag else None
        if lag is None or worst is None:
            return None
        doubling = reach.doubling if reach else math.inf
        growth = f"doubling every {doubling:.3g} steps" if math.isfinite(doubling) else "not by a constant rate"
        sentence = f"after {lag.lags[worst]} copies gradients are {lag.kept[worst]:.3g} times as large, {growth}"
        shorter = self._shorter(lag.lags[worst])
        return self._finding("exploding", sentence, self._clip(), self._orthogonal(), self._gated(), shorter)

    def _vanishing(self) -> Finding | None:
        lag, reach = self.layer.lag, self.layer.reach
        if lag is None or reach is None:
            return None
        flows = self._flows_back(reach)
        gone = reach.thousandth
        if gone is None or gone > flows * self.QUARTER:
            return None
        if lag.median[0] == 0:
            return self._finding("vanishing", "no gradient passes a single copy", self._gated())
        pace = f"halve every {reach.halving:.3g} steps" if reach.rate < 0 else "fall"
        sentence = (
            f"gradients {pace}: a tenth is left after {reach.tenth} copies, {self.LEFT:g} after {gone}, of {flows} "
            "that they flow back through; that matters to what is to link steps farther apart"
        )
        remedies = [*self._longer_memory(max(flows, 3)), self._orthogonal(), self._identity(), self._gated()]
        return self._finding("vanishing", sentence, *remedies, self._shorter(gone))

    def _saturated(self) -> Finding | None:
        units = self.layer.units
        bad = [(gate, share) for gate in units.gates if (share := self._harmful(gate)) > self.SATURATED]
        if not bad:
            return None
        shares = ", ".join(f"{share:.0%} of {gate.name} ({gate.operation})" for gate, share in bad)
        return self._finding(
            "saturated",
            f"{shares} saturated, where next to no gradient passes; {units.dead} units so in every row and step",
            Remedy("layer normalisation in the cell: LayerNormLSTMCell"),
            Remedy("smaller inputs: standardise them, or scale weight_ih down"),
            self._orthogonal(),
        )

    def _harmful(self, gate: Gate) -> float:
        """The share of a gate's entries that are saturated and should not be.

        A gate that leaves the state alone is saturated on purpose where it remembers; half of a relu's entries are zero
        by design, so of that only units that are always zero count.
        """
        if gate.operation == "relu":
            return gate.dead / gate.units
        idle = self.gates.layout.idle_end(gate.name) if self.gates else None
        return gate.share - {"high": gate.high, "low": gate.low, None: 0.0}[idle]

    def _cut(self) -> Finding | None:
        lag, reach = self.layer.lag, self.layer.reach
        if self.horizon is None or lag is None or reach is None or self.horizon >= reach.measured:
            return None
        left = lag.kept[self.horizon - 1]
        if not left > self.CUT:
            return None
        sentence = f"after the horizon of {self.horizon} copies {left:.0%} of the gradient is left, and is cut off"
        longer = Remedy(f"a longer horizon: horizon={reach.tenth or reach.measured}")
        return self._finding("cut by truncation", sentence, longer)

    def _longer_memory(self, steps: int) -> list[Remedy]:
        if not remedy.can_set_keeping_bias(self.cell):
            return []
        chrono, bias = partial(remedy.chrono, self.cell, steps), partial(remedy.forget_bias, self.cell, 1.0)
        return [
            Remedy(f"chrono initialisation: ur.remedy.chrono(rnn, {steps})", chrono),
            Remedy("forget-gate bias: ur.remedy.forget_bias(rnn, 1.0)", bias),
        ]

    def _orthogonal(self) -> Remedy | None:
        if not remedy.can_set_recurrent(self.cell):
            return None
        text = "orthogonal recurrent weights: ur.remedy.orthogonal(rnn)"
        return Remedy(text, partial(remedy.orthogonal, self.cell))

    def _identity(self) -> Remedy | None:
        if self.gates is None or not any(gate.operation == "relu" for gate in self.layer.units.gates):
            return None
        return Remedy("identity recurrent weights: ur.remedy.identity(rnn)", partial(remedy.identity, self.cell))

    def _gated(self) -> Remedy | None:
        keeps = self.gates is not None and self.gates.layout.keeps is not None
        return None if keeps else Remedy("a gated cell: LSTMCell, GRUCell")

    def _shorter(self, reach: int) -> Remedy | None:
        if self.layer.lag is None or not 1 <= reach < self.layer.lag.lags[-1]:
            return None
        return Remedy(f"a shorter horizon costs less memory: unroll(cell, horizon={reach})")

    def _clip(self) -> Remedy | None:
        """Clip at the norm that gradients would have if every copy's share were as large as the median copy's."""
        weights = self.layer.weights
        copies = [math.hypot(*norms) for norms in zip(*(weight.norms for weight in weights), strict=True)]
        finite = sorted(norm for norm in copies if math.isfinite(norm) and norm > 0)
        if not finite:
            return None
        value = finite[len(finite) // 2] * math.sqrt(len(finite))
        return Remedy(f"clip: torch.nn.utils.clip_grad_norm_(rnn.parameters(), {value:.2g})")
