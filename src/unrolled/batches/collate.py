"""Samples of different lengths as one batch, padded or packed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import default_collate

from unrolled.errors import InputError
from unrolled.trees import Structure, TreeSpec, describe, leaves, unflatten


def collate_padded(
    samples: Sequence[Any], *, sequences: Collection[Any] = (), batch_first: bool = False
) -> tuple[Any, Tensor]:
    """One padded batch of samples that differ in length, and their lengths: a `collate_fn` for a DataLoader.

    Args:
        samples: B samples. A sample is a sequence `[T, ...]`, or a tuple, named tuple or dict of sequences and other
            things.
        sequences: which parts of a sample are sequences: positions in a tuple, names in a named tuple, keys of a dict.
            Such a part is a tensor, a numpy array or a pytree of them; all of one sample share its T. The other parts
            are put together by `torch.utils.data.default_collate`.
        batch_first: whether sequences become `[B, T, ...]`.

    Returns:
        The batch, built like a sample, its sequences `[T, B, ...]` with zeros for padding and T the longest; and the
        lengths, integers `[B]`.

    Raises:
        InputError: for samples that do not fit each other, parts that are not there, or sequences of one sample that
            differ in length.

    Example:
        >>> import torch, unrolled as ur
        >>> from functools import partial
        >>> samples = [(torch.tensor([1, 2, 3]), 0), (torch.tensor([4]), 1)]
        >>> collate = partial(ur.collate_padded, sequences=[0])  # for DataLoader(samples, collate_fn=collate)
        >>> (inputs, labels), lengths = collate(samples)
        >>> inputs, labels, lengths
        (tensor([[1, 4],
                [2, 0],
                [3, 0]]), tensor([0, 1]), tensor([3, 1]))
    """
    batch = _Samples(samples, sequences)
    lengths = batch.lengths()
    uneven = (lengths != lengths[:, :1]).any(1).nonzero()
    if len(uneven):
        i = int(uneven[0])
        raise InputError(
            f"padded sequences of one sample must share T, since there is one list of lengths, got lengths "
            f"{lengths[i].tolist()} in sample {i}; ur.collate_packed keeps the lengths of each"
        )
    return batch.joined(lambda rows: pad_sequence(rows, batch_first)), lengths[:, 0].clone()


def collate_packed(samples: Sequence[Any], *, sequences: Collection[Any] = ()) -> Any:
    """One batch of samples that differ in length, its sequences packed: a `collate_fn` for a DataLoader.

    Args:
        samples: B samples. A sample is a sequence `[T, ...]`, or a tuple, named tuple or dict of sequences and other
            things.
        sequences: which parts of a sample are sequences: positions in a tuple, names in a named tuple, keys of a dict.
            Such a part is a tensor, a numpy array or a pytree of them. The other parts are put together by
            `torch.utils.data.default_collate`.

    Returns:
        The batch, built like a sample, with a PackedSequence for each tensor of a sequence. Rows keep their order.

    Raises:
        InputError: for samples that do not fit each other, parts that are not there, or a sequence without a step,
            which a PackedSequence cannot hold.

    Example:
        >>> import torch, unrolled as ur
        >>> batch = ur.collate_packed([torch.tensor([1, 2, 3]), torch.tensor([4])])
        >>> batch.data, batch.batch_sizes
        (tensor([1, 4, 2, 3]), tensor([2, 1, 1]))
    """
    batch = _Samples(samples, sequences)
    empty = (batch.lengths() == 0).any(1).nonzero()
    if len(empty):
        raise InputError(
            f"a PackedSequence holds no row without a step, got length 0 in sample {int(empty[0])}; "
            "leave such samples out, or take ur.collate_padded"
        )
    return batch.joined(lambda rows: pack_sequence(rows, enforce_sorted=False))


class _Sequence(NamedTuple):
    """One part of all samples: how its pytree is built, and for each leaf of it the samples' tensors."""

    structure: Structure
    tensors: list[tuple[Tensor, ...]]

    @classmethod
    def of(cls, column: list[Any]) -> _Sequence:
        try:
            column = [_with_tensors(tree) for tree in column]
            specs = [TreeSpec.of(tree, 1) for tree in column]
        except TypeError as error:
            raise InputError(
                f"a sequence must be tensors [T, ...]: {error}; convert it with torch.as_tensor"
            ) from error
        are_sequences = bool(specs[0].leaves) and all(leaf.leading for leaf in specs[0].leaves)
        for i, spec in enumerate(specs):
            if not are_sequences or spec != specs[0]:
                raise InputError(
                    "sequences of one batch must be tensors [T, ...] that differ in T only: "
                    f"sample 0 has {describe(column[0])}, sample {i} has {describe(column[i])}"
                )
        return cls(specs[0].structure, list(zip(*map(leaves, column), strict=True)))


