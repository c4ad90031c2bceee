"""Tensors with numbers in place of a tracer's, which have none, and a cell that holds other tensors than its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unrolled.cells.contract import check_context, starting_state
from unrolled.trees import TensorSpec, Tree, TreeSpec, map_leaves, unflatten


class CallSpec(NamedTuple):
    """What a call passes, but for T and B. A state without leaves is made by the cell."""

    inputs: TreeSpec
    state: TreeSpec
    context: TreeSpec

    @classmethod
    def of(cls, inputs: Tree, state: Tree, context: Tree) -> CallSpec:
        """What a call passes; gradients matter where they are enabled."""
        grads = torch.is_grad_enabled()
        specs = [TreeSpec.of(tree, n, requires_grad=grads) for tree, n in ((inputs, 2), (state, 1), (context, 1))]
        return cls(*specs)

    def sample(self, cell: nn.Module, batch: int) -> tuple[Tree, Tree, Tree]:
        """Inputs of two steps, state and context of these kinds, checked as those of any call are."""
        inputs = unflatten(self.inputs.structure, [_sample_of(spec, 2, batch) for spec in self.inputs.leaves])
        state, context = (unflatten(tree.structure, [_sample_of(x, batch) for x in tree.leaves]) for tree in self[1:])
        check_context(cell, context, batch)
        starting = starting_state(cell, state, inputs, batch)
        return inputs, map_leaves(Tensor.detach, starting) if state is None else starting, context


def _sample_of(spec: TensorSpec, *sizes: int) -> Tensor:
    """A tensor of a kind, its leading dimensions of these sizes; integers are zero, an index into anything."""
    shape = torch.Size((*sizes[: spec.leading], *spec.shape))
    if not spec.dtype.is_floating_point and not spec.dtype.is_complex:
        return torch.zeros(shape, dtype=spec.dtype, device=spec.device)
    numbers = torch.linspace(-0.5, 0.5, shape.numel(), dtype=spec.dtype, device=spec.device)
    return numbers.view(shape).requires_grad_(spec.requires_grad)


def tensors_in(cell: nn.Module) -> list[Tensor]:
    """The cell's parameters and buffers, each once."""
    return [*dict(cell.named_parameters()).values(), *dict(cell.named_buffers()).values()]


def call_with_tensors(cell: nn.Module, tensors: Sequence[Tensor], call: Callable[[], Any]) -> Any:
    """Call a function while the cell holds other tensors than its own."""
    names = [name for name, _ in (*cell.named_parameters(), *cell.named_buffers())]
    around = _Around(cell)
    return torch.func.functional_call(around, {f"cell.{n}": t for n, t in zip(names, tensors, strict=True)}, (call,))


class _Around(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


def with_numbers(tensor: Tensor) -> Tensor:
    """A tensor with numbers: this one without its graph, or one of its kind if it is a stand-in."""
    if type(tensor) in (Tensor, nn.Parameter):
        try:
            tensor.data_ptr()
            return tensor.detach()
        except RuntimeError:
            pass
    return _sample_of(TensorSpec.of(tensor)).detach()


_one_at_a_time = threading.Lock()


def in_new_thread(call: Callable[[], Any]) -> Any:
    """Call in another thread, which starts with none of the modes of whoever is tracing in this one."""
    with _one_at_a_time, ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()
