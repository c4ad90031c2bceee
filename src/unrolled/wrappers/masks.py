"""Masks as a function of numbers: a hash of (seed, t, entry), in integer operations that are the same everywhere.

Nothing is drawn inside of a step, so that a mask does not depend on the engine, on where a sequence is cut into
windows, or on how often a step is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_WORD = 2**32 - 1


def draw_seeds(batch_size: int) -> Tensor:
    """One seed for each row, `[B]`, from torch's default generator: the same whatever the device is."""
    return torch.randint(2**63 - 1, (batch_size,), device="cpu")


class RowDraws(NamedTuple):
    """What every row draws at one step: a linear function of integers, `[B]` each."""

    factor: Tensor
    summand: Tensor

    @classmethod
    def at(cls, seed: Tensor, t: Tensor | None) -> RowDraws:
        """What is drawn: a function of each row's seed and the time, of all their bits.

        Args:
            seed: one integer for each row, `[B]`.
            t: the number of the copy, `[B]`; None for a draw that all copies share.
        """
        low, high = torch.bitwise_and(seed, _WORD), torch.bitwise_and(torch.bitwise_right_shift(seed, 32), _WORD)
        factor = _mixed(low if t is None else low ^ _mixed(torch.bitwise_and(t, _WORD)))
        return cls(torch.bitwise_right_shift(factor, 1), _mixed(factor ^ high))

    def kept(self, p: float, shape: tuple[int, ...], start: int = 0) -> Tensor:
        """Which entries of `[B, *shape]` are kept, each with probability 1 - p.

        The linear function is taken of a hash of the entry's number: strongly universal hashing, which is one product
        and one sum for each entry, and by which any two entries are independent.

        Args:
            p: the probability of being dropped; 32 bits of it count.
            shape: the entries of a row.
            start: the number of the first one.

        Source: M. Dietzfelbinger, "Universal hashing and k-wise independent random variables via integer arithmetic
        without primes", STACS (1996).

        Example:
            >>> RowDraws.at(torch.tensor([3, 4]), torch.tensor([0, 0])).kept(0.5, (8,)).int()
            tensor([[0, 1, 0, 1, 0, 0, 1, 0],
                    [1, 0, 0, 1, 0, 0, 0, 0]], dtype=torch.int32)
        """
        entries = _mixed(torch.arange(start, start + math.prod(shape), device=self.factor.device)).view(shape)
        factor, summand = (word.view(-1, *(1,) * len(shape)) for word in self)
        # 31 bits times 32 bits, and 32 bits more: 63 bits hold it.
        return torch.bitwise_and(torch.addcmul(summand, factor, entries), _WORD) >= round(p * 2**32)

    def masks(self, leaves: Sequence[Tensor], probabilities: Sequence[float]) -> Iterator[Tensor | None]:
        """Which entries of each leaf `[B, ...]` are kept, None for all; no two entries of a row share a number."""
        start = 0
        for leaf, p in zip(leaves, probabilities, strict=True):
            yield self.kept(p, tuple(leaf.shape[1:]), start) if p else None
            start += math.prod(leaf.shape[1:])


def _mixed(word: Tensor) -> Tensor:
    """A permutation of the numbers below 2**32 in which every bit depends on every bit.

    No product leaves 63 bits: what an integer does that overflows is not torch's to promise.

    Source: C. Wellons, "Prospecting for hash functions" (2018), there called lowbias32.
    """
    word = word ^ torch.bitwise_right_shift(word, 16)
    word = torch.bitwise_and(word * 0x7FEB352D, _WORD)
    word = word ^ torch.bitwise_right_shift(word, 15)
    word = torch.bitwise_and(word * (0x846CA68B - 2**32), _WORD)
    return word ^ torch.bitwise_right_shift(word, 16)