class _Samples:
    """Samples part by part: `_Sequence`s, and lists of the other things."""

    def __init__(self, samples: Sequence[Any], sequences: Collection[Any]) -> None:
        if not samples:
            raise InputError("a batch needs at least one sample, got none; leave empty batches out")
        self.sample = samples[0]
        every = [_parts_of(sample) for sample in samples]
        first = every[0]
        for i, parts in enumerate(every):
            if parts.keys() != first.keys():
                raise InputError(
                    f"samples of one batch must have the same parts: sample 0 has {_describe_parts(first)}, sample {i} "
                    f"has {_describe_parts(parts)}; fill in what is missing"
                )
        named = sequences if len(sequences) or None not in first else (None,)
        if not len(named) or any(key not in first for key in named):
            raise InputError(
                f"sequences must name the parts of a sample that are sequences, got {sequences!r} for a sample with "
                f"{_describe_parts(first)}; use functools.partial(collate, sequences=[...]), or none where a sample is "
                "one tensor"
            )
        columns = {key: [parts[key] for parts in every] for key in first}
        self.parts = {key: _Sequence.of(column) if key in named else column for key, column in columns.items()}

    def lengths(self) -> Tensor:
        """The length of each tensor of a sequence, for each sample: `[B, tensors]`."""
        sequences = [part for part in self.parts.values() if isinstance(part, _Sequence)]
        columns = [tensors for sequence in sequences for tensors in sequence.tensors]
        return torch.tensor([[len(tensor) for tensor in tensors] for tensors in columns]).T

    def joined(self, join: Callable[[Any], Any]) -> Any:
        """One batch, built like a sample."""
        parts = {
            key: unflatten(part.structure, [join(tensors) for tensors in part.tensors])
            if isinstance(part, _Sequence)
            else default_collate(part)
            for key, part in self.parts.items()
        }
        if isinstance(self.sample, Mapping):
            return parts
        if isinstance(self.sample, tuple | list):
            return type(self.sample)(**parts) if hasattr(self.sample, "_fields") else tuple(parts.values())
        return parts[None]


def _parts_of(sample: Any) -> dict[Any, Any]:
    """A sample's parts by key, name or position; what has no parts is its own, under None."""
    if isinstance(sample, Mapping):
        return dict(sample)
    if isinstance(sample, tuple | list):
        return dict(zip(getattr(sample, "_fields", range(len(sample))), sample, strict=True))
    return {None: sample}


def _describe_parts(parts: dict[Any, Any]) -> str:
    if None in parts:
        return f"no parts, a {type(parts[None]).__name__}"
    return f"parts {', '.join(map(repr, parts))}"


def _with_tensors(tree: Any) -> Any:
    """A pytree whose numpy arrays are tensors, as torch's own collate takes them."""
    if isinstance(tree, np.ndarray | np.generic):
        return torch.as_tensor(np.require(tree, requirements=["C", "W"]))
    if isinstance(tree, dict):
        return type(tree)(zip(tree, map(_with_tensors, tree.values()), strict=True))
    if isinstance(tree, tuple | list):
        children = map(_with_tensors, tree)
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return tree
