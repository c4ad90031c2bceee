"""Verification: every engine that can run a network here against the reference, values and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from unrolled.autograd_graph import differentiable
from unrolled.engine.witness import neighbours, reals
from unrolled.errors import InputError
from unrolled.lengths import Lengths
from unrolled.networks.base import first_state
from unrolled.networks.layout import Call
from unrolled.networks.torch_layers import TorchLayer, networks_of
from unrolled.networks.unroll import ENGINES, Unrolled
from unrolled.results import Result, aligned
from unrolled.trees import Tree, leaves, map_leaves, named_leaves
from unrolled.unseen import OwnDraws

Trees: TypeAlias = tuple[Tree, ...]
"""Inputs, state and context."""

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
"""How far an engine may be off, relative to the largest entry."""


@dataclass(frozen=True)
class Check(Result):
    """One engine in one precision.

    Attributes:
        engine: the engine that was asked for.
        ran: the engine that ran.
        dtype: the precision.
        error: the largest deviation from the reference, relative to the largest entry of the tensor it is in.
        bound: how large it may be there.
        where: the value or gradient with the largest error in relation to its bound.

    Example:
        >>> Check("native", "native", torch.float64, error=1e-15, bound=1e-10, where="outputs").passed
        True
    """

    engine: str
    ran: str
    dtype: torch.dtype
    error: float
    bound: float
    where: str

    @property
    def passed(self) -> bool:
        """Whether it kept within the bound; NaN does not."""
        return self.error <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, the precision as text, and whether the check passed."""
        return super().to_dict() | {"dtype": str(self.dtype), "passed": self.passed}


