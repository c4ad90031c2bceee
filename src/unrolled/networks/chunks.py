"""Chunks of a long sequence, of any lengths, handed out as steps in the portions that are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from unrolled import sequence
from unrolled.errors import InputError
from unrolled.trees import Tree, TreeSpec, describe, flatten, map_leaves

_NO_MORE: Any = object()


class Chunks:
    """A source of chunks, read as far as it is needed; no more than one chunk is held beyond what was taken.

    Args:
        source: an iterable of pytrees of `[t, B, ...]` (`[B, t, ...]` with `batch_first`).
        resets: an iterable beside it with a bool `[t, B]` for each chunk, or None.
        batch_first: whether chunks are `[B, t, ...]`.

    Example:
        >>> chunks = Chunks(torch.arange(10).view(2, 5, 1), None)
        >>> [chunks.take(4)[0].flatten().tolist() for _ in range(3)]
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    """

    def __init__(self, source: Iterable[Tree], resets: Iterable[Tensor] | None, *, batch_first: bool = False) -> None:
        self._pairs = self._each(iter(source), None if resets is None else iter(resets))
        self._batch_first = batch_first
        self._first: Tree = None
        self._left: Tree = None
        self.batch = 0

    def take(self, steps: int) -> Tree:
        """The next steps as `(inputs, resets)`, each `[n, B, ...]` with n = `steps`; fewer at the end, None after it.

        Raises:
            InputError: for a chunk that is not like the first one, naming it.
        """
        parts: list[Tree] = []
        missing = steps
        while missing:
            if self._left is None:
                self._left = next(self._pairs, None)
                if self._left is None:
                    break
            have = _length(self._left)
            parts.append(map_leaves(lambda x, n=missing: x[:n], self._left))
            self._left = map_leaves(lambda x, n=missing: x[n:], self._left) if have > missing else None
            missing -= min(have, missing)
        return map_leaves(lambda *leaves: torch.cat(leaves), *parts) if len(parts) > 1 else next(iter(parts), None)

    def _each(self, source: Iterator[Tree], resets: Iterator[Tensor] | None) -> Iterator[Tree]:
        for number, chunk in enumerate(source):
            steps = self._checked(number, chunk)
            mask = None if resets is None else self._checked_mask(number, _length(steps), next(resets, _NO_MORE))
            yield steps, mask
        if resets is not None and next(resets, _NO_MORE) is not _NO_MORE:
            raise InputError("resets must have one mask for each chunk of the source, got more; end both together")

    def _checked(self, number: int, chunk: Tree) -> Tree:
        try:
            _, B = sequence.sizes(chunk, batch_first=self._batch_first)
        except InputError as error:
            raise InputError(f"chunk {number}: {error}") from error
        steps = sequence.swap_time_and_batch(chunk) if self._batch_first else chunk
        if self._first is None:
            self._first, self.batch = map_leaves(lambda x: x[:0].detach(), steps), B
        elif TreeSpec.of(steps, 1) != TreeSpec.of(self._first, 1):
            raise InputError(
                f"all chunks must have the B, structure, dtypes and features of the first, "
                f"{describe(_step(self._first))} in each step, but chunk {number} has {describe(_step(steps))}; make "
                "the source yield chunks of one kind, or begin windows() anew for another batch"
            )
        return steps

    def _checked_mask(self, number: int, steps: int, mask: Any) -> Tensor:
        wanted = (self.batch, steps) if self._batch_first else (steps, self.batch)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != wanted:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            got = "none" if mask is _NO_MORE else got
            raise InputError(f"resets of chunk {number} must be a bool tensor {list(wanted)}, got {got}")
        return mask.T if self._batch_first else mask


def _length(pair: Tree) -> int:
    return len(flatten(pair)[0][0])


def _step(steps: Tree) -> Tree:
    return map_leaves(lambda x: x.new_empty(x.shape[1:]), steps)
