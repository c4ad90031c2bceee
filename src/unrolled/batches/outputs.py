"""Outputs of rows that end at different times: the last one, a pool of them, a loss over them.

Padding is never computed with. Steps are selected, not multiplied by a mask: NaN times zero is NaN.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

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
    outputs, found = _padded(outputs, lengths, batch_first)
    _refuse_empty_rows("last_output", found)
    return map_leaves(
        lambda leaf: leaf[found.to(leaf.device) - 1, torch.arange(len(found), device=leaf.device)], outputs
    )


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
    if how not in _POOLS:
        raise OptionError(f"how must be one of {', '.join(map(repr, _POOLS))}, got {how!r}")
    outputs, found = _padded(outputs, lengths, batch_first)
    if how != "sum":
        _refuse_empty_rows(f"pooled(how={how!r})", found)
    return map_leaves(lambda leaf: _POOLS[how](leaf, found.to(leaf.device)), outputs)


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
    outputs, found = _padded(outputs, lengths, batch_first)
    targets, others = _padded(targets, lengths, batch_first, name="targets")
    steps = len(leaves(outputs)[0])
    if steps != len(leaves(targets)[0]) or not torch.equal(found, others):
        raise InputError(
            f"outputs and targets must share T, B and lengths, got T = {steps}, lengths {found.tolist()} and "
            f"T = {len(leaves(targets)[0])}, lengths {others.tolist()}; one target belongs to each output"
        )
    if not found.any():
        raise InputError(f"sequence_loss needs at least one step, got lengths {found.tolist()}; skip such a batch")
    times, rows = (torch.arange(steps).unsqueeze(1) < found).nonzero(as_tuple=True)
    outputs, targets = map_leaves(lambda leaf: leaf[times.to(leaf.device), rows.to(leaf.device)], (outputs, targets))
    return _mean_of(loss, outputs, targets, len(times))


def _padded(outputs: Tree, lengths: Lengths, batch_first: bool, name: str = "outputs") -> tuple[Tree, Tensor]:
    """A caller's outputs time-first, and the length of each row, `[B]` on the CPU."""
    if isinstance(outputs, PackedSequence):
        if lengths is not None:
            raise InputError(f"a PackedSequence has its own lengths, got {lengths!r:.80} beside it; leave lengths out")
        return pad_packed_sequence(outputs)
    T, B = _sizes(outputs, batch_first, name)
    found = torch.full((B,), T) if lengths is None else checked_lengths(lengths, T, B)
    return swap_time_and_batch(outputs) if batch_first else outputs, found


def _sizes(outputs: Tree, batch_first: bool, name: str) -> tuple[int, int]:
    rule = f"{name} must be tensors {'[B, T, ...]' if batch_first else '[T, B, ...]'} that share T >= 1 and B >= 1"
    try:
        shapes = {leaf.shape[:2] for leaf in leaves(outputs)}
    except TypeError as error:
        raise InputError(f"{rule}: {error}; convert it with torch.as_tensor") from error
    if len(shapes) != 1 or len(first := shapes.pop()) < 2 or 0 in first:
        raise InputError(
            f"{rule}, got {describe(outputs)}; pass the outputs of a whole batch, each as long as the others"
        )
    return (first[1], first[0]) if batch_first else (first[0], first[1])


def _refuse_empty_rows(asked: str, lengths: Tensor) -> None:
    empty = (lengths == 0).nonzero()
    if len(empty):
        raise InputError(
            f"{asked} needs at least one step in each row, got length 0 for row {int(empty[0])}; "
            "leave rows without a step out of the batch"
        )


def _valid(leaf: Tensor, lengths: Tensor) -> Tensor:
    """Which steps are no padding, `[T, B, 1, ...]`."""
    valid = torch.arange(len(leaf), device=leaf.device).unsqueeze(1) < lengths
    return valid.view(valid.shape + (1,) * (leaf.dim() - 2))


def _sum(leaf: Tensor, lengths: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.where(_valid(leaf, lengths), leaf, leaf.new_zeros(())).sum(0, dtype=dtype)


def _mean(leaf: Tensor, lengths: Tensor) -> Tensor:
    if not (leaf.is_floating_point() or leaf.is_complex()):
        raise InputError(f"the mean needs floating outputs, got {leaf.dtype}; convert them: outputs.float()")
    # As torch.mean does: the sum of many float16 is beyond its range where their mean is not.
    total = _sum(leaf, lengths, torch.promote_types(leaf.dtype, torch.float32))
    return (total / lengths.view((-1,) + (1,) * (leaf.dim() - 2))).to(leaf.dtype)


def _max(leaf: Tensor, lengths: Tensor) -> Tensor:
    # In place of padding stands step 0, which every row has: it can win over nothing that it does not win over itself.
    return torch.where(_valid(leaf, lengths), leaf, leaf[:1]).max(0).values


_POOLS: dict[str, Callable[..., Tensor]] = {"mean": _mean, "max": _max, "sum": _sum}


def _mean_of(loss: Callable[..., Any], outputs: Tree, targets: Tree, N: int) -> Tensor:
    values = loss(outputs, targets, reduction="none") if _takes_reduction(loss) else loss(outputs, targets)
    if not isinstance(values, Tensor) or values.shape[:1] != (N,):
        got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise OptionError(
            f"a sequence's loss must return one value per step, [N, ...] with N = {N}, got {got}; "
            'do not reduce it: reduction="none"'
        )
    return values.mean()


def _takes_reduction(loss: Callable[..., Any]) -> bool:
    try:
        return "reduction" in inspect.signature(loss).parameters
    except ValueError:  # some functions written in C have no signature
        return False
