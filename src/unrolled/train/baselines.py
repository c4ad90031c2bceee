"""What simpler models reach on the same text: models of a few characters of context, and a compressor."""

from __future__ import annotations

import lzma
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unrolled.train.text import Split

_Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Baseline:
    """A simpler model's score on the test text, in bits per character."""

    name: str
    bits: float


def baselines(split: Split) -> list[Baseline]:
    """Scores of character models of order 2 and 3 and of `xz -9e`, which know the training (and validation) text.

    A test text of three characters or fewer has no score of order 3, one of two has none of order 2 either.
    """
    longest = min(len(split.validation), len(split.test)) - 1  # a longer context would have nothing to predict
    orders = [
        Baseline(f"order-{order} character model", context_model_bits(split, order))
        for order in (2, 3)
        if order <= longest
    ]
    return [*orders, Baseline("xz -9e", xz_bits(split))]


def entropy_bits(text: str) -> float:
    """The order-0 entropy of a text: bits per character of the best model that knows letter frequencies only.

    Example:
        >>> entropy_bits("abab")
        1.0
    """
    counts = np.unique(_codes(text), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def context_model_bits(split: Split, order: int) -> float:
    """Bits per test character of a model that counts what follows each `order` characters.

    Counts of the training text are smoothed by adding k to each; k is the one of a few that is best on the
    validation text.
    """
    counts = _ContextCounts(split.train, order)
    validation = counts.numbers(split.validation)
    best = min((1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001), key=lambda k: counts.bits(validation, k))
    return counts.bits(counts.numbers(split.test), best)


def xz_bits(split: Split) -> float:
    """Bits per test character that `xz -9e` adds when the test text follows the training text."""

    def compressed(text: str) -> int:
        return len(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))

    return 8 * (compressed(split.train + split.test) - compressed(split.train)) / len(split.test)


def _codes(text: str) -> _Numbers:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64)


class _ContextCounts:
    """How often each character follows each context in the training text."""

    def __init__(self, text: str, order: int) -> None:
        self.order = order
        self.symbols = np.unique(_codes(text))
        self.alphabet = len(self.symbols) + 1
        contexts, following = self._grams(self.numbers(text))
        self.contexts = np.unique(contexts, return_counts=True)
        self.grams = np.unique(following, return_counts=True)

    def numbers(self, text: str) -> _Numbers:
        """Each character's place among the known ones, from 1; 0 for one that is not there."""
        return _look_up((self.symbols, np.arange(1, self.alphabet)), _codes(text))

    def _grams(self, numbers: _Numbers) -> tuple[_Numbers, _Numbers]:
        """Contexts, and contexts with the character that follows, each as one number."""
        length = len(numbers) - self.order
        contexts = np.zeros(max(length, 0), dtype=np.int64)
        for place in range(self.order):
            contexts = contexts * self.alphabet + numbers[place : place + len(contexts)]
        return contexts, contexts * self.alphabet + numbers[self.order :][: len(contexts)]

    def bits(self, numbers: _Numbers, k: float) -> float:
        """Bits per character of a text, with k added to each count."""
        contexts, following = self._grams(numbers)
        chances = (_look_up(self.grams, following) + k) / (_look_up(self.contexts, contexts) + k * self.alphabet)
        return float(-np.log2(chances).mean())


def _look_up(table: tuple[_Numbers, _Numbers], keys: _Numbers) -> _Numbers:
    """The values of some keys in a table of sorted keys and their values; 0 for one that is not there."""
    known, values = table
    places = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.where(known[places] == keys, values[places], 0)
