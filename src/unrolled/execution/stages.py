"""Running a partitioned step over a segment of copies, stage by stage."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping, Sequence

import torch
from torch import Tensor

from unrolled.execution.batched import Batched, Entry
from unrolled.execution.protocol import LoopInputs, LoopRunner
from unrolled.execution.timed import Summed, Timed, spread
from unrolled.lengths import Extent
from unrolled.plan.loops import LoopProgram
from unrolled.plan.partition import Counter, Held, Loop, Stage, Steps


def over_time(entry: Entry, extent: Extent, rows: int | None) -> Tensor:
    """A value over a segment as loops and callers take it; `rows` is the dimension of its rows, if it has any."""
    if isinstance(entry, Summed):
        raise TypeError("a sum over all steps has no entries of its own")
    return (entry if isinstance(entry, Timed) else spread(entry, extent, rows)).over_time()


class Stages:
    """A partitioned step that is run over a segment.

    Args:
        stages: where each operation runs.
        loops: the program of each stage that is a loop.
        state: the values of the state's leaves.
        next_state: the values that replace them; -1 for none.
        batched: runs what is outside of loops.
        runner: runs the loops.
        read: states of loops that are read outside of them.
        reverse: whether time goes from the last copy to the first.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        loops: Sequence[LoopProgram | None],
        state: Sequence[int],
        next_state: Sequence[int],
        batched: Batched,
        runner: LoopRunner,
        read: Collection[int],
        *,
        reverse: bool = False,
    ) -> None:
        self.stages, self.loops = stages, loops
        self.state, self.next_state = state, next_state
        self.batched, self.runner, self.reverse = batched, runner, reverse
        self.read = read

    def run(self, env: MutableMapping[int, Entry], initial: Sequence[Tensor]) -> list[Tensor]:
        """Run all stages.

        Args:
            env: the values of the step's inputs; every other value is added.
            initial: the state that the first copy receives (the last one, in reverse).

        Returns:
            The state that the last copy hands on (the first one, in reverse).
        """
        final: dict[int, Tensor] = {}
        for stage, loop in zip(self.stages, self.loops, strict=True):
            if isinstance(stage, Steps):
                self.batched.run(stage.ops, env)
            elif isinstance(stage, Loop) and loop is not None:
                final |= self._run_loop(stage, loop, env, initial)
            elif not isinstance(stage, Loop):
                (leaf,) = stage.leaves
                env[self.state[leaf]], final[leaf] = self._known(stage, leaf, env, initial[leaf])
        return [final[leaf] for leaf in range(len(self.state))]

    def _known(self, stage: Stage, leaf: int, env: MutableMapping[int, Entry], first: Tensor) -> tuple[Entry, Tensor]:
        """What every copy receives of a leaf that is in no loop, and what the last one hands on."""
        extent = self.batched.extent
        if isinstance(stage, Held):
            return (spread(first, extent, 0) if extent.ragged else first), first
        if isinstance(stage, Counter):
            counts, last = self._counted(first, stage.step)
            return self._timed(self.state[leaf], counts), last
        value = self.next_state[leaf]
        entry = env[value] if value >= 0 else torch.zeros_like(first)
        entries = over_time(entry, extent, 0)
        received = extent.shifted(first, entries, reverse=self.reverse)
        return self._timed(self.state[leaf], received), extent.last_of(entries, reverse=self.reverse)

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

    def _timed(self, value: int, tensor: Tensor) -> Timed:
        """A value as it came over time, folded where rows end at different times."""
        extent = self.batched.extent
        return Timed(tensor, extent, self.batched.rows.get(value) if extent.ragged else None)

    def _run_loop(
        self, stage: Loop, loop: LoopProgram, env: MutableMapping[int, Entry], initial: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        extent, rows = self.batched.extent, self.batched.rows
        request = LoopInputs(
            [over_time(env[v], extent, rows.get(v)) for v in loop.sequences],
            [env[v] for v in loop.fixed],
            [initial[leaf] for leaf in stage.leaves],
            extent,
            self.reverse,
        )
        walk = self.runner(loop, request)
        env.update({v: self._timed(v, tensor) for v, tensor in zip(loop.emitted, walk.emitted, strict=True)})
        for (_, value), total in zip(loop.totals, walk.totals, strict=True):
            env[value] = Summed(total.view(self.batched.program.values[value].sizes(extent.batch)))
        for number, leaf in enumerate(stage.leaves):
            if self.state[leaf] in self.read:
                env[self.state[leaf]] = self._timed(self.state[leaf], walk.received(number))
        return dict(zip(stage.leaves, walk.last, strict=True))
