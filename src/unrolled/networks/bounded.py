"""Networks whose gradients flow back through a bounded number of copies, or whose memory is bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.bptt.checkpointed import run_checkpointed
from unrolled.bptt.checkpointing import Budget, FixedSchedule, checkpointing_of
from unrolled.bptt.costs import Costs, Meter
from unrolled.bptt.memory_plan import MemoryPlan
from unrolled.bptt.planning import Planner, format_bytes
from unrolled.bptt.schedules import Schedule, store_all
from unrolled.bptt.segments import SequenceRun
from unrolled.bptt.truncated import run_by_blocks
from unrolled.bptt.truncation import truncation_of
from unrolled.errors import InputError, OptionError
from unrolled.lengths import Lengths
from unrolled.lru import LRUCache
from unrolled.networks.base import Network
from unrolled.networks.layout import Call
from unrolled.networks.windows import Window, iterate_windows
from unrolled.tracing.vmap import active_transform
from unrolled.trees import Tree, TreeSpec, leaves
from unrolled.unseen import OwnDraws


class BoundedNetwork(Network):
    """A network that takes a horizon or a memory budget; what the options are is said in `unroll`."""

    def __init__(
        self,
        *,
        batch_first: bool = False,
        horizon: int | None = None,
        stride: int | None = None,
        memory: int | float | str | None = None,
        checkpoint: Schedule | Callable[[int], Schedule] | None = None,
    ) -> None:
        super().__init__(batch_first=batch_first)
        self.truncation = truncation_of(horizon, stride)
        self.checkpointing = checkpointing_of(memory, checkpoint, horizon)
        self._meters: LRUCache[Meter] = LRUCache(32)

    @property
    def horizon(self) -> int | None:
        """How many copies gradients flow back through; None for all of them."""
        return self.truncation.horizon if self.truncation else None

    @property
    def stride(self) -> int | None:
        """How many steps have their losses taken together; None for all of them."""
        return self.truncation.stride if self.truncation else None

    @property
    def memory(self) -> int | float | str | None:
        """The memory budget, as the constructor received it."""
        return self.checkpointing.given if isinstance(self.checkpointing, Budget) else None

    @property
    def checkpoint(self) -> Schedule | Callable[[int], Schedule] | None:
        """The schedule, as the constructor received it."""
        return self.checkpointing.given if isinstance(self.checkpointing, FixedSchedule) else None

    def windows(
        self,
        source: Iterable[Tree],
        state: Tree = None,
        *,
        lengths: Lengths = None,
        resets: Iterable[Tensor] | None = None,
        context: Tree = None,
    ) -> Iterator[Window]:
        """Truncated BPTT over a sequence that is longer than memory, with updates of the weights between windows.

        Each window has `stride` new steps (the last one may have fewer) and goes back through `horizon` copies: the
        horizon - stride copies before its new steps are run again, with the current weights, from the state that the
        window before had there. One window is held at a time. Inputs of the overlap are kept as numbers: what made them
        gets its gradients from the window in which they were new, and needs chunks of `stride` steps for that.

        Args:
            source: an iterable of chunks, pytrees of `[t, B, ...]` (`[B, t, ...]` with `batch_first`), t as you like.
            state: what each row's first copy receives: numbers, or leaves of a graph; by default the cell's own.
            lengths: how many steps each row has in all chunks together, integers `[B]`.
            resets: an iterable of its own, for each chunk a bool `[t, B]` (`[B, t]`): rows that start afresh.
                It is no part of the chunks, because a chunk is whatever tree the cell reads.
            context: what a cell with a third argument receives at every step: numbers, or leaves of a graph.

        Yields:
            A `Window`. Where its `backward` is not called (as in evaluation) the next one begins all the same.

        Raises:
            OptionError: for a network without a horizon.
            InputError: for a reversed network, for chunks that differ in B, structure or dtype, naming the chunk, and
                for a context that is neither numbers nor a leaf.
            StateError: for a state that is neither.

        Example:
            >>> import torch, unrolled as ur
            >>> rnn = ur.unroll(ur.GRUCell(3, 4), horizon=6, stride=3)
            >>> for window in rnn.windows(torch.randn(5, 2, 3) for _ in range(2)):
            ...     window.backward(window.outputs.pow(2).mean())
            ...     print(window.start, window.stop)
            0 3
            3 6
            6 9
            9 10
        """
        return iterate_windows(self, self._run, source, state, lengths=lengths, resets=resets, context=context)

    def _refuse_parts(self, what: str) -> None:
        """Refuse parts that cannot be cut at one place, for a horizon or for a memory budget."""

    def _runs(self, call: Call, first: Tree) -> tuple[SequenceRun, Callable[[], SequenceRun]]:
        """The run that a call comes to, and what makes the same run on a copy of the network, to measure on.

        Args:
            call: the call.
            first: the state that each row's first copy receives, with the caller's rows.
        """
        raise NotImplementedError

    def _run_from(self, call: Call, first: Tree) -> tuple[Tree, Tree]:
        """Run a call within its bounds, from a state on; see `_run`."""
        outputs, last = self._run_bounded(*self._runs(call, first))
        return outputs, call.layout.last(last, first)

    def _run_bounded(self, run: SequenceRun, again: Callable[[], SequenceRun]) -> tuple[Tree, Tree]:
        """Run a sequence: block by block with a horizon, by a schedule where memory is bounded.

        Raises:
            OptionError: for a budget that is too small, or inside of a transform of torch.func.
        """
        cut = self.truncation
        if cut is not None and run.extent.steps > cut.horizon and torch.is_grad_enabled():
            within = active_transform(run.tensors) if cut.stride < cut.horizon else ""
            if within:
                raise OptionError(
                    f"stride < horizon is not offered inside of {within}; take stride = horizon, or "
                    "differentiate with backward()"
                )
            return run_by_blocks(cut, run)
        if self.checkpointing is not None:
            within = active_transform(run.tensors)
            if within:
                raise OptionError(
                    f"checkpoints are not offered inside of {within}; leave memory= and checkpoint= "
                    "out, or differentiate with backward()"
                )
            schedule = self._schedule(run, again)
            if schedule.segments > 1:
                return run_checkpointed(run, schedule)
        return run.at_once()

    def _schedule(self, run: SequenceRun, again: Callable[[], SequenceRun]) -> Schedule:
        """The schedule that a run goes by."""
        if self.checkpointing is None:
            return store_all(run.extent.steps)
        return self.checkpointing.schedule(run.extent, lambda length: self._costs(run, again, length))

    def _costs(self, run: SequenceRun, again: Callable[[], SequenceRun], length: int) -> Costs:
        """What a run takes in memory, measured up to so many steps of a segment; kept for the next such call."""
        engines = tuple(getattr(network, "engine", None) for network in self.modules())
        return self._meters.get(lambda: (engines, run.engine, _kind(run)), Meter).costs(again, length)

    def _schedule_message(self, call: Call) -> str:
        """What a call goes by, in a sentence: bytes promised, extra steps, the time expected; '' without a budget.

        Args:
            call: the call, with the state that first copies receive.
        """
        if self.checkpointing is None:
            return ""
        run, again = self._runs(call, call.state)
        schedule = self._schedule(run, again)
        chosen = Planner(self._costs(run, again, schedule.length), run.extent).option(schedule)
        return (
            f"checkpoints by {chosen.name}: {format_bytes(chosen.bytes)} promised, {schedule.extra_advances:,} steps "
            f"run once more, {chosen.ratio:.2f} times the time of full storage expected"
        )


def _kind(run: SequenceRun) -> tuple[Any, ...]:
    """All that memory depends on, but for the steps."""
    modules: nn.Module = run.module
    return (
        *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")),
        run.extent.batch,
        run.reverse,
        TreeSpec.of(run.inputs, 2 - run.extent.ragged, requires_grad=True),
        *(TreeSpec.of(tree, requires_grad=True) for tree in (run.state, run.context)),
        tuple(module.training for module in modules.modules()),
        tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in modules.parameters()),
    )


def plan_memory(
    rnn: nn.Module,
    inputs: Tree,
    state: Tree = None,
    *,
    lengths: Lengths = None,
    resets: Tensor | None = None,
    context: Tree = None,
) -> MemoryPlan:
    """What each schedule takes in memory and time for a call with these arguments.

    Memory is measured on a copy of the network over a few steps; the whole sequence is not run.

    Args:
        rnn: what `unroll` or `stack` made, with a memory budget or without.
        inputs: as the call takes them.
        state: as the call takes it.
        lengths: as the call takes them.
        resets: as the call takes them.
        context: as the call takes it.

    Raises:
        OptionError: for another network, or a budget that is too small.
        InputError: as the call itself does.

    Example:
        >>> import torch, unrolled as ur
        >>> plan = ur.plan_memory(ur.unroll(ur.GRUCell(3, 4), memory=0.2), torch.randn(400, 2, 3))
        >>> plan.chosen.bytes < 0.2 * plan.options[0].bytes, plan.options[0].name
        (True, 'store_all')
    """
    if not isinstance(rnn, BoundedNetwork):
        raise OptionError(f"plan_memory plans what ur.unroll and ur.stack make, got {type(rnn).__name__}")
    rnn._refuse_parts("memory budget")
    call = Call.of(inputs, state, lengths=lengths, resets=resets, context=context, batch_first=rnn.batch_first)
    if not call.extent.rows:
        raise InputError(
            "plan_memory needs a row with at least one step, got lengths that are all 0; pass a longer row"
        )
    with OwnDraws():
        run, again = rnn._runs(call, rnn._first_state(call))
        schedule = rnn._schedule(run, again)
        costs = rnn._costs(run, again, 1 if rnn.checkpointing is None else schedule.length)
    extent, planner = run.extent, Planner(costs, run.extent)
    mine = planner.option(schedule)
    outputs = round(costs.outputs * extent.rows / extent.batch)
    options = tuple(sorted({*planner.frontier(), mine}, key=lambda o: (-o.bytes, o.ratio)))
    inputs_bytes = sum(leaf.nbytes for leaf in leaves(run.inputs))
    return MemoryPlan(rnn._get_name(), extent.steps, extent.batch, options, mine, inputs_bytes, outputs)
