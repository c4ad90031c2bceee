"""Externals: the tensors that a step reads and is not given, each by the way on which it is found at every call."""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from unrolled.recording.guards.kinds import BOOKKEEPING, held_by
from unrolled.recording.guards.places import PLAIN


@dataclass(frozen=True)
class External:
    """A tensor that a cell holds: as a parameter, a buffer, an attribute, or somewhere inside of one.

    Attributes:
        module: the path of the module that holds it.
        way: how it is found from there: attributes by name, entries of containers by their key in a tuple.
    """

    module: str
    way: tuple[str | tuple[Any], ...]

    def fetch(self, cell: nn.Module) -> Tensor:
        """The tensor as it is now."""
        thing: Any = cell.get_submodule(self.module)
        for step in self.way:
            thing = thing[step[0]] if isinstance(step, tuple) else getattr(thing, step)
        tensor: Tensor = thing
        return tensor.resolve_neg() if self.way[-1] == "imag" else tensor

    @property
    def parts(self) -> list[External]:
        """The two parts of a complex one."""
        return [replace(self, way=(*self.way, part)) for part in ("real", "imag")]

    @property
    def name(self) -> str:
        """Its path, as in `named_parameters`, and on as Python has it: `0.params['decay']`."""
        way = [f"[{step[0]!r}]" if isinstance(step, tuple) else f".{step}" for step in self.way]
        return "".join([self.module, *way]).lstrip(".")


@dataclass(frozen=True)
class OutsideTensor:
    """A tensor outside of the cell, in a global or a closure: guards hold that this very one stands there.

    Attributes:
        name: what a person would call it.
        key: tells it from others.
        tensor: refers to it; what guards compare keeps it alive.
        part: of a complex one 'real' or 'imag' for that part alone.
    """

    name: str
    key: int
    tensor: weakref.ref[Tensor] = field(compare=False)
    part: str = ""

    def fetch(self, cell: nn.Module) -> Tensor:
        """The tensor."""
        tensor = self.tensor()
        assert tensor is not None
        return getattr(tensor, self.part).resolve_neg() if self.part else tensor

    @property
    def parts(self) -> list[OutsideTensor]:
        """The two parts of a complex one."""
        return [replace(self, part=part) for part in ("real", "imag")]


@dataclass(frozen=True)
class Constant:
    """A tensor that the step makes out of Python numbers, the same ones in every step.

    Attributes:
        numbers: its bytes.
        shape: its shape.
        dtype: of its entries.
        device: where it is.
    """

    numbers: bytes
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    name: ClassVar[str] = "a constant"

    @classmethod
    def of(cls, tensor: Tensor) -> Constant:
        """A tensor's numbers."""
        numbers = bytes(tensor.detach().cpu().contiguous().view(torch.uint8).flatten().tolist())
        return cls(numbers, tuple(tensor.shape), tensor.dtype, tensor.device)

    def fetch(self, cell: nn.Module) -> Tensor:
        """The tensor."""
        return _made(self)

    @property
    def parts(self) -> list[Constant]:
        """The two parts of a complex one."""
        tensor = _made(self)
        return [Constant.of(tensor.real), Constant.of(tensor.imag)]


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _made(constant: Constant) -> Tensor:
    if not constant.numbers:
        return torch.zeros(constant.shape, dtype=constant.dtype, device=constant.device)
    flat = torch.frombuffer(bytearray(constant.numbers), dtype=constant.dtype)
    return flat.view(constant.shape).to(constant.device)


Found: TypeAlias = External | OutsideTensor | Constant
"""Where a tensor comes from that a step reads and is not given."""


def held_tensors(cell: nn.Module) -> dict[External, Tensor]:
    """Every tensor that can be found in a cell, once, by the shortest way; parameters and buffers first.

    What functions, classes and modules of Python's read is not the cell's.

    Example:
        >>> import torch
        >>> cell = nn.Linear(2, 3, bias=False)
        >>> cell.settings = {"decay": (0.5, torch.ones(3))}
        >>> [external.name for external in held_tensors(cell)]
        ['weight', "settings['decay'][1]"]
    """
    modules = list(cell.named_modules())
    own = [(name, (key, held)) for name, module in modules for key, held in _held_by(module)]
    own.sort(key=lambda entry: not isinstance(entry[1][1], nn.Parameter))
    pending = deque([(External(name, (key,)), held) for name, (key, held) in own])
    seen = {id(module) for _, module in modules}
    found: dict[External, Tensor] = {}
    while pending:
        external, thing = pending.popleft()
        if id(thing) in seen or isinstance(thing, PLAIN):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found[external] = thing
        else:
            pending += [(External(external.module, (*external.way, step)), held) for step, held in _inside(thing)]
    return found


def _held_by(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    yield from ((key, held) for key, held in vars(module).items() if key not in BOOKKEEPING)


def _inside(thing: Any) -> Iterable[tuple[str | tuple[Any], Any]]:
    """What a container or an object holds, each by its name or key; keys that a copy would not have are left out."""
    if isinstance(thing, nn.Module):
        yield from _held_by(thing)
        yield from thing._modules.items()
    elif isinstance(thing, dict):
        yield from (((key,), held) for key, held in thing.items() if isinstance(key, PLAIN))
    elif isinstance(thing, tuple | list | deque):
        names = getattr(thing, "_fields", None)
        yield from zip(names, thing, strict=True) if names else (((n,), held) for n, held in enumerate(thing))
    elif isinstance(thing, types.MethodType):
        yield "__self__", thing.__self__
    elif isinstance(thing, functools.partial):
        yield from (("args", thing.args), ("keywords", thing.keywords))
    if not isinstance(thing, nn.Module | types.FunctionType | types.MethodType | types.ModuleType | type):
        yield from (held_by(thing) or {}).items()
