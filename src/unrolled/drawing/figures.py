"""Charts of results: which figures are drawn, with axes, units and a sentence that says what is seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from unrolled.bptt.actions import Advance, Reverse, StoreTape
from unrolled.bptt.schedules import Schedule
from unrolled.diagnosis.results import LayerDiagnosis
from unrolled.drawing.portrait import Chart, Series

_MOST_LINES = 6


def layer_charts(found: LayerDiagnosis) -> tuple[Chart, ...]:
    """The charts of one cell's diagnosis."""
    charts = [_flow(found), _lag(found), _jacobian(found), _shares(found), _saturation(found), _states(found)]
    return tuple(chart for chart in charts if chart is not None)


def _numbers(values: Sequence[float], *, above: float = -math.inf) -> tuple[float | None, ...]:
    return tuple(float(value) if math.isfinite(value) and value > above else None for value in values)


def _far_apart(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis is needed to see the small ones; zeros are then left out."""
    positive = [value for value in values if 0 < value < math.inf]
    return bool(positive) and max(positive) > 30 * min(positive)


def _steps(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(t) for t in range(len(values)))


def _flow(found: LayerDiagnosis) -> Chart:
    norms = found.flow.norms
    largest, least = max(norms), min(norms)
    at = norms.index(largest)
    spread = f"{largest / least:.3g} times the smallest" if least else "and some copies receive none at all"
    series = Series("|dL/dstate|", _numbers(norms))
    return Chart(
        "flow", "Gradient of the loss by each copy's state", "copy t", "norm over all rows", _steps(norms), (series,),
        f"The largest gradient, {largest:.3g}, reaches the state of copy {at}: {spread}.",
        by_copy=True, log_y=_far_apart(norms),
    )  # fmt: skip


def _lag(found: LayerDiagnosis) -> Chart | None:
    lag, reach = found.lag, found.reach
    if lag is None or reach is None:
        return None
    told = f"it is a tenth after {reach.tenth} copies" if reach.tenth else "more than a tenth of it is left at the end"
    rate = "doubles every " + f"{reach.doubling:.3g}" if reach.rate > 0 else "halves every " + f"{reach.halving:.3g}"
    sentence = f"On its way back the gradient {rate} copies; {told} (quartiles over rows and {lag.probes} probes)."
    series = Series("median", *(_numbers(values, above=0.0) for values in (lag.median, lag.lower, lag.upper)))
    return Chart(
        "lag", "Gradient over distance", "lag t − s, in copies", "|d loss_t / d state_s|",
        tuple(map(float, lag.lags)), (series,), sentence, log_y=True,
    )  # fmt: skip


def _jacobian(found: LayerDiagnosis) -> Chart | None:
    jacobian = found.jacobian
    if jacobian is None:
        return None
    sentence = f"The largest stretch of a small change of the state: {jacobian.median[0]:.3g} after one copy"
    sentence += f", {jacobian.median[-1]:.3g} after {jacobian.lags[-1]}"
    if found.lyapunov is not None:
        sentence += f"; the leading Lyapunov exponent is {found.lyapunov.exponents[0]:.3g} per step"
    bands = (_numbers(values, above=0.0) for values in (jacobian.median, jacobian.lower, jacobian.upper))
    return Chart(
        "jacobian", "How far a change of the state is stretched", "lag t − s, in copies",
        "leading singular value of d state_t / d state_s", tuple(map(float, jacobian.lags)),
        (Series("median", *bands),), f"{sentence} (quartiles over {jacobian.rows} rows).", log_y=True,
    )  # fmt: skip


def _shares(found: LayerDiagnosis) -> Chart | None:
    weights = sorted(found.weights, key=lambda one: -one.norm)[:_MOST_LINES]
    if not weights:
        return None
    first = weights[0]
    left = len(found.weights) - len(weights)
    more = f" {left} smaller ones are not drawn." if left else ""
    sentence = (
        f"The shares of {first.name} add up to {first.agreement:.0%} of what they would if all copies agreed; its "
        f"whole gradient has norm {first.norm:.3g}.{more}"
    )
    series = tuple(Series(one.name, _numbers(one.norms)) for one in weights)
    return Chart(
        "shares", "Each copy's share of the weight gradients", "copy t", "norm of the share", _steps(first.norms),
        series, sentence, by_copy=True, log_y=_far_apart([x for one in weights for x in one.norms]),
    )  # fmt: skip


def _saturation(found: LayerDiagnosis) -> Chart | None:
    gates = found.units.gates[:_MOST_LINES]
    if not gates:
        return None
    worst = max(gates, key=lambda gate: gate.share)
    dead = f"; {found.units.dead} units never leave saturation" if found.units.dead else ""
    sentence = f"Most saturated is {worst.name}: {worst.share:.0%} of its entries over all steps{dead}."
    series = tuple(Series(gate.name, _numbers(gate.saturated)) for gate in gates)
    return Chart(
        "saturation", "Saturated share of gates and activations", "copy t", "share of rows × units",
        _steps(gates[0].saturated), series, sentence, by_copy=True, share=True,
    )  # fmt: skip


def _states(found: LayerDiagnosis) -> Chart | None:
    states = found.units.states
    if not states:
        return None
    told = ", ".join(f"{state.name} from {state.norms[0]:.3g} to {state.norms[-1]:.3g}" for state in states)
    series = tuple(Series(state.name, _numbers(state.norms)) for state in states[:_MOST_LINES])
    return Chart(
        "states", "Norm of the state", "copy t", "mean norm over rows", _steps(states[0].norms), series,
        f"From the first copy to the last: {told}.", by_copy=True,
    )  # fmt: skip


def memory_chart(plan: Mapping[str, Any]) -> Chart:
    """Memory against time for every schedule.

    Args:
        plan: `MemoryPlan.to_dict()`.
    """
    options = plan["options"]
    chosen = next(n for n, option in enumerate(options) if option["chosen"])
    mine, least = options[chosen], options[-1]
    sentence = (
        f"The network goes by {mine['schedule']}; down to {least['share']:.1%} of full storage can be had for "
        f"{least['time_ratio']:.2f} times the time."
    )
    return Chart(
        "memory", "Memory against time, by schedule", "activation memory, bytes", "time over that of full storage",
        tuple(float(option["bytes"]) for option in options),
        (Series("schedule", tuple(option["time_ratio"] for option in options)),), sentence,
        log_x=True, log_y=True, points=True,
        labels=tuple(option["schedule"] for option in options), chosen=chosen,
    )  # fmt: skip


_KINDS = {Advance: "forward, no tape", StoreTape: "forward, taped", Reverse: "backward"}


def schedule_chart(schedule: Schedule) -> Chart:
    """A training step as it is walked: forwards, back, and again forwards where steps are run once more.

    Args:
        schedule: what the network goes by.
    """
    x, lines = list[float](), {kind: list[float | None]() for kind in _KINDS}
    now = 0
    for action in schedule:
        if not isinstance(action, Advance | StoreTape | Reverse):
            continue
        ends = (action.stop, action.start) if isinstance(action, Reverse) else (action.start, action.stop)
        spent = (2 if isinstance(action, Reverse) else 1) * (action.stop - action.start)
        x += [float(now), float(now + spent), float(now + spent)]
        for kind, line in lines.items():
            line += [*map(float, ends), None] if isinstance(action, kind) else [None] * 3
        now += spent
    series = tuple(Series(name, tuple(lines[kind])) for kind, name in _KINDS.items() if set(lines[kind]) - {None})
    return Chart(
        "schedule", "The schedule of a training step", "time, in steps forward (a step back takes two)", "step t",
        tuple(x), series, _schedule_told(schedule),
    )  # fmt: skip


def _schedule_told(schedule: Schedule) -> str:
    if schedule.segments == 1:
        return f"All {schedule.T:,} steps forward with one tape, and back over it: no step is run twice."
    return (
        f"{schedule.segments:,} segments of {schedule.length:,} steps, one tape at a time; from "
        f"{schedule.slots_needed:,} stored states {schedule.extra_advances:,} steps are run once more."
    )
