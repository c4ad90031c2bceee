"""An engine against the reference, on given cells and on random ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import unrolled as ur
from matching import assert_match
from problems import uneven_loss
from random_operations import OPERATIONS
from unrolled.engine import native
from unrolled.engine.cell_call import CellCall
from unrolled.engine.plan_cache import Decision, _loops_of, _plan
from unrolled.networks.base import first_state
from unrolled.networks.layout import Call
from unrolled.plan.loops import LoopProgram
from unrolled.trees import Tree, leaves, map_leaves

ENGINES = ("eager", "native")
_MOVED = Generator()
"""What moves the reference: cells that draw have the numbers of torch's own generator."""

_LOOKS = 10
"""How often it is looked at most how far the reference moves."""

__all__ = ["ENGINES", "RandomCell", "assert_as_reference", "decision", "gradients", "recipes", "unrolled"]


def unrolled(cell: nn.Module, engine: str, **options: Any) -> ur.Unrolled:
    """An unrolled cell whose plans may fall back without a warning: what is taken is asked of `decision`."""
    rnn = ur.unroll(cell, engine=engine, **options)
    rnn._plans._announce = lambda found: found
    return rnn


@functools.lru_cache(maxsize=4)
def _known(cell: nn.Module, engine: str) -> ur.Unrolled:
    """One network for a cell, however often it is asked: its plans are made once."""
    return unrolled(cell, engine)


def decision(cell: nn.Module, inputs: Tree, engine: str, state: Tree = None, context: Tree = None) -> Decision:
    """Which plan and engine a call takes, and why."""
    rnn = _known(cell, engine)
    call = Call.of(inputs, state, context=context)
    inputs, state = call.steps, first_state(rnn, call)
    return rnn._plans.look_up(cell, inputs, state, context)


def _noisy(tensor: Tensor) -> Tensor:
    """Off by one unit in the last place, up or down; zeros and infinities are exact."""
    if not tensor.is_floating_point():
        return tensor
    up = torch.rand(tensor.shape, generator=_MOVED).to(tensor.device) < 0.5
    toward = torch.where(up, torch.inf, -torch.inf).to(tensor.dtype)
    return torch.where((tensor == 0) | tensor.isinf(), tensor, torch.nextafter(tensor, toward))


def _leaf(tensor: Tensor, wanted: bool) -> Tensor:
    detached = tensor.detach()  # keeps the layout
    return detached.requires_grad_() if wanted and detached.is_floating_point() else detached


def _found(
    rnn: nn.Module, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, loss: Callable[..., Tensor], wanted: bool
) -> tuple[Tree, dict[str, Tensor | None]]:
    inputs = map_leaves(lambda x: _leaf(x, wanted), inputs)
    state = None if state is None else map_leaves(lambda x: _leaf(x, wanted), state)
    context = None if context is None else map_leaves(lambda x: _leaf(x, wanted), context)
    given = {"input": inputs, "state": state, "context": context}
    asked = {
        f"{name}{n}": leaf for name, tree in given.items() if tree is not None for n, leaf in enumerate(leaves(tree))
    }
    asked |= dict(cell.named_parameters())
    asked = {name: leaf for name, leaf in asked.items() if leaf.requires_grad}
    torch.manual_seed(0)
    outputs, last = rnn(inputs, state, context=context)
    values = map_leaves(lambda x: x.detach().clone(), {"outputs": outputs, "state": last, "drawn next": torch.rand(())})
    total = loss(outputs, last)
    if not asked or not total.requires_grad:
        return values, dict.fromkeys(asked)
    grads = torch.autograd.grad(total, list(asked.values()), allow_unused=True)
    return values, dict(zip(asked, grads, strict=True))


def gradients(cell: nn.Module, inputs: Tree, *, engine: str, loss: Callable[..., Tensor]) -> dict[str, Tensor | None]:
    """The gradients of a loss by inputs and parameters, by name; None where it does not depend on them."""
    return _found(_known(cell, engine), cell, inputs, None, None, loss, True)[1]


