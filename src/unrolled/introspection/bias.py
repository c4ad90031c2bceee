"""What truncation does to a gradient: its angle to the full one and its relative norm, from the copies' graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unrolled.bptt.truncation import LossBlock, Truncation, truncation_of
from unrolled.errors import OptionError
from unrolled.introspection.taps import derivative
from unrolled.results import Result


@dataclass(frozen=True)
class Bias(Result):
    """A truncated gradient compared with the full one.

    Attributes:
        cosine: of the angle between them; NaN if one of them is zero.
        ratio: the truncated one's Euclidean norm over the full one's.
    """

    cosine: float
    ratio: float

    @property
    def angle(self) -> float:
        """The angle between them, in degrees."""
        return math.degrees(math.acos(max(-1.0, min(1.0, self.cosine))))


@dataclass(frozen=True)
class TruncationBias(Result):
    """What truncation does to the gradient of a run; `print` it.

    Attributes:
        horizon: k2, copies that gradients flow back through.
        stride: k1, steps whose losses are taken together.
        whole: of all parameters together.
        parameters: of each parameter.

    Example:
        >>> import torch, unrolled as ur
        >>> copies = ur.copies(ur.unroll(ur.RNNCell(3, 4)), torch.ones(9, 2, 3))
        >>> copies.backward(copies.outputs.sum())
        >>> sorted(copies.truncated(horizon=4).parameters)
        ['bias_hh', 'bias_ih', 'weight_hh', 'weight_ih']
    """

    horizon: int
    stride: int
    whole: Bias
    parameters: Mapping[str, Bias]

    def __str__(self) -> str:
        rows = [("all", self.whole), *self.parameters.items()]
        width = max(len(name) for name, _ in rows)
        head = f"truncated (horizon {self.horizon}, stride {self.stride}) against full gradient: angle, norm"
        lines = (f"  {name:<{width}}  {bias.angle:5.1f} degrees  x {bias.ratio:.3f}" for name, bias in rows)
        return "\n".join([head, *lines])


@dataclass(frozen=True)
class StepGrads:
    """One step of a run: what the loss took of it, and what gradients flow on to.

    Attributes:
        flowed: the tensors that the loss took from it, each with its gradient.
        weights: the parameters by name, as this step's copies alone read them.
        next_state: the tensors of the state that it passed on, of those that have a gradient.
    """

    flowed: Sequence[tuple[Tensor, Tensor]]
    weights: Mapping[str, Tensor]
    next_state: Sequence[Tensor]

    @classmethod
    def of_layers(cls, layers: Sequence[StepGrads]) -> StepGrads:
        """One step of all layers of a stack; parameters are named by the number of their layer first."""
        return cls(
            [pair for layer in layers for pair in layer.flowed],
            {f"{n}.{name}": weight for n, layer in enumerate(layers) for name, weight in layer.weights.items()},
            [state for layer in layers for state in layer.next_state],
        )


def truncation_to_compare(horizon: int | None, stride: int | None, own: Truncation | None) -> Truncation:
    """The truncation to compare with: that of the arguments, or the network's own.

    Raises:
        OptionError: if there is neither.
    """
    found = truncation_of(horizon, stride) or own
    if found is None:
        raise OptionError(
            "this network has no horizon; say which truncation to compare with: truncated(horizon=k2, stride=k1)"
        )
    return found


def truncation_bias(
    truncation: Truncation, steps: Sequence[StepGrads], initial: Sequence[Tensor], made_of: Mapping[str, Tensor]
) -> TruncationBias:
    """The truncated gradient compared with the full one, block by block from one graph.

    Args:
        truncation: its horizon and stride.
        steps: all of the run, in the order in which they ran.
        initial: the tensors of initial states that parameters may have made.
        made_of: the parameters by name.
    """
    T = len(steps)
    whole = [LossBlock(0, T, 0)]
    cut = whole if truncation.horizon >= T else truncation.blocks(T)
    truncated, full = (_total(blocks, steps, initial, made_of) for blocks in (cut, whole))
    pairs = {name: _bias(truncated[name], full[name]) for name in made_of}
    flat = (torch.cat([x.flatten() for x in grads.values()]) for grads in (truncated, full))
    return TruncationBias(truncation.horizon, truncation.stride, _bias(*flat), pairs)


def _total(
    blocks: Sequence[LossBlock], steps: Sequence[StepGrads], initial: Sequence[Tensor], made_of: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A gradient in which each block's losses reach the copies from its cut on, and no earlier one."""
    sums = {name: torch.zeros_like(weight) for name, weight in made_of.items()}
    begins, weights = [x for x in initial if x.requires_grad], list(made_of.values())
    for block in blocks:
        flowed = [pair for step in steps[block.begin : block.end] for pair in step.flowed]
        aliases = [pair for step in steps[block.cut : block.end] for pair in step.weights.items()]
        at_cut = steps[block.cut - 1].next_state if block.cut else []
        found = derivative(flowed, [*(x for _, x in aliases), *begins, *at_cut], "the truncated gradient")
        shares = [(name, grad) for (name, _), grad in zip(aliases, found, strict=False)]
        whole, cut_off = found[len(aliases) : len(aliases) + len(begins)], found[len(aliases) + len(begins) :]
        # Rows may begin, or start afresh, at any step: only what came to them past the cut is taken off.
        before = derivative(list(zip(at_cut, cut_off, strict=True)), begins, "the gradient that is cut off")
        through = [(x, a - b) for x, a, b in zip(begins, whole, before, strict=True)]
        shares += zip(made_of, derivative(through, weights, "the initial state"), strict=True)
        for name, grad in shares:
            sums[name] += grad
    return sums


def _bias(truncated: Tensor, full: Tensor) -> Bias:
    a, b = truncated.double().flatten(), full.double().flatten()
    norms = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    return Bias(float(torch.dot(a, b) / (norms[0] * norms[1])), float(norms[0] / norms[1]))
