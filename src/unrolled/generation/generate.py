"""Generation: a cell whose output is its next input, until each row of the batch has come to its own end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from unrolled import sequence
from unrolled.cells.adapted import as_cell
from unrolled.cells.contract import check_context, starting_state
from unrolled.errors import InputError, OptionError
from unrolled.generation.live_rows import (
    LeavingRows,
    RowSpec,
    StayingRows,
    check_rows,
    select_rows,
    with_rows,
)
from unrolled.networks.layered import Layered
from unrolled.networks.unroll import Unrolled
from unrolled.plan.independence import rows_are_independent
from unrolled.trees import Tree, describe, map_leaves, named_leaves

Feed = Callable[[Tree], Tree]
Until = Callable[[Tree], Tensor]


@dataclass(frozen=True)
class Step:
    """One step of `stream`: what the N rows made that had not ended before it.

    Attributes:
        t: the number of the step.
        rows: which rows of the batch they are, in order, int64 `[N]`.
        output: what the cell gave out for them, a pytree of `[N, ...]`.
        state: what it passes on for them, a pytree of `[N, ...]`.
        ended: for which of them this step was the last, bool `[N]`.

    Example:
        >>> import torch, unrolled as ur
        >>> cell = ur.as_cell(lambda x, s: (x + 1, s))
        >>> for step in ur.stream(cell, torch.zeros(2), torch.tensor([1, 3]), until=lambda x: x == 4):
        ...     print(step.t, step.rows.tolist(), step.output.tolist(), step.ended.tolist())
        0 [0, 1] [2, 4] [False, True]
        1 [0] [3] [False]
        2 [0] [4] [True]
    """

    t: int
    rows: Tensor
    output: Tree
    state: Tree
    ended: Tensor


def generate(
    cell: nn.Module | Callable[..., Any],
    state: Tree,
    first: Tree,
    *,
    feed: Feed | None = None,
    until: Until | None = None,
    max_steps: int | None = None,
    context: Tree = None,
) -> tuple[Tree, Tensor, Tree]:
    """Run a cell on its own outputs, each row of the batch until its own end.

    A row whose output `until` accepts ends with that step, and is not computed any more. Gradients flow back through
    all that was fed, unless `feed` detaches it or picks integers; under `torch.no_grad` nothing is kept for them.

    Where it is not proved that the cell treats rows independently (batch statistics, random numbers of its own), the
    rows that have ended are still run with the others, unseen, on the input and state that they ended with.

    Args:
        cell: a cell, anything `as_cell` makes one of without further arguments, or what `unroll` made of one.
        state: the state copy 0 receives, a pytree of `[B, ...]`; None for the cell's own initial state.
        first: the input of copy 0, a pytree of `[B, ...]`.
        feed: `(output) -> input` of the next copy, for the N rows that go on, row by row; by default the output itself.
        until: `(output) -> ended`, bool `[N]`, for the N rows of a step, row by row.
        max_steps: after how many steps rows end in any case. Without it only `until` ends them, if ever.
        context: what a cell with a third argument receives at every step, a pytree of `[B, ...]`.

    Returns:
        The outputs, a pytree of `[T, B, ...]` where T is the longest row's length, zeros where a row has ended; the
        lengths, int64 `[B]`; and the state, each row's own at its end.

    Raises:
        OptionError: for neither `until` nor `max_steps`, one that is no such thing, no mask from `until`, or a module
            of several cells.
        InputError: for a `first` or context that is no batch of B rows, or a `feed` that makes no input like `first`.
        StateError: for a state that does not fit, or whose rows cannot end each on its own.
        CellError: if the cell breaks its contract or raises.

    Source: A. Graves, "Generating sequences with recurrent neural networks", arXiv:1308.0850 (2013).

    Example:
        >>> import torch, unrolled as ur
        >>> cell = ur.as_cell(lambda x, s: (x + 1, s + x))
        >>> outputs, lengths, state = generate(cell, torch.zeros(2), torch.tensor([1., 3.]), until=lambda x: x >= 4)
        >>> outputs.T, lengths, state
        (tensor([[2., 3., 4.],
                [4., 0., 0.]]), tensor([3, 1]), tensor([6., 3.]))
    """
    outputs: list[Tree] = []
    zeros: Tree = None
    last: Tree = None
    for step in stream(cell, state, first, feed=feed, until=until, max_steps=max_steps, context=context):
        zeros = map_leaves(torch.zeros_like, step.output) if step.t == 0 else zeros
        outputs.append(with_rows(zeros, step.rows, step.output))
        if any(step.ended.tolist()):
            last = with_rows(last, step.rows, (torch.full_like(step.rows, step.t + 1), step.state))
    lengths, state = last
    return sequence.stacked(outputs), lengths, state


def stream(
    cell: nn.Module | Callable[..., Any],
    state: Tree,
    first: Tree,
    *,
    feed: Feed | None = None,
    until: Until | None = None,
    max_steps: int | None = None,
    context: Tree = None,
) -> Iterator[Step]:
    """The steps of `generate` as they come, each before the next is computed.

    Takes what `generate` takes and raises what it raises, before the first step where it can. The tensors of a step are
    those that the next one reads: clone them to write into them.

    Returns:
        One `Step` at a time, of the rows that have not ended.

    Example:
        >>> import torch, unrolled as ur
        >>> cell = ur.as_cell(lambda x, s: (x + s, x))
        >>> steps = ur.stream(cell, torch.tensor([0]), torch.tensor([1]), max_steps=8)
        >>> [step.output.item() for step in steps]
        [1, 2, 3, 5, 8, 13, 21, 34]
    """
    cell = _cell_of(cell)
    _check_ends(until, max_steps)
    B = _batch_size(first)
    check_context(cell, context, B)
    state = starting_state(cell, state, first, B)
    if until is not None:
        check_rows(cell, state, B)
    alone = until is None or B == 1 or rows_are_independent(cell, first, state, context)
    batch = LeavingRows(cell, context) if alone else StayingRows(cell, context)
    return _live_steps(batch, state, first, feed, until, max_steps)


def _cell_of(cell: nn.Module | Callable[..., Any]) -> nn.Module:
    if isinstance(cell, Layered):
        raise OptionError(
            f"generation runs one cell, step by step, got a {type(cell).__name__} of several over time; write a cell "
            "that calls one after the other, with a tuple of their states"
        )
    return cell.cell if isinstance(cell, Unrolled) else as_cell(cell)


def _live_steps(
    batch: LeavingRows | StayingRows,
    state: Tree,
    first: Tree,
    feed: Feed | None,
    until: Until | None,
    max_steps: int | None,
) -> Iterator[Step]:
    input, rows = first, torch.arange(_batch_size(first), device=sequence.device_of(first))
    nobody, everybody = rows < 0, rows >= 0
    inputs, outputs = RowSpec(first), None
    for t in count():
        output, state = batch.step(t, input, state)
        outputs = outputs or RowSpec.of_outputs(output, len(rows))
        outputs.check_output(t, output, len(rows))
        if t + 1 == max_steps:
            ended = everybody[: len(rows)]
        else:
            ended = nobody if until is None else _ended(until, t, output, rows)
        yield Step(t, rows, output, state, ended)
        ending = sum(ended.tolist())
        if ending == len(rows):
            return
        if ending:
            going = (~ended).nonzero().squeeze(1)
            batch = batch.without_ended(going, input, state)
            rows, output, state = (select_rows(tree, going) for tree in (rows, output, state))
        input = output if feed is None else feed(output)
        # Outputs are alike: where they are inputs, one was looked at for all.
        if feed is not None or t == 0:
            inputs.check_input(t, input, len(rows), fed=feed is not None)


def _batch_size(first: Tree) -> int:
    """The B that all leaves of the first input agree on."""
    try:
        found = named_leaves(first, "first")
    except TypeError as error:
        raise InputError(f"first must be a pytree of tensors: {error}; convert it with torch.as_tensor") from error
    if not found:
        raise InputError("first must have at least one tensor [B, ...], got none; B is read from it")
    B = len(found[0][1]) if found[0][1].dim() else 0
    for name, leaf in found:
        if leaf.dim() == 0 or len(leaf) == 0 or len(leaf) != B:
            raise InputError(
                f"first is the input of copy 0, [B, ...] with one B >= 1 in all leaves, got {describe(first)}; "
                f"look at {name}; for a single row add a batch of one: unsqueeze(0)"
            )
    return B


def _check_ends(until: Until | None, max_steps: int | None) -> None:
    if until is None and max_steps is None:
        raise OptionError("generation needs an end, got neither until= nor max_steps=; pass one of them, or both")
    if until is not None and not callable(until):
        raise OptionError(f"until must be a function (output) -> ended, bool [N], got a {type(until).__name__}")
    if max_steps is not None and (isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1):
        raise OptionError(f"max_steps must be an integer of at least 1, got {max_steps!r}; leave it out for no bound")


def _ended(until: Until, t: int, output: Tree, rows: Tensor) -> Tensor:
    ended = until(output)
    if not isinstance(ended, Tensor) or ended.dtype != torch.bool or ended.shape != rows.shape:
        got = describe(ended) if isinstance(ended, Tensor) else f"a {type(ended).__name__}"
        raise OptionError(
            f"until must return one bool for each of the {len(rows)} rows that it is given, bool[{len(rows)}], but at "
            f"step {t} it returned {got}; compare each row by itself: until=lambda output: output.argmax(-1) == end"
        )
    return ended.to(rows.device)
