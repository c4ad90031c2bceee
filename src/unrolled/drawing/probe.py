"""A sketch of an unrolled network, from one step of it that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unrolled import sequence
from unrolled.autograd_graph import differentiable, leaves_behind
from unrolled.cells.adapted import parameter_names
from unrolled.cells.contract import CheckedStep, name_of, state_names
from unrolled.drawing.sketch import Parameter, Sketch, TensorLabel
from unrolled.errors import InputError
from unrolled.networks.base import first_state
from unrolled.networks.layered import Layered, run_parts
from unrolled.networks.layout import Call
from unrolled.networks.stack import Bidirectional
from unrolled.networks.torch_layers import network_call, networks_of
from unrolled.networks.unroll import Unrolled
from unrolled.trees import Tree, flatten, leaves, map_leaves, paths
from unrolled.unseen import OwnDraws


def sketches_of(rnn: nn.Module, inputs: Tree, state: Tree, context: Tree) -> tuple[Sketch, ...]:
    """What is drawn of each network in this one, in the order in which they run.

    One step of each reads and writes clones, so that nothing it does in place outlives the picture.

    Raises:
        OptionError: if `rnn` is no unrolled network.
        InputError: as the call itself does.
        StateError: as the call itself does.
        CellError: as the call itself does.
    """
    networks_of(rnn, "draw")
    rnn, inputs, state = network_call(rnn, inputs, state)
    with OwnDraws(), torch.inference_mode(False), torch.no_grad():
        if isinstance(rnn, Layered):
            sequence.sizes(inputs, batch_first=rnn.batch_first)
            inputs = sequence.swap_time_and_batch(inputs) if rnn.batch_first else inputs
        sketches: list[Sketch] = []
        _sketch(rnn, inputs, state, context, "", sketches)
        return tuple(sketches)


def _sketch(
    network: nn.Module, steps: Tree, state: Tree, context: Tree, place: str, sketches: list[Sketch]
) -> tuple[Tree, Tree]:
    """Add the sketches of all networks in this one; return outputs like its own."""
    if isinstance(network, Unrolled):
        tensors = [*network.named_parameters(), *network.named_buffers()]
        clones = {f"rnn.{name}": tensor.detach().clone() for name, tensor in tensors}
        step = _OneStep(network, place)
        sketch, output = torch.func.functional_call(step, clones, (steps, state, context))
        sketches.append(sketch)
        return map_leaves(lambda leaf: leaf.expand(sketch.T, *leaf.shape), output), None
    layered = cast("Layered", network)
    both = isinstance(layered, Bidirectional)
    names = iter(("forwards", "backwards") if both else [f"layer {n}" for n in range(len(layered.parts))])

    def run(part: nn.Module, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
        return _sketch(part, steps, state, context, ", ".join(filter(None, [place, next(names)])), sketches)

    return run_parts(layered, run, steps, state, context)


class _OneStep(nn.Module):
    """An unrolled network of which one copy is run: returns its sketch and the copy's output."""

    def __init__(self, rnn: Unrolled, place: str) -> None:
        super().__init__()
        self.rnn, self.place = rnn, place
        self.trained = {name: parameter.requires_grad for name, parameter in rnn.cell.named_parameters()}

    def forward(self, inputs: Tree, state: Tree, context: Tree) -> tuple[Sketch, Tree]:
        """Run copy 0."""
        cell = self.rnn.cell
        weights = dict(cell.named_parameters())
        for weight in weights.values():  # autograd follows all of them here, frozen ones included
            weight.requires_grad_(differentiable(weight))
        with torch.enable_grad():
            call = Call.of(inputs, state, context=context, batch_first=self.rnn.batch_first)
            steps, first = call.steps, first_state(self.rnn, call)
        T, B = sequence.sizes(steps)
        try:
            constant = _labels("context", context)
        except TypeError as error:
            raise InputError(
                f"a context must be a pytree of tensors: {error}; convert it with torch.as_tensor"
            ) from error
        reads = _WeightReads(weights)
        tensors = leaves(first)
        initial = reads.weights_among([*tensors, *leaves_behind(tensors)]) if state is None else set()
        input, first = map_leaves(lambda x: x[0].clone(), steps), map_leaves(Tensor.clone, first)
        with reads if initial else nullcontext():
            output, _ = CheckedStep(cell, context)(0, input, first)
        unshared = initial - reads.found
        sketch = Sketch(
            cell=name_of(cell),
            T=T,
            B=B,
            input=_labels("x", input),
            state=_labels("s", first, state_names(cell)),
            output=_labels("o", output),
            parameters=tuple(
                Parameter(name, tuple(weights[path].shape), path not in unshared, self.trained[path])
                for name, path in parameter_names(cell).items()
            ),
            origin="passed" if state is not None else "learned" if initial else "own",
            context=constant,
            place=self.place,
            reverse=self.rnn.reverse,
        )
        return sketch, output


class _WeightReads(TorchFunctionMode):
    """Notices which of some weights the operations of a step read."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.found: set[str] = set()

    def weights_among(self, values: Iterable[Any]) -> set[str]:
        """The names of those values that are weights."""
        return {self.names[id(value)] for value in values if id(value) in self.names}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        values = [*args, *kwargs.values()]
        values += [item for value in values if isinstance(value, tuple | list) for item in value]
        self.found |= self.weights_among(values)
        return func(*args, **kwargs)


def _labels(symbol: str, tree: Tree, names: Sequence[str] = ()) -> tuple[TensorLabel, ...]:
    """How a picture names the tensors of a tree: by the names that the cell gives them, or by their paths."""
    tensors, structure = flatten(tree)
    places = paths(structure)
    if len(names) != len(tensors):
        names = [symbol + path for path in places]
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    return tuple(map(TensorLabel, names, places, (tuple(tensor.shape) for tensor in tensors), dtypes))
