"""Pytrees: tuples, named tuples, lists, dicts and dataclasses, nested at will, with tensors at the leaves.

`None` is a tree without leaves. Trees are compared by their structure, a plain nested tuple.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tree = Any
"""A pytree of tensors. Python's type system has no name for it."""


class _Fields(NamedTuple):
    kind: type
    keys: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()


class Structure(_Fields):
    """A tree without its tensors: comparable with `==`, and enough to build the tree again.

    A dict's keys are sorted, so that equal dicts have equal structures; the order they came in is remembered beside.
    """

    order: tuple[Any, ...] | None = None


_LEAF = Structure(Tensor)
_NONE = Structure(type(None))


class TensorSpec(NamedTuple):
    """A tensor without its numbers.

    Attributes:
        leading: how many dimensions lead whose sizes do not matter (T, B); fewer in a tensor that has fewer.
        shape: the sizes of all others.
        dtype: the tensor's.
        device: the tensor's.
        requires_grad: whether a gradient for it is wanted, where that matters.
    """

    leading: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False

    @classmethod
    def of(cls, tensor: Tensor, leading: int = 0, *, requires_grad: bool = False) -> TensorSpec:
        """What a tensor is but for the sizes of its first dimensions."""
        own = min(leading, tensor.dim())
        return cls(own, tuple(tensor.shape[leading:]), tensor.dtype, tensor.device, requires_grad)


class TreeSpec(NamedTuple):
    """A tree without its numbers: its structure, and of what kind each leaf is. Two trees are alike if their specs are.

    Example:
        >>> TreeSpec.of((torch.ones(5, 2, 3),), leading=2) == TreeSpec.of((torch.ones(7, 4, 3),), leading=2)
        True
    """

    structure: Structure
    leaves: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, tree: Tree, leading: int = 0, *, requires_grad: bool = False) -> TreeSpec:
        """What a tree is but for the sizes of its leaves' first dimensions.

        Args:
            tree: the tree.
            leading: how many dimensions of each leaf do not matter.
            requires_grad: whether it matters which leaves require a gradient.

        Raises:
            TypeError: if a leaf is not a tensor.
        """
        tensors, structure = flatten(tree)
        # Spelt out, since every call of a network comes by here.
        specs = [
            TensorSpec(min(leading, x.dim()), x.shape[leading:], x.dtype, x.device, requires_grad and x.requires_grad)
            for x in tensors
        ]
        return cls(structure, tuple(specs))


def flatten(tree: Tree) -> tuple[list[Tensor], Structure]:
    """Take a tree apart into its tensors, in order, and its structure.

    Raises:
        TypeError: if a leaf is not a tensor.
    """
    # Every call of a network comes by here, mostly with one of these.
    if isinstance(tree, Tensor):
        return [tree], _LEAF
    if type(tree) is tuple and {*map(type, tree)} == {Tensor}:
        return list(tree), _tuple_of(len(tree))
    found: list[Tensor] = []
    return found, _collect(tree, found)


def unflatten(structure: Structure, tensors: Sequence[Tensor]) -> Tree:
    """Build a tree of this structure from its tensors; the inverse of `flatten`."""
    return _build(structure, iter(tensors))


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree, in order.

    Raises:
        TypeError: if a leaf is not a tensor.
    """
    return flatten(tree)[0]


def map_leaves(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Apply a function to each leaf of a tree, along with the leaves of trees of the same structure."""
    tensors, structure = flatten(tree)
    return unflatten(structure, [function(*group) for group in zip(tensors, *map(leaves, others), strict=True)])


def leaves_along(tree: Any, structure: Structure) -> list[Any]:
    """What stands in a tree where a tree of this structure has its leaves; None where there is nothing.

    Example:
        >>> import torch
        >>> _, structure = flatten({"b": torch.ones(1), "a": (torch.ones(1), torch.ones(1))})
        >>> leaves_along({"b": 3, "a": (1, None)}, structure), leaves_along(None, structure)
        ([1, None, 3], [None, None, None])
    """
    if structure.kind is Tensor:
        return [tree]
    found: list[Any] = []
    for key, child in zip(structure.keys, structure.children, strict=True):
        by_key = tree is not None and (isinstance(key, int) or issubclass(structure.kind, dict))
        found += leaves_along(tree[key] if by_key else getattr(tree, str(key), None), child)
    return found


