"""What a page shows, measured: one run with all its copies, the plan, and with a loss the diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unrolled.cells.contract import name_of, state_names
from unrolled.diagnosis.diagnose import diagnose
from unrolled.diagnosis.results import LayerDiagnosis
from unrolled.drawing.charts import layer_charts, memory_chart, schedule_chart
from unrolled.drawing.portrait import Chart, Layer, Portrait, Strip
from unrolled.errors import InputError, OptionError
from unrolled.introspection.copies import Copies
from unrolled.introspection.layered import copies
from unrolled.introspection.single_copy import Copy
from unrolled.lengths import Lengths
from unrolled.networks.bounded import plan_memory
from unrolled.networks.layout import BatchLayout
from unrolled.networks.stack import Stack
from unrolled.networks.torch_layers import networks_of
from unrolled.networks.unroll import Unrolled
from unrolled.plan.report import Plan
from unrolled.trees import Tree, flatten, leaves_along, map_leaves, paths


def portrait(
    rnn: nn.Module,
    inputs: Tree,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    state: Tree = None,
    lengths: Lengths = None,
    resets: Tensor | None = None,
    context: Tree = None,
    row: int = 0,
    horizon: int | None = None,
) -> Portrait:
    """Measure what a page shows.

    Args:
        rnn: what `unroll`, `stack` or `Bidirectional` made, or a layer of this package.
        inputs: as the call takes them.
        loss: `loss(outputs, state)`, a scalar; without one there are no gradients to show.
        state: as the call takes it.
        lengths: as the call takes them; strips are blank where the row has ended.
        resets: as the call takes them.
        context: as the call takes it.
        row: which row of the batch strips show.
        horizon: as `diagnose` takes it.

    Raises:
        OptionError: for more copies than a page can hold.
        InputError: for a row that the batch does not have.
    """
    extent = BatchLayout.of(inputs, lengths, batch_first=getattr(rnn, "batch_first", False)).extent
    T, B = extent.steps, extent.batch
    _check_page(T, B, row)
    options = {"lengths": lengths, "resets": resets, "context": context}
    with torch.random.fork_rng(), torch.enable_grad():
        run = copies(rnn, inputs, state, **options)
        runs = run.named_networks()
        if loss is not None:
            run.observe(loss(run.outputs, run.state))
    diagnosis = None
    if loss is not None and T > 1:
        with torch.random.fork_rng():
            diagnosis = diagnose(rnn, inputs, loss, state=state, **options, horizon=horizon)
    diagnoses: Sequence[LayerDiagnosis | None] = diagnosis.layers if diagnosis else [None] * len(runs)
    layers = tuple(
        _MeasuredLayer(part, network, row, loss is not None).layer(name, found)
        for (name, part), network, found in zip(runs, networks_of(rnn, "draw"), diagnoses, strict=True)
    )
    charts = _memory_charts(rnn, inputs, state, options)
    verdict = diagnosis.verdict.to_dict() if diagnosis else None
    notes: tuple[str, ...] = ()
    if loss is None:
        example = "ur.draw(rnn, inputs, 'page.html', loss=lambda outputs, state: ...)"
        notes = (f"Gradients, the verdict and most figures need a loss: {example}",)
    elif T == 1:
        notes = ("Figures over time and a verdict need at least two copies.",)
    return Portrait(rnn._get_name(), T, B, row, layers, charts, verdict, notes)


def _check_page(T: int, B: int, row: int) -> None:
    most = 4000
    if not T:
        raise InputError("a page needs a row with at least one step, got lengths that are all 0; pass a longer row")
    if not 0 <= row < B:
        raise InputError(f"row must be one of the batch's {B}, from 0 to {B - 1}, got {row}")
    if most < T:
        raise OptionError(f"a page holds up to {most} copies, got {T}; pass a part of the sequence")


def _memory_charts(rnn: nn.Module, inputs: Tree, state: Tree, options: dict[str, Any]) -> tuple[Chart, ...]:
    if not isinstance(rnn, Unrolled | Stack) or any(network.reverse for network in networks_of(rnn, "draw")[1:]):
        return ()
    plan = plan_memory(rnn, inputs, state, **options)
    return schedule_chart(plan.chosen.schedule), memory_chart(plan.to_dict())


@dataclass(frozen=True)
class _MeasuredLayer:
    """One network after its run.

    Attributes:
        copies: its copies.
        network: the network itself.
        row: the row of the batch that strips show.
        with_grads: whether there are gradients to show.
    """

    copies: Copies
    network: Unrolled
    row: int
    with_grads: bool

    def layer(self, name: str, diagnosis: LayerDiagnosis | None) -> Layer:
        """Its plan, its strips, and with a diagnosis its figures."""
        plan = self._step_plan()
        cell = name_of(self.network.cell)
        return Layer(
            name=name or cell,
            cell=cell,
            engine=f"engine {plan.engine}: {plan.why}",
            reverse=self.network.reverse,
            operations=plan.operations,
            results=plan.results,
            strips=tuple(self._strips()),
            charts=layer_charts(diagnosis) if diagnosis else (),
            figures=tuple(diagnosis.in_words()) if diagnosis else (),
            missing=tuple(f"{one.figure}: {one.why}" for one in diagnosis.missing) if diagnosis else (),
        )

    def _step_plan(self) -> Plan:
        first = self.copies[0]
        twice = map_leaves(lambda leaf: torch.stack([leaf.detach()] * 2), first.input)
        state = map_leaves(Tensor.detach, first.state)
        network = Unrolled(self.network.cell, engine=self.network.engine, quiet=True)
        return network.plan(twice, state, context=self.copies.context_of(first))

    def _strips(self) -> Iterator[Strip]:
        """Input, state and output, and their gradients, of each tensor that all copies have."""
        first = self.copies[0]
        own_names = list(state_names(self.copies.cell))
        trees = {"input": ("x", first.input), "state": ("s", first.state), "output": ("o", first.output)}
        parts: list[tuple[str, str, Callable[[Copy], Tree]]] = [
            ("input", "", lambda copy: copy.input),
            ("state", "", lambda copy: copy.state),
            ("output", "", lambda copy: copy.output),
        ]
        if self.with_grads:
            parts += [
                ("input", " gradient", lambda copy: copy.input_grad),
                ("state", " gradient", lambda copy: copy.total_state_grad),
                ("output", " gradient", lambda copy: copy.output_grad),
            ]
        for kind, suffix, part_of in parts:
            letter, tree = trees[kind]
            structure = flatten(tree)[1]
            names = [f"{letter}{path}" for path in paths(structure)]
            if kind == "state" and len(own_names) == len(names):
                names = own_names
            columns = zip(*(leaves_along(part_of(copy), structure) for copy in self.copies), strict=True)
            for name, column in zip(names, columns, strict=True):
                if all(leaf is not None for leaf in column):
                    yield self._strip(f"dL/d{name}" if suffix else name, kind + suffix, column)

    def _strip(self, name: str, role: str, column: Sequence[Tensor]) -> Strip:
        """One row of one tensor in all copies; blank where the row has ended."""
        column = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in column]
        size = max(column[0][0].numel(), 1) if column[0].dim() else 1
        entries = min(size, 64)
        values = np.full((len(self.copies), entries), np.nan)
        for t, (copy, leaf) in enumerate(zip(self.copies, column, strict=True)):
            place = (copy.rows == self.row).nonzero().flatten()
            if not leaf.dim():
                values[t] = float(leaf)
            elif len(place):
                values[t] = leaf[int(place[0])].detach().flatten()[:entries].double().cpu().numpy()
        return Strip.encoded(name, role, values, size)