def assert_as_reference(
    cell: nn.Module,
    inputs: Tree,
    state: Tree = None,
    *,
    engine: str,
    context: Tree = None,
    loss: Callable[..., Tensor] = uneven_loss,
    inputs_require_grad: bool = True,
    rnn: nn.Module | None = None,
    what: str = "",
) -> None:
    """Fail unless an engine gives the reference's values and all gradients; none counts as zeros."""
    rest = (cell, inputs, state, context, loss, inputs_require_grad)
    got = _numbers(_found(rnn or _known(cell, engine), *rest))
    want = _numbers(_found(_known(cell, "reference"), *rest))
    _drop_zeros(got, want)
    try:
        assert_match(got, want, what)
    except AssertionError as error:
        _assert_within_its_own_movement(got, want, rest, what, error)


def _numbers(found: tuple[Tree, dict[str, Tensor | None]]) -> dict[str, Tensor]:
    values = {f"value {n}": leaf for n, leaf in enumerate(leaves(found[0]))}
    return values | {f"gradient by {name}": g for name, g in found[1].items() if g is not None}


def _drop_zeros(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Take out the gradients that are zero but for rounding, in both: those have no largest entry to compare with."""
    largest = max([t.abs().max().item() for t in want.values() if t.is_floating_point() and t.numel()], default=0.0)
    for name in {*got, *want}:
        pair = [group[name] for group in (got, want) if name in group]
        if name.startswith("gradient") and all(
            t.abs().max() <= 8 * torch.finfo(t.dtype).eps * largest for t in pair if t.numel()
        ):
            got.pop(name, None)
            want.pop(name, None)


def _assert_within_its_own_movement(
    got: dict[str, Tensor], want: dict[str, Tensor], rest: tuple[Any, ...], what: str, error: AssertionError
) -> None:
    """A chaotic case: three times what the reference moves under noise of one unit in the last place is allowed."""
    if got.keys() != want.keys():
        raise AssertionError(f"{what}: {sorted(got)} is not {sorted(want)}") from error
    moved = dict.fromkeys(want, 0.0)
    for _ in range(_LOOKS):
        for name, tensor in _numbers(_found_with_noise(*rest)).items():
            if name in want and tensor.is_floating_point():
                moved[name] = max(moved[name], (tensor - want[name]).abs().max().item())
        if all(_matches(got[name], tensor, moved[name]) for name, tensor in want.items()):
            return  # more looks can only allow more
    for name, tensor in want.items():
        if not _matches(got[name], tensor, moved[name]):
            assert_match(got[name], tensor, f"{what} {name} (the reference itself moves by {moved[name]:.3g})")


def _matches(got: Tensor, want: Tensor, moved: float) -> bool:
    """Whether a tensor is the reference's, but for three times what the reference itself moves by."""
    same_kind = (got.shape, got.dtype) == (want.shape, want.dtype)
    if moved and same_kind and (got - want).abs().max() <= 3 * moved:
        return True
    try:
        assert_match(got, want)
    except AssertionError:
        return False
    return True


class _Noise(TorchDispatchMode):
    """What element-wise operations make, forward and backward, is off by one unit in the last place.

    A difference of numbers that are nearly the same moves by that, however little the cell's own inputs count in it.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        new = all(returned.alias_info is None for returned in func._schema.returns)
        return _noisy(made) if new and torch.Tag.pointwise in func.tags else made


def _found_with_noise(
    cell: nn.Module, inputs: Tree, state: Tree, context: Tree, loss: Callable[..., Tensor], wanted: bool
) -> tuple[Tree, dict[str, Tensor | None]]:
    kept = [parameter.detach().clone() for parameter in cell.parameters()]
    try:
        for parameter in cell.parameters():
            parameter.data = _noisy(parameter.data)
        trees = [tree if tree is None else map_leaves(_noisy, tree) for tree in (inputs, state, context)]
        with _Noise():
            return _found(_known(cell, "reference"), cell, *trees, loss, wanted)
    finally:
        for parameter, before in zip(cell.parameters(), kept, strict=True):
            parameter.data = before


# -- random cells ----------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """A random cell: sizes, and for each operation its name and which of the values made before it reads.

    What it is run on is part of it, and whether the gradients of its inputs are asked for.
    """

    size: int
    states: int
    lines: tuple[tuple[str, int, int], ...]
    kept: tuple[int, ...]
    shown: int
    steps: int
    batch: int
    seed: int
    asked: bool = True
    counts: bool = False  # whether one more state counts, in whole numbers


class RandomCell(nn.Module):
    """Some operations on an input and some states `[B, H]`, all one size; what it hands on is bounded by a tanh."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, size = recipe, recipe.size
        made = torch.Generator().manual_seed(recipe.seed)
        for name, shape in {
            "shared": (size, size),
            "weight": (size, size),
            "wide": (size, 2 * size),
            "tall": (2 * size, size),
            "bias": (size,),
            "gate": (size,),
            "heads": (2, size, size),
        }.items():
            numbers = torch.randn(shape, generator=made, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(numbers / (2 * shape[-1] ** 0.5 if len(shape) > 1 else 2)))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> tuple[Tensor, ...]:
        # No two units alike: which of two equal numbers is the larger is a matter of rounding.
        units = torch.arange(self.recipe.size, dtype=torch.float64) / 31
        states = tuple((units + 0.1 * n).expand(batch_size, -1) for n in range(self.recipe.states))
        return (*states, torch.arange(batch_size).unsqueeze(-1)) if self.recipe.counts else states

    def forward(self, input: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        values = [input, *state]
        if self.recipe.counts:
            values[-1] = (values[-1] % 4 / 3).to(input.dtype).expand_as(input)
        for name, a, b in self.recipe.lines:
            x, y = values[-1 - a % len(values)], values[-1 - b % len(values)]
            values.append(OPERATIONS[name](self, x, y))
        following = tuple(0.7 * torch.tanh(values[-1 - n % len(values)]) for n in self.recipe.kept)
        if self.recipe.counts:
            following = (*following, torch.where(values[-1][:, :1] > 0.1, state[-1] + 1, state[-1] // 2))
        return values[-1 - self.recipe.shown % len(values)], following


@st.composite
def recipes(draw: Any) -> Recipe:
    """A strategy for random cells and what to run them on."""
    states, place = draw(st.integers(1, 3)), st.integers(0, 20)
    line = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 5), place)
    return Recipe(
        draw(st.sampled_from([1, 2, 3, 5, 8, 9, 17])),
        states,
        tuple(draw(st.lists(line, min_size=2, max_size=12))),
        tuple(draw(st.lists(place, min_size=states, max_size=states))),
        draw(place),
        draw(st.integers(1, 8)),
        draw(st.integers(1, 7)),
        draw(st.integers(0, 999)),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def assert_recipe_as_reference(recipe: Recipe, engine: str) -> None:
    """Fail unless a random cell is planned, runs on this engine and gives the reference's numbers."""
    _MOVED.manual_seed(recipe.seed)  # the noise too is the recipe's
    cell, inputs = _made(recipe)
    rnn = unrolled(cell, engine)
    found = rnn._plans.look_up(cell, inputs, first_state(rnn, Call.of(inputs)), None)
    assert found.plan is not None, found.why
    assert found.engine == engine or "does not emit" in found.why, found.why
    assert_as_reference(cell, inputs, engine=engine, inputs_require_grad=recipe.asked, rnn=rnn)


def failures_on_the_native_engine(recipes: Iterable[Recipe]) -> list[str]:
    """What fails of some random cells whose loops are built as one library; alone, or only so."""
    recipes = list(recipes)
    _build_together(recipes)
    failed = [recipe for recipe in recipes if _failure(recipe)]
    found = []
    for recipe in failed:
        native._LOOPS.clear()
        found.append(_failure(recipe) or f"{recipe} fails only in a library with the loops of others")
    return found


def _failure(recipe: Recipe) -> str:
    try:
        assert_recipe_as_reference(recipe, "native")
    except Exception as error:
        return f"{recipe}: {type(error).__name__}: {error}"
    return ""


def _build_together(recipes: Iterable[Recipe]) -> None:
    """Those that this cannot be done for are planned and built, or fail, where they are run."""
    loops: list[LoopProgram] = []
    for recipe in recipes:
        cell, inputs = _made(recipe)
        call = CellCall.of(cell, inputs, cell.initial_state(recipe.batch), None)
        with suppress(Exception):
            loops += _loops_of(_plan(call, fuse=True))
    with suppress(native.BuildError):
        native.prepare(loops)


def _made(recipe: Recipe) -> tuple[RandomCell, Tensor]:
    """A cell, and the inputs that it is run on."""
    made = torch.Generator().manual_seed(recipe.seed)
    inputs = torch.randn(recipe.steps, recipe.batch, recipe.size, generator=made, dtype=torch.float64)
    return RandomCell(recipe), inputs.requires_grad_(recipe.asked)
