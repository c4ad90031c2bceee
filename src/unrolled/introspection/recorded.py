"""What the copies of one unrolled network share: the weights, the doors, and whether there are gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from unrolled.autograd_graph import leaves_behind
from unrolled.bptt.truncation import Truncation
from unrolled.cells.adapted import parameter_names
from unrolled.errors import GradientError
from unrolled.introspection.taps import GradientTap, TappedTree, leads_to, pass_through
from unrolled.networks.layout import BatchLayout
from unrolled.trees import Tree, unflatten


class RecordedRun:
    """What all the copies of one unrolled network share.

    Args:
        cell: the cell.
        given: how the caller gave the batch.
        listener: what remembers gradients; several networks may have one.
        state: the state of the caller's rows, `[B, ...]`.
        fresh: the state that rows are reset to, or None where there are no resets.
        context: what the cell receives at every step, with the caller's rows, or None.
        reverse: whether the last copy comes first.
        own_state: whether `state` was made by the cell and not by the caller.

    Attributes:
        initial: the door of `state`.
        first: its rows as engines see them.
        order: which row of the caller's each of these is.
        no_outputs: what a run without any step gives out.
        truncation: how far gradients flow back in a call of the network; copies show the whole.
    """

    def __init__(
        self,
        cell: nn.Module,
        given: BatchLayout,
        listener: GradientTap,
        state: Tree,
        fresh: Tree,
        context: Tree,
        *,
        reverse: bool,
        own_state: bool,
    ) -> None:
        self.cell, self.given, self.listener, self.reverse = cell, given, listener, reverse
        self.truncation: Truncation | None = None
        self.trained = {name: p for name, p in cell.named_parameters() if p.requires_grad}
        self.paths = {name: path for name, path in parameter_names(cell).items() if path in self.trained}
        self.weights = {name: self.trained[path] for name, path in self.paths.items()}
        self.no_outputs: Tree = None
        (self.initial,) = self.through_door(state)
        self.first = given.rows(self.initial.tree)
        self.order = given.rows(torch.arange(given.batch))
        self.fresh = None if fresh is None else self.through_door(given.rows(fresh))[0]
        self.context = None if context is None else self.through_door(given.rows(context))[0]
        made = [self.initial] if own_state else []
        self.made = made if self.fresh is None else [*made, self.fresh]
        self._norms: dict[int, dict[str, Tensor]] = {}
        self._norms_of = 0

    @property
    def norms(self) -> dict[int, dict[str, Tensor]]:
        """The norms of shares by t, as far as they were asked for since the last backward pass."""
        if self._norms_of != self.listener.backwards:
            self._norms, self._norms_of = {}, self.listener.backwards
        return self._norms

    def through_door(self, *trees: Tree) -> list[TappedTree]:
        """Lead trees through one door."""
        return pass_through(self.listener, *trees)


class Received:
    """A state as a copy is handed it: rows of the copy before it, and the initial state of rows that begin.

    Args:
        parts: where the rows come from, and which ones they are there; None for all.
    """

    def __init__(self, *parts: tuple[TappedTree, Tensor | slice | None]) -> None:
        self._parts = parts

    @property
    def grad_tree(self) -> Tree:
        """The gradients that came back to it."""
        columns = zip(*(_rows(passage.filled, rows) for passage, rows in self._parts), strict=True)
        grads = [None if column[0] is None else _joined(column) for column in columns]
        return unflatten(self._parts[0][0].structure, grads)


def _rows(grads: list[Tensor | None], rows: Tensor | slice | None) -> list[Tensor | None]:
    return grads if rows is None else [None if grad is None else grad[rows] for grad in grads]


def _joined(column: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(column) if len(column) > 1 else column[0]


def backward_through(listener: GradientTap, loss: Tensor, gradient: Tensor | None) -> None:
    """Run `loss.backward(gradient)`, and remember what passes the doors of some copies.

    Raises:
        GradientError: if the loss has no gradient, is no scalar and comes without one, or is not of these copies.
    """
    _check_loss(listener, loss, gradient)
    listener.remember(lambda: loss.backward(gradient, retain_graph=True))


def observe(listener: GradientTap, loss: Tensor) -> dict[Tensor, Tensor]:
    """Remember what a backward pass sends through the doors of some copies, and leave every `.grad` as it is.

    Returns:
        The leaves that the loss depends on, each with its gradient.

    Raises:
        GradientError: as `backward_through`.
    """
    _check_loss(listener, loss, None)
    by = leaves_behind([loss])
    found: dict[Tensor, Tensor] = {}

    def backward() -> None:
        # By all leaves, so that no door is left out: autograd runs only what leads to something asked for.
        grads = torch.autograd.grad(loss, by, retain_graph=True, allow_unused=True)
        found.update((leaf, grad) for leaf, grad in zip(by, grads, strict=True) if grad is not None)

    listener.remember(backward)
    return found


def _check_loss(listener: GradientTap, loss: Tensor, gradient: Tensor | None) -> None:
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise GradientError(
            "the loss has no gradient; compute it from copies.outputs, or from a copy's output or state, "
            "with gradients enabled"
        )
    if gradient is None and loss.numel() != 1:
        raise GradientError(
            f"the loss must be a scalar, got shape {list(loss.shape)}; take its .sum() or .mean(), or pass gradient"
        )
    if gradient is not None and gradient.shape != loss.shape:
        raise GradientError(f"gradient must have the loss's shape {list(loss.shape)}, got {list(gradient.shape)}")
    if not leads_to([loss], listener):
        raise GradientError(
            "the loss does not depend on these copies; compute it from their outputs or states, not of another run"
        )


class Shares(Mapping[str, Tensor]):
    """Parameter names to tensors that are computed when asked for."""

    def __init__(self, network: RecordedRun, title: str, compute: Callable[[str], Tensor]) -> None:
        network.listener.require_backward()
        self._names, self._title, self._compute = tuple(network.weights), title, compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            known = ", ".join(self._names) or "none"
            raise KeyError(f"{name!r} is not a trained parameter of the cell; these are: {known}")
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"{self._title}: {', '.join(self._names)}"
