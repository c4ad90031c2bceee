"""Units and gates: each copy's step is run once more, on what it received, and its activations are noted.

Saturated is where the slope is under a tenth of its steepest: a sigmoid below 0.026 or above 0.974, a tanh beyond
0.949 on either side, a relu at zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unrolled.autograd_graph import differentiable
from unrolled.cells.adapted import gates_of
from unrolled.cells.contract import name_of, state_names
from unrolled.diagnosis.figures import EffectiveMemory, Gate, SpectralRadius, StateNorm, UnitFigures
from unrolled.diagnosis.results import Missing
from unrolled.diagnosis.statistics import norm, quartiles, row_norms
from unrolled.internals import DispatchMode
from unrolled.introspection.copies import Copies
from unrolled.introspection.single_copy import Copy
from unrolled.recording.events import UnrecordableError
from unrolled.recording.guards.twin import twin_of
from unrolled.trees import flatten, leaves, paths
from unrolled.unseen import OwnDraws

_ATEN = torch.ops.aten
_OPERATIONS = {
    _ATEN.sigmoid.default: "sigmoid",
    _ATEN.sigmoid_.default: "sigmoid",
    _ATEN.log_sigmoid_forward.default: "sigmoid",
    _ATEN.tanh.default: "tanh",
    _ATEN.tanh_.default: "tanh",
    _ATEN.relu.default: "relu",
    _ATEN.relu_.default: "relu",
}
_TENTH = math.sqrt(0.9)  # where a tanh's slope, 1 - y^2, is a tenth; a sigmoid is a tanh of half the size, moved up
_ENDS = {"sigmoid": ((1 - _TENTH) / 2, (1 + _TENTH) / 2), "tanh": (-_TENTH, _TENTH), "relu": (0.0, math.inf)}


class _Activation(NamedTuple):
    operation: str
    value: Tensor


class _ActivationMode(DispatchMode):
    """Notes the results of activations, in the order in which they are computed.

    Attributes:
        found: the activations.
        fused: an operation that computes gates where nobody sees them; empty for none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Activation] = []
        self.fused = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _OPERATIONS:
            value = result[0].exp() if func is _ATEN.log_sigmoid_forward.default else result.clone()
            self.found.append(_Activation(_OPERATIONS[func], value))
        elif "fused" in str(func):
            self.fused = str(func)
        return result


def unit_figures(copies: Copies) -> tuple[UnitFigures, list[Missing]]:
    """The gates, units and state norms of one network's copies, and what could not be measured.

    Args:
        copies: all copies of one run.
    """
    cell, missing = copies.cell, list[Missing]()
    gates: tuple[Gate, ...] = ()
    memory: tuple[EffectiveMemory, ...] = ()
    try:
        gates, memory = _gate_figures(copies)
    except UnrecordableError as error:
        missing.append(Missing("units.gates", str(error)))
    if gates_of(cell) is None:
        missing.append(Missing("units.memory", f"which gate of {name_of(cell)} keeps the state is not known"))
    radii = _spectral_radii(cell, [int(x.shape[-1]) for x in leaves(copies[0].state) if x.dim() > 1])
    if not radii:
        missing.append(Missing("units.radii", f"{name_of(cell)} has no square parameter as wide as its state"))
    return UnitFigures(gates, memory, _state_norms(copies), radii), missing


def _state_norms(copies: Copies) -> tuple[StateNorm, ...]:
    tensors, structure = flatten(copies[0].next_state)
    names: Sequence[str] = state_names(copies.cell)
    if len(names) != len(tensors):
        names = [f"state{path}" for path in paths(structure)]

    def mean_norm(copy: Copy, n: int) -> float:
        """The mean over rows of a leaf's norm; of a leaf without rows the norm."""
        leaf, rows = leaves(copy.next_state)[n].detach(), len(copy.rows)
        by_row = leaf.dim() and len(leaf) == rows
        return float(row_norms([leaf.unsqueeze(0)], rows)[0].mean()) if by_row else norm(leaf)

    return tuple(
        StateNorm(name, tuple(mean_norm(copy, n) for copy in copies))
        for n, name in enumerate(names)
        if differentiable(tensors[n])
    )


