"""Gradients by distance: probes of the loss sent back through the copies, all of them at once.

A probe is what the loss takes of one row's output at one step: its gradient there. For a loss that is a sum over steps
this is d loss_t. All probes are cotangents of one tape, `[P, n, ...]`, and pass it copy by copy, so that no more than
one copy's gradients are held; what is kept of these is a norm for each probe, row and lag.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unrolled.diagnosis.quantiles import median, quartiles
from unrolled.diagnosis.results import LagProfile, Reach
from unrolled.diagnosis.walk import Walk, row_norms
from unrolled.introspection.copies import Copy
from unrolled.trees import leaves


def lag_profile(walk: Walk, probes: int) -> LagProfile | None:
    """|d loss_t / d state_s| over the lag t - s.

    Args:
        walk: the copies of one network, after a backward pass.
        probes: at most so many probes for a row, spread evenly over the steps at which the loss takes something.

    Returns:
        The profile; None if the loss takes nothing of the outputs and last states, or no state can have a gradient.
    """
    if not any(x.is_floating_point() or x.is_complex() for x in leaves(walk.copies[0].state)):
        return None
    taken = [_taken(walk, k) for k in range(len(walk.copies))]
    chosen = _chosen(walk, taken, probes)
    if not (chosen >= 0).any():
        return None
    norms, counted = _sent_back(walk, taken, chosen)
    return _profile(walk, chosen, norms, counted)


class _Taken(NamedTuple):
    """What the loss takes of one copy.

    Attributes:
        outputs: its gradients by the output.
        states: those that it takes directly of the state that the copy handed on.
        norms: the norm of both for each row, `[n]`.
    """

    outputs: list[Tensor]
    states: list[Tensor]
    norms: Tensor


def _taken(walk: Walk, k: int) -> _Taken:
    """What the loss takes of copy k."""
    copy = walk.copies[k]
    outputs = [grad for grad in copy.taps.output.grads_or_zeros if grad is not None]
    states = [grad for grad in copy.taps.next_state.grads_or_zeros if grad is not None]
    if k + 1 < len(walk.copies):
        passed = [grad.unsqueeze(0) for grad in walk.copies[k + 1].taps.state.grads_or_zeros if grad is not None]
        returned = walk.handed_back(k + 1, passed)
        # Exactly zero where the loss takes nothing: the sum that is left has one term.
        states = [grad - back.squeeze(0) for grad, back in zip(states, returned, strict=True)]
    norms = row_norms([grad.unsqueeze(0) for grad in (*outputs, *states)], walk.sizes[k])[0]
    return _Taken(outputs, states, norms)


def _chosen(walk: Walk, taken: Sequence[_Taken], probes: int) -> Tensor:
    """For each copy and row the number of the probe that starts there, -1 for none: `[K, B]`."""
    steps, rows = len(walk.copies), max(walk.sizes)
    there = torch.zeros(steps, rows, dtype=torch.bool)
    for k, one in enumerate(taken):
        there[k, : walk.sizes[k]] = one.norms != 0
    chosen = torch.full((steps, rows), -1)
    for row in range(rows):
        found = there[:, row].nonzero().squeeze(1)
        if len(found) > probes:
            found = found[torch.linspace(len(found) - 1, 0, probes).round().long().flip(0)]  # of one: the last
        chosen[found, row] = torch.arange(len(found))
    return chosen


def _sent_back(walk: Walk, taken: Sequence[_Taken], chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The norms by lag, probe and row, `[K, P, B]`, and which of them there are."""
    steps, rows = chosen.shape
    many = int(chosen.max()) + 1
    norms = torch.zeros(steps, many, rows, dtype=torch.float64)
    counted = torch.zeros(steps, many, rows, dtype=torch.bool)
    age = torch.zeros(many, rows, dtype=torch.int64)
    under_way = torch.zeros(many, rows, dtype=torch.bool)
    size_of = torch.zeros(many, rows, dtype=torch.float64)
    cotangents: list[Tensor] | None = None
    for k in range(steps - 1, -1, -1):
        size, here = walk.sizes[k], taken[k]
        starting = (chosen[k] >= 0).nonzero().squeeze(1)
        which = chosen[k][starting]
        under_way[which, starting] = True
        size_of[which, starting] = here.norms[starting]
        started = [_started(grad, which, starting, many, here.norms) for grad in here.outputs]
        added = [_started(grad, which, starting, many, here.norms) for grad in here.states]
        cotangents = added if cotangents is None else [a + b for a, b in zip(cotangents, added, strict=True)]
        cotangents = _pulled(walk.copies[k], started, cotangents)
        age += under_way
        probe, row = under_way.nonzero(as_tuple=True)
        norms[age[probe, row] - 1, probe, row] = row_norms(cotangents, size)[probe, row] * size_of[probe, row]
        counted[age[probe, row] - 1, probe, row] = True
        fresh = walk.fresh[k]
        under_way[:, walk.shared(k) :] = False
        if fresh is not None:
            under_way[:, :size] &= ~fresh.cpu()
        if k:
            cotangents = walk.handed_back(k, cotangents)
    return norms, counted


