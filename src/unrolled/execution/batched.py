"""Operations outside of loops, run for all copies of a segment at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from unrolled.execution.series import Entry, TimeSeries, Total
from unrolled.execution.written import StepsWriter
from unrolled.lengths import Extent
from unrolled.operations.operation import Linear, operation_of
from unrolled.plan.sums import contracts_rows
from unrolled.recording.interpret import run_op
from unrolled.recording.program import Custom, Op, Program, live_in

CHUNK_BYTES = 32 << 20
"""How much is held of the steps' shares of a gradient that no product contracts, before they are added up."""

Affine: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]


class BatchedOps(NamedTuple):
    """Runs operations of a step over a segment.

    Attributes:
        program: the step.
        rows: for each value that has rows, in which dimension.
        coupled: operations that are not proved to act row by row; these are mapped over T.
        extent: how far the segment reaches.
        sums: values that are wanted added up over all steps, and may be as soon as the rows are contracted.
        written: what was written of it before, by operations: what they read, and functions for kinds of that.
        affine: a product of large matrices, `(x, y, bias) -> x @ y + bias`, if an engine has one of its own; it
            returns None for those that it leaves to torch.
    """

    program: Program
    rows: Mapping[int, int]
    coupled: Mapping[int, str]
    extent: Extent
    written: dict[tuple[int, ...], tuple[list[int], dict[tuple[Any, ...], Callable[..., None]]]]
    sums: frozenset[int] = frozenset()
    affine: Affine | None = None

    def series(self, value: int, tensor: Tensor) -> TimeSeries:
        """A value from its entries at all steps: `[T, ...]`, or folded where rows end at different times."""
        return TimeSeries(tensor, self.extent, self.rows.get(value) if self.extent.ragged else None)

    def over_time(self, entry: Entry, rows: int | None) -> Tensor:
        """A value as loops and callers take it.

        Args:
            entry: the value.
            rows: the dimension of its rows, if it has any.
        """
        if isinstance(entry, Total):
            raise TypeError("a sum over all steps has no entries of its own")
        return (entry if isinstance(entry, TimeSeries) else TimeSeries.constant(entry, self.extent, rows)).over_time()

    def run(self, ops: tuple[int, ...], env: MutableMapping[int, Entry]) -> None:
        """Run some operations; their results are added to `env`."""
        if ops not in self.written:
            self.written[ops] = live_in([self.program.ops[number] for number in ops]), {}
        live, functions = self.written[ops]
        kinds = [type(env[v]) for v in live]
        key = self.extent.ragged, *kinds
        if key not in functions:
            functions[key] = StepsWriter(self, ops, dict(zip(live, kinds, strict=True))).function()
        functions[key](self, env)

    def way(self, number: int, op: Op, kinds: Mapping[int, type]) -> str:
        """How an operation is run on entries of these kinds.

        Returns:
            'once', on what is the same at every step; 'folded', on all rows of all steps at once, or 'contracted',
            which adds up over them; 'sums', on what was summed, as on one step's; else the method that runs it:
            'on_totals', 'mapped' or 'step_by_step'.
        """
        found = set(kinds.values())
        if Total in found:
            return "sums" if operation_of(op).linear is Linear.EACH or found == {Total} else "on_totals"
        if TimeSeries not in found:
            by_step = self.extent.ragged and number in self.coupled and any(v in self.rows for v in op.inputs)
            return "step_by_step" if by_step else "once"
        if all((v in self.rows) == (kind is TimeSeries) for v, kind in kinds.items()):
            if number not in self.coupled:
                return "folded"
            if self.sums.issuperset(v for v in op.outputs if v >= 0) and contracts_rows(op, self.rows, self.program):
                return "contracted"
        return "mapped"

    def made(self, op: Op, way: str) -> type:
        """The kind of the results of an operation that is run by the method of this name."""
        early = self.sums.issuperset(v for v in op.outputs if v >= 0)
        return Total if way == "on_totals" or early else TimeSeries

    def mapped(self, op: Op, entries: Mapping[int, Entry]) -> Sequence[Entry]:
        """An operation for each step, by vmap; Functions with a backward of their own one after the other."""
        if self.extent.ragged:
            return self.step_by_step(op, entries)
        tensors = [
            entry.stacked() if isinstance(entry, TimeSeries) else entry.tensor if isinstance(entry, Total) else entry
            for entry in entries.values()
        ]
        dims = tuple(0 if isinstance(entry, TimeSeries) else None for entry in entries.values())

        def once(*values: Tensor) -> tuple[Tensor, ...]:
            results = run_op(op, dict(zip(entries, values, strict=True)), self.extent.batch)
            return tuple(result for v, result in zip(op.outputs, results, strict=False) if v >= 0)

        run = _one_by_one(once, dims) if isinstance(op.target, Custom) else torch.vmap(once, in_dims=dims)
        made: Sequence[Entry]
        if self.sums.issuperset(v for v in op.outputs if v >= 0):
            made = [Total(total) for total in self._in_chunks(op, run, tensors, dims)]
        else:
            made = [TimeSeries(result, self.extent) for result in run(*tensors)]
        left = iter(made)
        return [next(left) if v >= 0 else made[0] for v in op.outputs]  # what nobody reads is one of the others

    def _in_chunks(
        self, op: Op, run: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], dims: Sequence[int | None]
    ) -> list[Tensor]:
        """The sums over all steps of an operation's results, of which no more than a few are held at a time."""
        bytes_of_step = sum(self.program.values[v].bytes(self.extent.batch) for v in op.outputs if v >= 0)
        many = max(1, CHUNK_BYTES // max(bytes_of_step, 1))
        totals: list[Tensor] = []
        for start in range(0, self.extent.steps, many):
            pairs = zip(tensors, dims, strict=True)
            chunk = [tensor[start : start + many] if dim == 0 else tensor for tensor, dim in pairs]
            added = [result.sum(0) for result in run(*chunk)]
            totals = [total + more for total, more in zip(totals, added, strict=True)] if totals else added
        return totals

    def on_totals(self, op: Op, entries: Mapping[int, Entry]) -> Sequence[Entry]:
        """An operation that is linear in all that it reads together: each of that is added up first."""
        tensors = {v: self.total(v, entry) for v, entry in entries.items()}
        return [Total(result) for result in run_op(op, tensors, self.extent.batch)]

    def step_by_step(self, op: Op, entries: Mapping[int, Entry]) -> Sequence[Entry]:
        """An operation for each step on the rows that are alive, where steps differ in how many that are."""
        columns = {v: self.each(v, entry) for v, entry in entries.items()}
        results = (
            run_op(op, {v: column[t] for v, column in columns.items()}, n) for t, n in enumerate(self.extent.sizes)
        )
        if self.sums.issuperset(v for v in op.outputs if v >= 0):
            return self._added_up(op, results)
        made = zip(*results, strict=True)
        return [  # what nobody reads is one of its entries
            TimeSeries(column[0], self.extent) if v < 0 else TimeSeries.joined(column, self.extent, self.rows.get(v))
            for v, column in zip(op.outputs, made, strict=False)
        ]

    def each(self, value: int, entry: Entry) -> Sequence[Tensor]:
        """An entry at step 0, 1, 2, ...; of what is the same at every step, the rows that are alive."""
        if isinstance(entry, TimeSeries):
            return entry.each()
        rows = self.rows.get(value)
        if isinstance(entry, Total) or rows is None:
            return [entry.tensor if isinstance(entry, Total) else entry] * self.extent.steps
        many = entry.shape[rows] // self.extent.batch
        return [entry.narrow(rows, 0, many * n) for n in self.extent.sizes]

    def _added_up(self, op: Op, results: Iterable[Sequence[Any]]) -> list[Entry]:
        """The sums of an operation's results over all steps, one step after the other; what has rows keeps them."""
        totals: list[Any] = []
        for found in results:
            if not totals:
                totals = [None if v < 0 else result.clone() for v, result in zip(op.outputs, found, strict=False)]
                continue
            for v, total, result in zip(op.outputs, totals, found, strict=False):
                if v >= 0:
                    rows = self.rows.get(v)
                    part = total if rows is None else total.narrow(rows, 0, result.shape[rows])
                    part.add_(result)
        return [Total(total) for total in totals]

    def total(self, value: int, entry: Entry) -> Tensor:
        """A value added up over all steps; what has rows keeps them."""
        rows = self.rows.get(value)
        if isinstance(entry, Total):
            return entry.tensor
        if isinstance(entry, TimeSeries):
            return entry.total()
        if self.extent.ragged and rows is not None:
            return TimeSeries.constant(entry, self.extent, rows).total()
        return entry * self.extent.steps


def _one_by_one(function: Callable[..., tuple[Tensor, ...]], dims: Sequence[int | None]) -> Callable[..., list[Tensor]]:
    def run(*tensors: Tensor) -> list[Tensor]:
        steps = next(len(tensor) for tensor, dim in zip(tensors, dims, strict=True) if dim == 0)
        columns = [
            tensor.unbind(0) if dim == 0 else [tensor] * steps for tensor, dim in zip(tensors, dims, strict=True)
        ]
        return [
            torch.stack(column) for column in zip(*(function(*row) for row in zip(*columns, strict=True)), strict=True)
        ]

    return run
