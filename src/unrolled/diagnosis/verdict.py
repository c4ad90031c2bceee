"""The verdict: rules over the figures, each with the remedies that apply to the network.

All thresholds are here. What a rule does not find is not said: a network that no rule catches is healthy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from torch import nn

from unrolled import remedy
from unrolled.cells.adapted import gates_of
from unrolled.diagnosis.results import KINDS, Finding, LayerDiagnosis, Reach, Remedy, Verdict
from unrolled.diagnosis.unit_results import Gate

LEFT = 0.001
"""Vanishing: the share of a gradient below which it counts as gone ..."""

QUARTER = 0.25
"""... after this share of the steps that gradients flow back through. Less would call short memories healthy that
could not link the first half of a sequence to its end; more would ask of every network to remember all it has read."""

GROWN = 100.0
"""Exploding, chaotic: by how much gradients, or tangents, grow over the steps measured. A network at the edge (an
orthogonal one, a cell that adds up) moves by a small factor either way."""

SURE = 2.0
"""Chaotic: by how many standard errors a Lyapunov exponent must be above zero."""

BOUNDED = 0.5
"""Chaotic, and not merely growing: the state's norm grows at less than this share of the exponent."""

SATURATED = 0.5
"""Saturated: the share of a gate's entries, or of dead units."""

CUT = 0.1
"""Cut by truncation: the share of a gradient that is left where the horizon ends it."""


def verdict_of(layers: Sequence[LayerDiagnosis], cells: Sequence[nn.Module], horizon: int | None) -> Verdict:
    """Apply the rules.

    Args:
        layers: the figures, layer by layer.
        cells: the cell of each.
        horizon: how many copies gradients flow back through in training; None for all.
    """
    found = [finding for layer, cell in zip(layers, cells, strict=True) for finding in _findings(layer, cell, horizon)]
    if not found:
        found = [_healthy(layers, horizon) if any(map(_flows, layers)) else Finding("vanishing", _NO_GRADIENT)]
    return Verdict(tuple(sorted(found, key=lambda finding: KINDS.index(finding.kind))))


_NO_GRADIENT = "no gradient at all reaches any copy: the loss does not change with the outputs, or its slope is zero"


def _flows(layer: LayerDiagnosis) -> bool:
    return layer.lag is not None or any((*layer.flow.norms, *(share.norm for share in layer.weights)))


def _findings(layer: LayerDiagnosis, cell: nn.Module, horizon: int | None) -> Iterator[Finding]:
    rules = (_chaotic(layer, cell), _exploding(layer, cell), _vanishing(layer, cell, horizon))
    yield from _there(*rules, _saturated(layer, cell), _cut(layer, horizon))


def _there(*findings: Finding | None) -> Iterable[Finding]:
    return (finding for finding in findings if finding is not None)


def _chaotic(layer: LayerDiagnosis, cell: nn.Module) -> Finding | None:
    found = layer.lyapunov
    if found is None or not found.exponents or not found.exponents[0] > SURE * found.errors[0]:
        return None
    leading = found.exponents[0]
    if leading * found.steps < math.log(GROWN) or _state_growth(layer) > BOUNDED * leading:
        return None
    sentence = (
        f"two states that differ a little differ {math.exp(leading):.3g} times as much after each step (leading "
        f"Lyapunov exponent {leading:+.3g} per step, standard error {found.errors[0]:.1g}), in a bounded state"
    )
    remedies = [_orthogonal(cell), _gated(cell), _clip(layer), _shorter(layer, round(math.log(GROWN) / leading))]
    return Finding("chaotic", sentence, tuple(_remedies(remedies)), layer.name)


