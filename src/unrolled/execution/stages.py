"""Running a partitioned step over a segment of copies, stage by stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unrolled.execution.batched import BatchedOps
from unrolled.execution.draws import draw
from unrolled.execution.protocol import LoopInputs, LoopRunner
from unrolled.execution.series import Entry, TimeSeries, Total
from unrolled.plan.loops import LoopProgram
from unrolled.plan.partition import Counter, Draws, Held, Loop, Stage, Steps


class SegmentStages(NamedTuple):
    """A partitioned step that is run over a segment.

    Attributes:
        stages: where each operation runs.
        loops: the program of each loop among them.
        state: the values of the state's leaves.
        next_state: the values that replace them; -1 for none.
        batched: runs what is outside of loops.
        runner: runs the loops.
        read: states of loops that are read outside of them.
        reverse: whether time goes from the last copy to the first.
        last_owned: whether what is returned has memory of its own; not where nobody reads it.
    """

    stages: Sequence[Stage]
    loops: Mapping[Loop, LoopProgram]
    state: Sequence[int]
    next_state: Sequence[int]
    batched: BatchedOps
    runner: LoopRunner
    read: Collection[int]
    reverse: bool
    last_owned: bool = True

    def run(self, env: MutableMapping[int, Entry], initial: Sequence[Tensor]) -> list[Tensor]:
        """Run all stages.

        Args:
            env: the values of the step's inputs; every other value is added.
            initial: the state that the first copy receives (the last one, in reverse).

        Returns:
            The state that the last copy passes on (the first one, in reverse).
        """
        final: dict[int, Tensor] = {}
        for stage in self.stages:
            if isinstance(stage, Steps):
                self.batched.run(stage.ops, env)
            elif isinstance(stage, Draws):
                draw(self.batched, stage.ops, env, reverse=self.reverse)
            elif isinstance(stage, Loop):
                final |= self._run_loop(stage, self.loops[stage], env, initial)
            else:
                (leaf,) = stage.leaves
                env[self.state[leaf]], final[leaf] = self._outside_loops(stage, leaf, env, initial[leaf])
        return [final[leaf] for leaf in range(len(self.state))]

    def _outside_loops(
        self, stage: Stage, leaf: int, env: MutableMapping[int, Entry], first: Tensor
    ) -> tuple[Entry, Tensor]:
        """What every copy receives of a leaf that is in no loop, and what the last one passes on."""
        extent = self.batched.extent
        if isinstance(stage, Held):
            return (TimeSeries.constant(first, extent, 0) if extent.ragged else first), first
        if isinstance(stage, Counter):
            counts, last = self._counted(first, stage.step)
            return self.batched.series(self.state[leaf], counts), last
        value = self.next_state[leaf]
        entry = env[value] if value >= 0 else torch.zeros_like(first)
        entries = self.batched.over_time(entry, 0)
        received = extent.shifted(first, entries, reverse=self.reverse)
        return self.batched.series(self.state[leaf], received), extent.last_of(entries, reverse=self.reverse)

    def _counted(self, first: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What each copy receives of a counter to which every copy adds `step`, and what the last one passes on."""
        extent, shape = self.batched.extent, (-1, *(1,) * first.dim())
        if extent.ragged:
            lengths = extent.lengths.to(first.device)
            done = extent.time_of.to(first.device)
            rows = extent.row_of.to(first.device)
            done = lengths[rows] - 1 - done if self.reverse else done
            counts = first[rows] + (done * step).to(first.dtype).view(shape[: first.dim()])
            return counts, first + (lengths * step).to(first.dtype).view(shape[: first.dim()])
        steps = torch.arange(extent.steps + 1, device=first.device) * step
        counts = first + steps.to(first.dtype).view(shape)
        return (counts[:-1].flip(0) if self.reverse else counts[:-1]), counts[-1]

    def _run_loop(
        self, stage: Loop, loop: LoopProgram, env: MutableMapping[int, Entry], initial: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        batched, extent = self.batched, self.batched.extent
        sequences = [batched.over_time(env[v], batched.rows.get(v)) for v in loop.sequences]
        states = [initial[leaf] for leaf in stage.leaves]
        fixed = [env[v] for v in loop.fixed]
        result = self.runner(loop, LoopInputs(sequences, fixed, states, extent, self.reverse, self.last_owned))
        env.update({v: self.batched.series(v, tensor) for v, tensor in zip(loop.emitted, result.emitted, strict=True)})
        for (_, value), total in zip(loop.totals, result.totals, strict=True):
            env[value] = Total(total.view(batched.program.values[value].sizes(extent.batch)))
        for number, leaf in enumerate(stage.leaves):
            if self.state[leaf] in self.read:
                env[self.state[leaf]] = self.batched.series(self.state[leaf], result.received(number))
        return dict(zip(stage.leaves, result.last, strict=True))
