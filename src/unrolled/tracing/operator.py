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
from unrolled.tracing.samples import held
from unrolled.tracing.sites import Site, site_at


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
def operator(tensors: list[Tensor], wanted: list[bool], site: int) -> list[Tensor]:
    """Run the network of a site: the leaves of its outputs and of its state."""
    at = site_at(site)
    with outside():
        if any(wanted):
            tape, results = _taped(at, tensors, wanted)
            token = _TAPES.keep(tape)
        else:
            with torch.no_grad():
                results = at.run(tensors)
            token = torch.zeros(1, dtype=torch.uint8)
    return [*map(_plain, results), token]


def _plain(result: Tensor) -> Tensor:
    """Contiguous and at the start of its memory, as the trace takes it to be; without a copy where that can be."""
    result = result.detach().contiguous()
    return torch.from_dlpack(result) if result.storage_offset() else result


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


@operator.register_fake
def _(tensors: list[Tensor], wanted: list[bool], site: int) -> list[Tensor]:
    T, B = tensors[0].shape[:2]
    results = [tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in site_at(site).shapes(T, B)]
    return [*results, torch.empty(1, dtype=torch.uint8)]


@torch.library.custom_op("unrolled::run_backward", mutates_args=())
def _run_backward(
    grads: list[Tensor], token: Tensor, tensors: list[Tensor], wanted: list[bool], asked: list[bool], site: int
) -> list[Tensor]:
    at = site_at(site)
    with outside():
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
    if grad is None:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    return grad.clone(memory_format=torch.contiguous_format)


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


operator.register_autograd(_backward, setup_context=_setup)


def call(site: int, tensors: list[Tensor]) -> list[Tensor]:
    """Call the operator: leaves of the outputs and of the last state, and the token of what was kept."""
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    return torch.ops.unrolled.run(tensors, wanted, site)