@dataclass(frozen=True)
class Verification(Result):
    """All checks of a network; true if all passed. `print` it for a table.

    Example:
        >>> bool(Verification(()))
        True
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every engine gave the reference's numbers."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """`passed` and `checks`."""
        return {"passed": self.passed} | super().to_dict()

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        rows = [("engine", "ran", "dtype", "largest error", "bound", "where", "")]
        for c in self.checks:
            dtype = str(c.dtype).removeprefix("torch.")
            verdict = "ok" if c.passed else "MISMATCH"
            rows.append((c.engine, c.ran, dtype, f"{c.error:.1e}", f"{c.bound:.0e}", c.where, verdict))
        return "\n".join(aligned(rows))


def verify(
    rnn: nn.Module,
    inputs: Tree,
    state: Tree = None,
    *,
    lengths: Lengths = None,
    resets: Tensor | None = None,
    context: Tree = None,
) -> Verification:
    """Compare every engine that can run this network with the reference: outputs, states and all gradients.

    Copies of the network are run in float64 and float32; `.grad`, buffers and random state stay as they are. Where the
    reference itself moves further when its inputs change by one unit in the last place (a chaotic cell, a spike at its
    threshold), the bound is three times that movement.

    Args:
        rnn: what `unroll`, `stack` or `Bidirectional` made, or a `RNN`, `LSTM` or `GRU` layer of this package. Every
            network in it is run by the engine that is compared.
        inputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`), or a PackedSequence.
        state: the state that each row's first copy receives, as `rnn` takes it; by default the cell's own.
        lengths: how many steps each row has, integers `[B]`.
        resets: a bool `[T, B]` (`[B, T]` with `batch_first`): rows that start afresh just before step t.
        context: what a cell with a third argument receives at every step.

    Returns:
        One check for each engine and precision.

    Raises:
        OptionError: if `rnn` is no unrolled network.
        InputError: as the call itself does.

    Example:
        >>> import unrolled as ur
        >>> bool(verify(ur.unroll(ur.GRUCell(3, 4)), torch.randn(5, 2, 3), lengths=[5, 2]))
        True
    """
    networks_of(rnn, "verify")
    if context is not None and isinstance(rnn, TorchLayer):
        raise InputError(f"{type(rnn).__name__} takes no context; leave context= out")
    options = {"lengths": lengths, "resets": resets}
    return Verification(tuple(_checks(rnn, (inputs, state, context), options)))


def _checks(rnn: nn.Module, trees: Trees, options: dict[str, Any]) -> Iterator[Check]:
    for dtype in BOUNDS:
        measured = _Precision(rnn, dtype, trees, options)
        for engine in ENGINES:
            if engine not in ("auto", "reference"):
                yield measured.check(engine)


class _Values(NamedTuple):
    """What one run gave.

    Attributes:
        ran: the engines that ran.
        values: every value and gradient by its name.
    """

    ran: str
    values: list[tuple[str, Tensor]]


class _Precision:
    """One call of a network in one precision, run by any engine.

    Attributes:
        truth: the reference's values.
        bounds: how far an engine may be off in each of them: a given share, or three times as far as the reference
            moves where its inputs change in their last digit.
    """

    def __init__(self, rnn: nn.Module, dtype: torch.dtype, trees: Trees, options: dict[str, Any]) -> None:
        self.rnn, self.dtype, self.options = rnn, dtype, options
        self.trees = tuple(map_leaves(self._converted, tree) for tree in trees)
        self.truth = self._run("reference", self.trees).values
        moved = self._run("reference", tuple(map_leaves(_neighbour, tree) for tree in self.trees)).values
        movements = [_error(a, b) for (_, a), (_, b) in zip(moved, self.truth, strict=True)]
        self.bounds = [max(BOUNDS[dtype], 3 * movement) for movement in movements]

    def check(self, engine: str) -> Check:
        """Compare one engine with the reference, and report the value that is farthest off for its bound."""
        ran, values = self._run(engine, self.trees)
        errors = [_error(found, true) for (_, found), (_, true) in zip(values, self.truth, strict=True)]
        ratios = [error / bound for error, bound in zip(errors, self.bounds, strict=True)]
        worst = max(range(len(errors)), key=lambda i: (math.isnan(errors[i]), ratios[i]))
        return Check(engine, ran, self.dtype, errors[worst], self.bounds[worst], self.truth[worst][0])

    def _run(self, engine: str, trees: Trees) -> _Values:
        network = copy.deepcopy(self.rnn)._apply(lambda tensor: tensor.to(self._dtype_of(tensor)))
        whole = network.network if isinstance(network, TorchLayer) else network
        parts = [module for module in whole.modules() if isinstance(module, Unrolled)]
        for part in parts:
            part.run_by(engine, quiet=True)
        inputs, state, context = (map_leaves(lambda x: x.detach().requires_grad_(x.requires_grad), t) for t in trees)
        options = self.options if context is None else self.options | {"context": context}
        # An initial state may be drawn at random: every run draws the same one.
        with OwnDraws():
            start = state
            if state is None and isinstance(network, Unrolled) and any(True for _ in network.parameters()):
                start = self._own_state(network, inputs, options)
            outputs, last = network(inputs, start, **options)
        found = [*named_leaves(outputs, "outputs"), *named_leaves(last, "state")]
        owner = network.cell if isinstance(network, Unrolled) else network
        by = [
            *named_leaves(inputs, "inputs.grad"),
            *named_leaves(state, "initial state.grad"),
            *named_leaves(context, "context.grad"),
            *((f"{name}.grad", weight) for name, weight in owner.named_parameters()),
        ]
        found += _gradients(found, [(name, tensor) for name, tensor in by if tensor.requires_grad])
        ran = ", ".join(dict.fromkeys(part.ran for part in parts))
        return _Values(ran, [(name, tensor.detach()) for name, tensor in found])

    def _own_state(self, network: Unrolled, inputs: Tree, options: dict[str, Any]) -> Tree:
        """The cell's initial state in this precision, where the cell makes it in another one whatever it is asked."""
        call = Call.of(
            inputs, lengths=options["lengths"], context=options.get("context"), batch_first=network.batch_first
        )
        state = first_state(network, call)
        if all(x.dtype == self._dtype_of(x) for x in leaves(state)):
            return None
        return map_leaves(lambda x: x.to(self._dtype_of(x)), state)

    def _converted(self, tensor: Tensor) -> Tensor:
        if not differentiable(tensor):
            return tensor.detach().clone()
        return tensor.detach().to(self._dtype_of(tensor), copy=True).requires_grad_()

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        """What a tensor is in this precision: a complex number is two of its reals, an integer stays one."""
        if tensor.is_complex():
            return self.dtype.to_complex()
        return self.dtype if tensor.is_floating_point() else tensor.dtype


def _neighbour(tensor: Tensor) -> Tensor:
    """The next number in every entry, up and down in turn."""
    if not differentiable(tensor):
        return tensor
    moved = neighbours(reals(tensor.detach()))
    return (torch.view_as_complex(moved) if tensor.is_complex() else moved).requires_grad_()


def _gradients(results: list[tuple[str, Tensor]], by: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The gradients of a loss that takes something else of every entry of the results."""
    loss: Any = 0
    for result in (reals(tensor) for _, tensor in results if tensor.requires_grad):
        shares = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype, device=result.device)
        loss = loss + (shares.view(result.shape) * result).sum()
    if not isinstance(loss, Tensor) or not by:
        return []
    grads = torch.autograd.grad(loss, [tensor for _, tensor in by], allow_unused=True)
    return [(name, torch.zeros_like(x) if g is None else g) for (name, x), g in zip(by, grads, strict=True)]


def _error(found: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest entry; infinite where NaN or infinity stand elsewhere."""
    if not differentiable(truth):
        return 0.0 if torch.equal(found, truth) else math.inf
    found, truth = reals(found), reals(truth)
    if not torch.equal(found.isfinite(), truth.isfinite()):
        return math.inf
    if not truth.numel():
        return 0.0
    difference, largest = (float(x.nan_to_num(0.0, 0.0, 0.0).abs().max()) for x in (found - truth, truth))
    return difference / largest if largest else (0.0 if difference == 0 else math.inf)
