"""The copies of one network in the order in which they ran, and which rows a state passes on from one to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled import sequence
from unrolled.introspection.copies import Copies


class Timeline:
    """The copies of one network, the first to run first.

    Rows are in the engine's order: those that are alive at a copy are the first ones, in either direction.

    Args:
        run: all copies of one run.
        resets: as the caller gave them, or None.

    Attributes:
        copies: in the order in which they ran.
        sizes: how many rows each of these has.
        fresh: for each a bool `[n]`, the rows that started afresh just before it; None for none.
    """

    def __init__(self, run: Copies, resets: Tensor | None) -> None:
        self.run, self.copies = run, run.in_order
        self.sizes = [len(copy.rows) for copy in self.copies]
        self.fresh: list[Tensor | None] = [None] * len(self.copies)
        if resets is not None and self.copies:
            mask = run.layout.restarts(run.layout.mask(resets), reverse=run.reverse)
            self.fresh = list(sequence.each_step(mask, run.layout.extent))[:: -1 if run.reverse else 1]

    def shared(self, k: int) -> int:
        """How many rows copy k and the one that ran before it both have."""
        return min(self.sizes[k - 1], self.sizes[k]) if k else 0

    def passed_back(self, k: int, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients by the state that copy k received, as gradients by the one that the copy before it passed on.

        Args:
            k: the copy, not the first one.
            grads: `[P, n, ...]` for each leaf, with P probes; without rows `[P, ...]`.
        """
        fresh, shared, before, now = self.fresh[k], self.shared(k), self.sizes[k - 1], self.sizes[k]
        found = []
        for grad in grads:
            if grad.dim() < 2 or grad.shape[1] != now:
                found.append(grad)
                continue
            if fresh is not None:
                kept = grad.masked_fill(fresh.to(grad.device).view(1, -1, *(1,) * (grad.dim() - 2)), 0.0)
            else:
                kept = grad
            ended = kept.new_zeros((len(kept), before - shared, *kept.shape[2:]))
            found.append(torch.cat([kept[:, :shared], ended], 1) if before != now else kept)
        return found
