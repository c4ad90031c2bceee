"""Autograd's graph: the nodes behind some tensors, the leaves among them, and vector-Jacobian products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def differentiable(tensor: Tensor) -> bool:
    """Whether a tensor is of a dtype that has gradients."""
    return tensor.is_floating_point() or tensor.is_complex()


def new_leaf(tensor: Tensor) -> Tensor:
    """A copy with a gradient of its own, if its dtype has gradients."""
    return tensor.detach().clone().requires_grad_(differentiable(tensor))


class _WithGradients(torch.autograd.Function):
    """A number whose gradients by some tensors are given ones."""

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor], *ends: Tensor) -> Tensor:
        ctx.grads = grads
        return ends[0].detach().new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return None, *ctx.grads


def with_gradients(ends: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """A number whose gradients by some tensors are given ones.

    Differentiating it is `torch.autograd.grad(ends, ..., grads)`, which imports sympy: over half a second, once in a
    process, before the first call of a network would give anything.

    Args:
        ends: what was computed; all need a gradient.
        grads: the gradient of each of them.
    """
    return _WithGradients.apply(grads, *ends)


def nodes_behind(
    tensors: Iterable[Tensor], *, known: Iterable[Tensor] = (), beyond: Callable[[Any], bool] = lambda _: True
) -> Iterator[Any]:
    """The nodes of the graph that some tensors lead to, each once.

    Args:
        tensors: where the graph begins; those without a gradient lead nowhere.
        known: tensors whose nodes, and what lies behind them, are left out.
        beyond: whether the search goes on behind a node.
    """
    seen = {get_gradient_edge(tensor).node for tensor in known if tensor.requires_grad}
    ahead: list[Any] = [get_gradient_edge(tensor).node for tensor in tensors if tensor.requires_grad]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if beyond(node):
            ahead += [following for following, _ in node.next_functions]


def leaf_of(node: Any) -> Tensor | None:
    """The leaf whose gradient a node adds up; None for any other node: a Function may have a `variable` of its own."""
    return node.variable if node.name().endswith("AccumulateGrad") else None


def leaves_behind(tensors: Iterable[Tensor], *, known: Iterable[Tensor] = ()) -> list[Tensor]:
    """The leaves that some tensors depend on, besides those that are known and what only these depend on.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
        >>> [leaf.shape for leaf in leaves_behind([a.sum() * b], known=[a])]
        [torch.Size([3])]
    """
    return [leaf for node in nodes_behind(tensors, known=known) if (leaf := leaf_of(node)) is not None]


def vjp(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """The vector-Jacobian product: the gradient of each input, None where none flows.

    Args:
        outputs: what was computed; some may need no gradient.
        grads: the gradient of each of them, or None.
        inputs: what to differentiate by; some may need no gradient.
        retain_graph: whether the graph is gone through again later.
        create_graph: whether the gradients get a graph of their own.
    """
    flowing = [(x, grad) for x, grad in zip(outputs, grads, strict=True) if grad is not None and x.requires_grad]
    wanted = [n for n, x in enumerate(inputs) if x.requires_grad]
    result: list[Tensor | None] = [None] * len(inputs)
    if flowing and wanted:
        found = torch.autograd.grad(
            [x for x, _ in flowing],
            [inputs[n] for n in wanted],
            [grad for _, grad in flowing],
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
        for n, grad in zip(wanted, found, strict=True):
            result[n] = grad
    return result
