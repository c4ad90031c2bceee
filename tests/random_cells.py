"""An engine against the reference, on given cells and on random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import unrolled as ur
from matching import assert_match
from problems import uneven_loss
from unrolled.engine import native
from unrolled.engine.cell_call import CellCall
from unrolled.engine.plan_cache import Decision, _loops_of, _plan
from unrolled.networks.base import first_state
from unrolled.networks.layout import Call
from unrolled.plan.loops import LoopProgram
from unrolled.trees import Tree, leaves, map_leaves

ENGINES = ("eager", "native")
_LOOKS = 10
"""How often it is looked at most how far the reference moves."""

__all__ = ["ENGINES", "RandomCell", "assert_as_reference", "decision", "gradients", "recipes", "unrolled"]


def unrolled(cell: nn.Module, engine: str, **options: Any) -> ur.Unrolled:
    """An unrolled cell whose plans may fall back without a warning: what is taken is asked of `decision`."""
    rnn = ur.unroll(cell, engine=engine, **options)
    rnn._plans._announce = lambda found: found
    return rnn


def decision(cell: nn.Module, inputs: Tree, engine: str, state: Tree = None, context: Tree = None) -> Decision:
    """Which plan and engine a call takes, and why."""
    rnn = unrolled(cell, engine)
    call = Call.of(inputs, state, context=context)
    inputs, state = call.steps, first_state(rnn, call)
    return rnn._plans.look_up(cell, inputs, state, context)


def _noisy(tensor: Tensor) -> Tensor:
    """Off by one unit in the last place, up or down; zeros and infinities are exact."""
    if not tensor.is_floating_point():
        return tensor
    toward = torch.where(torch.rand_like(tensor) < 0.5, -torch.inf, torch.inf).to(tensor.dtype)
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
    outputs, last = rnn(inputs, state, context=context)
    values = map_leaves(lambda x: x.detach().clone(), {"outputs": outputs, "state": last})
    total = loss(outputs, last)
    if not asked or not total.requires_grad:
        return values, dict.fromkeys(asked)
    grads = torch.autograd.grad(total, list(asked.values()), allow_unused=True)
    return values, dict(zip(asked, grads, strict=True))


def gradients(cell: nn.Module, inputs: Tree, *, engine: str, loss: Callable[..., Tensor]) -> dict[str, Tensor | None]:
    """The gradients of a loss by inputs and parameters, by name; None where it does not depend on them."""
    return _found(unrolled(cell, engine), cell, inputs, None, None, loss, True)[1]


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
    got = _numbers(_found(rnn or unrolled(cell, engine), *rest))
    want = _numbers(_found(unrolled(cell, "reference"), *rest))
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
            return _found(unrolled(cell, "reference"), cell, *trees, loss, wanted)
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


def _roll(x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:], x[:, :1]], -1)


def _swapped(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, -1)[::-1], -1)


def _in_heads(x: Tensor, y: Tensor) -> Tensor:
    q = torch.cat([x, y], -1).view(x.shape[0], 2, x.shape[1])
    return (q.softmax(-1) * q.flip(1)).transpose(1, 2).reshape(x.shape[0], -1)[:, : x.shape[1]]


def _with_part_written(x: Tensor, y: Tensor) -> Tensor:
    made = x.clone()
    made[:, ::2] = 0.5
    made[:, -1] += y[:, 0]
    return made


def _written_unseen(x: Tensor, y: Tensor) -> Tensor:
    made = x + y
    older = made[:, 1:]
    with torch.no_grad():
        made[:, :-1].clamp_(min=-0.2)
    return made + older.sum(-1, keepdim=True) / x.shape[1]


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(2) * y.unsqueeze(1)).mean(1)


def _matrix(x: Tensor, y: Tensor) -> Tensor:
    return x.unsqueeze(2) * y.unsqueeze(1) / x.shape[1]


def _attended(cell: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    q = F.linear(torch.stack([x, y], 1), cell.weight, cell.bias).unsqueeze(2)
    heads = torch.stack([q, 0.5 - q], 2).squeeze(3).transpose(1, 2)
    return ((heads @ heads.transpose(2, 3)).softmax(-1) @ heads).mean((1, 2))


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "weighted": lambda cell, x, y: F.linear(x, cell.shared) + y,
    "weighted with bias": lambda cell, x, y: F.linear(x, cell.weight, cell.bias) * y,
    "weighted turned": lambda cell, x, y: x @ cell.shared - y,
    "scaled": lambda cell, x, y: cell.bias * x + y,
    "gated": lambda cell, x, y: torch.sigmoid(cell.gate) * x + (1 - torch.sigmoid(cell.gate)) * y,
    "add": lambda cell, x, y: x + y,
    "sub": lambda cell, x, y: 0.5 - x - y,
    "mul": lambda cell, x, y: x * y,
    "div": lambda cell, x, y: x / (1 + y.abs()),
    "lerp": lambda cell, x, y: torch.lerp(x, y, 0.3),
    "maximum": lambda cell, x, y: torch.maximum(x, y),
    "minimum": lambda cell, x, y: torch.minimum(x, y),
    "where": lambda cell, x, y: torch.where(x > y, x, 0.5 * y),
    "where not": lambda cell, x, y: torch.where(~(x > 0.1) & (y < 0.2), y, x),
    "masked": lambda cell, x, y: x.masked_fill(y <= 0, 0.25),
    "step": lambda cell, x, y: (x >= y).to(x.dtype) * x,
    "tanh": lambda cell, x, y: torch.tanh(x + y),
    "sigmoid": lambda cell, x, y: torch.sigmoid(x),
    "relu": lambda cell, x, y: torch.relu(x),
    "exp": lambda cell, x, y: torch.exp(-x * x),
    "softplus": lambda cell, x, y: F.softplus(x),
    "silu": lambda cell, x, y: F.silu(x),
    "gelu": lambda cell, x, y: F.gelu(x),
    "elu": lambda cell, x, y: F.elu(x),
    "leaky": lambda cell, x, y: F.leaky_relu(x, 0.1),
    "log1p": lambda cell, x, y: torch.log1p(x.abs()),
    "sqrt": lambda cell, x, y: torch.sqrt(1 + x * x),
    "rsqrt": lambda cell, x, y: torch.rsqrt(1 + x**2) * y,
    "sin": lambda cell, x, y: torch.sin(x) + torch.cos(y),
    "erf": lambda cell, x, y: torch.erf(x),
    "clamp": lambda cell, x, y: x.clamp(-0.3, 0.4),
    "cube": lambda cell, x, y: x**3,
    "softmax": lambda cell, x, y: x.softmax(-1),
    "log softmax": lambda cell, x, y: x.log_softmax(-1) / 4,
    "layer norm": lambda cell, x, y: F.layer_norm(x + y, x.shape[1:], cell.bias, cell.gate, eps=0.1),
    "mean": lambda cell, x, y: x - y.mean(-1, keepdim=True),
    "sum": lambda cell, x, y: x * y.sum(-1, keepdim=True) / x.shape[1],
    "sum without dim": lambda cell, x, y: x + (x * y).sum(-1).unsqueeze(-1) / x.shape[1],
    "amax": lambda cell, x, y: x - y.amax(-1, keepdim=True),
    "amin": lambda cell, x, y: x + y.amin(-1, keepdim=True),
    "var": lambda cell, x, y: x * y.var(-1, unbiased=False, keepdim=True),
    "norm": lambda cell, x, y: x / (1 + y.norm(dim=-1, keepdim=True)),
    "roll": lambda cell, x, y: _roll(x) + y,
    "swap": lambda cell, x, y: _swapped(x),
    "heads": lambda cell, x, y: _in_heads(x, y),
    "outer": lambda cell, x, y: _outer(x, y),
    "stack": lambda cell, x, y: torch.stack([x, y, x * y], 1).mean(1),
    "join": lambda cell, x, y: torch.cat([x, y], -1)[:, ::2],
    "pad": lambda cell, x, y: F.pad(x[:, 1:], (1, 0)) + y,
    "select": lambda cell, x, y: x[:, :1] * y,
    "select last": lambda cell, x, y: x[:, -1].unsqueeze(1).expand_as(y) - y,
    "detach": lambda cell, x, y: x.detach() * y,
    "in place": lambda cell, x, y: (x * y).add_(x).mul_(0.5),
    "part written": lambda cell, x, y: _with_part_written(x, y),
    "written unseen": lambda cell, x, y: _written_unseen(x, y),
    "zeros": lambda cell, x, y: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], -1) + y,
    "product": lambda cell, x, y: F.linear(torch.cat([x, y], -1), cell.wide),
    "gates": lambda cell, x, y: torch.prod(
        torch.stack(F.linear(x, cell.tall, cell.tall[:, 0]).sigmoid().chunk(2, -1)), 0
    ),
    "mish": lambda cell, x, y: F.mish(x) + F.hardtanh(y, -0.5, 0.5),
    "hard": lambda cell, x, y: F.hardsigmoid(x) * F.softshrink(y, 0.1) + F.hardshrink(x, 0.2),
    "prelu": lambda cell, x, y: F.prelu(x, cell.gate) + F.prelu(y, cell.gate[:1]),
    "glu": lambda cell, x, y: F.glu(torch.cat([x, y], -1), -1),
    "logsumexp": lambda cell, x, y: x - y.logsumexp(-1, keepdim=True) / 4,
    "arcs": lambda cell, x, y: torch.atan(x) + torch.asinh(y) + torch.sinh(0.3 * torch.tanh(x)),
    "atan2": lambda cell, x, y: torch.atan2(x, 1 + y.abs()) + torch.hypot(y, 1 + x) / 4,
    "logarithms": lambda cell, x, y: torch.log2(1 + x.abs()) - torch.log10(2 + y * y) + torch.exp2(-x * x),
    "bools": lambda cell, x, y: torch.where((x > 0) ^ x.isfinite() | y.isnan(), x, y) * ((x > 0) + (y > 0)),
    "count": lambda cell, x, y: x * (y > 0).sum(-1, keepdim=True) / x.shape[1] + y * (x > 0).any(-1, keepdim=True),
    "cumsum": lambda cell, x, y: x.cumsum(-1) / x.shape[1] + y,
    "flip": lambda cell, x, y: x.flip(-1) + y,
    "rolled back": lambda cell, x, y: x.roll(1, -1) - y.roll(-2, -1),
    "repeat": lambda cell, x, y: x[:, :1].repeat(1, x.shape[1]) * y.repeat(1, 2)[:, 1 : 1 + x.shape[1]],
    "every second": lambda cell, x, y: torch.cat([x[:, ::2], y[:, 1::2]], -1),
    "gathered": lambda cell, x, y: x.gather(1, torch.arange(x.shape[1]).flip(0).expand(len(x), -1)) + y,
    "scattered": lambda cell, x, y: y.scatter_add(1, (torch.arange(x.shape[1]) // 2).expand(len(x), -1), x) / 2,
    "permuted": lambda cell, x, y: x[:, torch.arange(x.shape[1]) * 2 % x.shape[1]] - y,
    "written": lambda cell, x, y: y.index_add(1, torch.arange(x.shape[1]) // 3, x) / 3,
    "first": lambda cell, x, y: y.index_copy(1, torch.arange(1), x[:, -1:]).index_fill(1, torch.arange(1) - 1, 0.1),
    "ordered": lambda cell, x, y: x.sort(-1)[0] - y.sort(-1, descending=True)[0],
    "largest": lambda cell, x, y: x.topk((x.shape[1] + 1) // 2, -1)[0].sum(-1, keepdim=True) * y / x.shape[1],
    "running": lambda cell, x, y: x.cummax(-1)[0] + y.tanh().cumprod(-1) + (x.tanh() + y.tanh()).logcumsumexp(-1) / 4,
    "middle": lambda cell, x, y: x - y.median(-1, keepdim=True)[0] + x.max(-1, keepdim=True)[0],
    "counted": lambda cell, x, y: x * (torch.count_nonzero(y > 0, -1).unsqueeze(-1) // 2 % 3).to(x.dtype) + y,
    "pad both": lambda cell, x, y: F.pad(x[:, 1:], (0, 1), value=0.5) + F.pad(y, (1, -1)),
    "unbound": lambda cell, x, y: torch.stack(torch.cat([x, y], -1).unbind(-1)[::2], -1),
    "rows stacked": lambda cell, x, y: torch.stack([x, y]).prod(0),
    "diagonal": lambda cell, x, y: _matrix(x, y).diagonal(dim1=1, dim2=2) * x.shape[1],
    "matrix read": lambda cell, x, y: (_matrix(x, y) @ x.unsqueeze(-1)).squeeze(-1),
    "matrix written": lambda cell, x, y: (
        torch.bmm(_matrix(x, y), _matrix(y, x)).mean(2) + torch.einsum("bi,bj->bi", x, y) / 9
    ),
    "every row of a row": lambda cell, x, y: F.linear(torch.stack([x, y], 1), cell.weight, cell.bias).prod(1),
    "weights of heads": lambda cell, x, y: torch.einsum("bhd,hde->bhe", torch.stack([x, y], 1), cell.heads).sum(1),
    "attended": _attended,
    "attended by torch": lambda cell, x, y: F.scaled_dot_product_attention(
        *torch.stack([x, y, x * y, 0.5 - x, y, x], 1).view(len(x), 3, 1, 2, -1).unbind(1)
    ).mean((1, 2)),
    "batch norm in eval": lambda cell, x, y: F.batch_norm(
        x + y, cell.bias.detach(), cell.gate.detach().square() + 0.5, cell.gate, cell.bias
    ),
    "row by vector": lambda cell, x, y: (x @ cell.gate).unsqueeze(-1) * y,
    "turned": lambda cell, x, y: (torch.complex(x, y) * torch.exp(1j * cell.gate)).real + torch.polar(x.abs(), y).imag,
    "complex": lambda cell, x, y: (
        torch.tanh(torch.complex(x, y) @ torch.complex(cell.shared, cell.weight)) / torch.complex(2 + x * x, y)
    ).abs(),
    "convolved": lambda cell, x, y: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(cell.bias).conj(), n=x.shape[1]),
    "root": lambda cell, x, y: torch.sqrt(torch.complex(1 + x * x, y)).imag,
    "heads of weights": lambda cell, x, y: torch.tanh(F.linear(y, cell.tall).view(len(x), 2, -1)).sum(1) * x,
}


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
        return tuple((units + 0.1 * n).expand(batch_size, -1) for n in range(self.recipe.states))

    def forward(self, input: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        values = [input, *state]
        for name, a, b in self.recipe.lines:
            x, y = values[-1 - a % len(values)], values[-1 - b % len(values)]
            values.append(OPERATIONS[name](self, x, y))
        following = tuple(0.7 * torch.tanh(values[-1 - n % len(values)]) for n in self.recipe.kept)
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
    )


def assert_recipe_as_reference(recipe: Recipe, engine: str) -> None:
    """Fail unless a random cell is planned, runs on this engine and gives the reference's numbers."""
    torch.manual_seed(recipe.seed)  # the noise too is the recipe's
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
