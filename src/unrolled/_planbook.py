"""The plan book: which plan holds for a call. Plans are made on first use, checked, and kept under their guards."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unrolled import sequence
from unrolled._kept import Kept
from unrolled.bptt.run import run_plan
from unrolled.bptt.walk import LoopRunner
from unrolled.cells.contract import CheckedStep
from unrolled.engine import reference
from unrolled.engine.choice import Runner
from unrolled.lengths import Extent
from unrolled.plan.coupling import couples_rows
from unrolled.plan.guards import fingerprint
from unrolled.plan.loops import LoopProgram
from unrolled.plan.plan import StepPlan, plan_step
from unrolled.plan.refusals import why_not_recorded
from unrolled.plan.tape import UnrecordableError
from unrolled.plan.twin import observe, scratch_of, twin_of
from unrolled.plan.watch import watcher_of
from unrolled.trees import Tree, flatten, leaves, map_leaves
from unrolled.unseen import unseen

__all__ = ["Decision", "PlanBook"]

_MOST_PLANS = 128


@dataclass(frozen=True)
class Decision:
    """A plan, or none; the engine that is taken, and why no faster one."""

    plan: StepPlan | None
    engine: str
    why: str


class PlanBook:
    """The plans of one unrolled network.

    Args:
        engine: 'auto', 'reference', 'eager' or 'native'.
        quiet: whether the plan alone says that another engine runs than the one that was asked for by name.
    """

    def __init__(self, engine: str, *, quiet: bool = False) -> None:
        self.engine, self.quiet = engine, quiet
        self.runner = Runner(use_native=engine in ("auto", "native"))
        self._entries: Kept[Decision] = Kept(_MOST_PLANS)
        self._coupling: Kept[bool] = Kept(_MOST_PLANS)
        self._said: set[Decision] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled network makes its plans anew."""
        return {
            "engine": self.engine,
            "quiet": self.quiet,
            "runner": Runner(self.runner.use_native),
            "_entries": Kept(_MOST_PLANS),
            "_coupling": Kept(_MOST_PLANS),
            "_said": set(),
        }

    def couples(self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, extent: Extent) -> bool:
        """Whether a row's results depend on other rows; the step is tried once for each kind of call.

        Args:
            cell: the cell.
            inputs: `[T, B, ...]`; `[N, ...]` where rows end at different times.
            state: what copy 0 receives.
            context: what is the same at every step, or None.
            extent: how far the inputs reach.
        """
        sample = map_leaves(lambda x: x[0], _first_steps(inputs, extent))

        def key() -> Any:
            return (fingerprint(cell), _shapes(sample, 1), _shapes(state, 1), _shapes(context, 1), extent.batch)

        try:
            return self._coupling.get(key, lambda: _tried(cell, sample, state, context))
        except UnrecordableError:
            return _tried(cell, sample, state, context)

    def look_up(
        self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, extent: Extent | None = None
    ) -> Decision:
        """The plan for a call, made now if there is none yet.

        Args:
            cell: the cell.
            inputs: `[T, B, ...]`; `[N, ...]` where rows end at different times.
            state: what copy 0 receives.
            context: what is the same at every step, or None.
            extent: how far the inputs reach; None for T and B of their own.
        """
        decision = self._decision(cell, inputs, state, context, extent or Extent(*leaves(inputs)[0].shape[:2]))
        if extent is not None and extent.ragged and decision.plan is not None and decision.plan.why_not_ragged:
            why = f"rows of different lengths need steps that act row by row: {decision.plan.why_not_ragged}"
            decision = self._told_once(Decision(None, "reference", why))
        return decision

    def _decision(self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, extent: Extent) -> Decision:
        given = [*leaves(inputs), *leaves(state), *(leaves(context) if context is not None else [])]
        why = why_not_recorded([*given, *_held(cell)])
        if why is not None:
            return Decision(None, "reference", why)
        needing = _needing(inputs, context)
        kind = (_shapes(inputs, 2 - extent.ragged), _shapes(state, 1), _shapes(context, 1), needing)

        def key() -> Any:
            # A step may do something else for some batch sizes, which a recording at two others does not show.
            return (fingerprint(cell), kind, extent.batch)

        try:
            return self._entries.get(
                key,
                lambda: self._decide(cell, _first_steps(inputs, extent), state, context, needing),
                holds=lambda decision: _still_fits(decision.plan, cell),
            )
        except UnrecordableError as error:
            return Decision(None, "reference", str(error))

    def _decide(self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, needing: tuple[bool, ...]) -> Decision:
        try:
            with unseen():
                inputs, state, context = (map_leaves(Tensor.clone, tree) for tree in (inputs, state, context))
                observe(cell, map_leaves(lambda x: x[0], inputs), state, context)
                with watcher_of(cell).kept():
                    plan, slower = self._planned(cell, inputs, state, context, needing)
                    _compare(plan, cell, inputs, state, context, self.runner, needing)
        except UnrecordableError as error:
            return self._told(Decision(None, "reference", str(error)))
        except Exception as error:  # a cell that fails is told by the reference, which names the copy
            return self._told(Decision(None, "reference", f"planning it raised {type(error).__name__}: {error}"))
        if slower:
            return self._told(Decision(plan, "eager", "; ".join(slower)))
        return Decision(plan, "native", "every loop is emitted as C")

    def _planned(
        self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, needing: tuple[bool, ...]
    ) -> tuple[StepPlan, list[str]]:
        """A plan, and why not all of its loops run natively; fused if that is what all of them do."""
        device = sequence.device_of(inputs)
        if not self.runner.why_not_native((), device):
            plan = self._recorded(cell, inputs, state, context, needing, fuse=True)
            if not self.runner.why_not_native(_loops_of(plan), device):
                return plan, []
        plan = self._recorded(cell, inputs, state, context, needing, fuse=False)
        return plan, self.runner.why_not_native(_loops_of(plan), device)

    def _recorded(
        self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, needing: tuple[bool, ...], *, fuse: bool
    ) -> StepPlan:
        """Record on a twin; twice if the step writes attributes: only if that changes nothing are they scratch."""
        first, batch, twin = map_leaves(lambda x: x[0], inputs), sequence.sizes(inputs)[1], twin_of(cell)
        plan = plan_step(twin, first, state, context, batch, needing, fuse=fuse)
        scratch = scratch_of(cell, twin)
        if scratch:
            again = plan_step(twin, first, state, context, batch, needing, fuse=fuse)
            scratch_of(cell, twin)
            read = {external.attribute for external in plan.recording.externals}
            if again.recording != plan.recording or read.intersection(scratch):
                raise UnrecordableError(f"its step reads {scratch[0]}, which the step before it left")
        return plan

    def _told(self, decision: Decision) -> Decision:
        """Say it where another engine runs than the one that was asked for by name, and where there is no compiler."""
        if self.engine == "auto" and self.runner.no_compiler and not self.quiet:
            _say_once(f"unrolled runs loops with torch operations, which is slower: {self.runner.no_compiler}")
        if not self.quiet and self.engine not in ("auto", decision.engine):
            warnings.warn(
                f"engine={self.engine!r} was asked for, but this cell runs on {decision.engine!r}: {decision.why}",
                stacklevel=2,
            )
        return decision

    def _told_once(self, decision: Decision) -> Decision:
        """Say it for a decision that is made anew at every call."""
        known, self._said = decision in self._said, {*self._said, decision}
        return decision if known else self._told(decision)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _still_fits(plan: StepPlan | None, cell: nn.Module) -> bool:
    """Whether the tensors that a plan reads out of the cell are of the kind that was recorded."""
    if plan is None:
        return True
    recording = plan.recording
    values = recording.fixed[len(recording.fixed) - len(recording.externals) :]
    return all(
        (known := recording.program.values[value]).dtype == (tensor := external.fetch(cell)).dtype
        and known.shape == tuple(tensor.shape)
        and (value in plan.asked) == tensor.requires_grad
        for value, external in zip(values, recording.externals, strict=True)
    )


