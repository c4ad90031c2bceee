"""Stateful modules: called with an input alone, they keep their state in attributes from one call to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from unrolled.errors import CellError, OptionError
from unrolled.trees import Tree, leaves, map_leaves

NOTHING: Any = type("Nothing", (), {"__repr__": lambda self: "nothing"})()
"""What stands in an attribute that a module does not have."""


class AttributeStep:
    """The step of a stateful module: its attributes are set to the state, it is called, and they are read.

    Args:
        names: the attributes, by their paths: `"v"`, `"1.v"`. The state is a dict of what stands in them.
        found: whether they were found in the module as it is, and nobody has named them.
    """

    def __init__(self, names: Sequence[str], *, found: bool = False) -> None:
        self.names, self.found = tuple(names), found

    def __call__(self, module: nn.Module, input: Tree, state: dict[str, Tree]) -> tuple[Tree, Tree]:
        """Run one step; the module is left as it was.

        Raises:
            CellError: if something else than tensors stands in an attribute afterwards.
        """
        with kept(module, self.names):
            for name, value in state.items():
                # A module that writes into its attributes in place writes into nobody's state.
                set_attribute(module, name, map_leaves(Tensor.clone, value))
            output = module(input)
            return output, {name: read_state(module, name) for name in self.names}


def read_state(module: nn.Module, path: str) -> Tree:
    """What a step has left in an attribute of a module.

    Raises:
        CellError: if that is something else than tensors.
    """
    value = get_attribute(module, path)
    try:
        leaves(value)
    except TypeError:
        raise CellError(
            f"after a step {path} of {type(module).__name__} holds {value!r:.80}, which is no state; name in "
            "state_attributes= what holds tensors, and make tensors of numbers that change"
        ) from None
    return value


@contextmanager
def kept(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """A context that leaves attributes of a module, by their paths, as they were."""
    before = [(name, get_attribute(module, name)) for name in names]
    try:
        yield
    finally:
        for name, value in before:
            set_attribute(module, name, value)


def get_attribute(module: nn.Module, path: str) -> Any:
    """What stands in an attribute, or `NOTHING`."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name, NOTHING)


def set_attribute(module: nn.Module, path: str, value: Any) -> None:
    """Put something into an attribute, as the module's own code does."""
    owner, _, name = path.rpartition(".")
    part = module.get_submodule(owner)
    if value is not NOTHING:
        setattr(part, name, value)
    elif hasattr(part, name):
        delattr(part, name)


def check_attributes(module: nn.Module, names: Sequence[str]) -> None:
    """Refuse paths that lead nowhere in a module, or to a parameter.

    Raises:
        OptionError: naming the path.
    """
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise OptionError(f"state_attributes= takes the paths of attributes, ('v',) or ('0.v', '2.v'), got {names!r}")
    parts = {name for name, _ in module.named_modules()}
    for path in names:
        owner, _, name = path.rpartition(".")
        if owner not in parts or not name.isidentifier():
            raise OptionError(f"state_attributes= names {path}, but {type(module).__name__} has no part {owner!r}")
        if isinstance(get_attribute(module, path), nn.Parameter | nn.Module):
            kind = type(get_attribute(module, path)).__name__
            raise OptionError(f"state_attributes= names {path}, a {kind}; name what a call leaves for the next one")
