"""What a compiler or an export sees of an unrolled network: one operator.

All of `run_traced` is traced; the plan that it looks up is a constant to the trace, guarded by which cell it is.
Whatever else may change in the cell is looked at when the operator runs, as in any call. A call that has no plan, or
that would be refused, breaks the graph and is made as it is, outside of it; `rnn.plan(inputs)` says why.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from unrolled import sequence
from unrolled.cells.contract import floating_dtype
from unrolled.engine.plan_cache import PlanCache
from unrolled.internals import operable, transforms
from unrolled.tracing.operator import call
from unrolled.tracing.samples import CallSpec, in_new_thread, tensors_in
from unrolled.tracing.sites import Site
from unrolled.trees import Structure, TensorSpec, Tree, TreeSpec, flatten, leaves, unflatten


def run_traced(plans: PlanCache, cell: nn.Module, inputs: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree] | None:
    """Put an unrolled network into the program that is being traced, as one operator.

    Args:
        plans: the network's plan cache.
        cell: its cell.
        inputs: `[T, B, ...]`.
        state: what copy 0 receives; None for the cell's own initial state.
        context: what is the same at every step, or None.

    Returns:
        The outputs, `[T, B, ...]`, and the last state; None where there is no plan or the call would be refused.
    """
    _, B = sequence.sizes(inputs)
    site = _site(plans, cell, _as_constants(inputs, 2), _as_constants(state, 1), _as_constants(context, 1))
    if site is None:
        return None
    steps = leaves(inputs)
    if state is None:
        state = cell.initial_state(B, device=steps[0].device, dtype=floating_dtype(cell, steps))
    rows = [*leaves(state), *leaves(context)]
    if any(leaf.dim() > 0 and leaf.shape[0] != B for leaf in rows):
        return None
    *results, _ = call(site, [*steps, *rows, *tensors_in(cell)])
    start, structure = flatten(state)
    outputs = len(results) - len(start)
    return unflatten(getattr(_OUTPUTS, f"of_{site}"), results[:outputs]), unflatten(structure, results[outputs:])


_OUTPUTS = SimpleNamespace()
"""The structure of each site's outputs. A trace reads it here: a constant that is no number, it could not guard.

An attribute for each: of a dict a trace has only what stood in it when it was first read.
"""


@torch.compiler.disable
def graph_break(call: Callable[..., tuple[Tree, Tree]], *arguments: Any) -> tuple[Tree, Tree]:
    """Call what no compiler is to look into: it breaks its graph here."""
    return call(*arguments)


def _as_constants(tree: Tree, leading: int) -> tuple[Any, Any]:
    """A tree's structure and the specs of its leaves made of plain tuples, which a trace can hold as constants."""
    tensors, structure = flatten(tree)
    grads, specs = torch.is_grad_enabled(), []
    for tensor in tensors:
        # A symbol among the sizes, other than T and B, is made a number by counting to it: the plan depends on it.
        sizes = tuple([len(range(size)) for size in tensor.shape[leading:]])
        leading_here = min(leading, tensor.dim())
        specs.append((leading_here, sizes, tensor.dtype, tensor.device, grads and tensor.requires_grad))
    return _as_tuples(structure), tuple(specs)


def _as_tuples(structure: Structure) -> tuple[Any, ...]:
    children = tuple([_as_tuples(child) for child in structure.children])
    return structure.kind, structure.keys, children, structure.order


def _from_tuples(values: tuple[Any, ...]) -> Structure:
    kind, keys, children, order = values
    structure = Structure(kind, keys, tuple(map(_from_tuples, children)))
    if order is not None:
        structure.order = order
    return structure


@torch.compiler.assume_constant_result
def _site(plans: PlanCache, cell: nn.Module, *trees: tuple[Any, Any]) -> int | None:
    inputs, state, context = (TreeSpec(_from_tuples(s), tuple([TensorSpec(*x) for x in specs])) for s, specs in trees)
    # Inside of a transform the operator would have to be differentiated or mapped below autograd, which it is not.
    site = (
        Site.of(plans, cell, CallSpec(inputs, state, context)) if in_new_thread(operable) and not transforms() else None
    )
    if site is None:
        return None
    name = f"of_{site.number}"
    if not hasattr(_OUTPUTS, name):
        setattr(_OUTPUTS, name, site.structures[0])
        weakref.finalize(site, vars(_OUTPUTS).pop, name, None).atexit = False
    return site.number