def _started(grad: Tensor, which: Tensor, rows: Tensor, many: int, norms: Tensor) -> Tensor:
    """Cotangents `[P, n, ...]`, zero but where a probe starts: there of norm 1, so that no digits are lost."""
    made = grad.new_zeros((many, *grad.shape))
    if grad.dim() and grad.shape[0] == len(norms):
        sizes = norms[rows].to(grad.device).view(-1, *(1,) * (grad.dim() - 1))
        which, rows = which.to(grad.device), rows.to(grad.device)
        wide = torch.complex128 if grad.is_complex() else torch.float64
        made[which, rows] = (grad[rows].to(wide) / sizes).to(grad.dtype)
    return made


def _pulled(copy: Copy, outputs: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor]:
    """Cotangents of what a copy gave out, pulled back to the state that it received; all probes in one pass."""
    by = [x for x in leaves(copy.seen) if x.is_floating_point() or x.is_complex()]
    raw = [x for x in (*copy.taps.output.raw, *copy.taps.next_state.raw) if x.is_floating_point() or x.is_complex()]
    pairs = [(x, given) for x, given in zip(raw, (*outputs, *states), strict=True) if x.requires_grad]
    many = len(states[0]) if states else 1
    if not pairs:
        return [x.new_zeros((many, *x.shape)) for x in by]
    of, given = zip(*pairs, strict=True)
    found = _in_one_pass(of, by, given)
    return [x.new_zeros((many, *x.shape)) if grad is None else grad for x, grad in zip(by, found, strict=True)]


def _in_one_pass(of: Sequence[Tensor], by: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor | None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return list(torch.autograd.grad(of, by, given, retain_graph=True, allow_unused=True, is_grads_batched=True))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a Function of the user's that cannot be mapped: probe after probe, all the same
        each = [
            torch.autograd.grad(of, by, one, retain_graph=True, allow_unused=True) for one in zip(*given, strict=True)
        ]
        return [None if column[0] is None else torch.stack(column) for column in zip(*each, strict=True)]


def _profile(walk: Walk, chosen: Tensor, norms: Tensor, counted: Tensor) -> LagProfile:
    lags, figures, kept, counts = [], [], [], []
    for lag in range(1, len(norms) + 1):
        there = counted[lag - 1]
        if not there.any():
            break
        first = norms[0][there]
        lags.append(lag)
        counts.append(int(there.sum()))
        figures.append(quartiles(norms[lag - 1][there]))
        kept.append(median(norms[lag - 1][there][first != 0] / first[first != 0]) if (first != 0).any() else 0.0)
    lower, middle, upper = zip(*figures, strict=True)
    steps = sorted(walk.copies[k].t for k in (chosen >= 0).any(1).nonzero().flatten().tolist())
    many = int(chosen.max()) + 1
    return LagProfile(tuple(lags), lower, middle, upper, tuple(kept), tuple(counts), many, tuple(steps))


def reach(profile: LagProfile) -> Reach:
    """How far back gradients reach: read off what is kept at each lag."""

    def fallen(share: float) -> int | None:
        return next((lag for lag, kept in zip(profile.lags, profile.kept, strict=True) if kept <= share), None)

    return Reach(fallen(0.1), fallen(0.01), fallen(0.001), _rate(profile), profile.lags[-1])


def _rate(profile: LagProfile) -> float:
    """The slope of the line through the logarithms of what is kept; minus infinity if nothing is after one copy.

    Only numbers that the dtype's smallest ones do not distort are taken.
    """
    points = [(n, math.log(x)) for n, x in zip(profile.lags, profile.kept, strict=True) if 1e-30 < x < 1e30]
    if len(points) < 2:
        return -math.inf if len(profile.lags) > 1 and profile.kept[1] == 0 else 0.0
    mean_n, mean_x = (sum(column) / len(points) for column in zip(*points, strict=True))
    over = sum((n - mean_n) ** 2 for n, _ in points)
    return sum((n - mean_n) * (x - mean_x) for n, x in points) / over
