"""Sequences: pytrees of `[T, B, ...]`, taken apart into copies' inputs and put together from their outputs.

Shape letters, here and everywhere: `T` time, `B` batch, `I` input features, `H` hidden features, `G` gate
features, `L` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unrolled.errors import CellError, InputError
from unrolled.lengths import Extent
from unrolled.trees import Structure, TensorSpec, Tree, flatten, leaves, map_leaves, paths, unflatten


def sizes(inputs: Tree, *, batch_first: bool = False) -> tuple[int, int]:
    """The length T and the batch size B that all leaves of a sequence agree on.

    Args:
        inputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`).
        batch_first: whether the caller's layout has the batch first.

    Raises:
        InputError: if a leaf has no T and B, if leaves disagree, or if T or B is 0.
    """
    layout = "[B, T, ...]" if batch_first else "[T, B, ...]"
    tensors, structure = _flatten_inputs(inputs)
    for path, tensor in zip(paths(structure), tensors, strict=True):
        if tensor.dim() < 2:
            raise InputError(
                f"inputs{path} must be {layout}, got shape {list(tensor.shape)}; "
                f"for a single sequence add a batch of one: inputs.unsqueeze({0 if batch_first else 1})"
            )
        if tensor.shape[:2] != tensors[0].shape[:2]:
            raise InputError(
                f"all inputs must share T and B: inputs{paths(structure)[0]} is {list(tensors[0].shape)}, "
                f"inputs{path} is {list(tensor.shape)}; pad or cut them to one {layout}"
            )
    first, second = tensors[0].shape[:2]
    T, B = (second, first) if batch_first else (first, second)
    if T == 0 or B == 0:
        raise InputError(
            f"inputs {layout} need T >= 1 and B >= 1, got T = {T}, B = {B} "
            f"(shape {list(tensors[0].shape)}); leave empty batches out before the call"
        )
    return T, B


def _flatten_inputs(inputs: Tree) -> tuple[list[Tensor], Structure]:
    if isinstance(inputs, PackedSequence):
        raise InputError("a PackedSequence is not taken here; pad it: torch.nn.utils.rnn.pad_packed_sequence")
    try:
        tensors, structure = flatten(inputs)
    except TypeError as error:
        raise InputError(f"inputs must be a pytree of tensors: {error}; convert it with torch.as_tensor") from error
    if _holds_packed(inputs):
        raise InputError("a PackedSequence among others is not taken; pass padded tensors and lengths=")
    if not tensors:
        raise InputError("inputs must have at least one tensor [T, B, ...], got none; T and B are read from it")
    return tensors, structure


def _holds_packed(tree: Tree) -> bool:
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    return isinstance(tree, PackedSequence) or any(_holds_packed(child) for child in inside)


def device_of(inputs: Tree) -> torch.device:
    """The device of a sequence: that of its first leaf."""
    return leaves(inputs)[0].device


def swap_time_and_batch(sequence: Tree) -> Tree:
    """`[B, T, ...]` to `[T, B, ...]` and back, without copying."""
    return map_leaves(lambda tensor: tensor.transpose(0, 1), sequence)


def rows_where(mask: Tensor, chosen: Tree, other: Tree) -> Tree:
    """A tree of `[B, ...]` whose rows are those of `chosen` where a mask, a bool `[B]`, is true, else of `other`."""

    def choose(here: Tensor, there: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *(1,) * (there.dim() - 1)), here, there)

    return map_leaves(choose, chosen, other)


def each_step(inputs: Tree, extent: Extent) -> Iterator[Tree]:
    """The inputs of copy 0, 1, 2, ...

    `unbind` and `split` have one backward for all T steps. Indexing `inputs[t]` would allocate a gradient of the whole
    sequence at every step, which is quadratic in T.
    """
    tensors, structure = flatten(inputs)
    columns = [tensor.split(extent.sizes) if extent.ragged else tensor.unbind(0) for tensor in tensors]
    for step in zip(*columns, strict=True):
        yield unflatten(structure, step)


def joined(steps: Sequence[Tree], extent: Extent) -> Tree:
    """Put T trees of `[B, ...]` together: `[T, B, ...]`, or `[N, ...]` where rows end at different times.

    Raises:
        CellError: naming the first step whose structure, shape or dtype differs from that of step 0.
    """
    return _joined(steps, torch.cat, 1) if extent.ragged else stacked(steps)


def stacked(steps: Sequence[Tree]) -> Tree:
    """Put T trees of `[...]` together into one tree of `[T, ...]`.

    Raises:
        CellError: naming the first step whose structure, shape or dtype differs from that of step 0.
    """
    return _joined(steps, torch.stack, 0)


def _joined(steps: Sequence[Tree], join: Callable[[list[Tensor]], Tensor], rows: int) -> Tree:
    """Trees put together leaf by leaf; the first `rows` dimensions may differ."""
    flat = [flatten(step) for step in steps]
    first, structure = flat[0]
    specs = [TensorSpec.of(tensor, rows) for tensor in first]
    for t, (tensors, other) in enumerate(flat):
        if other != structure or [TensorSpec.of(tensor, rows) for tensor in tensors] != specs:
            raise CellError(
                f"a cell's output must keep its structure, shape and dtype: copy 0 returned "
                f"{_say(first)}, copy {t} returned {_say(tensors)}; return the same kind of output at every step"
            )
    columns = zip(*(tensors for tensors, _ in flat), strict=True)
    return unflatten(structure, [join(list(column)) for column in columns])


def _say(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors) or "no tensor"