def _state_growth(layer: LayerDiagnosis) -> float:
    """The rate at which the state's norm grows over the second half of the steps, per step."""
    whole = [math.hypot(*norms) for norms in zip(*(state.norms for state in layer.units.states), strict=True)]
    half = whole[len(whole) // 2 :]
    if len(half) < 2 or not half[0] > 0 or not math.isfinite(half[-1]):
        return 0.0 if half and half[-1] == 0 else math.inf
    return math.log(half[-1] / half[0]) / (len(half) - 1) if half[-1] > 0 else 0.0


def _exploding(layer: LayerDiagnosis, cell: nn.Module) -> Finding | None:
    if layer.lag is None:
        return None
    worst = next((n for n, kept in enumerate(layer.lag.kept) if kept >= GROWN), None)
    if worst is None:
        return None
    doubling = layer.reach.doubling if layer.reach else math.inf
    growth = f"doubling every {doubling:.3g} steps" if math.isfinite(doubling) else "not by a constant rate"
    sentence = (
        f"after {layer.lag.lags[worst]} copies gradients are {layer.lag.kept[worst]:.3g} times as large, {growth}"
    )
    remedies = [_clip(layer), _orthogonal(cell), _gated(cell), _shorter(layer, layer.lag.lags[worst])]
    return Finding("exploding", sentence, tuple(_remedies(remedies)), layer.name)


def _vanishing(layer: LayerDiagnosis, cell: nn.Module, horizon: int | None) -> Finding | None:
    if layer.lag is None or layer.reach is None:
        return None
    flows = _flows_back(layer.reach, horizon)
    gone = layer.reach.thousandth
    if gone is None or gone > flows * QUARTER:
        return None
    if layer.lag.median[0] == 0:
        return Finding("vanishing", "no gradient passes a single copy", tuple(_remedies([_gated(cell)])), layer.name)
    pace = f"halve every {layer.reach.halving:.3g} steps" if layer.reach.rate < 0 else "fall"
    sentence = (
        f"gradients {pace}: a tenth is left after {layer.reach.tenth} copies, "
        f"{LEFT:g} after {gone}, of {flows} that they flow back through; that matters to what is to link steps farther "
        "apart"
    )
    remedies = [*_memory(cell, flows), _orthogonal(cell), _identity(cell, layer), _gated(cell), _shorter(layer, gone)]
    return Finding("vanishing", sentence, tuple(_remedies(remedies)), layer.name)


def _saturated(layer: LayerDiagnosis, cell: nn.Module) -> Finding | None:
    bad = [(gate, share) for gate in layer.units.gates if (share := _harmful(gate, cell)) > SATURATED]
    if not bad:
        return None
    told = ", ".join(f"{share:.0%} of {gate.name} ({gate.operation})" for gate, share in bad)
    sentence = f"{told} saturated, where next to no gradient passes; {layer.units.dead} units so in every row and step"
    remedies = [
        Remedy("layer normalisation in the cell: LayerNormLSTMCell"),
        Remedy("smaller inputs: standardise them, or scale weight_ih down"),
        _orthogonal(cell),
    ]
    return Finding("saturated", sentence, tuple(_remedies(remedies)), layer.name)


def _harmful(gate: Gate, cell: nn.Module) -> float:
    """The share of a gate's entries that are saturated and should not be.

    A gate that leaves the state alone is saturated on purpose where it remembers; half of a relu's entries are zero by
    design, so of that only units that are always zero count.
    """
    if gate.operation == "relu":
        return gate.dead / gate.units
    gates = gates_of(cell)
    idle = gates.layout.idle_end(gate.name) if gates else None
    return gate.share - (gate.high if idle == "high" else gate.low if idle == "low" else 0.0)


def _cut(layer: LayerDiagnosis, horizon: int | None) -> Finding | None:
    if horizon is None or layer.lag is None or layer.reach is None or horizon >= layer.reach.measured:
        return None
    left = layer.lag.kept[horizon - 1]
    if not left > CUT:
        return None
    farther = layer.reach.tenth or layer.reach.measured
    sentence = f"after the horizon of {horizon} copies {left:.0%} of the gradient is left, and is cut off"
    return Finding("cut by truncation", sentence, (Remedy(f"a longer horizon: horizon={farther}"),), layer.name)


def _flows_back(reach: Reach, horizon: int | None) -> int:
    """How many copies gradients flow back through in training, as far as was measured."""
    return min(reach.measured, horizon or reach.measured)


def _healthy(layers: Sequence[LayerDiagnosis], horizon: int | None) -> Finding:
    """What is left of a gradient at the distance over which a vanishing one would be gone, by the same rule."""
    told = []
    for reach in (layer.reach for layer in layers if layer.reach is not None and layer.reach.measured > 1):
        flows = _flows_back(reach, horizon)
        if reach.tenth and reach.tenth < flows:
            told.append(
                f"a tenth of the gradient is left after {reach.tenth} copies, more than {LEFT:g} after a quarter of "
                f"the {flows} that it flows back through"
            )
        else:
            told.append(
                f"more than a tenth of the gradient is left after all {flows} copies that it flows back through"
            )
    return Finding("healthy", "; ".join(dict.fromkeys(told)) or "no rule says otherwise")


def _remedies(remedies: Sequence[Remedy | None]) -> list[Remedy]:
    return [one for one in remedies if one is not None]


def _memory(cell: nn.Module, steps: int) -> list[Remedy]:
    if not remedy.can_set_keeping_bias(cell):
        return []
    steps = max(steps, 3)
    return [
        Remedy(f"chrono initialisation: ur.remedy.chrono(rnn, {steps})", partial(remedy.chrono, cell, steps)),
        Remedy("forget-gate bias: ur.remedy.forget_bias(rnn, 1.0)", partial(remedy.forget_bias, cell, 1.0)),
    ]


def _orthogonal(cell: nn.Module) -> Remedy | None:
    if not remedy.settable_recurrent(cell):
        return None
    return Remedy("orthogonal recurrent weights: ur.remedy.orthogonal(rnn)", partial(remedy.orthogonal, cell))


def _identity(cell: nn.Module, layer: LayerDiagnosis) -> Remedy | None:
    if gates_of(cell) is None or not any(gate.operation == "relu" for gate in layer.units.gates):
        return None
    return Remedy("identity recurrent weights: ur.remedy.identity(rnn)", partial(remedy.identity, cell))


def _gated(cell: nn.Module) -> Remedy | None:
    gates = gates_of(cell)
    if gates is not None and gates.layout.keeps is not None:
        return None
    return Remedy("a gated cell: LSTMCell, GRUCell")


def _shorter(layer: LayerDiagnosis, reach: int) -> Remedy | None:
    if layer.lag is None or not 1 <= reach < layer.lag.lags[-1]:
        return None
    return Remedy(f"a shorter horizon costs less memory: unroll(cell, horizon={reach})")


def _clip(layer: LayerDiagnosis) -> Remedy | None:
    """Clip at the norm that gradients would have if every copy's share were as large as the median copy's."""
    copies = [math.hypot(*norms) for norms in zip(*(weight.norms for weight in layer.weights), strict=True)]
    finite = sorted(norm for norm in copies if math.isfinite(norm) and norm > 0)
    if not finite:
        return None
    value = finite[len(finite) // 2] * math.sqrt(len(finite))
    return Remedy(f"clip: torch.nn.utils.clip_grad_norm_(rnn.parameters(), {value:.2g})")
