"""A whole run as one operator of torch, `unrolled::run`: for compilers, exports and `vmap` around an unrolled network."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unrolled import sequence
from unrolled._planbook import PlanBook
from unrolled._sites import Asked, Kind, Site, held, site_at, site_of
from unrolled.trees import Structure, Tree, flatten, leaves, unflatten

__all__ = ["call", "run_mapped"]

_OUTSIDE = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())


def _outside() -> AbstractContextManager[None]:
    """Where autograd sees what is done, as it does outside of an operator."""
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(*_OUTSIDE)
    return guard


class _Tapes:
    """What forward runs keep for their backward, each as long as the token that stands for it has memory."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}

    def keep(self, tape: Any) -> Tensor:
        memory = np.zeros(1, dtype=np.uint8)
        token = torch.from_numpy(memory)
        self._kept[token.data_ptr()] = tape
        weakref.finalize(memory, self._kept.pop, token.data_ptr(), None).atexit = False
        return token

    def of(self, token: Tensor) -> Any:
        return self._kept.get(token.data_ptr())


_TAPES = _Tapes()


@torch.library.custom_op("unrolled::run", mutates_args=())
def _run(tensors: list[Tensor], wanted: list[bool], site: int) -> list[Tensor]:
    at = site_at(site)
    with _outside():
        if any(wanted):
            tape, results = _taped(at, tensors, wanted)
            token = _TAPES.keep(tape)
        else:
            with torch.no_grad():
                results = at.run(tensors)
            token = torch.zeros(1, dtype=torch.uint8)
    return [*(result.detach().contiguous() for result in results), token]


def _taped(at: Site, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Any, list[Tensor]]:
    own = {tensor.data_ptr() for tensor in held(at.alive()[1])}
    with torch.inference_mode(False), torch.enable_grad():
        # A compiler writes over what it no longer needs itself; the cell's own weights are not its to write to.
        given = [t.detach() if t.data_ptr() in own else t.detach().clone() for t in tensors]
        given = [t.requires_grad_(w) for t, w in zip(given, wanted, strict=True)]
        results = at.run(given)
    if tuple(x.requires_grad for x in results) != at.reach(tuple(wanted))[1]:
        raise at.outdated("other results that have gradients")
    edges = [torch.autograd.graph.get_gradient_edge(x) if x.requires_grad else None for x in results]
    return (given, edges), results


@_run.register_fake
def _(tensors: list[Tensor], wanted: list[bool], site: int) -> list[Tensor]:
    T, B = tensors[0].shape[:2]
    results = [tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in site_at(site).shapes(T, B)]
    return [*results, torch.empty(1, dtype=torch.uint8)]


