"""The parts of torch that have no public name: used here and nowhere else.

Where a release lacks one, what is built on it is not offered, and the rest works: nothing is missed at import.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from torch import nn, overrides
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

_dispatch_modes = getattr(_python_dispatch, "_get_current_dispatch_mode_stack", None)
_function_modes = getattr(overrides, "_get_current_function_mode_stack", None)
_saved_hooks = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
_functorch: Any = getattr(torch._C, "_functorch", None)
_interpreters = getattr(_functorch, "get_interpreter_stack", None)

_autocast_anywhere: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)

OUTSIDE = tuple(
    getattr(torch._C, name)()
    for name in ("_dispatch_tls_local_include_set", "_dispatch_tls_local_exclude_set")
    if hasattr(torch._C, name)
)
"""What torch dispatches on where nothing is going on, as it is while this is imported."""


class DispatchMode(TorchDispatchMode):
    """A mode that sees every operation of a thread.

    torch would bring in its compiler when one is first entered, to keep it from looking into the mode, which takes more
    than a second; no mode of ours is entered where something is compiled.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def autocasting() -> bool:
    """Whether torch chooses dtypes as operations run, on any kind of device; True where torch does not tell."""
    return bool(_autocast_anywhere())


def dual_numbers() -> bool:
    """Whether there may be forward-mode derivatives; True where torch does not tell."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def tensors_in(module: nn.Module, *kinds: str) -> Iterator[torch.Tensor]:
    """What a module and those in it hold as `_parameters`, or as `_buffers`.

    Torch's own way also makes their names, which takes longer than all else that is asked before a call.
    """
    for each in module.modules():
        for kind in kinds:
            for tensor in getattr(each, kind).values():
                if tensor is not None:
                    yield tensor


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one, and not a stand-in for many as in `vmap`, or for none: those have no memory."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def broadcast_shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """What `torch.broadcast_shapes` gives; that imports sympy, which takes nearly half a second."""
    sizes = [{n for n in each if n != 1} for each in zip_longest(*map(reversed, shapes), fillvalue=1)]
    if any(len(each) > 1 for each in sizes):
        raise RuntimeError(f"shapes {', '.join(str(tuple(shape)) for shape in shapes)} cannot be broadcast together")
    return tuple(next(iter(each), 1) for each in reversed(sizes))


def watching() -> str | None:
    """What looks at every operation of this thread, and must see those of a loop; None if nothing does.

    A tracer, a counter of operations or a debugger is a mode of torch's; those of this package look on for itself.
    """
    if _dispatch_modes is None or _function_modes is None:
        return "this release of torch does not tell which modes look on"
    foreign = [type(mode).__name__ for mode in (*_dispatch_modes(), *_function_modes()) if _looks_on(mode)]
    return f"a {foreign[0]} looks at every operation, and is to see those of the loop" if foreign else None


def unmoded() -> AbstractContextManager[None]:
    """A context in which no mode at all sees what is run, for what is asked of torch in the middle of a recording."""
    guard: AbstractContextManager[None] = _python_dispatch._disable_current_modes()
    return guard


def _looks_on(mode: Any) -> bool:
    return type(mode).__name__ != "DeviceContext" and type(mode).__module__.partition(".")[0] != "unrolled"


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """A context whose operations no mode of torch's sees, but for those that act on them, as a default device does."""
    if watching() is None or _dispatch_modes is None or _function_modes is None:
        yield
        return
    functions = list(_function_modes())
    kept = [mode for mode in functions if not _looks_on(mode)]
    with _python_dispatch._disable_current_modes():
        _replace_function_modes(functions, kept)
        try:
            yield
        finally:
            _replace_function_modes(kept, functions)


def _replace_function_modes(present: list[Any], wanted: list[Any]) -> None:
    for _ in present:
        overrides._pop_mode()
    for mode in wanted:
        overrides._push_mode(mode)


def saved_hooks_hidden() -> AbstractContextManager[Any]:
    """A context in which hooks on saved tensors are not called, where there are any."""
    if _saved_hooks is not None and not _saved_hooks(True):
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: Any) -> Any:
    return tensor


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """A context in which `parametrize.cached()` keeps nothing: it goes by a module, not by the tensors it holds."""
    before = getattr(parametrize, "_cache_enabled", 0), getattr(parametrize, "_cache", {})
    if not before[0]:
        yield
        return
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


CONSTANTS_TAKE_OBJECTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
"""Whether what `torch.compile` takes for a constant may be asked of any object; before, a network breaks its graph."""

_CALL, _GETATTR = nn.Module.__call__, nn.Module.__getattr__


def modules_are_patched() -> bool:
    """Whether a tracer is at work that has put functions of its own into `nn.Module`, for all threads."""
    return nn.Module.__call__ is not _CALL or nn.Module.__getattr__ is not _GETATTR


@lru_cache(maxsize=1)
def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """Torch's own formulas of operations by simpler ones; empty where they are not to be had."""
    try:
        from torch._decomp import decomposition_table as table
    except ImportError:
        return {}
    return dict(table)


def outside() -> AbstractContextManager[None]:
    """Where autograd sees what is done, as it does outside of an operator."""
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(*OUTSIDE)
    return guard


@lru_cache(maxsize=1)
def operable() -> bool:
    """Whether this torch lets an operator use autograd inside; without it no call is made one."""
    x = torch.ones(1, requires_grad=True)
    try:
        with torch._C._AutoDispatchBelowAutograd():
            hidden = (x * 2).requires_grad
            with outside(), torch.enable_grad():
                return not hidden and (x * 2).requires_grad
    except (AttributeError, TypeError):
        return False


def transforms() -> list[str]:
    """The names of the transforms of torch.func that are active, the innermost last.

    Where torch does not tell, `vmap` maps the reference, as every other transform does.
    """
    found = _interpreters() if _interpreters else None
    return [str(interpreter.key()).rpartition(".")[2] for interpreter in found or ()]


@contextlib.contextmanager
def without_innermost_transform() -> Iterator[None]:
    """Where the `vmap` whose rule runs is not: torch hides it from single operations only, not from autograd."""
    include, exclude = OUTSIDE
    for name in ("FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode"):
        include = include | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(include, exclude):
        level = _functorch.pop_dynamic_layer_stack()
        try:
            yield
        finally:
            _functorch.push_dynamic_layer_stack(level)