def _spectral_radii(cell: nn.Module, widths: Sequence[int]) -> tuple[SpectralRadius, ...]:
    """Those of the recurrent weights; of a cell that names none, of every square parameter as wide as its state."""
    gates, found = gates_of(cell), []
    square = [(n, x) for n, x in cell.named_parameters() if x.dim() == 2 and x.shape[0] == x.shape[1] in widths]
    for name, weight in square if gates is None else gates.recurrent_blocks():
        values = weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64).cpu()
        radius = float(torch.linalg.eigvals(values).abs().max()) if values.isfinite().all() else math.nan
        found.append(SpectralRadius(name, radius))
    return tuple(found)


def _gate_figures(copies: Copies) -> tuple[tuple[Gate, ...], tuple[EffectiveMemory, ...]]:
    cell = twin_of(copies.cell)
    tallies: list[_Tally] = []
    with torch.no_grad(), OwnDraws():
        for copy in copies:
            activations = _activations(cell, copies, copy)
            kinds = [(operation, value.shape[1]) for operation, value in activations]
            tallies = tallies or [_Tally(*kind) for kind in kinds]
            if kinds != [(tally.operation, tally.units) for tally in tallies]:
                raise UnrecordableError(f"copy {copy.t} computes other activations than copy 0: not one gate for each")
            for tally, activation in zip(tallies, activations, strict=True):
                tally.add(activation.value)
    operations, gates = [tally.operation for tally in tallies], gates_of(copies.cell)
    names: Sequence[str] = gates.layout.computed if gates else ()
    if len(names) != len(tallies):
        names = [f"{kind} {1 + operations[:n].count(kind)}" for n, kind in enumerate(operations)]
    found = tuple(tally.gate(name) for tally, name in zip(tallies, names, strict=True))
    keeps = gates.layout.keeps if gates else None
    if gates is None or keeps is None or keeps not in names:
        return found, ()
    return found, (tallies[names.index(keeps)].memory(keeps, gates.layout.keeps_at),)


def _activations(cell: nn.Module, copies: Copies, copy: Copy) -> list[_Activation]:
    """The activations of one copy with rows, each `[n, units]`."""
    rows = len(copy.rows)
    with _ActivationMode() as mode:
        cell(*copies.arguments(copy))
    if mode.fused:
        raise UnrecordableError(f"its gates are computed inside of {mode.fused}; take a cell of this package")
    by_row = [(kind, x) for kind, x in mode.found if x.dim() and x.shape[0] == rows]
    return [_Activation(kind, x.reshape(rows, -1)) for kind, x in by_row]


class _Tally:
    """What is counted of one gate, copy by copy."""

    def __init__(self, operation: str, units: int) -> None:
        self.operation, self.units = operation, units
        self.saturated: list[float] = []
        self.means: list[float] = []
        self.low = self.high = self.rows = 0
        self.always = torch.ones(units, dtype=torch.bool)
        self.total = torch.zeros(units, dtype=torch.float64)

    def add(self, value: Tensor) -> None:
        """Count one copy's values, `[n, units]`."""
        value = value.double().cpu()
        bottom, top = _ENDS[self.operation]
        low, high = value <= bottom, value >= top
        ends = low | high
        self.low, self.high = self.low + int(low.sum()), self.high + int(high.sum())
        self.rows += len(value)
        self.saturated.append(float(ends.double().mean()))
        self.means.append(float(value.mean()))
        self.always &= ends.all(0)
        self.total += value.sum(0)

    def gate(self, name: str) -> Gate:
        """The figures."""
        entries, dead = self.rows * self.units, int(self.always.sum())
        shares = self.low / entries, self.high / entries
        return Gate(name, self.operation, self.units, tuple(self.saturated), *shares, tuple(self.means), dead)

    def memory(self, name: str, keeps_at: str) -> EffectiveMemory:
        """1 / (1 - mean) of what a gate keeps, at its high end or at its low one."""
        means = self.total / self.rows
        kept = means if keeps_at == "high" else 1 - means
        mean = float(kept.mean())
        steps = math.inf if mean >= 1 else 1 / (1 - mean)
        return EffectiveMemory(name, mean, steps, *quartiles(1 / (1 - kept).clamp_min(0.0)))
