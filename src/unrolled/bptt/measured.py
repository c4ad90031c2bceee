"""What a network takes in memory, measured on the network itself over a few steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unrolled.bptt.allocations import Allocations
from unrolled.bptt.checkpointed import run_checkpointed
from unrolled.bptt.costs import Costs, Curve
from unrolled.bptt.schedules import segments
from unrolled.bptt.segments import SequenceRun
from unrolled.lengths import Extent
from unrolled.trees import Tree, leaves, map_leaves
from unrolled.unseen import unseen

_FIRST = (1, 2, 4, 8, 16, 64)  # steps of a segment
_WHOLE = (1, 8, 64, 256)  # steps of full storage
_LONGEST = 512
_SEGMENTS, _MORE = 3, 4


class Meter:
    """Costs of one kind of call; what has been measured is kept.

    Memory is not quite linear in the steps: some of it is there however few they are, and an engine's products take
    more room from some size on, which one depends on the processor. So it is measured at powers of two, and at the very
    length that is asked about; beyond 512 steps it is linear.
    """

    def __init__(self) -> None:
        self._stored: dict[int, int] = {}
        self._taped: dict[int, int] = {}
        self._slot = self._outputs = 0.0

    def costs(self, whole: Callable[[], SequenceRun], length: int) -> Costs:
        """What is known, measured up to so many steps of a segment.

        Args:
            whole: makes the run to measure, on a network that may be changed; its inputs' first step stands for all.
            length: steps, at least 1.
        """
        longest = max(_FIRST[-1], 1 << (max(length, 1).bit_length() - 1))
        wanted = [*_FIRST, min(_LONGEST, longest), min(_LONGEST, length)]
        missing = [steps for steps in dict.fromkeys(wanted) if steps not in self._taped]
        if missing:
            # Also for a call without gradients: a budget is one of training, and both go by the same schedule.
            with unseen(), torch.enable_grad():
                self._measure(_Sample(whole()), missing)
        curves = [Curve(tuple(sorted(points.items()))) for points in (self._stored, self._taped)]
        return Costs(curves[0], curves[1], _SEGMENTS - 1, self._slot, self._outputs)

    def _measure(self, sample: _Sample, lengths: Sequence[int]) -> None:
        if not self._stored:
            sample.taped(1, 2)  # what is made once, plans above all, is none of the costs
            found = {steps: sample.stored(steps) for steps in _WHOLE}
            self._stored = {steps: peak for steps, (peak, _) in found.items()}
            self._outputs = found[_WHOLE[-1]][1] / _WHOLE[-1]
            self._slot = (sample.taped(1, _SEGMENTS + _MORE) - sample.taped(1, _SEGMENTS)) / _MORE
        for steps in lengths:
            self._taped[steps] = sample.taped(steps, _SEGMENTS)


@dataclass(frozen=True)
class _Sample:
    """A run whose first step is repeated as often as one likes."""

    whole: SequenceRun

    def stored(self, steps: int) -> tuple[int, int]:
        """The peak of full storage, and the outputs' bytes."""
        whole = self._repeated(steps)
        return _peak(whole, lambda: whole.run(whole.inputs, whole.state, whole.context, whole.extent, 0))

    def taped(self, steps: int, count: int) -> int:
        """The peak of a run in so many segments."""
        whole = self._repeated(steps * count)
        return _peak(whole, lambda: run_checkpointed(whole, segments(steps * count, steps)))[0]

    def _repeated(self, steps: int) -> SequenceRun:
        """All rows go on to the end; where rows may end, engines are told so step by step, which takes more memory."""
        whole, batch, ragged = self.whole, self.whole.extent.batch, self.whole.extent.ragged

        def repeated(leaf: Tensor) -> Tensor:
            first = leaf.detach()[:batch].unsqueeze(0) if ragged else leaf.detach()[:1]
            many = first.expand(steps, *first.shape[1:]).clone()
            return (many.flatten(0, 1) if ragged else many).requires_grad_(leaf.requires_grad)

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        inputs = map_leaves(repeated, whole.inputs)
        state, context = map_leaves(leaf, whole.state), map_leaves(leaf, whole.context)
        extent = Extent(steps, batch, (batch,) * steps if ragged else None)
        return replace(whole, inputs=inputs, state=state, context=context, extent=extent, measured=True)


def _peak(whole: SequenceRun, run: Callable[[], tuple[Tree, Tree]]) -> tuple[int, int]:
    """The most bytes that a training step holds, but for outputs and gradients of outputs and inputs; the outputs'."""
    given = [x for x in (*leaves(whole.inputs), *leaves(whole.state), *leaves(whole.context)) if x.requires_grad]
    weights = [x for x in whole.module.parameters() if x.requires_grad]
    with Allocations() as noted:
        outputs, last = run()
    results = [x for x in (*leaves(outputs), *leaves(last)) if x.requires_grad]
    grads = [torch.zeros_like(x) for x in results]
    found: Sequence[Tensor | None] = ()
    if results and (given or weights):
        with noted:
            found = torch.autograd.grad(results, [*given, *weights], grads, allow_unused=True)
    apart = [x for x in found[: len(given)] if x is not None]
    shown = leaves(outputs)
    return noted.peak(without=[*shown, *apart]), sum(x.nbytes for x in shown)


def copy_sharing_tensors(network: nn.Module) -> nn.Module:
    """A copy of a network on the same tensors: what its steps leave in attributes does not reach the network itself.

    One that cannot be copied is returned as it is: then its steps are called some more times than there are.
    """
    shared = [*network.parameters(), *network.buffers()]
    shared += [x for module in network.modules() for x in vars(module).values() if isinstance(x, Tensor)]
    plans = [vars(module)["_plans"] for module in network.modules() if "_plans" in vars(module)]
    try:
        return copy.deepcopy(network, {id(x): x for x in (*shared, *plans)})
    except Exception:
        return network
