"""The copies of one network in the order in which they ran, and what of a state is handed from one to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled import sequence
from unrolled.introspection.copies import Copies


class Walk:
    """The copies of one network, first to run first.

    Rows are in the engine's order: those that are alive at a copy are the first ones, whichever way is walked.

    Args:
        copies: all copies of one run.
        resets: as the caller gave them, or None.

    Attributes:
        copies: in the order in which they ran.
        sizes: how many rows each of these has.
        fresh: for each a bool `[n]`, the rows that started afresh just before it; None for none.
    """

    def __init__(self, copies: Copies, resets: Tensor | None) -> None:
        layout, reverse = copies.layout, copies.reverse
        self.run, self.copies = copies, copies.in_order
        self.sizes = [len(copy.rows) for copy in self.copies]
        self.fresh: list[Tensor | None] = [None] * len(self.copies)
        if resets is not None and self.copies:
            mask = layout.restarts(layout.mask(resets), reverse=reverse)
            self.fresh = list(sequence.each_step(mask, layout.extent))[:: -1 if reverse else 1]

    def shared(self, k: int) -> int:
        """How many rows copy k and the one that ran before it both have."""
        return min(self.sizes[k - 1], self.sizes[k]) if k else 0

    def handed_back(self, k: int, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients by the state that copy k received, as gradients by the state that the copy before it handed on.

        Args:
            k: the copy, not the first one.
            grads: `[P, n, ...]` for each leaf, with P probes; without rows `[P, ...]`.
        """
        fresh = self.fresh[k]
        have, before, now = self.shared(k), self.sizes[k - 1], self.sizes[k]
        found = []
        for grad in grads:
            if grad.dim() < 2 or grad.shape[1] != now:
                found.append(grad)
                continue
            kept = grad if fresh is None else grad.masked_fill(_as_mask(fresh, grad), 0.0)
            more = kept.new_zeros((len(kept), before - have, *kept.shape[2:]))
            found.append(torch.cat([kept[:, :have], more], 1) if before != now else kept)
        return found


def _as_mask(fresh: Tensor, grad: Tensor) -> Tensor:
    return fresh.to(grad.device).view(1, -1, *(1,) * (grad.dim() - 2))


def row_norms(tensors: Sequence[Tensor], rows: int) -> Tensor:
    """The norm of each row over all leaves `[P, n, ...]`, as `[P, n]` float64; leaves without rows are left out.

    In float64, since the square of a small float32 is zero.
    """
    by_row = [x for x in tensors if x.dim() > 1 and x.shape[1] == rows]
    sizes = [x.abs() if x.is_complex() else x for x in by_row]
    norms = [
        torch.linalg.vector_norm(x.flatten(2) if x.dim() > 2 else x[..., None], dim=-1, dtype=torch.float64)
        for x in sizes
    ]
    if not norms:
        return torch.zeros(len(tensors[0]) if tensors else 1, rows, dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack(norms), dim=0).cpu()
