"""A whole run as one operator of torch, `unrolled::run`: for compilers, exports and `vmap` around a network.

A forward run whose gradients are wanted keeps its graph, as an eager call does: nothing is computed twice. The graph
stays here, under a token that is one of the operator's results, and goes when the traced program lets go of the token.
A second derivative goes through the reference; a forward-mode one is torch's own error.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrolled.internals import outside
from unrolled.tracing.sites import Site

_GRAPHS: dict[int, Any] = {}
"""What forward runs keep for their backward passes, by the address of the token that stands for each."""


def _token_of(graph: Any) -> Tensor:
    """Keep a graph for as long as the token has its memory."""
    memory = np.zeros(1, dtype=np.uint8)
    token = torch.from_numpy(memory)
    _GRAPHS[token.data_ptr()] = graph
    weakref.finalize(memory, _GRAPHS.pop, token.data_ptr(), None).atexit = False
    return token


@torch.library.custom_op("unrolled::run", mutates_args=())
def operator(tensors: list[Tensor], wanted: list[bool], site: int) -> list[Tensor]:
    """Run the network of a site: the leaves of its outputs and of its state."""
    at = Site.at(site)
    with outside():
        if any(wanted):
            graph, results = at.run_with_graph(tensors, wanted)
            token = _token_of(graph)
        else:
            with torch.no_grad():
                results = at.run(tensors)
            token = torch.zeros(1, dtype=torch.uint8)
    return [*map(_as_traced, results), token]


def _as_traced(result: Tensor) -> Tensor:
    """Contiguous and at the start of its memory, as the trace takes it to be; without a copy where that can be."""
    result = result.detach().contiguous()
    return torch.from_dlpack(result) if result.storage_offset() else result


@operator.register_fake
def _(tensors: list[Tensor], wanted: list[bool], site: int) -> list[Tensor]:
    T, B = tensors[0].shape[:2]
    results = [tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in Site.at(site).shapes(T, B)]
    return [*results, torch.empty(1, dtype=torch.uint8)]


@torch.library.custom_op("unrolled::run_backward", mutates_args=())
def _run_backward(
    grads: list[Tensor], token: Tensor, tensors: list[Tensor], wanted: list[bool], reached: list[bool], site: int
) -> list[Tensor]:
    at = Site.at(site)
    with outside():
        # A token that was copied on its way stands for nothing: the same run once more has the same numbers.
        inputs, edges = _GRAPHS.get(token.data_ptr()) or at.run_with_graph(tensors, wanted)[0]
        pairs = [(edge, grad) for edge, grad in zip(edges, grads, strict=True) if edge is not None]
        found = iter(
            torch.autograd.grad(
                [edge for edge, _ in pairs],
                [x for x in inputs if x.requires_grad],
                [grad for _, grad in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        )
    by_tensor = [next(found) if w else None for w in wanted]
    if any(grad is not None and not a for grad, a in zip(by_tensor, reached, strict=True)):
        raise at.outdated("other tensors that get gradients")
    return [
        torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        if grad is None
        else grad.clone(memory_format=torch.contiguous_format)
        for grad, x, a in zip(by_tensor, inputs, reached, strict=True)
        if a
    ]


@_run_backward.register_fake
def _(
    grads: list[Tensor], token: Tensor, tensors: list[Tensor], wanted: list[bool], reached: list[bool], site: int
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, a in zip(tensors, reached, strict=True) if a]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, wanted, site = inputs
    ctx.wanted, ctx.at = tuple(wanted), Site.at(site)
    ctx.reached, differentiable = ctx.at.reach(ctx.wanted)
    ctx.mark_non_differentiable(*(x for x, d in zip(output, (*differentiable, False), strict=True) if not d))
    ctx.save_for_backward(*tensors, output[-1])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    *tensors, token = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiable(ctx, tensors, grads[:-1]), None, None
    found = iter(torch.ops.unrolled.run_backward(grads[:-1], token, tensors, ctx.wanted, ctx.reached, ctx.at.number))
    return [next(found) if reached else None for reached in ctx.reached], None, None


def _differentiable(ctx: Any, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients as a graph of their own, for a second derivative: the reference, by ordinary autograd."""
    inputs = [tensor.view_as(tensor) for tensor in tensors]
    pairs = [(x, g) for x, g in zip(ctx.at.run(inputs, by_reference=True), grads, strict=True) if x.requires_grad]
    by = [x for x, reached in zip(inputs, ctx.reached, strict=True) if reached]
    found = iter(
        torch.autograd.grad([x for x, _ in pairs], by, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return [next(found) if reached else None for reached in ctx.reached]


operator.register_autograd(_backward, setup_context=_setup)


def call(site: int, tensors: list[Tensor]) -> list[Tensor]:
    """Call the operator: leaves of the outputs and of the last state, and the token of the graph that is kept."""
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    return torch.ops.unrolled.run(tensors, wanted, site)
