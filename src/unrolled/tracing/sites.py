"""Sites: places in a traced program where a network is run, with what the trace must know of it beforehand.

Whoever traces (a compiler, an export, a `vmap`) has tensors without numbers. A site is made on real ones of the same
kind, by the plan cache as for any call; so a site knows the plan, and with it the shapes of all results.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unrolled.cells.contract import CheckedStep, name_of
from unrolled.engine import reference
from unrolled.engine.plan_cache import PlanCache
from unrolled.errors import CellError, OptionError
from unrolled.execution.run import run_plan
from unrolled.lengths import Extent
from unrolled.lru import LRUCache
from unrolled.plan.plan import StepPlan
from unrolled.recording.guards.fingerprint import fingerprint
from unrolled.recording.program import Size
from unrolled.tracing.samples import CallSpec, call_with_tensors, in_new_thread, tensors_in, with_numbers
from unrolled.trees import Structure, Tree, leaves, map_leaves, unflatten


@dataclass(frozen=True, eq=False)
class Site:
    """A place where a network is run by the operator.

    The operator's tensors are the leaves of inputs, state and context, and then the cell's parameters and buffers.

    Attributes:
        number: what the operator knows it by.
        network: the plan cache and the cell, held weakly.
        plan: how it was recorded.
        spec: what the call passes.
        batch: the B that it was made with.
    """

    _by_number: ClassVar[weakref.WeakValueDictionary[int, Site]] = weakref.WeakValueDictionary()
    _by_plans: ClassVar[weakref.WeakKeyDictionary[PlanCache, LRUCache[Site]]] = weakref.WeakKeyDictionary()
    _numbers: ClassVar[Iterator[int]] = itertools.count(1)

    number: int
    network: tuple[weakref.ref[PlanCache], weakref.ref[nn.Module]]
    plan: StepPlan
    spec: CallSpec
    batch: int
    _reached: dict[tuple[bool, ...], Any] = field(default_factory=dict)

    @classmethod
    def at(cls, number: int) -> Site:
        """The site of a number.

        Raises:
            OptionError: if it is of another process, or its network is gone.
        """
        try:
            return cls._by_number[number]
        except KeyError:
            raise OptionError(
                f"a traced program runs the unrolled network that it was traced with, in the same process, and there "
                f"is none of number {number}; keep the network as long as the program, and export it anew elsewhere"
            ) from None

    @classmethod
    def of(cls, plans: PlanCache, cell: nn.Module, spec: CallSpec, batch: int = 4) -> Site | None:
        """The site for a call; None where the call has no plan, or is refused: it is then left as it is.

        Args:
            plans: the network's plan cache.
            cell: its cell.
            spec: what the call passes.
            batch: B, if it is known.
        """
        try:
            # None is let go while the network is there: a traced program may run it.
            known = cls._by_plans.setdefault(plans, LRUCache(sys.maxsize))
            return known.get(
                lambda: (fingerprint(cell), weakref.ref(cell), spec, batch),
                lambda: in_new_thread(lambda: cls._make(plans, cell, spec, batch)),
            )
        except Exception:  # the call itself says it, with the numbers that it was given
            return None

    @classmethod
    def _make(cls, plans: PlanCache, cell: nn.Module, spec: CallSpec, batch: int) -> Site:
        tensors = [with_numbers(tensor).requires_grad_(tensor.requires_grad) for tensor in tensors_in(cell)]
        plan = call_with_tensors(cell, tensors, lambda: plans.look_up(cell, *spec.sample(cell, batch)).plan)
        if plan is None or plan.draws:  # a trace keeps the generators of random numbers to itself
            raise OptionError("no plan")
        if plan.recording.asked:
            plans.drop(plan)  # its answers are those of made-up numbers
            raise OptionError("a step that asks for its numbers, of which a trace has none")
        site = cls(next(cls._numbers), (weakref.ref(plans), weakref.ref(cell)), plan, spec, batch)
        call_with_tensors(cell, tensors, lambda: site._refuse_other_tensors(cell, tensors))
        cls._by_number[site.number] = site
        return site

    @property
    def structures(self) -> tuple[Structure, Structure]:
        """Of the outputs and of the state."""
        return self.plan.recording.structures[3], self.plan.recording.structures[1]

    @property
    def outputs(self) -> int:
        """How many leaves the outputs have."""
        return len(self.plan.recording.outputs)

    @property
    def arguments(self) -> int:
        """How many of the tensors are leaves of inputs, state and context."""
        return sum(self.plan.recording.counts)

    @property
    def folds(self) -> bool:
        """Whether all that goes in and comes out has rows, and no operation couples them."""
        program, counts = self.plan.reals.program, self.plan.reals.counts
        values = program.values
        ends = (*program.inputs[: sum(counts)], *program.outputs)
        rows = all(self.plan.rows.get(v) == 0 and values[v].shape[:1] == (Size(1, 0),) for v in ends)
        return rows and not self.plan.coupled

    def shapes(self, T: int, B: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the leaves of the outputs and of the last state; T and B may be symbols."""
        recording = self.plan.recording
        values = recording.program.values
        found = [((T, *values[v].sizes(B)), values[v].dtype) for v in recording.outputs]
        return found + [(values[v].sizes(B), values[v].dtype) for v in recording.next_state]

    def run(self, tensors: Sequence[Tensor], *, by_reference: bool = False) -> list[Tensor]:
        """The network as it is now, with these tensors in place of the cell's own: outputs' and last state's leaves.

        Raises:
            OptionError: if the network is gone.
            CellError: if its results are no longer those that the surrounding program was traced with.
        """
        plans, cell = self.alive()
        inputs, state, context = self.trees(tensors)
        extent = Extent(*leaves(inputs)[0].shape[:2])

        def call() -> tuple[Tree, Tree]:
            plan = None if by_reference else plans.look_up(cell, inputs, state, context).plan
            if plan is None or plan.recording.asked:  # what it asks may be answered otherwise
                outputs, last = reference.run(CheckedStep(cell, context), inputs, state, extent)
                return map_leaves(torch.clone, outputs), map_leaves(torch.clone, last)
            self._refuse_other_tensors(cell, tensors)
            return run_plan(plan, cell, inputs, state, context, plans.runner, extent)

        results = leaves(call_with_tensors(cell, tensors[self.arguments :], call))
        if not by_reference and [(tuple(x.shape), x.dtype) for x in results] != self.shapes(extent.steps, extent.batch):
            raise self.outdated("other shapes of its results")
        return results

    def alive(self) -> tuple[PlanCache, nn.Module]:
        """The plan cache and the cell."""
        plans, cell = (found() for found in self.network)
        if plans is None or cell is None:
            raise OptionError(
                "a traced program runs the unrolled network that it was traced with, and that one is gone; "
                "keep the network as long as the program"
            )
        return plans, cell

    def _refuse_other_tensors(self, cell: nn.Module, tensors: Sequence[Tensor]) -> None:
        """Refuse a cell that reads a tensor which needs a gradient and is not among the operator's tensors."""
        known = {id(tensor) for tensor in tensors}
        for external in self.plan.recording.externals:
            tensor = external.fetch(cell)
            if tensor.requires_grad and id(tensor) not in known:
                raise CellError(
                    f"a traced program gives gradients to parameters only, but {external.name} of {name_of(cell)} is "
                    "a plain tensor that needs one; make it an nn.Parameter"
                )

    def run_with_graph(
        self, tensors: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[tuple[list[Tensor], list[Any]], list[Tensor]]:
        """Run and keep the graph: the tensors that stand in for those passed, the results' edges, and the results.

        Args:
            tensors: the operator's tensors.
            wanted: for each whether its gradient is wanted.

        Raises:
            CellError: if other results have gradients than the surrounding program was traced with.
        """
        own = {tensor.data_ptr() for tensor in tensors_in(self.alive()[1])}
        with torch.inference_mode(False), torch.enable_grad():
            # A compiler writes over what it no longer needs itself; the cell's own weights are not its to write to.
            inputs = [t.detach() if t.data_ptr() in own else t.detach().clone() for t in tensors]
            inputs = [t.requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
            results = self.run(inputs)
        if tuple(x.requires_grad for x in results) != self.reach(tuple(wanted))[1]:
            raise self.outdated("other results that have gradients")
        edges = [torch.autograd.graph.get_gradient_edge(x) if x.requires_grad else None for x in results]
        return (inputs, edges), results

    def outdated(self, what: str) -> CellError:
        """The error for a cell that has changed since the surrounding program was traced, in what the trace knows."""
        name = name_of(self.alive()[1])
        return CellError(
            f"a cell must stay what the program around it was traced with, but {name} has come to have {what}; "
            "trace it again: torch.compiler.reset(), or export it anew"
        )

    def trees(self, tensors: Sequence[Tensor]) -> tuple[Tree, Tree, Tree]:
        """Inputs, state and context of the operator's tensors."""
        remaining = iter(tensors)
        structures, counts = self.plan.recording.structures[:3], self.plan.recording.counts
        parts = [list(itertools.islice(remaining, count)) for count in counts]
        inputs, state, context = (unflatten(s, part) for s, part in zip(structures, parts, strict=True))
        return inputs, state, context

    def reach(self, wanted: tuple[bool, ...]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Which tensors get a gradient where some want one, and which results have one; found on a sample."""
        if wanted not in self._reached:
            self._reached[wanted] = in_new_thread(lambda: self._reach(wanted))
        return self._reached[wanted]

    def _reach(self, wanted: tuple[bool, ...]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        _, cell = self.alive()
        tensors = [*leaves(self.spec.sample(cell, self.batch)), *tensors_in(cell)]
        tensors = [with_numbers(t).requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        results = self.run(tensors)
        ends = [x for x in results if x.requires_grad]
        by = [x for x in tensors if x.requires_grad]
        grads = torch.autograd.grad(ends, by, [torch.ones_like(x) for x in ends], allow_unused=True) if ends else ()
        reached = {id(x) for x, grad in zip(by, grads, strict=False) if grad is not None}
        return tuple([id(x) in reached for x in tensors]), tuple([x.requires_grad for x in results])
