"""Gradients by distance: probes of the loss sent back through the copies, all of them at once.

A probe is what the loss takes of one row's output at one step: its gradient there. For a loss that is a sum over steps
this is d loss_t. All probes are cotangents of one graph, `[P, n, ...]`, and pass it copy by copy, so that no more than
one copy's gradients are held; what is kept of these is a norm for each probe, row and lag.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unrolled.autograd_graph import differentiable
from unrolled.diagnosis.figures import LagProfile
from unrolled.diagnosis.statistics import median, quartiles, row_norms
from unrolled.diagnosis.timeline import Timeline
from unrolled.introspection.single_copy import Copy
from unrolled.trees import leaves


def lag_profile(timeline: Timeline, probes: int) -> LagProfile | None:
    """|d loss_t / d state_s| over the lag t - s.

    Args:
        timeline: the copies of one network, after a backward pass.
        probes: at most so many probes for a row, spread evenly over the steps at which the loss takes something.

    Returns:
        The profile; None if the loss takes nothing of the outputs and last states, or no state can have a gradient.
    """
    if not any(map(differentiable, leaves(timeline.copies[0].state))):
        return None
    found = _Probes(timeline, probes)
    if not found.count:
        return None
    found.send_back()
    return found.profile()


class _LossGrads(NamedTuple):
    """What the loss takes of one copy.

    Attributes:
        outputs: its gradients by the output.
        states: those that it takes directly of the state that the copy passed on.
        norms: the norm of both for each row, `[n]`.
    """

    outputs: list[Tensor]
    states: list[Tensor]
    norms: Tensor

    @classmethod
    def of(cls, timeline: Timeline, k: int) -> _LossGrads:
        """What it takes of copy k."""
        taps = timeline.copies[k].taps
        outputs = [grad for grad in taps.output.grads_or_zeros if grad is not None]
        states = [grad for grad in taps.next_state.grads_or_zeros if grad is not None]
        if k + 1 < len(timeline.copies):
            received = timeline.copies[k + 1].taps.state.grads_or_zeros
            returned = timeline.passed_back(k + 1, [grad.unsqueeze(0) for grad in received if grad is not None])
            # Exactly zero where the loss takes nothing: the sum that is left has one term.
            states = [grad - back.squeeze(0) for grad, back in zip(states, returned, strict=True)]
        norms = row_norms([grad.unsqueeze(0) for grad in (*outputs, *states)], timeline.sizes[k])[0]
        return cls(outputs, states, norms)


class _Probes:
    """Probes of all rows, on their way back through K copies.

    Attributes:
        loss_grads: what the loss takes of each copy.
        starts: for each copy and row the number of the probe that starts there, -1 for none: `[K, B]`.
        count: P, the most that a row has.
        start: the copy at which each probe that is under way started, -1 for one that is not: `[P, B]`.
        scale: the norm that each had there; probes are sent back with norm 1, so that no digits are lost: `[P, B]`.
        norms: the norm of each probe after it has passed a number of copies, -1 where it does not: `[K, P, B]`.
    """

    def __init__(self, timeline: Timeline, most: int) -> None:
        self.timeline = timeline
        self.loss_grads = [_LossGrads.of(timeline, k) for k in range(len(timeline.copies))]
        steps, rows = len(timeline.copies), max(timeline.sizes)
        self.starts = torch.full((steps, rows), -1)
        there = torch.zeros(steps, rows, dtype=torch.bool)
        for k, grads in enumerate(self.loss_grads):
            there[k, : timeline.sizes[k]] = grads.norms != 0
        for row in range(rows):
            found = there[:, row].nonzero().squeeze(1)
            if len(found) > most:
                found = found[torch.linspace(len(found) - 1, 0, most).round().long().flip(0)]  # of one: the last
            self.starts[found, row] = torch.arange(len(found))
        self.count = int(self.starts.max()) + 1
        self.start = torch.full((self.count, rows), -1)
        self.scale = torch.zeros(self.count, rows, dtype=torch.float64)
        self.norms = torch.full((steps, self.count, rows), -1.0, dtype=torch.float64)

    def send_back(self) -> None:
        """Send all probes back to the first copy, or to where their rows began, and note their norms."""
        timeline, cotangents = self.timeline, None
        for k in reversed(range(len(timeline.copies))):
            outputs, states = self._start(k)
            cotangents = states if cotangents is None else [a + b for a, b in zip(cotangents, states, strict=True)]
            cotangents = _pull_back(timeline.copies[k], outputs, cotangents)
            probe, row = (self.start >= 0).nonzero(as_tuple=True)
            lag = self.start[probe, row] - k
            sizes = row_norms(cotangents, timeline.sizes[k])
            self.norms[lag, probe, row] = sizes[probe, row] * self.scale[probe, row]
            self._end(k)
            if k:
                cotangents = timeline.passed_back(k, cotangents)

    def _start(self, k: int) -> tuple[list[Tensor], list[Tensor]]:
        """The cotangents of the probes that start at copy k, by its output and by the state that it passed on."""
        outputs, states, norms = self.loss_grads[k]
        rows = (self.starts[k] >= 0).nonzero().squeeze(1)
        probes = self.starts[k][rows]
        self.start[probes, rows] = k
        self.scale[probes, rows] = norms[rows]

        def cotangents(grad: Tensor) -> Tensor:
            """`[P, n, ...]`, zero but where a probe starts."""
            made = grad.new_zeros((self.count, *grad.shape))
            if grad.dim() and grad.shape[0] == len(norms):
                at = rows.to(grad.device)
                sizes = norms[rows].to(grad.device).view(-1, *(1,) * (grad.dim() - 1))
                wide = torch.complex128 if grad.is_complex() else torch.float64
                made[probes.to(grad.device), at] = (grad[at].to(wide) / sizes).to(grad.dtype)
            return made

        return [cotangents(grad) for grad in outputs], [cotangents(grad) for grad in states]

    def _end(self, k: int) -> None:
        """No probe goes on in rows that begin, or start afresh, with copy k."""
        fresh = self.timeline.fresh[k]
        self.start[:, self.timeline.shared(k) :] = -1
        if fresh is not None:
            self.start[:, : self.timeline.sizes[k]].masked_fill_(fresh.cpu(), -1)

    def profile(self) -> LagProfile:
        """Quartiles over rows and probes."""
        lags, figures, kept, counts = [], [], [], []
        for lag, norms in enumerate(self.norms, 1):
            there = norms != -1
            if not there.any():
                break
            first = self.norms[0][there]
            lags.append(lag)
            counts.append(int(there.sum()))
            figures.append(quartiles(norms[there]))
            kept.append(median(norms[there][first != 0] / first[first != 0]) if (first != 0).any() else 0.0)
        lower, middle, upper = zip(*figures, strict=True)
        steps = sorted(self.timeline.copies[k].t for k in (self.starts >= 0).any(1).nonzero().flatten().tolist())
        return LagProfile(tuple(lags), lower, middle, upper, tuple(kept), tuple(counts), self.count, tuple(steps))


def _pull_back(copy: Copy, outputs: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor]:
    """Cotangents of what a copy gave out, pulled back to the state that it received; all probes in one pass."""
    by = list(filter(differentiable, leaves(copy.seen)))
    raw = filter(differentiable, copy.taps.output.raw + copy.taps.next_state.raw)
    pairs = [(x, cotangents) for x, cotangents in zip(raw, (*outputs, *states), strict=True) if x.requires_grad]
    count = len(states[0]) if states else 1
    found: Sequence[Tensor | None] = [None] * len(by)
    if pairs:
        of, cotangents = zip(*pairs, strict=True)
        found = _gradients_in_one_pass(of, by, cotangents)
    return [x.new_zeros((count, *x.shape)) if grad is None else grad for x, grad in zip(by, found, strict=True)]


def _gradients_in_one_pass(
    of: Sequence[Tensor], by: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return torch.autograd.grad(of, by, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a Function of the user's that cannot be mapped: probe after probe, all the same
        probes = zip(*cotangents, strict=True)
        each = [torch.autograd.grad(of, by, probe, retain_graph=True, allow_unused=True) for probe in probes]
        return [None if column[0] is None else torch.stack(column) for column in zip(*each, strict=True)]
