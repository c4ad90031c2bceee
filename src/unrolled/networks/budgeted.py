"""Checkpointed BPTT of a network: a schedule that is given, or the fastest one that a memory budget has room for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.bptt.checkpointed import run_checkpointed
from unrolled.bptt.checkpointing import Budget, Checkpointing, FixedSchedule
from unrolled.bptt.costs import Costs, Meter
from unrolled.bptt.planning import Planner, format_bytes
from unrolled.bptt.schedules import Schedule
from unrolled.bptt.segments import SequenceRun
from unrolled.errors import OptionError
from unrolled.lru import LRUCache
from unrolled.networks.layout import BatchLayout
from unrolled.tracing.vmap import transformed
from unrolled.trees import Tree, TreeSpec

_MOST_METERS = 32


class Budgeted:
    """A network whose memory may be bounded.

    Attributes:
        checkpointing: the budget or the schedule; None for full storage.
    """

    checkpointing: Checkpointing | None = None
    batch_first: bool

    @property
    def memory(self) -> int | float | str | None:
        """The memory budget, as it was given."""
        return self.checkpointing.given if isinstance(self.checkpointing, Budget) else None

    @property
    def checkpoint(self) -> Schedule | Callable[[int], Schedule] | None:
        """The schedule, as it was given."""
        return self.checkpointing.given if isinstance(self.checkpointing, FixedSchedule) else None

    def runs(
        self, given: BatchLayout, steps: Tree, state: Tree, resets: Tensor | None, context: Tree
    ) -> tuple[SequenceRun, Callable[[], SequenceRun]]:
        """A run that could be made, and the same on a copy of the network."""
        raise NotImplementedError

    def run_whole(self, whole: SequenceRun, again: Callable[[], SequenceRun]) -> tuple[Tree, Tree]:
        """Run a sequence, by a schedule if memory is bounded.

        Args:
            whole: the run.
            again: makes the same run on a copy of the network, to measure on.

        Raises:
            OptionError: for a budget that is too small, or inside of a transform of torch.func.
        """
        within = "" if self.checkpointing is None else transformed(whole.tensors)
        if within:
            raise OptionError(
                f"checkpoints are not offered inside of {within}; leave memory= and checkpoint= "
                "out, or differentiate with backward()"
            )
        schedule = None if self.checkpointing is None else self.schedule(self.checkpointing, whole, again)
        if schedule is None or schedule.segments == 1:
            return whole.at_once()
        return run_checkpointed(whole, schedule)

    def schedule_told(self, whole: SequenceRun, again: Callable[[], SequenceRun]) -> str:
        """What a run goes by, in a sentence: bytes promised, extra steps, the time expected; '' without a budget."""
        if self.checkpointing is None:
            return ""
        found = self.schedule(self.checkpointing, whole, again)
        told = Planner(self.costs(whole, again, found.length), whole.extent).option(found)
        return (
            f"checkpoints by {told.name}: {format_bytes(told.bytes)} promised, {found.extra_advances:,} steps run once "
            f"more, {told.ratio:.2f} times the time of full storage expected"
        )

    def costs(self, whole: SequenceRun, again: Callable[[], SequenceRun], length: int) -> Costs:
        """What a run takes in memory, measured up to so many steps of a segment; kept for the next such call."""
        meters: LRUCache[Meter] = self.__dict__.setdefault("_meters", LRUCache(_MOST_METERS))
        networks = self.modules() if isinstance(self, nn.Module) else ()
        engines = tuple(getattr(network, "engine", None) for network in networks)
        return meters.get(lambda: (engines, _kind(whole)), Meter).costs(again, length)

    def schedule(self, checkpointing: Checkpointing, whole: SequenceRun, again: Callable[[], SequenceRun]) -> Schedule:
        """The schedule that a run goes by; takes what `run_whole` does."""
        return checkpointing.schedule(whole.extent, lambda length: self.costs(whole, again, length))


def _kind(whole: SequenceRun) -> tuple[Any, ...]:
    """All that memory depends on, but for the steps."""
    modules: nn.Module = whole.module
    return (
        *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")),
        whole.extent.batch,
        whole.reverse,
        TreeSpec.of(whole.inputs, 2 - whole.extent.ragged, requires_grad=True),
        *(TreeSpec.of(tree, requires_grad=True) for tree in (whole.state, whole.context)),
        tuple(module.training for module in modules.modules()),
        tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in modules.parameters()),
    )
