"""Verification: every engine that can run a network here against the reference, values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from unrolled.engine.witness import neighbours, reals
from unrolled.errors import InputError, OptionError
from unrolled.lengths import Lengths
from unrolled.networks.base import first_state
from unrolled.networks.layered import Layered
from unrolled.networks.layout import Call
from unrolled.networks.torch_layers import TorchLayer
from unrolled.networks.unroll import ENGINES, Unrolled
from unrolled.results import Result, aligned
from unrolled.trees import Tree, flatten, leaves, map_leaves, paths
from unrolled.unseen import OwnDraws

Trees: TypeAlias = tuple[Tree, Tree, Tree]
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
    if not isinstance(rnn, Unrolled | Layered | TorchLayer):
        raise OptionError(
            f"verify takes what unroll or stack made, got a {type(rnn).__name__}; wrap its cell: ur.unroll(cell)"
        )
    if context is not None and isinstance(rnn, TorchLayer):
        raise InputError(f"{type(rnn).__name__} takes no context; leave context= out")
    options = {"lengths": lengths, "resets": resets}
    return Verification(tuple(_checks(rnn, (inputs, state, context), options)))


def _checks(rnn: nn.Module, trees: Trees, options: dict[str, Any]) -> Iterator[Check]:
    for dtype in BOUNDS:
        given = tuple(map_leaves(lambda x, to=dtype: _leaf(x, to), tree) for tree in trees)
        truth = _run(rnn, "reference", dtype, given, options)[1]
        nudged = _run(rnn, "reference", dtype, tuple(map_leaves(_nudged, tree) for tree in given), options)[1]
        movement = [_error(a, b) for (_, a), (_, b) in zip(nudged, truth, strict=True)]
        bounds = [max(BOUNDS[dtype], 3 * moved) for moved in movement]
        for engine in ENGINES:
            if engine not in ("auto", "reference"):
                ran, found = _run(rnn, engine, dtype, given, options)
                yield _worst(engine, ran, dtype, found, truth, bounds)


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.detach().clone()
    return tensor.detach().to(_of_kind(tensor, dtype), copy=True).requires_grad_()


def _of_kind(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is in a precision: a complex number is two of its reals, an integer stays one."""
    if tensor.is_complex():
        return dtype.to_complex()
    return dtype if tensor.is_floating_point() else tensor.dtype


def _nudged(tensor: Tensor) -> Tensor:
    """The next number in every entry, up and down in turn."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    nudged = neighbours(reals(tensor.detach()))
    return (torch.view_as_complex(nudged) if tensor.is_complex() else nudged).requires_grad_()


def _run(
    rnn: nn.Module, engine: str, dtype: torch.dtype, given: Trees, options: dict[str, Any]
) -> tuple[str, list[tuple[str, Tensor]]]:
    """The engines that ran, and every value and gradient by its name."""
    network = copy.deepcopy(rnn)._apply(lambda tensor: tensor.to(_of_kind(tensor, dtype)))
    parts = _networks_in(network)
    for part in parts:
        part.run_by(engine, quiet=True)
    inputs, state, context = (map_leaves(lambda x: x.detach().requires_grad_(x.requires_grad), tree) for tree in given)
    if context is not None:
        options = options | {"context": context}
    # An initial state may be drawn at random: every run draws the same one.
    with OwnDraws():
        start = state
        if state is None and isinstance(network, Unrolled) and any(True for _ in network.parameters()):
            start = _own_state(network, inputs, options, dtype)
        outputs, last = network(inputs, start, **options)
    found = [*_named("outputs", outputs), *_named("state", last)]
    ends = [reals(tensor) for _, tensor in found if tensor.requires_grad]
    loss = sum((_weights(tensor) * tensor).sum() for tensor in ends)
    by = [
        *_named("inputs.grad", inputs),
        *_named("initial state.grad", state),
        *_named("context.grad", context),
        *((f"{name}.grad", parameter) for name, parameter in _owner(network).named_parameters()),
    ]
    by = [(name, tensor) for name, tensor in by if tensor.requires_grad]
    if isinstance(loss, Tensor) and by:
        grads = torch.autograd.grad(loss, [tensor for _, tensor in by], allow_unused=True)
        found += [(n, torch.zeros_like(x) if g is None else g) for (n, x), g in zip(by, grads, strict=True)]
    return ", ".join(dict.fromkeys(part.ran for part in parts)), [(name, tensor.detach()) for name, tensor in found]


def _own_state(network: Unrolled, inputs: Tree, options: dict[str, Any], dtype: torch.dtype) -> Tree:
    """The cell's own initial state in this precision, where the cell makes it in another one whatever it is asked."""
    call = Call.of(inputs, lengths=options["lengths"], context=options.get("context"), batch_first=network.batch_first)
    state = first_state(network, call)
    if all(x.dtype == _of_kind(x, dtype) for x in leaves(state)):
        return None
    return map_leaves(lambda x: x.to(_of_kind(x, dtype)), state)


def _networks_in(rnn: nn.Module) -> list[Unrolled]:
    """The unrolled networks that a module is made of, in the order in which they run."""
    whole = rnn.network if isinstance(rnn, TorchLayer) else rnn
    return [module for module in whole.modules() if isinstance(module, Unrolled)]


def _owner(rnn: nn.Module) -> nn.Module:
    """What has the parameters under the names that a user knows."""
    return rnn.cell if isinstance(rnn, Unrolled) else rnn


def _named(title: str, tree: Tree) -> list[tuple[str, Tensor]]:
    tensors, structure = flatten(tree)
    return [(title + path, tensor) for path, tensor in zip(paths(structure), tensors, strict=True)]


def _weights(tensor: Tensor) -> Tensor:
    """A loss that takes something else of every entry."""
    return torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype, device=tensor.device).view(tensor.shape)


def _error(found: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest entry; infinite where NaN or infinity stand elsewhere."""
    if not (truth.is_floating_point() or truth.is_complex()):
        return 0.0 if torch.equal(found, truth) else float("inf")
    found, truth = reals(found), reals(truth)
    if not torch.equal(found.isfinite(), truth.isfinite()):
        return float("inf")
    apart = float((found - truth).nan_to_num(0.0, 0.0, 0.0).abs().max()) if truth.numel() else 0.0
    largest = float(truth.nan_to_num(0.0, 0.0, 0.0).abs().max()) if truth.numel() else 0.0
    return apart / largest if largest else (0.0 if apart == 0 else float("inf"))


def _worst(
    engine: str,
    ran: str,
    dtype: torch.dtype,
    found: Sequence[tuple[str, Tensor]],
    truth: Sequence[tuple[str, Tensor]],
    bounds: Sequence[float],
) -> Check:
    errors = [_error(ours, theirs) for (_, ours), (_, theirs) in zip(found, truth, strict=True)]
    ratios = [error / bound for error, bound in zip(errors, bounds, strict=True)]
    worst = max(range(len(errors)), key=lambda i: (errors[i] != errors[i], ratios[i]))
    return Check(engine, ran, dtype, errors[worst], bounds[worst], truth[worst][0])
