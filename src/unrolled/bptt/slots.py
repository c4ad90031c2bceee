"""Slots for states."""

from __future__ import annotations

import torch
from torch import Tensor

from unrolled.bptt.replay import RandomState
from unrolled.trees import Structure, Tree, flatten, unflatten


class Slots:
    """Stored states, in memory that is made once: small tensors that stay would cut the heap to pieces.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._memory: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
        self._stored: dict[int, tuple[list[Tensor], Structure, RandomState]] = {}

    @torch.no_grad()
    def store(self, slot: int, state: Tree, random: RandomState) -> None:
        """Keep a copy of a state, and of the random numbers to come."""
        leaves, structure = flatten(state)
        kept = [self._place(n, slot, leaf).copy_(leaf) for n, leaf in enumerate(leaves)]
        self._stored[slot] = kept, structure, random

    def restore(self, slot: int) -> tuple[Tree, RandomState]:
        """What is in a slot, where it stays."""
        kept, structure, random = self._stored[slot]
        return unflatten(structure, kept), random

    def _place(self, number: int, slot: int, leaf: Tensor) -> Tensor:
        """Memory for a leaf with its rows, of which an earlier step may have had more."""
        key = number, leaf.shape[1:], leaf.dtype
        rows = leaf.shape[0] if leaf.dim() else 1
        memory = self._memory.get(key)
        if memory is None or memory.shape[1] < rows:
            memory = leaf.new_empty((self._count, rows, *leaf.shape[1:]))
            self._memory[key] = memory
        return memory[slot, :rows] if leaf.dim() else memory[slot, 0]
