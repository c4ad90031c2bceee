"""Stand-ins for tensors without numbers, and a cell that holds other tensors than its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unrolled.cells.contract import check_context, check_state, make_state
from unrolled.trees import Structure, Tree, map_leaves, unflatten

__all__ = ["CallSpec", "TensorSpec", "apart", "call_with", "held", "real"]

_STEPS = 2


class TensorSpec(NamedTuple):
    """A tensor without its numbers; of its dimensions, T and B are not told, only that they lead."""

    leading: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    needs: bool

    @classmethod
    def of(cls, tensor: Tensor, leading: int) -> TensorSpec:
        """What kind a tensor is, and whether a gradient for it is wanted."""
        sizes, needs = tuple(map(int, tensor.shape[leading:])), torch.is_grad_enabled() and tensor.requires_grad
        return cls(min(leading, tensor.dim()), sizes, tensor.dtype, tensor.device, needs)

    def sample(self, *sizes: int) -> Tensor:
        """A tensor of this kind, its leading dimensions of these sizes; integers are zero, an index into anything."""
        shape = torch.Size((*sizes[: self.leading], *self.shape))
        if not self.dtype.is_floating_point and not self.dtype.is_complex:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        numbers = torch.linspace(-0.5, 0.5, shape.numel(), dtype=self.dtype, device=self.device)
        return numbers.view(shape).requires_grad_(self.needs)


class CallSpec(NamedTuple):
    """What a call passes: structures, each with the kinds of its leaves. A state without leaves is made by the cell."""

    inputs: tuple[Structure, tuple[TensorSpec, ...]]
    state: tuple[Structure, tuple[TensorSpec, ...]]
    context: tuple[Structure, tuple[TensorSpec, ...]]

    def sample(self, cell: nn.Module, batch: int) -> tuple[Tree, Tree, Tree]:
        """Inputs, state and context of these kinds, checked as those of any call are."""
        inputs = unflatten(self.inputs[0], [kind.sample(_STEPS, batch) for kind in self.inputs[1]])
        state, context = (unflatten(structure, [kind.sample(batch) for kind in kinds]) for structure, kinds in self[1:])
        check_context(cell, context, batch)
        if state is None:
            return inputs, map_leaves(Tensor.detach, make_state(cell, inputs, batch)), context
        check_state(cell, state, inputs, batch)
        return inputs, state, context


def held(cell: nn.Module) -> list[Tensor]:
    """The cell's parameters and buffers, each once."""
    return [*dict(cell.named_parameters()).values(), *dict(cell.named_buffers()).values()]


def call_with(cell: nn.Module, tensors: Sequence[Tensor], call: Callable[[], Any]) -> Any:
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


def real(tensor: Tensor) -> Tensor:
    """A tensor with numbers: this one, apart from its graph, or one of its kind if it is a stand-in."""
    if type(tensor) in (Tensor, nn.Parameter):
        try:
            tensor.data_ptr()
            return tensor.detach()
        except RuntimeError:
            pass
    return TensorSpec.of(tensor, 0).sample().detach()


_making = threading.Lock()


def apart(call: Callable[[], Any]) -> Any:
    """Call in a thread of its own: it starts with none of the modes of whoever is tracing here."""
    with _making, ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()
