"""Running a network on aliases of its parameters, so that their gradients can be taken segment by segment.

What hangs on a parameter itself (a hook that clips, `.grad`) must see the sum over all segments, once. And a run that
is repeated in a backward pass needs the tensors of the forward pass, whatever the module holds by then.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unrolled.internals import uncached


class ParameterAliases:
    """A module's tensors as they are now, and aliases of its parameters to run on.

    Args:
        module: the module.

    Attributes:
        weights: the parameters that require a gradient.
        aliases: for each of them a leaf on the same memory.
        constants: all other parameters and buffers, by name.
    """

    _locks: ClassVar[weakref.WeakKeyDictionary[nn.Module, threading.RLock]] = weakref.WeakKeyDictionary()
    _lock_of_locks: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, module: nn.Module) -> None:
        # One thread at a time runs a module on aliases: for so long they stand in the module itself.
        with self._lock_of_locks:
            self._lock = self._locks.setdefault(module, threading.RLock())
        with self._lock:
            self._look_at(module)

    def _look_at(self, module: nn.Module) -> None:
        named = dict.fromkeys(module.parameters())
        made = {id(parameter): self._alias(parameter) for parameter in named}
        holders = [(part._parameters, name, x) for part in module.modules() for name, x in part._parameters.items()]
        self._aliases = [(holder, name, made[id(x)]) for holder, name, x in holders if x is not None]
        holders = [(part._buffers, name, x) for part in module.modules() for name, x in part._buffers.items()]
        self._buffers = [(holder, name, x) for holder, name, x in holders if x is not None]
        self.weights = [parameter for parameter in named if parameter.requires_grad]
        self.aliases = [made[id(parameter)] for parameter in self.weights]
        all_named = [*module.named_parameters(), *module.named_buffers()]
        self.constants = {name: x for name, x in all_named if not x.requires_grad}

    @staticmethod
    def _alias(parameter: Tensor) -> Tensor:
        if isinstance(parameter, nn.Parameter):
            return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        return detached_leaf(parameter)

    def __call__(self, run: Callable[..., Any], *args: Any, again: bool = False) -> Any:
        """Run on the aliases.

        Args:
            run: what runs the module.
            args: what it is called with.
            again: whether it has run before: what it writes into its buffers is then thrown away.
        """
        with self._lock:
            scratch = [(holder, name, buffer.clone()) for holder, name, buffer in self._buffers] if again else []
            swapped = [*self._aliases, *scratch]
            before = [(holder, name, holder[name]) for holder, name, _ in swapped]
            self._put(swapped)
            try:
                with uncached():
                    return run(*args)
            finally:
                self._put(before)

    @staticmethod
    def _put(tensors: Iterable[tuple[dict[str, Any], str, Any]]) -> None:
        """What `torch.func.functional_call` does, without looking every name up anew for every segment."""
        for holder, name, tensor in tensors:
            holder[name] = tensor


def detached_leaf(tensor: Tensor) -> Tensor:
    """A leaf of another graph, on the same memory; in inference mode there will be no graph."""
    return tensor.detach().requires_grad_(tensor.requires_grad and not torch.is_inference_mode_enabled())
