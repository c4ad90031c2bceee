"""A diagnosis in words: for a terminal, and for a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterator

from unrolled.diagnosis.results import Diagnosis, LayerDiagnosis, Reach
from unrolled.diagnosis.unit_results import Gate


def told(found: Diagnosis) -> str:
    """The verdict, and the figures of each layer in a few lines."""
    horizon = "" if found.horizon is None else f", horizon {found.horizon}"
    head = f"{found.network}, {found.T} copies, batch {found.B}{horizon}: loss {found.loss:.4g}, "
    lines = [f"{head}gradient norm {found.grad_norm:.3g}", "", str(found.verdict)]
    for layer in found.layers:
        rows = [*figures_of(layer), *((f"no {missing.figure}", missing.why) for missing in layer.missing)]
        width = max(len(name) for name, _ in rows)
        title = ", ".join(filter(None, [layer.name, layer.cell]))
        lines += ["", title, *(f"  {name.ljust(width)}  {figures}" for name, figures in rows)]
    return "\n".join(lines)


def told_as_html(found: Diagnosis) -> str:
    """The same, as a notebook shows it."""
    return f"<pre>{html.escape(told(found))}</pre>"


def figures_of(layer: LayerDiagnosis) -> Iterator[tuple[str, str]]:
    """The figures of a layer, each with its name, in words."""
    flow = layer.flow.norms
    yield "gradient flow", f"{flow[0]:.2e} at the first copy, {flow[-1]:.2e} at the last, {max(flow):.2e} at most"
    if layer.lag is not None and layer.reach is not None:
        yield "reach", f"{_reach(layer.reach)}; probes: {layer.lag.probes} to a row"
    if layer.jacobian is not None:
        j = layer.jacobian
        exact = "exact" if j.tangents == j.size else f"bounds from below, {j.tangents} of {j.size} directions"
        yield "Jacobian product", f"leading singular value {_lags(j.lags, j.median)} ({exact})"
    if layer.lyapunov is not None:
        exponents = ", ".join(f"{x:+.3g}" for x in layer.lyapunov.exponents)
        yield "Lyapunov exponents", f"{exponents} per step, over {layer.lyapunov.steps} steps"
    for share in layer.weights:
        yield f"shares of {share.name}", f"norm {share.norm:.2e}, copies agree {share.agreement:.0%}"
    for gate in layer.units.gates:
        yield f"{gate.name} ({gate.operation})", _gate(gate)
    for memory in layer.units.memory:
        yield (
            "memory",
            f"{memory.steps:.3g} steps by the {memory.gate} gate, which keeps {memory.mean:.3g} of the state",
        )
    for state in layer.units.states:
        yield f"norm of {state.name}", f"{state.norms[0]:.3g} at the first copy, {state.norms[-1]:.3g} at the last"
    for radius in layer.units.radii:
        yield f"radius of {radius.name}", f"{radius.value:.3g}"


def _reach(reach: Reach) -> str:
    fallen = {"a tenth": reach.tenth, "a hundredth": reach.hundredth, "a thousandth": reach.thousandth}
    told = [f"{share} after {lag} copies" for share, lag in fallen.items() if lag is not None]
    if reach.measured == 1:
        return "the loss takes something at the first copy alone"
    rate = f"halving in {reach.halving:.3g} steps" if reach.rate < 0 else f"doubling in {reach.doubling:.3g} steps"
    return f"{', '.join(told) or f'more than a tenth after all {reach.measured} copies'}; {rate}"


def _lags(lags: tuple[int, ...], values: tuple[float, ...]) -> str:
    some = dict.fromkeys((0, len(lags) // 2, len(lags) - 1))
    return ", ".join(f"{values[n]:.2e} over {lags[n]}" for n in some)


def _gate(gate: Gate) -> str:
    dead = f", {gate.dead} of {gate.units} units always" if gate.dead else ""
    return f"{gate.share:.0%} saturated ({gate.low:.0%} low, {gate.high:.0%} high){dead}"
