"""Gradients by step and by copy: what of the loss's gradient each state receives, and each weight from each copy."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from unrolled.diagnosis.figures import GradientFlow, WeightShares
from unrolled.diagnosis.statistics import norm, quartiles, row_norms
from unrolled.introspection.copies import Copies
from unrolled.trees import leaves


def gradient_flow(copies: Copies) -> GradientFlow:
    """|dL/dstate_t|: the norm of the loss's whole gradient by the state that each copy receives.

    Args:
        copies: of one network, after a backward pass.
    """
    figures = []
    for copy in copies:
        # A leaf that has no gradient is None here, which is a tree without leaves.
        grads = [grad.unsqueeze(0) for grad in leaves(copy.total_state_grad)]
        norms = row_norms(grads, len(copy.rows))[0]
        figures.append((float(torch.linalg.vector_norm(norms)), *quartiles(norms)))
    return GradientFlow(*zip(*figures, strict=True))


def weight_shares(copies: Copies) -> tuple[WeightShares, ...]:
    """Each parameter's gradient by copy.

    The shares are computed twice, so that those of one copy are held at a time: first their norms and sum, then their
    cosines with the sum.

    Args:
        copies: of one network, after a backward pass.
    """
    names, sums = list(copies.weights), dict[str, Tensor]()
    norms, dots = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for copy in copies:
        for name, share in copy.shares(names).items():
            norms[name].append(norm(share))
            sums[name] = sums[name] + share if name in sums else share.clone()
    for copy in copies:
        for name, share in copy.shares(names).items():
            dots[name].append(_dot(share, sums[name]))
    found = []
    for name in names:
        whole, total = norm(sums[name]), sum(norms[name])
        pairs = zip(norms[name], dots[name], strict=True)
        cosines = tuple(dot / (one * whole) if one * whole else 0.0 for one, dot in pairs)
        found.append(WeightShares(name, whole, tuple(norms[name]), cosines, whole / total if total else 0.0))
    return tuple(found)


def _dot(a: Tensor, b: Tensor) -> float:
    """Of complex numbers the real part: how far one points where the other does."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return float((a.double() * b.double()).sum())
