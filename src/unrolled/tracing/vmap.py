"""An unrolled network inside of `torch.vmap`: the mapped dimension becomes rows of the batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from unrolled import sequence
from unrolled.engine.plan_cache import PlanCache
from unrolled.internals import operable, transforms, without_innermost_transform
from unrolled.tracing.operator import operator
from unrolled.tracing.samples import CallSpec, call_with_tensors, tensors_in
from unrolled.tracing.sites import Site
from unrolled.trees import Tree, leaves, unflatten


def run_mapped(plans: PlanCache, cell: nn.Module, inputs: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree] | None:
    """Run a network inside of `vmap` with the mapped dimension folded into its rows.

    Args:
        plans: the network's plan cache.
        cell: its cell.
        inputs: `[T, B, ...]`.
        state: what copy 0 receives.
        context: what is the same at every step, or None.

    Returns:
        Outputs and last state; None outside of `vmap`, or where the rows are not proved independent of each other.
    """
    if transforms()[-1:] != ["Vmap"] or not operable():
        return None
    site = Site.of(plans, cell, CallSpec.of(inputs, state, context), sequence.sizes(inputs)[1])
    if site is None or not site.folds:
        return None
    tensors = [*leaves(inputs), *leaves(state), *leaves(context), *tensors_in(cell)]
    *results, _ = torch.ops.unrolled.run(tensors, [False] * len(tensors), site.number)
    outputs, last = site.structures
    return unflatten(outputs, results[: site.outputs]), unflatten(last, results[site.outputs :])


def active_transform(tensors: Iterable[Tensor]) -> str:
    """What maps or differentiates a call, ordinary backward passes aside, in words; empty for nothing.

    Args:
        tensors: what the call passes, and weights: they may carry forward-mode tangents.
    """
    active = transforms()
    if active:
        return f"torch.func's {active[-1]}"
    return "forward-mode derivatives" if any(unpack_dual(x).tangent is not None for x in tensors) else ""


@operator.register_vmap
def _(info: Any, in_dims: Any, tensors: list[Tensor], wanted: list[bool], site: int) -> tuple[Any, Any]:
    at, N, dims = Site.at(site), info.batch_size, in_dims[0]
    with without_innermost_transform():
        folded = _folded(at, N, dims, tensors)
        results = folded or _mapped_reference(at, info, dims, tensors)
    places = [int(n < at.outputs) if folded else 0 for n in range(len(results))]
    if folded:
        results = [x.unflatten(place, (N, at.batch)) for x, place in zip(results, places, strict=True)]
    return [*results, torch.zeros(1, dtype=torch.uint8)], [*places, None]


def _folded(at: Site, N: int, dims: list[int | None], tensors: list[Tensor]) -> list[Tensor] | None:
    """All N runs as one of N times as many rows; None if weights are mapped, or the cell does not treat rows alike."""
    wide = Site.of(*at.alive(), at.spec, N * at.batch)
    mapped_weights = any(dim is not None for dim in dims[at.arguments :])
    if mapped_weights or wide is None or wide.plan.recording != at.plan.recording:
        return None
    pairs, inputs = zip(tensors[: at.arguments], dims, strict=False), at.plan.recording.counts[0]
    rows = [_as_rows(tensor, dim, N, int(n < inputs)) for n, (tensor, dim) in enumerate(pairs)]
    plans, cell = wide.alive()
    around = call_with_tensors(cell, tensors[at.arguments :], lambda: run_mapped(plans, cell, *wide.trees(rows)))
    return wide.run([*rows, *tensors[at.arguments :]]) if around is None else [*leaves(around[0]), *leaves(around[1])]


def _as_rows(tensor: Tensor, dim: int | None, N: int, place: int) -> Tensor:
    """The mapped dimension, of size N, folded into the rows at a place; what is not mapped is repeated."""
    mapped = tensor.expand(N, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.movedim(0, place).flatten(place, place + 1)


def _mapped_reference(at: Site, info: Any, dims: list[int | None], tensors: list[Tensor]) -> list[Tensor]:
    def run(*mapped: Tensor) -> tuple[Tensor, ...]:
        return tuple(at.run(mapped, by_reference=True))

    return list(torch.vmap(run, in_dims=tuple(dims), randomness=info.randomness)(*tensors))
