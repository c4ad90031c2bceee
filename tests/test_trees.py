"""Pytrees: what is taken apart is put together again, whatever its shape."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from matching import assert_match
from unrolled.trees import Tree, describe, flatten, leaves, map_leaves, paths, unflatten

CI = settings(derandomize=True, deadline=None, max_examples=60)


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Box:
    inner: Any
    lid: Any = None


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool])
TENSORS = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), SHAPES, DTYPES)
KEYS = st.one_of(st.text("ab'\"[].", min_size=1, max_size=3), st.integers(0, 3))


def containers(children: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    return st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(KEYS, children, max_size=3),
        st.builds(Point, children, children),
        st.builds(Box, children, children),
    )


TREES = st.recursive(st.one_of(TENSORS, st.none()), containers, max_leaves=8)


def same(a: Tree, b: Tree) -> bool:
    """Equal types and keys all the way down, and the very same tensors: written without the module under test."""
    if isinstance(a, Tensor) or a is None:
        return a is b
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Box):
        return same(a.inner, b.inner) and same(a.lid, b.lid)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def at(tree: Tree, path: str) -> Tree:
    """Follow a path as Python reads it."""
    return eval(f"tree{path}", {"tree": tree})


@given(TREES)
@CI
def test_unflatten_is_the_inverse_of_flatten(tree):
    tensors, structure = flatten(tree)
    assert same(unflatten(structure, tensors), tree)


@given(TREES)
@CI
def test_each_path_leads_to_its_leaf_when_python_follows_it(tree):
    tensors, structure = flatten(tree)
    found = [at(tree, path) for path in paths(structure)]
    assert [id(leaf) for leaf in found] == [id(leaf) for leaf in tensors]
    assert len(set(paths(structure))) == len(tensors)


@given(TREES, TREES)
@CI
def test_structures_are_equal_exactly_when_trees_differ_in_their_tensors_alone(one, other):
    a, b = flatten(one)[1], flatten(other)[1]
    filled = unflatten(a, flatten(one)[0])
    assert flatten(filled)[1] == a
    if a == b:
        assert same(unflatten(b, leaves(one)), one)
    else:
        assert not same(one, other)


def test_equal_dicts_have_equal_structures_and_keep_their_own_order():
    one, other = {"b": torch.zeros(1), "a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.zeros(1)}
    (tensors, structure), (_, other_structure) = flatten(one), flatten(other)
    assert structure == other_structure
    assert tensors[0].item() == 1
    assert list(unflatten(structure, tensors)) == ["b", "a"]


@given(TREES)
@CI
def test_describe_names_every_leafs_dtype_and_shape_on_one_line(tree):
    line = describe(tree)
    assert "\n" not in line
    for leaf in leaves(tree):
        assert f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" in line


@given(TREES)
@CI
def test_map_leaves_maps_every_leaf_and_keeps_the_rest(tree):
    doubled = map_leaves(lambda a, b: torch.cat([a.flatten(), b.flatten()]), tree, tree)
    assert flatten(doubled)[1] == flatten(tree)[1]
    assert [x.numel() for x in leaves(doubled)] == [2 * x.numel() for x in leaves(tree)]


def test_map_leaves_refuses_trees_with_another_number_of_leaves():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        map_leaves(torch.add, (torch.ones(1), torch.ones(1)), (torch.ones(1),))


@pytest.mark.parametrize(
    ("tree", "text", "ways"),
    [
        (torch.ones(2, 3), "float32[2, 3]", [""]),
        (None, "None", []),
        ((torch.ones(2), None), "(float32[2], None)", ["[0]"]),
        ({"a": torch.ones(1).long(), "b": [torch.ones(())]}, "{a: int64[1], b: (float32[])}", ["['a']", "['b'][0]"]),
        (Point(torch.ones(1), torch.ones(2)), "{x: float32[1], y: float32[2]}", [".x", ".y"]),
        (Box({"k": torch.ones(1)}), "{inner: {k: float32[1]}, lid: None}", [".inner['k']"]),
    ],
    ids=["tensor", "None", "tuple", "dict", "named tuple", "dataclass"],
)
def test_describe_and_paths_read_as_a_person_would_write_them(tree, text, ways):
    assert describe(tree) == text
    assert paths(flatten(tree)[1]) == ways


@pytest.mark.parametrize("leaf", [1.0, "text", [2], {3}, Point], ids=repr)
def test_a_leaf_that_is_no_tensor_is_named_by_type_and_value(leaf):
    wrong = leaf[0] if isinstance(leaf, list) else leaf
    with pytest.raises(TypeError, match=f"a {type(wrong).__name__}"):
        flatten({"a": (torch.ones(1), leaf)})


@pytest.mark.parametrize(
    "tree",
    [
        collections.OrderedDict(a=torch.ones(1)),
        collections.defaultdict(list, {"a": torch.ones(1)}),
        torch.max(torch.ones(2, 2), 0),
    ],
    ids=["OrderedDict", "defaultdict", "torch.return_types"],
)
def test_containers_of_the_standard_library_and_of_torch_keep_their_type(tree):
    tensors, structure = flatten(tree)
    again = unflatten(structure, tensors)
    assert type(again) is type(tree)
    assert_match(leaves(again), tensors, bound=0)


def test_a_subclass_of_a_tuple_and_a_plain_tuple_are_different_structures():
    a, b = torch.ones(1), torch.ones(2)
    kinds = [flatten(tree)[1] for tree in ((a, b), [a, b], Point(a, b), {"x": a, "y": b}, Box(a, b))]
    assert all(one != other for i, one in enumerate(kinds) for other in kinds[:i])