@torch.library.custom_op("unrolled::run_backward", mutates_args=())
def _run_backward(
    grads: list[Tensor], token: Tensor, tensors: list[Tensor], wanted: list[bool], asked: list[bool], site: int
) -> list[Tensor]:
    at = site_at(site)
    with _outside():
        # A token that was copied on its way stands for nothing: the same run once more has the same numbers.
        given, edges = _TAPES.of(token) or _taped(at, tensors, wanted)[0]
        pairs = [(edge, grad) for edge, grad in zip(edges, grads, strict=True) if edge is not None]
        found = iter(
            torch.autograd.grad(
                [edge for edge, _ in pairs],
                [x for x in given if x.requires_grad],
                [grad for _, grad in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        )
    by_tensor = [next(found) if w else None for w in wanted]
    if any(grad is not None and not a for grad, a in zip(by_tensor, asked, strict=True)):
        raise at.outdated("other tensors that get gradients")
    return [_own(g, x) for g, x, a in zip(by_tensor, given, asked, strict=True) if a]


def _own(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device) if grad is None else grad.clone(
        memory_format=torch.contiguous_format
    )


@_run_backward.register_fake
def _(
    grads: list[Tensor], token: Tensor, tensors: list[Tensor], wanted: list[bool], asked: list[bool], site: int
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, a in zip(tensors, asked, strict=True) if a]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, wanted, site = inputs
    ctx.wanted, ctx.at = tuple(wanted), site_at(site)
    ctx.asked, differentiable = ctx.at.reach(ctx.wanted)
    ctx.mark_non_differentiable(*(x for x, d in zip(output, (*differentiable, False), strict=True) if not d))
    ctx.save_for_backward(*tensors, output[-1])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    *tensors, token = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiable(ctx, tensors, grads[:-1]), None, None
    found = iter(torch.ops.unrolled.run_backward(grads[:-1], token, tensors, ctx.wanted, ctx.asked, ctx.at.number))
    return [next(found) if asked else None for asked in ctx.asked], None, None


def _differentiable(ctx: Any, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients as a graph of their own, for a second derivative: the reference, by ordinary autograd."""
    given = [tensor.view_as(tensor) for tensor in tensors]
    pairs = [(x, g) for x, g in zip(ctx.at.run(given, by_reference=True), grads, strict=True) if x.requires_grad]
    by = [x for x, asked in zip(given, ctx.asked, strict=True) if asked]
    found = iter(
        torch.autograd.grad([x for x, _ in pairs], by, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return [next(found) if asked else None for asked in ctx.asked]


_run.register_autograd(_backward, setup_context=_setup)


@_run.register_vmap
def _vmap(info: Any, in_dims: Any, tensors: list[Tensor], wanted: list[bool], site: int) -> tuple[Any, Any]:
    """Fold the mapped dimension into the rows where rows are independent; else map the reference."""
    at, dims = site_at(site), in_dims[0]
    N, B = info.batch_size, at.batch
    folded = site_of(*at.alive(), at.asked, N * B) if at.folds and not any(d is not None for d in dims[at.given :]) else None
    if folded is None or folded.plan.recording != at.plan.recording:
        mapped = torch.vmap(
            lambda *given: tuple(at.run(given, by_reference=True)), in_dims=tuple(dims), randomness=info.randomness
        )(*tensors)
        return [*mapped, torch.zeros(1, dtype=torch.uint8)], [0] * len(mapped) + [None]
    inputs = at.plan.recording.counts[0]
    rows = [_with_rows(x, d, N, int(n < inputs)) for n, (x, d) in enumerate(zip(tensors, dims, strict=True)) if n < at.given]
    *results, token = call(folded.number, [*rows, *tensors[at.given :]])
    places = [int(n < at.outputs) for n in range(len(results))]
    return [*(x.unflatten(p, (N, B)) for x, p in zip(results, places, strict=True)), token], [*places, None]


def _with_rows(tensor: Tensor, dim: int | None, N: int, place: int) -> Tensor:
    """The mapped dimension, of size N, folded into the rows at a place; what is not mapped is repeated."""
    tensor = tensor.expand(N, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, place).flatten(place, place + 1)


def call(site: int, tensors: list[Tensor]) -> list[Tensor]:
    """Call the operator: leaves of the outputs and of the last state, and the token of what was kept."""
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    return torch.ops.unrolled.run(tensors, wanted, site)


def run_mapped(plans: PlanBook, cell: nn.Module, inputs: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree] | None:
    """Run a network inside of `vmap` as one operator; None where that is not to be had.

    Args:
        plans: the network's plan book.
        cell: its cell.
        inputs: `[T, B, ...]`.
        state: what copy 0 receives.
        context: what is the same at every step, or None.
    """
    if not _only_mapped():
        return None
    asked = Asked(_kinds(inputs, 2), _kinds(state, 1), _kinds(context, 1))
    site = site_of(plans, cell, asked, sequence.sizes(inputs)[1])
    if site is None or not site.folds:
        return None
    *results, _ = call(site.number, [*leaves(inputs), *leaves(state), *leaves(context), *held(cell)])
    outputs, last = site.structures
    return unflatten(outputs, results[: site.outputs]), unflatten(last, results[site.outputs :])


def _kinds(tree: Tree, leading: int) -> tuple[Structure, tuple[Kind, ...]]:
    tensors, structure = flatten(tree)
    return structure, tuple([Kind.of(tensor, leading) for tensor in tensors])


def _only_mapped() -> bool:
    """Whether the innermost transform of torch.func is `vmap`, and none around it is forward-mode."""
    if _interpreters is None:
        return False
    names = [str(interpreter.key()).rpartition(".")[2] for interpreter in _interpreters() or ()]
    return names[-1:] == ["Vmap"] and {*names} <= {"Vmap", "Grad"}


_interpreters = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", None)
