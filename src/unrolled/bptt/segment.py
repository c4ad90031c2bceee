"""Running a coloured step over a segment of copies, stage by stage."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping, Sequence

import torch
from torch import Tensor

from unrolled.bptt.batched import Batched, Entry
from unrolled.bptt.timed import Summed, Timed, spread
from unrolled.bptt.walk import LoopRunner, shifted
from unrolled.plan.colour import Held, Loop, Shift, Stage, Steps
from unrolled.plan.loops import LoopProgram

__all__ = ["Stages", "over_time"]


def over_time(entry: Entry, steps: int) -> Tensor:
    """A value over a segment as `[T, ...]`."""
    if isinstance(entry, Summed):
        raise TypeError("a sum over all steps has no entries of its own")
    return entry.stacked() if isinstance(entry, Timed) else spread(entry, steps)


class Stages:
    """A coloured step that is run over a segment.

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
        steps = self.batched.steps
        final: dict[int, Tensor] = {}
        for stage, loop in zip(self.stages, self.loops, strict=True):
            if isinstance(stage, Steps):
                self.batched.run(stage.ops, env)
            elif isinstance(stage, Held):
                env[self.state[stage.leaf]] = final[stage.leaf] = initial[stage.leaf]
            elif isinstance(stage, Shift):
                entries = self._entries(env, stage.leaf, initial[stage.leaf])
                env[self.state[stage.leaf]] = Timed(shifted(initial[stage.leaf], entries, reverse=self.reverse), steps)
                final[stage.leaf] = entries[0 if self.reverse else -1]
            elif isinstance(stage, Loop) and loop is not None:
                final |= self._run_loop(stage, loop, env, initial)
        return [final[leaf] for leaf in range(len(self.state))]

    def _entries(self, env: MutableMapping[int, Entry], leaf: int, like: Tensor) -> Tensor:
        value = self.next_state[leaf]
        return (
            over_time(env[value], self.batched.steps)
            if value >= 0
            else spread(torch.zeros_like(like), self.batched.steps)
        )

    def _run_loop(
        self, stage: Loop, loop: LoopProgram, env: MutableMapping[int, Entry], initial: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        steps = self.batched.steps
        walk = self.runner(
            loop,
            [over_time(env[v], steps) for v in loop.sequences],
            [env[v] for v in loop.fixed],
            [initial[leaf] for leaf in stage.leaves],
            steps=steps,
            batch=self.batched.batch,
            reverse=self.reverse,
        )
        env.update({v: Timed(tensor, steps) for v, tensor in zip(loop.emitted, walk.emitted, strict=True)})
        for (_, value), total in zip(loop.totals, walk.totals, strict=True):
            env[value] = Summed(total.view(self.batched.program.values[value].sizes(self.batched.batch)))
        for number, leaf in enumerate(stage.leaves):
            if self.state[leaf] in self.read:
                env[self.state[leaf]] = Timed(walk.received(number), steps)
        return dict(zip(stage.leaves, walk.last, strict=True))
