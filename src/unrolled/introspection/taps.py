"""Taps: where the gradients that flow into and out of one copy are read.

A tap is one node of autograd's graph, the identity on values and on gradients. Every copy has one where things enter
(its input, its state and its aliases of the weights) and one where they leave (its output and its next state). Exactly
one copy lies between the two, so a copy's share of a weight's gradient is the derivative of what leaves by what enters.

That derivative costs the same at every t: autograd does not look beyond nodes nearer to the leaves than the one asked
for, and where a copy begins is farther from them than all earlier copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.autograd_graph import differentiable, leaf_of, leaves_behind, nodes_behind
from unrolled.errors import GradientError
from unrolled.trees import Tree, flatten, unflatten


class GradientTap:
    """Puts taps into the graph of a run, and remembers the gradients that pass them in backward passes of its own.

    Attributes:
        remembering: whether a pass is under way that is remembered.
        passes: how many have been remembered.
    """

    def __init__(self) -> None:
        self.remembering = False
        self.passes = 0
        self._grads: list[list[Tensor | None]] = []

    def insert(self, *trees: Tree) -> list[TappedTree]:
        """Lead some trees through one tap.

        Floating tensors without a gradient get one from here on, so that it can be shown. Where gradients are off the
        tap returns clones: a cell that writes into its state must not change what is shown.
        """
        tapped = [TappedTree(tree) for tree in trees]
        self._grads += [tree.grads for tree in tapped]
        places = [(tree, i) for tree in tapped for i, tensor in enumerate(tree.raw) if differentiable(tensor)]
        tensors = [tree.raw[i] for tree, i in places]
        if not tensors:
            return tapped
        if torch.is_grad_enabled():
            # The node must not hold the tensors that passed it: these hold their graph, and autograd's cycles are
            # never collected.
            grads = [(tree.grads, i) for tree, i in places]
            passed: Sequence[Tensor] = _TapNode.apply(self, grads, *map(_requiring_grad, tensors))
        else:
            passed = [tensor.clone() for tensor in tensors]
        for (tree, i), tensor in zip(places, passed, strict=True):
            tree.passed[i] = tensor
        return tapped

    def backward(self, loss: Tensor, gradient: Tensor | None) -> None:
        """Run `loss.backward(gradient)`, and remember what passes the taps.

        Raises:
            GradientError: if the loss has no gradient, is no scalar and comes without one, or is not of this run.
        """
        self._check_loss(loss, gradient)
        with self._remembered():
            loss.backward(gradient, retain_graph=True)

    def observe(self, loss: Tensor) -> dict[Tensor, Tensor]:
        """Remember what a backward pass sends through the taps, and leave every `.grad` as it is.

        Returns:
            The leaves that the loss depends on, each with its gradient.

        Raises:
            GradientError: as `backward`.
        """
        self._check_loss(loss, None)
        # By all leaves, so that no tap is left out: autograd runs only what leads to something asked for.
        by = leaves_behind([loss])
        with self._remembered():
            grads = torch.autograd.grad(loss, by, retain_graph=True, allow_unused=True)
        return {leaf: grad for leaf, grad in zip(by, grads, strict=True) if grad is not None}

    @contextlib.contextmanager
    def _remembered(self) -> Iterator[None]:
        """A context for one backward pass; if it fails, the gradients remembered before stay."""
        before = [(grads, list(grads)) for grads in self._grads]
        self.remembering = True
        try:
            yield
        except BaseException as error:
            for grads, old in before:
                grads[:] = old
            if not isinstance(error, RuntimeError):
                raise
            raise GradientError(
                "the backward pass failed; the copies' gradients are as before, .grad is as far as torch came. "
                f"If the weights have changed since the run, run copies again. torch says: {error}"
            ) from error
        finally:
            self.remembering = False
        self.passes += 1

    def require_backward(self) -> None:
        """Refuse to answer before there are gradients."""
        if not self.passes:
            raise GradientError("the copies have no gradients yet; call copies.backward(loss) first")

    def _check_loss(self, loss: Tensor, gradient: Tensor | None) -> None:
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
        if not any(_tap_at(node) is self for node in nodes_behind([loss], beyond=lambda node: _tap_at(node) is None)):
            raise GradientError(
                "the loss does not depend on these copies; compute it from their outputs or states, not of another run"
            )


class TappedTree:
    """One tree that goes through a tap.

    Attributes:
        raw: its tensors before the tap.
        passed: the same values after it.
        grads: the gradient that came back to each tensor; None where none did.
    """

    def __init__(self, tree: Tree) -> None:
        self.raw, self.structure = flatten(tree)
        self.passed = list(self.raw)
        self.grads: list[Tensor | None] = [None] * len(self.raw)

    @property
    def tree(self) -> Tree:
        """The tree after the tap."""
        return unflatten(self.structure, self.passed)

    @property
    def grads_or_zeros(self) -> list[Any]:
        """The gradients tensor by tensor, zeros where none came back; None for tensors that can have none."""
        pairs = zip(self.grads, self.passed, strict=True)
        return [torch.zeros_like(x) if grad is None and differentiable(x) else grad for grad, x in pairs]

    @property
    def grad_tree(self) -> Tree:
        """`grads_or_zeros` in the tree's structure."""
        return unflatten(self.structure, self.grads_or_zeros)

    @property
    def flowed(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors before the tap that a gradient came back to, each with it."""
        pairs = zip(self.raw, self.grads, strict=True)
        return [(raw, grad) for raw, grad in pairs if grad is not None and raw.requires_grad]


def _requiring_grad(tensor: Tensor) -> Tensor:
    """The tensor if it has a gradient already, else one of the same values that has."""
    if tensor.requires_grad:
        return tensor
    return (tensor.clone() if tensor.is_inference() else tensor.detach()).requires_grad_()


class _TapNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tap: GradientTap, grads: list[tuple[list[Tensor | None], int]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.gradient_tap, ctx.grads = tap, grads
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradient_tap.remembering:
            for (remembered, i), grad in zip(ctx.grads, grads, strict=True):
                # As in `.grad`, the gradient of a second pass is added to that of the first.
                before = remembered[i]
                remembered[i] = before if grad is None else grad if before is None else before + grad
        return (None, None, *grads)


def _tap_at(node: Any) -> GradientTap | None:
    """The tap that put this node into the graph; None for any other node."""
    return getattr(node, "gradient_tap", None)


def ways_past(taps: Sequence[TappedTree], tensors: Sequence[Tensor]) -> tuple[set[int], bool]:
    """By what other ways than through some taps the graph of some tensors leads on.

    Returns:
        The leaves (by `id`) that they depend on by ways that pass no tap, and whether a way leads through any
        other tap: then something computed in one copy is used in another.
    """
    known = {id(tensor.grad_fn) for tapped in taps for tensor in tapped.passed}
    leaves, others = set(), False
    for node in nodes_behind(tensors, beyond=lambda node: _tap_at(node) is None):
        if _tap_at(node) is not None:
            others = others or id(node) not in known
        elif (leaf := leaf_of(node)) is not None:
            leaves.add(id(leaf))
    return leaves, others


def derivative(flowed: Sequence[tuple[Tensor, Tensor]], by: Sequence[Tensor], what: str) -> list[Tensor]:
    """The vector-Jacobian product along a graph that is kept; zeros for tensors that nothing depends on.

    Args:
        flowed: tensors, each with the gradient by it.
        by: the tensors to differentiate by.
        what: what is computed, for the error.

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
    found = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(by, found, strict=True)]
    # An embedding's gradient may be sparse; shares are stacked and measured, which sparse tensors are not.
    return [grad.to_dense() if grad.is_sparse else grad for grad in found]
