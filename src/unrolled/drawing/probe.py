"""A sketch of an unrolled network, from one step of it that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unrolled import sequence
from unrolled.autograd_graph import leaves_behind
from unrolled.cells.adapted import parameter_names
from unrolled.cells.contract import CheckedStep, name_of, state_names
from unrolled.drawing import Leaf, Parameter, Sketch
from unrolled.errors import InputError
from unrolled.networks.layered import Layered
from unrolled.networks.stack import Bidirectional
from unrolled.networks.unroll import Unrolled
from unrolled.trees import Tree, flatten, leaves, map_leaves, paths
from unrolled.unseen import OwnDraws


def probed(rnn: Unrolled | Layered, inputs: Tree, state: Tree, context: Tree) -> tuple[Sketch, ...]:
    """What a picture of each network in this one, over these inputs, needs to know.

    The step reads and writes clones, so that nothing it does in place outlives the picture.
    """
    with OwnDraws(), torch.inference_mode(False), torch.no_grad():
        if isinstance(rnn, Unrolled):
            return (_probed(rnn, inputs, state, context, "")[0],)
        found: list[Sketch] = []
        sequence.sizes(inputs, batch_first=rnn.batch_first)
        steps = sequence.swap_time_and_batch(inputs) if rnn.batch_first else inputs
        _walked(rnn, steps, state, context, "", found)
        return tuple(found)


def _walked(
    part: nn.Module, steps: Tree, state: Tree, context: Tree, place: str, found: list[Sketch]
) -> tuple[Tree, Tree]:
    """Sketch all networks in a part; returns outputs of the kind that the part gives out."""
    if isinstance(part, Unrolled):
        sketch, output = _probed(part, steps, state, context, place)
        found.append(sketch)
        return map_leaves(lambda leaf: leaf.expand(sketch.T, *leaf.shape), output), None
    whole = cast("Layered", part)
    names = _part_names(whole)

    def run(part: nn.Module, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
        return _walked(part, steps, state, context, ", ".join(filter(None, [place, next(names)])), found)

    return whole.composed_by(run, steps, state, context)


def _part_names(whole: Layered) -> Iterator[str]:
    if isinstance(whole, Bidirectional):
        return iter(("forwards", "backwards"))
    return iter([f"layer {number}" for number in range(len(whole.parts))])


def _probed(rnn: Unrolled, inputs: Tree, state: Tree, context: Tree, place: str) -> tuple[Sketch, Tree]:
    """What a picture of one network needs to know, and what one of its copies gives out."""
    held = [*rnn.named_parameters(), *rnn.named_buffers()]
    clones = {f"rnn.{name}": tensor.detach().clone() for name, tensor in held}
    found: tuple[Sketch, Tree] = torch.func.functional_call(_Probe(rnn, place), clones, (inputs, state, context))
    return found


class _Probe(nn.Module):
    """An unrolled network of which one copy is run."""

    def __init__(self, rnn: Unrolled, place: str) -> None:
        super().__init__()
        self.rnn, self.place = rnn, place
        self.trained = {name: parameter.requires_grad for name, parameter in rnn.cell.named_parameters()}

    def forward(self, inputs: Tree, state: Tree, context: Tree) -> tuple[Sketch, Tree]:
        """Run copy 0, and say what it met and gave out."""
        cell = self.rnn.cell
        weights = self._weights()
        with torch.enable_grad():
            steps, first = self.rnn.prepared(inputs, state, context)
        T, B = sequence.sizes(steps)
        constant = _context_leaves(context)
        initial = _sources(leaves(first), weights) if state is None else set()
        input, first = map_leaves(lambda x: x[0].clone(), steps), map_leaves(Tensor.clone, first)
        with _Readers(weights) if initial else nullcontext() as readers:
            output, _ = CheckedStep(cell, context)(0, input, first)
        apart = initial - readers.found if readers else set()
        sketch = Sketch(
            cell=name_of(cell),
            T=T,
            B=B,
            input=_leaves("x", input),
            state=_leaves("s", first, state_names(cell)),
            output=_leaves("o", output),
            parameters=tuple(self._listed(weights, apart)),
            origin="passed" if state is not None else "learned" if initial else "own",
            context=constant,
            place=self.place,
            reverse=self.rnn.reverse,
        )
        return sketch, output

    def _weights(self) -> dict[str, Tensor]:
        """The cell's parameters as they are in this call, made such that autograd follows them."""
        weights = dict(self.rnn.cell.named_parameters())
        for weight in weights.values():
            weight.requires_grad_(weight.is_floating_point() or weight.is_complex())
        return weights

    def _listed(self, weights: dict[str, Tensor], apart: set[str]) -> Iterator[Parameter]:
        for name, path in parameter_names(self.rnn.cell).items():
            yield Parameter(name, tuple(weights[path].shape), path not in apart, self.trained[path])


def _sources(tensors: list[Tensor], weights: dict[str, Tensor]) -> set[str]:
    """The names of the weights that some tensors were computed from."""
    names = {id(weight): name for name, weight in weights.items()}
    return {names[id(tensor)] for tensor in (*tensors, *leaves_behind(tensors)) if id(tensor) in names}


class _Readers(TorchFunctionMode):
    """Notices which weights the operations of a step read, frozen ones included."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        given += [item for items in given if isinstance(items, tuple | list) for item in items]
        self.found |= {self.names[id(item)] for item in given if id(item) in self.names}
        return func(*args, **kwargs)


def _leaves(symbol: str, tree: Tree, names: Sequence[str] = ()) -> tuple[Leaf, ...]:
    tensors, structure = flatten(tree)
    found = paths(structure)
    if len(names) != len(tensors):
        names = [symbol + path for path in found]
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    return tuple(map(Leaf, names, found, shapes, dtypes))


def _context_leaves(context: Tree) -> tuple[Leaf, ...]:
    try:
        return _leaves("context", context)
    except TypeError as error:
        raise InputError(f"a context must be a pytree of tensors: {error}; convert it with torch.as_tensor") from error
