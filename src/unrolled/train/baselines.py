"""What simpler things reach on the same text: models of a few characters of context, and a compressor."""

from __future__ import annotations

import lzma
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unrolled.train.text import Split

_SMOOTHING = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Baseline:
    """A simpler model's score on the test text, in bits per character."""

    name: str
    bits: float


def baselines(split: Split) -> list[Baseline]:
    """Scores of character models of order 2 and 3 and of `xz -9e`, given the training (and validation) text.

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
    symbols = np.unique(_codes(split.train))
    counts = _Counts(_numbers(split.train, symbols), order, len(symbols) + 1)
    validation, test = (_numbers(text, symbols) for text in (split.validation, split.test))
    best = min(_SMOOTHING, key=lambda k: counts.bits(validation, k))
    return counts.bits(test, best)


def xz_bits(split: Split) -> float:
    """Bits per test character that `xz -9e` adds when the test text follows the training text."""

    def compressed(text: str) -> int:
        return len(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))

    return 8 * (compressed(split.train + split.test) - compressed(split.train)) / len(split.test)


def _codes(text: str) -> Codes:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64)


def _numbers(text: str, symbols: Codes) -> Codes:
    """Each character's place among the known symbols, from 1; 0 for one that is not there."""
    codes = _codes(text)
    places = np.searchsorted(symbols, codes).clip(max=len(symbols) - 1)
    return np.where(symbols[places] == codes, places + 1, 0)


class _Counts:
    """How often each character follows each context in the training text."""

    def __init__(self, numbers: Codes, order: int, alphabet: int) -> None:
        self.order, self.alphabet = order, alphabet
        contexts, following = self._grams(numbers)
        self.contexts = np.unique(contexts, return_counts=True)
        self.grams = np.unique(following, return_counts=True)

    def _grams(self, numbers: Codes) -> tuple[Codes, Codes]:
        """Contexts, and contexts with the character that follows, each as one number."""
        length = len(numbers) - self.order
        contexts = np.zeros(max(length, 0), dtype=np.int64)
        for place in range(self.order):
            contexts = contexts * self.alphabet + numbers[place : place + len(contexts)]
        return contexts, contexts * self.alphabet + numbers[self.order :][: len(contexts)]

    def bits(self, numbers: Codes, k: float) -> float:
        contexts, following = self._grams(numbers)
        chances = (_look_up(self.grams, following) + k) / (_look_up(self.contexts, contexts) + k * self.alphabet)
        return float(-np.log2(chances).mean())


def _look_up(table: tuple[Codes, NDArray[np.int64]], keys: Codes) -> NDArray[np.int64]:
    known, counts = table
    places = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.where(known[places] == keys, counts[places], 0)
