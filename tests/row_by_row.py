"""The truth about rows that end early: every row on its own, without padding, copy after copy by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import unrolled as ur
from unrolled.trees import Tree, leaves, map_leaves

__all__ = ["Batch", "answers", "garbage_in", "padding_of", "truth"]


class Batch(NamedTuple):
    """What a network is called with: inputs `[T, B, ...]`, one length for each row, and what else there is."""

    inputs: Tree
    lengths: Sequence[int]
    state: Tree = None
    resets: Tensor | None = None
    context: Tree = None

    @property
    def steps(self) -> int:
        return leaves(self.inputs)[0].shape[0]


def padding_of(lengths: Sequence[int], steps: int) -> Tensor:
    """Which entries `[T, B]` are padding."""
    return torch.arange(steps).unsqueeze(1) >= torch.tensor(lengths)


def garbage_in(inputs: Tree, lengths: Sequence[int], garbage: float) -> Tree:
    """Inputs whose padding is garbage; integers, which may be indices, get one that is in range."""

    def filled(x: Tensor) -> Tensor:
        mask = padding_of(lengths, len(x)).view(*x.shape[:2], *(1,) * (x.dim() - 2))
        return x.masked_fill(mask, garbage if x.is_floating_point() else 0)

    return map_leaves(filled, inputs)


def _row(tree: Tree, b: int) -> Tree:
    return None if tree is None else map_leaves(lambda leaf: leaf[b : b + 1], tree)


def _fresh(cell: nn.Module, batch: int, b: int) -> Tree:
    # As a call draws it: for all rows at once.
    with torch.random.fork_rng():
        return _row(cell.initial_state(batch, dtype=torch.float64), b)


def _walk(net: nn.Module, steps: list[Tree], b: int, batch: Batch, state: Tree) -> tuple[list[Tree], Tree]:
    """One row through a network: what it gives out step by step, and its last state."""
    if isinstance(net, ur.Stack):
        states = [None] * len(net.parts) if state is None else state
        last = []
        for part, own in zip(net.parts, states, strict=True):
            steps, handed_on = _walk(part, steps, b, batch, own)
            last.append(handed_on)
        return steps, tuple(last)
    if isinstance(net, ur.Bidirectional):
        states = [None, None] if state is None else state
        both = [_walk(part, steps, b, batch, own) for part, own in zip(net.parts, states, strict=True)]
        joined = [torch.cat(outputs, -1) for outputs in zip(*(outputs for outputs, _ in both), strict=True)]
        return joined, tuple(last for _, last in both)
    return _walk_cell(net, steps, b, batch, state)


def _walk_cell(net: ur.Unrolled, steps: list[Tree], b: int, batch: Batch, state: Tree) -> tuple[list[Tree], Tree]:
    fresh = _fresh(net.cell, len(batch.lengths), b)
    now = fresh if state is None else _row(state, b)
    context = () if batch.context is None else (_row(batch.context, b),)
    outputs: list[Tree] = [None] * len(steps)
    for t in reversed(range(len(steps))) if net.reverse else range(len(steps)):
        # "Just before step t" lies, walked backwards, after step t: it is step t - 1 that starts afresh.
        at = t + 1 if net.reverse else t
        if batch.resets is not None and at < len(steps) and batch.resets[at, b]:
            now = fresh
        outputs[t], now = net.cell(steps[t], now, *context)
    return outputs, now


def truth(net: nn.Module, batch: Batch) -> tuple[Tree, Tree]:
    """Outputs `[T, B, ...]`, zeros in the padding, and last states `[B, ...]`: every row alone."""
    rows, lasts = [], []
    for b, length in enumerate(batch.lengths):
        steps = [map_leaves(lambda x, t=t, b=b: x[t, b : b + 1], batch.inputs) for t in range(length)]
        outputs, last = _walk(net, steps, b, batch, batch.state)
        rows.append(outputs)
        lasts.append(last)
    kind = next(outputs[0] for outputs in rows if outputs)
    padded = [
        [*outputs, *[map_leaves(torch.zeros_like, kind) for _ in range(batch.steps - len(outputs))]] for outputs in rows
    ]
    by_row = [map_leaves(lambda *each: torch.stack(each), *outputs) for outputs in padded]
    return map_leaves(lambda *each: torch.cat(each, 1), *by_row), map_leaves(lambda *each: torch.cat(each), *lasts)


def _asking(tree: Tree) -> Tree:
    def asked(leaf: Tensor) -> Tensor:
        return leaf.detach().clone().requires_grad_() if leaf.is_floating_point() else leaf

    return None if tree is None else map_leaves(asked, tree)


def called(net: nn.Module, batch: Batch, form: str) -> tuple[Tree, Tree]:
    """A network's answer to a batch that is given in some form: list, tensor, or packed; outputs time-first."""
    rest = {"resets": batch.resets, "context": batch.context}
    inputs, lengths, batch_first = batch.inputs, list(batch.lengths), net.batch_first
    if batch.resets is not None:
        resets = batch.resets[: max(lengths)] if form == "packed" else batch.resets
        rest["resets"] = resets.T if batch_first else resets
    if form == "packed":
        packed = pack_padded_sequence(inputs, torch.tensor(lengths), enforce_sorted=lengths == sorted(lengths)[::-1])
        outputs, last = net(packed, batch.state, **rest)
        return _padded(outputs, batch.steps), last
    given: Any = torch.tensor(lengths, dtype=torch.int32) if form == "tensor" else lengths
    if batch_first:
        inputs = map_leaves(lambda x: x.transpose(0, 1), inputs)
    outputs, last = net(inputs, batch.state, lengths=given, **rest)
    return map_leaves(lambda x: x.transpose(0, 1), outputs) if batch_first else outputs, last


def _padded(outputs: Any, steps: int) -> Tree:
    """A tree of packed sequences as `[T, B, ...]`."""
    if isinstance(outputs, PackedSequence):
        return pad_packed_sequence(outputs, total_length=steps)[0]
    if isinstance(outputs, dict):
        return {key: _padded(value, steps) for key, value in outputs.items()}
    return type(outputs)(_padded(value, steps) for value in outputs)


def answers(net: nn.Module, batch: Batch, form: str = "truth", garbage: float = 0.0) -> dict[str, Any]:
    """Outputs, last states, and the gradients of a loss that all of them enter, by all that asks for one."""
    asked = batch._replace(
        inputs=_asking(garbage_in(batch.inputs, batch.lengths, garbage)),
        state=_asking(batch.state),
        context=_asking(batch.context),
    )
    torch.manual_seed(7)
    outputs, last = truth(net, asked) if form == "truth" else called(net, asked, form)
    total = sum(_mixed(leaf) for leaf in leaves([outputs, last]) if leaf.is_floating_point())
    by = {"inputs": asked.inputs, "state": asked.state, "context": asked.context, **dict(net.named_parameters())}
    found = {}
    for name, tree in by.items():
        for number, leaf in enumerate(leaves(tree)):
            if leaf.requires_grad:
                found[f"{name} {number}"] = leaf
    grads = torch.autograd.grad(total, list(found.values()), allow_unused=True)
    by_name = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(found.items(), grads, strict=True)
    }
    return {"outputs": outputs, "last": last, "gradients": by_name}


def _mixed(leaf: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)
    return (weights * leaf * (1 + 0.1 * leaf)).sum()
