"""Running a network on aliases of its weights: their gradients can be asked for piece by piece.

What hangs on a parameter itself (a hook that clips, `.grad`) must see the sum over all pieces, once. And a run that is
repeated in a backward pass needs the tensors of the forward pass, whatever the module holds by then.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.errors import GradientError
from unrolled.internals import uncached

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def _lock_of(module: nn.Module) -> threading.RLock:
    """One thread at a time runs a module on aliases: they stand in the module itself for so long."""
    with _locks_lock:
        return _locks.setdefault(module, threading.RLock())


class ParameterAliases:
    """A module's tensors as they are now, and aliases of its parameters to run on.

    Args:
        module: the module.

    Attributes:
        weights: the parameters that require a gradient.
        aliases: for each of them a leaf on the same memory.
        constants: all other parameters and buffers, by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self._lock = _lock_of(module)
        with self._lock:
            self._look_at(module)

    def _look_at(self, module: nn.Module) -> None:
        named = dict.fromkeys(module.parameters())
        made = {id(parameter): _alias(parameter) for parameter in named}
        holders = [(part._parameters, name, x) for part in module.modules() for name, x in part._parameters.items()]
        self._aliases = [(holder, name, made[id(x)]) for holder, name, x in holders if x is not None]
        holders = [(part._buffers, name, x) for part in module.modules() for name, x in part._buffers.items()]
        self._buffers = [(holder, name, x) for holder, name, x in holders if x is not None]
        self.weights = [parameter for parameter in named if parameter.requires_grad]
        self.aliases = [made[id(parameter)] for parameter in self.weights]
        all_named = [*module.named_parameters(), *module.named_buffers()]
        self.constants = {name: x for name, x in all_named if not x.requires_grad}

    def __call__(self, run: Callable[..., Any], *given: Any, again: bool = False) -> Any:
        """Run on the aliases.

        Args:
            run: what runs the module.
            given: what it is called with.
            again: whether it has run before: what it writes into its buffers is then thrown away.
        """
        with self._lock:
            return self._run(run, given, again)

    def _run(self, run: Callable[..., Any], given: tuple[Any, ...], again: bool) -> Any:
        scratch = [(holder, name, buffer.clone()) for holder, name, buffer in self._buffers] if again else []
        swapped = [*self._aliases, *scratch]
        before = [(holder, name, holder[name]) for holder, name, _ in swapped]
        _put(swapped)
        try:
            with uncached():
                return run(*given)
        finally:
            _put(before)


def _put(tensors: Iterable[tuple[dict[str, Any], str, Any]]) -> None:
    """What `torch.func.functional_call` does, without looking every name up anew: it is done for every segment."""
    for holder, name, tensor in tensors:
        holder[name] = tensor


def _alias(parameter: Tensor) -> Tensor:
    if isinstance(parameter, nn.Parameter):
        return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return own(parameter)


def own(tensor: Tensor) -> Tensor:
    """A leaf of a graph to come, on the same memory; in inference mode there will be none."""
    return tensor.detach().requires_grad_(tensor.requires_grad and not torch.is_inference_mode_enabled())


class VersionCheck:
    """Tensors that must not be written into until a backward pass: autograd itself looks after those with a gradient.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._versions = {name: (x, x._version) for name, x in tensors.items() if not x.is_inference()}

    def check(self) -> None:
        """Refuse a backward pass if one of them was written into.

        Raises:
            GradientError: naming it.
        """
        for name, (tensor, version) in self._versions.items():
            if tensor._version != version:
                raise GradientError(
                    f"{name} has been modified by an inplace operation since the forward pass, whose steps are run "
                    "again for the backward pass; write into it after backward, or leave memory= and checkpoint= out"
                )


def held_by(token: Tensor, name: str) -> Any:
    """What hangs on a saved tensor, so that it goes when autograd lets go of what was saved.

    Raises:
        GradientError: if hooks on saved tensors have put another one in its place.
    """
    if not hasattr(token, name):
        raise GradientError(
            "saved_tensors_hooks replaced what the backward pass goes by; call a network with memory=, checkpoint= or "
            "stride < horizon outside of them: its own memory is bounded already"
        )
    return getattr(token, name)