def paths(structure: Structure, prefix: str = "") -> list[str]:
    """How a person would write the way to each leaf: `.hidden`, `[0]`, `['gate'][1]`; '' for a bare tensor."""
    if structure.kind is Tensor:
        return [prefix]
    return [
        path
        for key, child in zip(structure.keys, structure.children, strict=True)
        for path in paths(child, prefix + _step_into(structure.kind, key))
    ]


def named_leaves(tree: Tree, name: str = "") -> list[tuple[str, Tensor]]:
    """The tensors of a tree, each by the tree's name and the way to it.

    Example:
        >>> import torch
        >>> [name for name, _ in named_leaves((torch.ones(1), {"a": torch.ones(1)}), "state")]
        ['state[0]', "state[1]['a']"]
    """
    tensors, structure = flatten(tree)
    return list(zip(paths(structure, name), tensors, strict=True))


def describe(tree: Tree) -> str:
    """A tree's shapes and dtypes on one line: `(float32[3, 4], float32[3, 4])`."""
    tensors, structure = flatten(tree)
    return _describe(structure, iter(tensors))


@cache
def _tuple_of(many: int) -> Structure:
    """The structure of a tuple of so many tensors, as most states are."""
    return Structure(tuple, tuple(range(many)), (_LEAF,) * many)


def _collect(tree: Tree, found: list[Tensor]) -> Structure:
    if isinstance(tree, Tensor):
        found.append(tree)
        return _LEAF
    if tree is None:
        return _NONE
    keys, children = _items(tree)
    structure = Structure(type(tree), keys, tuple([_collect(child, found) for child in children]))
    if isinstance(tree, dict):
        structure.order = tuple(tree)
    return structure


def _items(tree: Tree) -> tuple[tuple[Any, ...], Sequence[Tree]]:
    if isinstance(tree, dict):
        keys = _ordered(tree)
        return keys, [tree[key] for key in keys]
    if isinstance(tree, tuple | list):
        return getattr(tree, "_fields", tuple(range(len(tree)))), tree
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = tuple(field.name for field in dataclasses.fields(tree) if field.init)
        return names, [getattr(tree, name) for name in names]
    raise TypeError(f"leaves must be tensors, but one is a {type(tree).__name__}: {tree!r:.80}")


def _ordered(tree: dict[Any, Tree]) -> tuple[Any, ...]:
    """A dict's keys, sorted where they can be: two dicts that are equal have the same structure."""
    try:
        return tuple(sorted(tree))
    except TypeError:
        return tuple(tree)


def _build(structure: Structure, tensors: Iterator[Tensor]) -> Tree:
    kind = structure.kind
    if kind is Tensor:
        return next(tensors)
    if kind is type(None):
        return None
    children = [_build(child, tensors) for child in structure.children]
    if issubclass(kind, dict):
        by_key = dict(zip(structure.keys, children, strict=True))
        pairs = [(key, by_key[key]) for key in structure.order or structure.keys]
        return defaultdict(None, pairs) if issubclass(kind, defaultdict) else kind(pairs)
    if issubclass(kind, tuple | list) and not hasattr(kind, "_fields"):
        return kind(children)
    return kind(**dict(zip(structure.keys, children, strict=True)))


def _step_into(kind: type, key: Any) -> str:
    attribute = isinstance(key, str) and not issubclass(kind, dict)
    return f".{key}" if attribute else f"[{key!r}]"


def _describe(structure: Structure, tensors: Iterator[Tensor]) -> str:
    if structure.kind is Tensor:
        tensor = next(tensors)
        return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if structure.kind is type(None):
        return "None"
    parts = [_describe(child, tensors) for child in structure.children]
    if structure.keys == tuple(range(len(parts))):
        return f"({', '.join(parts)})"
    return "{" + ", ".join(f"{k}: {part}" for k, part in zip(structure.keys, parts, strict=True)) + "}"
