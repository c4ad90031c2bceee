"""Batches of samples that are about as long as each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from unrolled.errors import InputError, OptionError


class BucketSampler(Sampler[list[int]]):
    """Batches of samples that are about as long as each other, so that little of a batch is padding.

    Every sample comes once per epoch, with other neighbours each time, and batches come in random order. Where a few
    samples are far longer than all others, no choice of batches of one size avoids padding; smaller batches do.

    Args:
        lengths: the length of each sample, `[N]` integers: a list, an array, or a tensor on any device.
        batch_size: B, the samples of a batch. Those that are left over make one smaller batch.
        shuffle: whether chance plays a part. Without it the longest come first, so that a batch too large for memory
            fails at once.
        seed: what the order depends on, together with the epoch and nothing else.
        drop_last: whether to leave out what is left over: other samples each epoch, or the shortest without `shuffle`.

    Attributes:
        epoch: which epoch the next pass is. Each pass counts it on, so that a plain loop over a DataLoader needs no
            `set_epoch`.

    Raises:
        InputError: for lengths that are no list of integers.
        OptionError: for another batch size or seed, or if all samples would be dropped.

    Source: V. Khomenko et al., "Accelerating recurrent neural network training using sequence bucketing and multi-GPU
    data parallelization", DSMP (2016).

    Example:
        >>> import unrolled as ur
        >>> sampler = ur.BucketSampler([3, 50, 4, 51], batch_size=2, seed=1)
        >>> sorted(sorted(batch) for batch in sampler)
        [[0, 2], [1, 3]]
        >>> # DataLoader(samples, batch_sampler=sampler, collate_fn=ur.collate_packed)
    """

    def __init__(
        self,
        lengths: Tensor | Sequence[int],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.lengths = _sample_lengths(lengths)
        self.batch_size = _at_least("batch_size", batch_size, 1)
        self.shuffle = shuffle
        self.seed = _at_least("seed", seed, 0)
        self.drop_last = drop_last
        self.epoch = 0
        if not len(self):
            raise OptionError(
                f"drop_last leaves whole batches only, got batch_size {batch_size} for {len(self.lengths)} samples: "
                "all would be dropped; make batch_size smaller or drop_last False"
            )

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return len(self._sizes())

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of the next epoch, as lists of indices."""
        batches = self._by_chance(self.epoch) if self.shuffle else self._longest_first()
        self.epoch += 1
        return iter(batches)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of this epoch: a run that is resumed sees the order it would have seen."""
        self.epoch = _at_least("epoch", epoch, 0)

    def _sizes(self) -> list[int]:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return [self.batch_size] * whole + [rest] * (rest > 0 and not self.drop_last)

    def _by_chance(self, epoch: int) -> list[list[int]]:
        chance = np.random.default_rng((self.seed, epoch))
        sizes = chance.permutation(self._sizes())
        rows = chance.permutation(len(self.lengths))[: sizes.sum()]
        # Samples come in order of length, each length first made up to 5 % larger by chance: neighbours change places,
        # and padding grows by about half of it.
        blurred = self.lengths[rows] * chance.uniform(1, 1.05, len(rows))
        batches = _as_batches(rows[np.argsort(blurred)], sizes)
        return [batches[i] for i in chance.permutation(len(batches))]

    def _longest_first(self) -> list[list[int]]:
        return _as_batches(np.argsort(-self.lengths, kind="stable"), self._sizes())


def _as_batches(samples: NDArray[np.int64], sizes: Sequence[int] | NDArray[np.int64]) -> list[list[int]]:
    """Samples as batches of these sizes; those that are left over are dropped."""
    ends = np.cumsum(sizes)
    return [batch.tolist() for batch in np.split(samples[: ends[-1]], ends[:-1])]


def _sample_lengths(lengths: Any) -> NDArray[np.int64]:
    rule = "lengths must be [N] integers >= 0, one for each of N >= 1 samples"
    try:
        found = np.asarray(lengths.cpu() if isinstance(lengths, Tensor) else lengths)
    except ValueError as error:  # lists of different lengths
        raise InputError(f"{rule}: {error}; pass [len(sample) for sample in samples]") from error
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        raise InputError(
            f"{rule}, got {found.dtype}{list(found.shape)}; pass [len(sample) for sample in samples], samples in order"
        )
    if found.min() < 0:
        row = int(found.argmin())
        raise InputError(f"{rule}, got {found[row]} for sample {row}; a length counts steps")
    return found.astype(np.int64)


def _at_least(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < least:
        raise OptionError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)