def _loops_of(plan: StepPlan) -> list[LoopProgram]:
    """All loops that a plan may run: forward, with nothing kept, and backward."""
    forward = [loop for planned in plan.planned.values() for loop in (planned.loop, planned.inference)]
    backward = [loop for planned in plan.planned.values() for loop in planned.backward.loops if loop is not None]
    return forward + backward


def _held(cell: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers; torch's own way also makes their names, which takes longer than all that is asked."""
    for module in cell.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def _needing(inputs: Tree, context: Tree) -> tuple[bool, ...]:
    """For each leaf of inputs and context whether it requires a gradient."""
    return tuple([leaf.requires_grad for tree in (inputs, context) for leaf in leaves(tree)])


def _shapes(tree: Tree, leading: int) -> Any:
    """What of a tree a program depends on: all but T and B."""
    if tree is None:
        return None
    tensors, structure = flatten(tree)
    return structure, tuple([(t.shape[leading:] if t.dim() else None, t.dtype, t.device) for t in tensors])


def _tried(cell: nn.Module, input: Tree, state: Tree, context: Tree) -> bool:
    """Whether a step couples rows, found on a copy of the cell; one that cannot be copied is not touched."""
    with unseen():
        try:
            twin = twin_of(cell)
        except UnrecordableError:
            return False
        with contextlib.suppress(UnrecordableError):
            observe(cell, input, state, context)
        return couples_rows(twin, input, state, context, watcher_of(cell).snapshot())


def _first_steps(inputs: Tree, extent: Extent) -> Tree:
    """The first two steps of all rows as `[2, B, ...]`; the first one alone where the second has fewer rows."""
    return map_leaves(lambda x: x[: extent.batch].unsqueeze(0) if extent.ragged else x[:2], inputs)


def _compare(
    plan: StepPlan,
    cell: nn.Module,
    inputs: Tree,
    state: Tree,
    context: Tree,
    runner: LoopRunner,
    needing: Sequence[bool],
) -> None:
    """Two real steps, values and gradients, by the plan and by the cell itself."""
    twin = twin_of(cell)
    with torch.enable_grad():
        needed = iter(needing)
        sample = map_leaves(lambda x: _leaf(x[:2] if len(x) > 1 else torch.cat([x, x]), next(needed)), inputs)
        start = map_leaves(_leaf, state)
        extent = Extent(2, sequence.sizes(sample)[1])
        planned = _tensors(run_plan(plan, twin, sample, start, context, runner, extent), twin, sample, start)
        truth = _tensors(reference.run(CheckedStep(twin, context), sample, start, extent), twin, sample, start)
    with torch.no_grad():
        inferred = run_plan(plan, twin, sample, start, context, runner, extent)
    planned += [*leaves(inferred[0]), *leaves(inferred[1])]
    truth += truth[: len(leaves(inferred[0])) + len(leaves(inferred[1]))]
    scratch_of(cell, twin)
    scale = max([_largest(tensor) for tensor in truth], default=0.0)
    for ours, theirs in zip(planned, truth, strict=True):
        if not _close(ours, theirs, scale):
            raise UnrecordableError("its recording does not give the numbers of the cell itself")


def _leaf(tensor: Tensor, needed: bool = True) -> Tensor:
    copy = tensor.detach().clone()
    return copy.requires_grad_() if needed and copy.is_floating_point() else copy


def _tensors(result: tuple[Tree, Tree], cell: nn.Module, inputs: Tree, state: Tree) -> list[Tensor | None]:
    """Outputs, states and the gradients of a fixed mixture of them."""
    found = [*leaves(result[0]), *leaves(result[1])]
    losses = [
        (t * torch.linspace(0.5, 1.5, t.numel(), device=t.device).view(t.shape).to(t.dtype)).sum()
        for t in found
        if t.requires_grad
    ]
    by = [t for t in (*leaves(inputs), *leaves(state), *cell.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(sum(losses), by, allow_unused=True) if losses else [None] * len(by)
    return [*found, *grads]


def _largest(tensor: Tensor | None) -> float:
    if tensor is None or not tensor.numel() or not tensor.is_floating_point():
        return 0.0
    return float(tensor.detach().abs().nan_to_num().max())


def _close(ours: Tensor | None, theirs: Tensor | None, scale: float) -> bool:
    """Equal up to rounding, that of the largest numbers included: a fault of recording is far larger."""
    if ours is None or theirs is None:
        other = theirs if ours is None else ours
        return other is None or not other.any()
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    eps = torch.finfo(ours.dtype).eps
    bound = eps**0.5 * _largest(theirs) + 100 * eps * scale
    return torch.allclose(ours, theirs, rtol=0.0, atol=bound, equal_nan=True)
