"""Charts of results: which figures are drawn, with axes, units and a sentence that says what is seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from unrolled.bptt.actions import Advance, Reverse, StoreTape
from unrolled.bptt.schedules import Schedule
from unrolled.diagnosis.results import LayerDiagnosis
from unrolled.drawing.portrait import Chart, Series


def layer_charts(diagnosis: LayerDiagnosis) -> tuple[Chart, ...]:
    """The charts of one cell's diagnosis; a new one is a method of `_LayerCharts` and stands in this list."""
    charts = _LayerCharts(diagnosis)
    drawn = [charts.flow(), charts.lag(), charts.jacobian(), charts.shares(), charts.saturation(), charts.states()]
    return tuple(chart for chart in drawn if chart is not None)


class _LayerCharts:
    """One method for each chart; None where its figures could not be measured."""

    _MOST_LINES = 6

    def __init__(self, diagnosis: LayerDiagnosis) -> None:
        self.diagnosis = diagnosis
        self._copies = tuple(map(float, range(len(diagnosis.flow.norms))))

    def flow(self) -> Chart:
        norms = self.diagnosis.flow.norms
        largest, least = max(norms), min(norms)
        spread = f"{largest / least:.3g} times the smallest" if least else "and some copies receive none at all"
        return Chart(
            "flow", "Gradient of the loss by each copy's state", "copy t", "norm over all rows", self._copies,
            (Series.of("|dL/dstate|", norms),),
            f"The largest gradient, {largest:.3g}, reaches the state of copy {norms.index(largest)}: {spread}.",
            by_copy=True, log_y=_needs_log_axis(norms),
        )  # fmt: skip

    def lag(self) -> Chart | None:
        lag, reach = self.diagnosis.lag, self.diagnosis.reach
        if lag is None or reach is None:
            return None
        rate = f"doubles every {reach.doubling:.3g}" if reach.rate > 0 else f"halves every {reach.halving:.3g}"
        left = "more than a tenth of it is left at the end"
        end = f"it is a tenth after {reach.tenth} copies" if reach.tenth else left
        return Chart(
            "lag", "Gradient over distance", "lag t − s, in copies", "|d loss_t / d state_s|",
            tuple(map(float, lag.lags)), (Series.of("median", lag.median, lag.lower, lag.upper, above=0.0),),
            f"On its way back the gradient {rate} copies; {end} (quartiles over rows and {lag.probes} probes).",
            log_y=True,
        )  # fmt: skip

    def jacobian(self) -> Chart | None:
        jacobian, lyapunov = self.diagnosis.jacobian, self.diagnosis.lyapunov
        if jacobian is None:
            return None
        sentence = f"The largest stretch of a small change of the state: {jacobian.median[0]:.3g} after one copy"
        sentence += f", {jacobian.median[-1]:.3g} after {jacobian.lags[-1]}"
        if lyapunov is not None:
            sentence += f"; the leading Lyapunov exponent is {lyapunov.exponents[0]:.3g} per step"
        return Chart(
            "jacobian", "How far a change of the state is stretched", "lag t − s, in copies",
            "leading singular value of d state_t / d state_s", tuple(map(float, jacobian.lags)),
            (Series.of("median", jacobian.median, jacobian.lower, jacobian.upper, above=0.0),),
            f"{sentence} (quartiles over {jacobian.rows} rows).", log_y=True,
        )  # fmt: skip

    def shares(self) -> Chart | None:
        weights = sorted(self.diagnosis.weights, key=lambda one: -one.norm)[: self._MOST_LINES]
        if not weights:
            return None
        first = weights[0]
        left = len(self.diagnosis.weights) - len(weights)
        more = f" {left} smaller ones are not drawn." if left else ""
        return Chart(
            "shares", "Each copy's share of the weight gradients", "copy t", "norm of the share", self._copies,
            tuple(Series.of(one.name, one.norms) for one in weights),
            f"The shares of {first.name} add up to {first.agreement:.0%} of what they would if all copies agreed; its "
            f"whole gradient has norm {first.norm:.3g}.{more}",
            by_copy=True, log_y=_needs_log_axis([x for one in weights for x in one.norms]),
        )  # fmt: skip

    def saturation(self) -> Chart | None:
        units = self.diagnosis.units
        gates = units.gates[: self._MOST_LINES]
        if not gates:
            return None
        worst = max(gates, key=lambda gate: gate.share)
        dead = f"; {units.dead} units never leave saturation" if units.dead else ""
        return Chart(
            "saturation", "Saturated share of gates and activations", "copy t", "share of rows × units",
            self._copies, tuple(Series.of(gate.name, gate.saturated) for gate in gates),
            f"Most saturated is {worst.name}: {worst.share:.0%} of its entries over all steps{dead}.",
            by_copy=True, share=True,
        )  # fmt: skip

    def states(self) -> Chart | None:
        states = self.diagnosis.units.states
        if not states:
            return None
        changes = ", ".join(f"{state.name} from {state.norms[0]:.3g} to {state.norms[-1]:.3g}" for state in states)
        return Chart(
            "states", "Norm of the state", "copy t", "mean norm over rows", self._copies,
            tuple(Series.of(state.name, state.norms) for state in states[: self._MOST_LINES]),
            f"From the first copy to the last: {changes}.", by_copy=True,
        )  # fmt: skip


def _needs_log_axis(values: Sequence[float]) -> bool:
    """Whether the small ones are seen on a logarithmic axis only; zeros are then left out."""
    positive = [value for value in values if 0 < value < math.inf]
    return bool(positive) and max(positive) > 30 * min(positive)


def memory_chart(plan: Mapping[str, Any]) -> Chart:
    """Memory against time for every schedule.

    Args:
        plan: `MemoryPlan.to_dict()`.
    """
    options = plan["options"]
    chosen = next(n for n, option in enumerate(options) if option["chosen"])
    least = options[-1]
    return Chart(
        "memory", "Memory against time, by schedule", "activation memory, bytes", "time over that of full storage",
        tuple(float(option["bytes"]) for option in options),
        (Series("schedule", tuple(option["time_ratio"] for option in options)),),
        f"The network goes by {options[chosen]['schedule']}; down to {least['share']:.1%} of full storage can be had "
        f"for {least['time_ratio']:.2f} times the time.",
        log_x=True, log_y=True, points=True,
        labels=tuple(option["schedule"] for option in options), chosen=chosen,
    )  # fmt: skip


def schedule_chart(schedule: Schedule) -> Chart:
    """Which steps a training step runs at which time: forwards, back, and again forwards where steps are recomputed.

    Args:
        schedule: the schedule that the network follows.
    """
    names = {Advance: "forward, no tape", StoreTape: "forward, taped", Reverse: "backward"}
    x, lines = list[float](), {kind: list[float | None]() for kind in names}
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
    if schedule.segments == 1:
        sentence = f"All {schedule.T:,} steps forward with one tape, and back over it: no step is run twice."
    else:
        sentence = (
            f"{schedule.segments:,} segments of {schedule.length:,} steps, one tape at a time; from "
            f"{schedule.slots_needed:,} stored states {schedule.extra_advances:,} steps are run once more."
        )
    series = tuple(Series(name, tuple(lines[kind])) for kind, name in names.items() if set(lines[kind]) - {None})
    return Chart(
        "schedule", "The schedule of a training step", "time, in steps forward (a step back takes two)", "step t",
        tuple(x), series, sentence,
    )  # fmt: skip
