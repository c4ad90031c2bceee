"""Running a network on aliases of its weights: their gradients can be asked for piece by piece.

What hangs on a parameter itself (a hook that clips, `.grad`) must see the sum over all pieces, once. And a run that is
repeated in a backward pass needs the tensors of the forward pass, whatever the module holds by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

__all__ = ["Aside", "leaves_beside", "own"]


class Aside:
    """A module's tensors as they are now, and aliases of its parameters to run on.

    Args:
        module: the module.

    Attributes:
        weights: the parameters that require a gradient.
        aliases: for each of them a leaf on the same memory.
    """

    def __init__(self, module: nn.Module) -> None:
        self._whole = _Whole(module)
        named = dict(self._whole.named_parameters())
        self._named = {name: _alias(parameter) for name, parameter in named.items()}
        self._buffers = dict(self._whole.named_buffers())
        self.weights = [parameter for parameter in named.values() if parameter.requires_grad]
        self.aliases = [alias for alias in self._named.values() if alias.requires_grad]

    def __call__(self, run: Callable[..., Any], *given: Any, again: bool = False) -> Any:
        """Run on the aliases.

        Args:
            run: what runs the module.
            given: what it is called with.
            again: whether it has run before: what it writes into its buffers is then thrown away.
        """
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()} if again else {}
        return torch.func.functional_call(self._whole, {**self._named, **buffers}, (run, *given))


class _Whole(nn.Module):
    """Makes `functional_call` call something else than the module's forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, run: Callable[..., Any], *given: Any) -> Any:
        return run(*given)


def _alias(parameter: Tensor) -> Tensor:
    if isinstance(parameter, nn.Parameter):
        return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return own(parameter)


def own(tensor: Tensor) -> Tensor:
    """A leaf of a graph to come, on the same memory."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def leaves_beside(results: Iterable[Tensor], known: Iterable[Tensor]) -> list[Tensor]:
    """Leaves of a graph other than those that are known: what a cell reads from elsewhere gets its gradient, too.

    Args:
        results: where the graph begins.
        known: tensors beyond which nothing is looked for.
    """
    seen = {get_gradient_edge(tensor).node for tensor in known if tensor.requires_grad}
    ahead, found = [get_gradient_edge(tensor).node for tensor in results if tensor.requires_grad], list[Tensor]()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("AccumulateGrad"):
            found.append(node.variable)
        ahead += [following for following, _ in node.next_functions]
    return found
