"""Doors: where a tree of tensors enters or leaves a copy, and where the gradients that come back are remembered.

A door is one autograd node, the identity on values and on gradients. Every copy has a door in (its input, its state and
its aliases of the weights) and a door out (its output and its next state). Between the two lies exactly one copy, so a
copy's share of a weight's gradient is the derivative from its door out to its door in.

That derivative costs the same at every t: autograd does not look beyond nodes nearer to the leaves than the one asked
for, and a door in is farther from them than all earlier copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.autograd_graph import nodes_behind
from unrolled.errors import GradientError
from unrolled.trees import Tree, flatten, unflatten


class GradientTap:
    """What remembers the gradients that pass some doors: only those of `Copies.backward`, not of any other pass.

    Attributes:
        listening: whether what passes is remembered.
        backwards: how many passes have been remembered.
    """

    def __init__(self) -> None:
        self.listening = False
        self.backwards = 0
        self._remembered: list[list[Tensor | None]] = []

    def attend(self, passages: Sequence[TappedTree]) -> None:
        """Keep in mind where the gradients of some passages are remembered."""
        self._remembered += [passage.grads for passage in passages]

    def remember(self, backward: Callable[[], None]) -> None:
        """Run a backward pass and remember what flows; if it fails, what was remembered before stays."""
        before = [(grads, list(grads)) for grads in self._remembered]
        self.listening = True
        try:
            backward()
        except BaseException as error:
            for grads, kept in before:
                grads[:] = kept
            if not isinstance(error, RuntimeError):
                raise
            raise GradientError(
                "the backward pass failed; the copies' gradients are as before, .grad is as far as torch came. "
                f"If the weights have changed since the run, run copies again. torch says: {error}"
            ) from error
        finally:
            self.listening = False
        self.backwards += 1

    def require_backward(self) -> None:
        """Refuse to answer before there are gradients."""
        if not self.backwards:
            raise GradientError("the copies have no gradients yet; call copies.backward(loss) first")


class TappedTree:
    """One tree that goes through a door.

    Attributes:
        raw: its tensors before the door.
        passed: the same values after it.
        grads: what came back, leaf by leaf; None where nothing did.
    """

    def __init__(self, tree: Tree) -> None:
        self.raw, self.structure = flatten(tree)
        self.passed = list(self.raw)
        self.grads: list[Tensor | None] = [None] * len(self.raw)

    @property
    def tree(self) -> Tree:
        """The tree after the door."""
        return unflatten(self.structure, self.passed)

    @property
    def grad_tree(self) -> Tree:
        """The gradients in the tree's shape: zeros where nothing came back, None for leaves that have no gradient."""
        return unflatten(self.structure, self.filled)

    @property
    def filled(self) -> list[Any]:
        """The gradients leaf by leaf, with zeros where nothing came back; None for leaves that have no gradient."""
        pairs = zip(self.grads, self.passed, strict=True)
        return [torch.zeros_like(x) if g is None and _differentiable(x) else g for g, x in pairs]

    def flowed(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors before the door that a gradient came back to, each with it."""
        pairs = zip(self.raw, self.grads, strict=True)
        return [(raw, grad) for raw, grad in pairs if grad is not None and raw.requires_grad]


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def pass_through(listener: GradientTap, *trees: Tree) -> list[TappedTree]:
    """Lead some trees through one door.

    Tensors that nobody has asked a gradient of are asked for one from here on, so that it can be shown. Without
    gradients the door hands out clones: a cell that writes into its state must not change what is shown.
    """
    passages = [TappedTree(tree) for tree in trees]
    listener.attend(passages)
    slots = [(p, i) for p in passages for i, tensor in enumerate(p.raw) if _differentiable(tensor)]
    # The door must not hold what passed: tensors hold their graph, and autograd's cycles are never collected.
    grads = [(passage.grads, i) for passage, i in slots]
    tensors = [passage.raw[i] for passage, i in slots]
    if not tensors:
        return passages
    if not torch.is_grad_enabled():
        passed: Sequence[Tensor] = [tensor.clone() for tensor in tensors]
    else:
        passed = _Door.apply(listener, grads, *map(_asked, tensors))
    for (passage, i), tensor in zip(slots, passed, strict=True):
        passage.passed[i] = tensor
    return passages


def _asked(tensor: Tensor) -> Tensor:
    """The tensor if it has a gradient already, else one of the same values that has."""
    if tensor.requires_grad:
        return tensor
    return (tensor.clone() if tensor.is_inference() else tensor.detach()).requires_grad_()


class _Door(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, listener: GradientTap, grads: list[tuple[list[Tensor | None], int]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.listener, ctx.grads = listener, grads
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.listener.listening:
            for (remembered, i), grad in zip(ctx.grads, grads, strict=True):
                # As in `.grad`, what a second pass brings is added to what the first one left.
                before = remembered[i]
                remembered[i] = before if grad is None else grad if before is None else before + grad
        return (None, None, *grads)


def leads_to(tensors: Sequence[Tensor], listener: GradientTap) -> bool:
    """Whether the graph of some tensors leads to a door of this listener."""
    return any(getattr(node, "listener", None) is listener for node in nodes_behind(tensors, beyond=_is_no_tap))


def ways_past(doors: Sequence[TappedTree], tensors: Sequence[Tensor]) -> tuple[set[int], bool]:
    """By what other ways than through some doors the graph of some tensors leads on.

    Returns:
        The leaves (by `id`) that they depend on by ways that pass no door, and whether a way leads through any
        other door: then something computed in one copy is used in another.
    """
    known = {id(tensor.grad_fn) for passage in doors for tensor in passage.passed}
    leaves, others = set(), False
    for node in nodes_behind(tensors, beyond=_is_no_tap):
        if hasattr(node, "listener"):
            others = others or id(node) not in known
        elif hasattr(node, "variable"):
            leaves.add(id(node.variable))
    return leaves, others


def _is_no_tap(node: Any) -> bool:
    return not hasattr(node, "listener")


def derivative(flowed: Sequence[tuple[Tensor, Tensor]], by: Sequence[Tensor], what: str) -> list[Tensor]:
    """The vector-Jacobian product along a graph that is kept; zeros where no way leads.

    Raises:
        GradientError: if the graph's tensors have been changed since.
    """
    if not flowed or not by:
        return [torch.zeros_like(tensor) for tensor in by]
    outputs, grads = zip(*flowed, strict=True)
    try:
        found = torch.autograd.grad(outputs, by, grads, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise GradientError(
            f"{what} can no longer be computed; ask after copies.backward(loss) and before the weights change "
            f"(optimizer.step()). torch says: {error}"
        ) from error
    return [torch.zeros_like(x) if grad is None else _dense(grad) for x, grad in zip(by, found, strict=True)]


def _dense(grad: Tensor) -> Tensor:
    """An embedding's gradient may be sparse; shares are stacked and measured, which sparse tensors are not."""
    return grad.to_dense() if grad.is_sparse else grad
