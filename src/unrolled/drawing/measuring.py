"""What a page shows, measured: one run with all its copies, the plan, and with a loss the diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from unrolled.cells.contract import name_of, state_names
from unrolled.diagnosis.diagnose import diagnose
from unrolled.diagnosis.results import LayerDiagnosis
from unrolled.diagnosis.telling import figures_of
from unrolled.drawing.figures import layer_charts, memory_chart, schedule_chart
from unrolled.drawing.portrait import MISSING, Chart, Layer, Portrait, Strip
from unrolled.errors import InputError, OptionError
from unrolled.introspection.copies import Copies, Copy
from unrolled.introspection.layered import copies
from unrolled.lengths import Extent
from unrolled.networks.layered import Layered
from unrolled.networks.layout import Lengths, given_as
from unrolled.networks.plan_memory import plan_memory
from unrolled.networks.stack import Stack
from unrolled.networks.torch_layers import TorchLayer
from unrolled.networks.unroll import Unrolled
from unrolled.plan.report import Plan
from unrolled.trees import Structure, Tree, flatten, leaves_along, map_leaves, paths

_ENTRIES = 64
_DECADES = 12
"""How far down a page shows gradients, in powers of ten below the largest one."""

_MOST_COPIES = 4000


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
    given = given_as(inputs, lengths, batch_first=getattr(rnn, "batch_first", False))
    T, B = given.extent.steps, given.extent.batch
    _check(T, B, row)
    with torch.random.fork_rng(), torch.enable_grad():
        run = copies(rnn, inputs, state, lengths=lengths, resets=resets, context=context)
        named = run.named_networks()
        if loss is not None:
            run.observe(loss(run.outputs, run.state))
    found = None
    if loss is not None and T > 1:
        with torch.random.fork_rng():
            found = diagnose(
                rnn, inputs, loss, state=state, lengths=lengths, resets=resets, context=context, horizon=horizon
            )
    parts = _networks(rnn)
    diagnoses: Sequence[LayerDiagnosis | None] = found.layers if found else [None] * len(named)
    layers = tuple(
        _layer(name, one, part, given, row, with_grads=loss is not None)
        for (name, one), part, given in zip(named, parts, diagnoses, strict=True)
    )
    notes = _notes(T, with_loss=loss is not None)
    options = {"lengths": lengths, "resets": resets, "context": context}
    charts = _memory_charts(rnn, inputs, state, options)
    verdict = found.verdict.to_dict() if found else None
    return Portrait(rnn._get_name(), T, B, row, layers, charts, verdict, notes)


def _notes(T: int, *, with_loss: bool) -> tuple[str, ...]:
    if not with_loss:
        return (
            "Gradients, the verdict and most figures need a loss: "
            "ur.draw(rnn, inputs, 'page.html', loss=lambda outputs, state: ...)",
        )
    return () if T > 1 else ("Figures over time and a verdict need at least two copies.",)


def _check(T: int, B: int, row: int) -> None:
    if not T:
        raise InputError("a page needs a row with at least one step, got lengths that are all 0; pass a longer row")
    if not 0 <= row < B:
        raise InputError(f"row must be one of the batch's {B}, from 0 to {B - 1}, got {row}")
    if T > _MOST_COPIES:
        raise OptionError(f"a page holds up to {_MOST_COPIES} copies, got {T}; pass a part of the sequence")


def _networks(rnn: nn.Module) -> list[Unrolled]:
    if isinstance(rnn, TorchLayer):
        return _networks(rnn._network)
    return [rnn] if isinstance(rnn, Unrolled) else cast("Layered", rnn).networks


def _memory_charts(rnn: nn.Module, inputs: Tree, state: Tree, options: dict[str, Any]) -> tuple[Chart, ...]:
    if not isinstance(rnn, Unrolled | Stack) or any(network.reverse for network in _networks(rnn)[1:]):
        return ()
    plan = plan_memory(rnn, inputs, state, **options)
    return schedule_chart(plan.chosen.schedule), memory_chart(plan.to_dict())


def _layer(
    name: str, run: Copies, network: Unrolled, found: LayerDiagnosis | None, row: int, *, with_grads: bool
) -> Layer:
    """One network: its plan, its strips and its figures."""
    plan = _step_plan(run, network)
    cell = name_of(network.cell)
    return Layer(
        name=name or cell,
        cell=cell,
        engine=f"engine {plan.engine}: {plan.why}",
        reverse=network.reverse,
        operations=plan.operations,
        results=plan.results,
        strips=tuple(_strips(run, row, with_grads=with_grads)),
        charts=layer_charts(found) if found else (),
        figures=tuple(figures_of(found)) if found else (),
        missing=tuple(f"{missing.figure}: {missing.why}" for missing in found.missing) if found else (),
    )


def _step_plan(run: Copies, network: Unrolled) -> Plan:
    first = run[0]
    twice = map_leaves(lambda leaf: torch.stack([leaf.detach()] * 2), first.input)
    state = map_leaves(Tensor.detach, first.state)
    return network.step_plan(twice, state, run.context_of(first), Extent(2, len(first.rows)))


def _strips(run: Copies, row: int, *, with_grads: bool) -> Iterator[Strip]:
    """Input, state and output, and their gradients."""
    first = run[0]
    inputs = _names("x", first.input), flatten(first.input)[1]
    states = _state_names(run), flatten(first.state)[1]
    outputs = _names("o", first.output), flatten(first.output)[1]
    roles: list[tuple[str, Callable[[Copy], Tree], tuple[list[str], Structure]]] = [
        ("input", lambda copy: copy.input, inputs),
        ("state", lambda copy: copy.state, states),
        ("output", lambda copy: copy.output, outputs),
    ]
    grads: list[tuple[str, Callable[[Copy], Tree], tuple[list[str], Structure]]] = [
        ("input gradient", lambda copy: copy.input_grad, inputs),
        ("state gradient", lambda copy: copy.total_state_grad, states),
        ("output gradient", lambda copy: copy.output_grad, outputs),
    ]
    for role, of, (names, structure) in roles + (grads if with_grads else []):
        columns = zip(*(leaves_along(of(copy), structure) for copy in run), strict=True)
        for name, column in zip(names, columns, strict=True):
            if all(leaf is not None for leaf in column):
                yield _strip(f"dL/d{name}" if "gradient" in role else name, role, run, column, row)


def _names(letter: str, tree: Tree) -> list[str]:
    return [f"{letter}{path}" for path in paths(flatten(tree)[1])]


def _state_names(run: Copies) -> list[str]:
    names, found = list(state_names(run.cell)), _names("s", run[0].state)
    return names if len(names) == len(found) else found


def _strip(name: str, role: str, run: Copies, column: Sequence[Tensor], row: int) -> Strip:
    """One row of one leaf in all copies; blank where the row has ended."""
    column = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in column]
    size = max(column[0][0].numel(), 1) if column[0].dim() else 1
    shown = min(size, _ENTRIES)
    values = np.full((len(run), shown), np.nan)
    for t, (copy, leaf) in enumerate(zip(run, column, strict=True)):
        at = (copy.rows == row).nonzero().flatten()
        if len(at) and leaf.dim():
            values[t] = leaf[int(at[0])].detach().flatten()[:shown].double().cpu().numpy()
        elif not leaf.dim():
            values[t] = float(leaf)
    finite = np.isfinite(values)
    scale = float(np.abs(values[finite]).max()) if finite.any() else 0.0
    decades = _DECADES if "gradient" in role else 0
    levels = np.full(values.shape, MISSING, dtype=np.uint8)
    levels[finite] = np.rint((_scaled(values[finite] / (scale or 1.0), decades) + 1) * 127).astype(np.uint8)
    return Strip(name, role, shown, size, scale, levels.tobytes(), decades)


def _scaled(shares: np.ndarray, decades: int) -> np.ndarray:
    """Shares of the largest value, from -1 to 1; on a logarithmic scale of each sign, so that what vanishes is seen."""
    if not decades:
        return shares
    sizes = np.abs(shares)
    logs = np.log10(sizes, where=sizes > 0, out=np.full_like(sizes, -np.inf))
    return np.sign(shares) * np.maximum(1 + logs / decades, 0)
