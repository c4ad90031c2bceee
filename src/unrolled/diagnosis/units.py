"""Units and gates: each copy's step is run once more, on what it received, and its activations are noted.

Saturated is where the slope is under a tenth of its steepest: a sigmoid below 0.026 or above 0.974, a tanh beyond
0.949 on either side, a relu at zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.cells.adapted import gates_of
from unrolled.cells.contract import name_of, state_names
from unrolled.diagnosis.quantiles import quartiles
from unrolled.diagnosis.results import Missing
from unrolled.diagnosis.unit_results import EffectiveMemory, Gate, SpectralRadius, StateNorm, UnitFigures
from unrolled.diagnosis.walk import row_norms
from unrolled.internals import DispatchMode
from unrolled.introspection.copies import Copies, Copy
from unrolled.recording.guards.twin import twin_of
from unrolled.recording.tape import UnrecordableError
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


class _Noticed(DispatchMode):
    """Notes the results of activations, in the order in which they are computed.

    Attributes:
        found: the operation and its result.
        fused: an operation that computes gates where nobody sees them; empty for none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Tensor]] = []
        self.fused = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _OPERATIONS:
            value = result[0].exp() if func is _ATEN.log_sigmoid_forward.default else result.clone()
            self.found.append((_OPERATIONS[func], value))
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
        gates, memory = _gates(copies)
    except UnrecordableError as error:
        missing.append(Missing("units.gates", str(error)))
    if gates_of(cell) is None:
        missing.append(Missing("units.memory", f"which gate of {name_of(cell)} keeps the state is not known"))
    radii = _radii(cell, [int(x.shape[-1]) for x in leaves(copies[0].state) if x.dim() > 1])
    if not radii:
        missing.append(Missing("units.radii", f"{name_of(cell)} has no square parameter as wide as its state"))
    return UnitFigures(gates, memory, _state_norms(copies), radii), missing


def _state_norms(copies: Copies) -> tuple[StateNorm, ...]:
    tensors, structure = flatten(copies[0].next_state)
    names: Sequence[str] = state_names(copies.cell)
    if len(names) != len(tensors):
        names = [f"state{path}" for path in paths(structure)]
    found = []
    for n, name in enumerate(names):
        if tensors[n].is_floating_point() or tensors[n].is_complex():
            each = [(leaves(copy.next_state)[n].detach(), len(copy.rows)) for copy in copies]
            found.append(StateNorm(name, tuple(_mean_norm(x, rows) for x, rows in each)))
    return tuple(found)


def _mean_norm(leaf: Tensor, rows: int) -> float:
    """The mean over rows of a leaf's norm; of a leaf without rows the norm."""
    if leaf.dim() and len(leaf) == rows:
        return float(row_norms([leaf.unsqueeze(0)], rows)[0].mean())
    return float(torch.linalg.vector_norm(leaf.abs(), dtype=torch.float64))


def _radii(cell: nn.Module, widths: Sequence[int]) -> tuple[SpectralRadius, ...]:
    found = []
    gates = gates_of(cell)
    square = [(n, x) for n, x in cell.named_parameters() if x.dim() == 2 and x.shape[0] == x.shape[1] in widths]
    for name, weight in square if gates is None else gates.recurrent_blocks():
        values = weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64).cpu()
        radius = float(torch.linalg.eigvals(values).abs().max()) if values.isfinite().all() else math.nan
        found.append(SpectralRadius(name, radius))
    return tuple(found)


def _gates(copies: Copies) -> tuple[tuple[Gate, ...], tuple[EffectiveMemory, ...]]:
    cell = twin_of(copies.cell)
    tallies: list[_Tally] = []
    with torch.no_grad(), OwnDraws():
        for copy in copies:
            noticed = _activations(cell, copies, copy)
            kinds = [(operation, value.shape[1]) for operation, value in noticed]
            tallies = tallies or [_Tally(*kind) for kind in kinds]
            if kinds != [(tally.operation, tally.units) for tally in tallies]:
                raise UnrecordableError(f"copy {copy.t} computes other activations than copy 0: not one gate for each")
            for tally, (_, value) in zip(tallies, noticed, strict=True):
                tally.add(value)
    names = _names(copies.cell, [tally.operation for tally in tallies])
    gates = tuple(tally.gate(name) for tally, name in zip(tallies, names, strict=True))
    known = gates_of(copies.cell)
    if known is None or known.layout.keeps not in names:
        return gates, ()
    keeps = known.layout.keeps
    return gates, (tallies[names.index(keeps)].memory(keeps, known.layout.keeps_at == "high"),)


def _activations(cell: nn.Module, copies: Copies, copy: Copy) -> list[tuple[str, Tensor]]:
    """The activations of one copy with rows, each `[n, units]`."""
    rows = len(copy.rows)
    with _Noticed() as noticed:
        cell(*copies.arguments(copy))
    if noticed.fused:
        raise UnrecordableError(f"its gates are computed inside of {noticed.fused}; take a cell of this package")
    return [(kind, x.reshape(rows, -1)) for kind, x in noticed.found if x.dim() and x.shape[0] == rows]


def _names(cell: nn.Module, operations: Sequence[str]) -> list[str]:
    known = gates_of(cell)
    if known is not None and len(known.layout.computed) == len(operations):
        return list(known.layout.computed)
    return [f"{kind} {1 + operations[:n].count(kind)}" for n, kind in enumerate(operations)]


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
        many, dead = self.rows * self.units, int(self.always.sum())
        shares = self.low / many, self.high / many
        return Gate(name, self.operation, self.units, tuple(self.saturated), *shares, tuple(self.means), dead)

    def memory(self, name: str, high: bool) -> EffectiveMemory:
        """1 / (1 - mean) of what a gate keeps, at its high end or at its low one."""
        means = self.total / self.rows
        kept = means if high else 1 - means
        mean = float(kept.mean())
        return EffectiveMemory(name, mean, _memory(mean), *quartiles(1 / (1 - kept).clamp_min(0.0)))


def _memory(mean: float) -> float:
    return math.inf if mean >= 1 else 1 / (1 - mean)
