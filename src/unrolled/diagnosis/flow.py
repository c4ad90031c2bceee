"""Gradients by step and by copy: what of the loss's gradient each state receives, and each weight from each copy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unrolled.diagnosis.quantiles import quartiles
from unrolled.diagnosis.results import GradientFlow, WeightShares
from unrolled.diagnosis.walk import row_norms
from unrolled.introspection.copies import Copies
from unrolled.trees import leaves


def gradient_flow(copies: Copies) -> GradientFlow:
    """|dL/dstate_t|: the norm of the loss's whole gradient by the state that each copy receives.

    Args:
        copies: of one network, after a backward pass.
    """
    figures = []
    for copy in copies:
        grads = [grad.unsqueeze(0) for grad in _floating(copy.total_state_grad)]
        norms = row_norms(grads, len(copy.rows))[0]
        figures.append((float(torch.linalg.vector_norm(norms)), *quartiles(norms)))
    norms, lower, median, upper = zip(*figures, strict=True)
    return GradientFlow(norms, lower, median, upper)


def _floating(tree: object) -> list[Tensor]:
    """The gradients of a tree in which leaves without one are None, which is a tree without leaves."""
    return leaves(tree)


def weight_shares(copies: Copies) -> tuple[WeightShares, ...]:
    """Each parameter's gradient by copy.

    The shares are computed twice, so that those of one copy are held at a time: first their norms and sum, then their
    cosines with the sum.

    Args:
        copies: of one network, after a backward pass.
    """
    names = list(copies.weights)
    norms: dict[str, list[float]] = {name: [] for name in names}
    dots: dict[str, list[float]] = {name: [] for name in names}
    sums: dict[str, Tensor] = {}
    for shares in _each(copies, names):
        for name, share in shares.items():
            norms[name].append(_norm(share))
            sums[name] = sums[name] + share if name in sums else share.clone()
    for shares in _each(copies, names):
        for name, share in shares.items():
            dots[name].append(_dot(share, sums[name]))
    return tuple(_shares(name, _norm(sums[name]), norms[name], dots[name]) for name in names)


def _each(copies: Copies, names: list[str]) -> Iterator[dict[str, Tensor]]:
    for copy in copies:
        yield copy.shares(names) if names else {}


def _dot(a: Tensor, b: Tensor) -> float:
    """Of complex numbers the real part: how far one points where the other does."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return float((a.double() * b.double()).sum())


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.abs(), dtype=torch.float64))


def _shares(name: str, whole: float, norms: list[float], dots: list[float]) -> WeightShares:
    cosines = [dot / (norm * whole) if norm * whole else 0.0 for dot, norm in zip(dots, norms, strict=True)]
    return WeightShares(name, whole, tuple(norms), tuple(cosines), whole / sum(norms) if sum(norms) else 0.0)
