"""What a network takes in memory, measured on the network itself over a few steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from unrolled.bptt.allocations import Allocations
from unrolled.bptt.checkpointed import run_checkpointed
from unrolled.bptt.schedules import Schedule, segments
from unrolled.bptt.segments import SequenceRun
from unrolled.lengths import Extent
from unrolled.trees import Tree, leaves, map_leaves
from unrolled.unseen import unseen


@dataclass(frozen=True)
class Curve:
    """Bytes over steps, measured at some and linear between and beyond them.

    Attributes:
        points: pairs of steps and bytes, at least two, in order.

    Example:
        >>> Curve(((10, 100.0), (20, 180.0)))(30)
        260.0
    """

    points: tuple[tuple[int, float], ...]

    def __call__(self, steps: float) -> float:
        """Bytes for so many steps."""
        pairs = list(pairwise(self.points))
        (a, low), (b, high) = next((pair for pair in pairs if steps <= pair[1][0]), pairs[-1])
        return max(low + (high - low) * (steps - a) / (b - a), 0.0)


@dataclass(frozen=True)
class Costs:
    """Activation memory of a network for a batch size, in bytes; inputs, outputs and their gradients are not in it.

    Attributes:
        stored: full storage of so many steps.
        taped: a checkpointed run in segments of so many steps, with `slots` of its states stored.
        slots: how many that are.
        slot: one more stored state.
        outputs: those of one step, which are not counted.
    """

    stored: Curve
    taped: Curve
    slots: int
    slot: float
    outputs: float

    def full(self, extent: Extent) -> float:
        """What full storage takes."""
        return self.stored(extent.rows / extent.batch)

    def promised(self, schedule: Schedule, extent: Extent) -> float:
        """What a schedule takes at most; with rows that end early, as if each state had all rows."""
        if schedule.segments == 1:
            return self.full(extent)
        # Where a stored state is advanced, the advanced one is held as well.
        states = schedule.slots_needed + (schedule.slots_needed < schedule.segments - 1)
        # The segment that is first in time has the most rows; they come to so many steps of all rows.
        alive, length = extent.alive, schedule.length
        steps = length if alive is None else sum(alive[:length]) / extent.batch
        return self.taped(steps) + (states - self.slots) * self.slot


class Meter:
    """Measures the costs of one kind of call, and keeps what it has measured.

    Memory is not quite linear in the steps: some of it is there however few they are, and an engine's products take
    more room from some size on, which one depends on the processor. So it is measured at powers of two, and at the very
    length that is asked about; beyond 512 steps it is linear.
    """

    _SEGMENTS = 3
    """How many segments the measured runs have."""

    def __init__(self) -> None:
        self._stored: dict[int, int] = {}
        self._taped: dict[int, int] = {}
        self._slot = self._outputs = 0.0

    def costs(self, whole: Callable[[], SequenceRun], length: int) -> Costs:
        """The costs, measured up to so many steps of a segment.

        Args:
            whole: makes the run to measure, on a network that may be changed; its inputs' first step stands for all.
            length: steps, at least 1.
        """
        power_of_two = 1 << (length.bit_length() - 1)
        wanted = [1, 2, 4, 8, 16, 64, min(max(power_of_two, 64), 512), min(length, 512)]
        missing = [steps for steps in dict.fromkeys(wanted) if steps not in self._taped]
        if missing:
            # Also for a call without gradients: a budget is one of training, and both go by the same schedule.
            with unseen(), torch.enable_grad():
                self._measure(_RepeatedStep(whole()), missing)
        curves = [Curve(tuple(sorted(points.items()))) for points in (self._stored, self._taped)]
        return Costs(curves[0], curves[1], self._SEGMENTS - 1, self._slot, self._outputs)

    def _measure(self, step: _RepeatedStep, lengths: Sequence[int]) -> None:
        few, more = self._SEGMENTS, 4
        if not self._stored:
            step.peak_taped(1, 2)  # what is made once, plans above all, is none of the costs
            found = {steps: step.peak_stored(steps) for steps in (1, 8, 64, 256)}
            self._stored = {steps: peak for steps, (peak, _) in found.items()}
            self._outputs = found[256][1] / 256
            self._slot = (step.peak_taped(1, few + more) - step.peak_taped(1, few)) / more
        for steps in lengths:
            self._taped[steps] = step.peak_taped(steps, few)


@dataclass(frozen=True)
class _RepeatedStep:
    """Measures runs that repeat the first step of another one.

    Attributes:
        sample: the run whose first step is repeated.
    """

    sample: SequenceRun

    def peak_stored(self, steps: int) -> tuple[int, int]:
        """The peak of full storage, and the outputs' bytes."""
        run = self._repeated(steps)
        return _peak(run, run.at_once)

    def peak_taped(self, steps: int, count: int) -> int:
        """The peak of a checkpointed run of `count` segments of so many steps each."""
        run = self._repeated(steps * count)
        return _peak(run, lambda: run_checkpointed(run, segments(steps * count, steps)))[0]

    def _repeated(self, steps: int) -> SequenceRun:
        """No row ends early; a run of rows that may is still laid out as one, since that takes more memory."""
        batch, ragged = self.sample.extent.batch, self.sample.extent.ragged

        def repeated(leaf: Tensor) -> Tensor:
            first = leaf.detach()[:batch].unsqueeze(0) if ragged else leaf.detach()[:1]
            many = first.expand(steps, *first.shape[1:]).clone()
            return (many.flatten(0, 1) if ragged else many).requires_grad_(leaf.requires_grad)

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        inputs = map_leaves(repeated, self.sample.inputs)
        state, context = map_leaves(leaf, self.sample.state), map_leaves(leaf, self.sample.context)
        extent = Extent(steps, batch, (batch,) * steps if ragged else None)
        return replace(self.sample, inputs=inputs, state=state, context=context, extent=extent, measured=True)


def _peak(sequence: SequenceRun, run: Callable[[], tuple[Tree, Tree]]) -> tuple[int, int]:
    """The most bytes that a training step holds, without outputs and the gradients of outputs, inputs and state.

    Args:
        sequence: what is run.
        run: runs it.

    Returns:
        These bytes, and those of the outputs.
    """
    trees = (sequence.inputs, sequence.state, sequence.context)
    given = [x for tree in trees for x in leaves(tree) if x.requires_grad]
    weights = [x for x in sequence.module.parameters() if x.requires_grad]
    with Allocations() as allocations:
        outputs, last = run()
    results = [x for x in (*leaves(outputs), *leaves(last)) if x.requires_grad]
    grads = [torch.zeros_like(x) for x in results]
    found: Sequence[Tensor | None] = ()
    if results and (given or weights):
        with allocations:
            found = torch.autograd.grad(results, [*given, *weights], grads, allow_unused=True)
    uncounted = [*leaves(outputs), *(x for x in found[: len(given)] if x is not None)]
    return allocations.peak(without=uncounted), sum(x.nbytes for x in leaves(outputs))


def copy_sharing_tensors(network: nn.Module, share: Iterable[object] = ()) -> nn.Module:
    """A copy of a network on the same tensors, to measure on: what its steps write into attributes stays in the copy.

    A network that cannot be copied is returned itself: then its steps are called more often than the sequence has them.

    Args:
        network: a network, or a cell.
        share: what else the copy is to share.
    """
    shared = [*network.parameters(), *network.buffers()]
    shared += [x for module in network.modules() for x in vars(module).values() if isinstance(x, Tensor)]
    try:
        return copy.deepcopy(network, {id(x): x for x in (*shared, *share)})
    except Exception:
        return network
