"""Outputs of rows that end at different times: the last one, a pool of them, a loss over them.

Padding is never computed with. Steps are selected, not multiplied by a mask: NaN times zero is NaN.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from unrolled.autograd_graph import differentiable
from unrolled.errors import InputError, OptionError
from unrolled.lengths import Lengths, checked_lengths
from unrolled.sequence import swap_time_and_batch
from unrolled.trees import Tree, describe, leaves, map_leaves


def last_output(outputs: Tree, lengths: Lengths = None, *, batch_first: bool = False) -> Tree:
    """The last output of each row: many to one.

    Args:
        outputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`), or a PackedSequence.
        lengths: how many steps of each row are no padding, `[B]` integers from 1 to T: a list, or a tensor on any
            device. None for all T, and for a PackedSequence, which has its own.
        batch_first: whether the batch comes first in `outputs`.

    Returns:
        A pytree of `[B, ...]`. Whatever stands in the padding changes no value, and its gradient is exactly zero.

    Raises:
        InputError: for outputs or lengths that do not fit each other, or a row without a step.

    Example:
        >>> import torch, unrolled as ur
        >>> outputs = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> ur.last_output(outputs, lengths=[3, 1])
        tensor([5., 2.])
    """
    steps = _PaddedSteps.of(outputs, lengths, batch_first)
    steps.refuse_empty_rows("last_output")

    def last(leaf: Tensor) -> Tensor:
        ends = steps.lengths.to(leaf.device) - 1
        return leaf[ends, torch.arange(len(ends), device=leaf.device)]

    return map_leaves(last, steps.tree)


def pooled(outputs: Tree, lengths: Lengths = None, *, how: str = "mean", batch_first: bool = False) -> Tree:
    """The mean, the largest or the sum of each row's outputs over time: many to one.

    Args:
        outputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`), or a PackedSequence.
        lengths: how many steps of each row are no padding, `[B]` integers from 0 to T: a list, or a tensor on any
            device. None for all T, and for a PackedSequence, which has its own.
        how: "mean", "max" (each entry on its own; the gradient goes to the step it was taken from) or "sum".
        batch_first: whether the batch comes first in `outputs`.

    Returns:
        A pytree of `[B, ...]`. Whatever stands in the padding changes no value, and its gradient is exactly zero.

    Raises:
        InputError: for outputs or lengths that do not fit each other, the mean of integers, or the mean or the largest
            of a row without a step. The sum of no step is zero.
        OptionError: for another `how`.

    Example:
        >>> import torch, unrolled as ur
        >>> outputs = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> ur.pooled(outputs, lengths=[3, 2])
        tensor([3., 3.])
    """
    if how not in ("mean", "max", "sum"):
        raise OptionError(f"how must be one of 'mean', 'max', 'sum', got {how!r}")
    steps = _PaddedSteps.of(outputs, lengths, batch_first)
    if how != "sum":
        steps.refuse_empty_rows(f"pooled(how={how!r})")
    return map_leaves(lambda leaf: _pooled_leaf(leaf, steps.lengths.to(leaf.device), how), steps.tree)


def sequence_loss(
    loss: Callable[..., Any], outputs: Tree, targets: Tree, lengths: Lengths = None, *, batch_first: bool = False
) -> Tensor:
    """The mean of a loss over all steps that are no padding: many to many.

    Args:
        loss: `loss(outputs, targets)` for N steps at once, `[N, ...]` each: a function of torch.nn.functional, which is
            asked for `reduction="none"`, or anything that returns one value (or one tensor) per step `[N, ...]`, such
            as `torch.nn.CrossEntropyLoss(reduction="none")`.
        outputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`), or a PackedSequence.
        targets: the same for the targets, which are packed if the outputs are.
        lengths: how many steps of each row are no padding, `[B]` integers from 0 to T: a list, or a tensor on any
            device. None for all T, and for PackedSequences, which have their own.
        batch_first: whether the batch comes first in `outputs` and `targets`.

    Returns:
        The mean over steps, a scalar: a step counts the same in a short row as in a long one. If a step's loss is a
        tensor, as that of `mse_loss`, its mean is taken. Whatever stands in the padding changes no value, and its
        gradient is exactly zero.

    Raises:
        InputError: for outputs, targets or lengths that do not fit each other, or if no row has a step.
        OptionError: for a loss that does not return one value per step.

    Example:
        >>> import torch, unrolled as ur
        >>> from torch.nn.functional import cross_entropy
        >>> outputs, targets = torch.zeros(5, 2, 4), torch.zeros(5, 2, dtype=torch.long)  # [T, B, classes], [T, B]
        >>> ur.sequence_loss(cross_entropy, outputs, targets, lengths=[5, 3])  # log 4
        tensor(1.3863)
    """
    if isinstance(outputs, PackedSequence) != isinstance(targets, PackedSequence):
        raise InputError(
            f"outputs and targets must both be packed or both be padded, got {type(outputs).__name__} and "
            f"{type(targets).__name__}; torch.nn.utils.rnn.pack_padded_sequence and pad_packed_sequence convert them"
        )
    padded = _PaddedSteps.of(outputs, lengths, batch_first)
    wanted = _PaddedSteps.of(targets, lengths, batch_first, name="targets")
    T, N = len(leaves(padded.tree)[0]), int(padded.lengths.sum())
    if len(leaves(wanted.tree)[0]) != T or not torch.equal(padded.lengths, wanted.lengths):
        raise InputError(
            f"outputs and targets must share T, B and lengths, got T = {T}, lengths {padded.lengths.tolist()} and "
            f"T = {len(leaves(wanted.tree)[0])}, lengths {wanted.lengths.tolist()}; one target belongs to each output"
        )
    if not N:
        raise InputError(
            f"sequence_loss needs at least one step, got lengths {padded.lengths.tolist()}; skip such a batch"
        )
    times, rows = (torch.arange(T).unsqueeze(1) < padded.lengths).nonzero(as_tuple=True)
    selected = map_leaves(lambda leaf: leaf[times.to(leaf.device), rows.to(leaf.device)], (padded.tree, wanted.tree))
    values = loss(*selected, reduction="none") if _takes_reduction(loss) else loss(*selected)
    if not isinstance(values, Tensor) or values.shape[:1] != (N,):
        got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise OptionError(
            f"a sequence's loss must return one value per step, [N, ...] with N = {N}, got {got}; "
            'do not reduce it: reduction="none"'
        )
    return values.mean()


class _PaddedSteps(NamedTuple):
    """Outputs or targets, time-first, and the length of each row, `[B]` on the CPU."""

    tree: Tree
    lengths: Tensor

    @classmethod
    def of(cls, outputs: Tree, lengths: Lengths, batch_first: bool, name: str = "outputs") -> _PaddedSteps:
        if isinstance(outputs, PackedSequence):
            if lengths is not None:
                raise InputError(
                    f"a PackedSequence has its own lengths, got {lengths!r:.80} beside it; leave lengths out"
                )
            return cls(*pad_packed_sequence(outputs))
        rule = f"{name} must be tensors {'[B, T, ...]' if batch_first else '[T, B, ...]'} that share T >= 1 and B >= 1"
        try:
            shapes = {leaf.shape[:2] for leaf in leaves(outputs)}
        except TypeError as error:
            raise InputError(f"{rule}: {error}; convert it with torch.as_tensor") from error
        if len(shapes) != 1 or len(first := shapes.pop()) < 2 or 0 in first:
            raise InputError(
                f"{rule}, got {describe(outputs)}; pass the outputs of a whole batch, each as long as the others"
            )
        T, B = reversed(first) if batch_first else first
        checked = torch.full((B,), T) if lengths is None else checked_lengths(lengths, T, B)
        return cls(swap_time_and_batch(outputs) if batch_first else outputs, checked)

    def refuse_empty_rows(self, caller: str) -> None:
        empty = (self.lengths == 0).nonzero()
        if len(empty):
            raise InputError(
                f"{caller} needs at least one step in each row, got length 0 for row {int(empty[0])}; "
                "leave rows without a step out of the batch"
            )


def _pooled_leaf(leaf: Tensor, lengths: Tensor, how: str) -> Tensor:
    valid = torch.arange(len(leaf), device=leaf.device).unsqueeze(1) < lengths
    valid = valid.view(valid.shape + (1,) * (leaf.dim() - 2))
    if how == "max":
        # In place of padding stands step 0, which every row has: it wins over nothing that it does not win over itself.
        return torch.where(valid, leaf, leaf[:1]).max(0).values
    if how == "sum":
        return torch.where(valid, leaf, leaf.new_zeros(())).sum(0)
    if not differentiable(leaf):
        raise InputError(f"the mean needs floating outputs, got {leaf.dtype}; convert them: outputs.float()")
    # As torch.mean does: the sum of many float16 is beyond its range where their mean is not.
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    total = torch.where(valid, leaf, leaf.new_zeros(())).sum(0, dtype=dtype)
    return (total / lengths.view((-1,) + (1,) * (leaf.dim() - 2))).to(leaf.dtype)


def _takes_reduction(loss: Callable[..., Any]) -> bool:
    try:
        return "reduction" in inspect.signature(loss).parameters
    except ValueError:  # some functions written in C have no signature
        return False
