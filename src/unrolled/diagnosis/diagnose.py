"""Diagnosis of a network on a batch: all that can be measured of one forward and backward pass, and what it means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.cells.contract import name_of
from unrolled.diagnosis.flow import gradient_flow, weight_shares
from unrolled.diagnosis.lag import lag_profile, reach
from unrolled.diagnosis.nonfinite import first_bad_gradient, first_bad_value, is_finite
from unrolled.diagnosis.results import Diagnosis, JacobianProfile, LayerDiagnosis, Lyapunov, Missing
from unrolled.diagnosis.tangents import UnmeasurableError, measure_tangents, trajectory_of
from unrolled.diagnosis.units import unit_figures
from unrolled.diagnosis.verdict import verdict_of
from unrolled.diagnosis.walk import Walk
from unrolled.errors import GradientError, InputError, NonFiniteError, OptionError
from unrolled.introspection.copies import Copies
from unrolled.introspection.layered import copies
from unrolled.lengths import Lengths
from unrolled.trees import Tree, leaves

_ROWS = 8


def diagnose(
    rnn: nn.Module,
    inputs: Tree,
    loss: Callable[[Any, Any], Tensor],
    *,
    state: Tree = None,
    lengths: Lengths = None,
    resets: Tensor | None = None,
    context: Tree = None,
    probes: int = 32,
    lyapunov: int | None = None,
    horizon: int | None = None,
) -> Diagnosis:
    """Measure how a network trains: how far gradients reach, what each copy gives, which units are stuck.

    The network is run once by the reference engine, whose numbers are every engine's, and the loss is taken back
    through all copies, also where it has a horizon: what that cuts off is one of the figures. Weights, `.grad` and
    random numbers stay as they are. Rows that have ended take part in nothing, and lags are counted within rows.

    Args:
        rnn: what `unroll`, `stack` or `Bidirectional` made, or a `RNN`, `LSTM` or `GRU` layer of this package.
        inputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`), or a PackedSequence; at least two steps.
        loss: `loss(outputs, state)`, of what `rnn` returns for these inputs, a scalar.
        state: the state that each row's first copy receives, as `rnn` takes it; by default the cell's own.
        lengths: how many steps each row has, integers `[B]`.
        resets: a bool `[T, B]` (`[B, T]` with `batch_first`): rows that start afresh just before step t.
        context: what a cell with a third argument receives at every step.
        probes: at most so many losses of a row are followed back, spread over the steps that have one; 1 for the last.
        lyapunov: how many exponents; four, or as many as a row's state has entries, by default.
        horizon: how many copies gradients flow back through in training; that of `rnn` by default.

    Returns:
        The figures of each layer and direction, and a verdict; `print` it. What could not be measured is in `missing`.

    Raises:
        GradientError: for a loss that does not depend on the network or is no scalar, or where gradients are off.
        InputError: as the call itself does, and for fewer than two steps.
        NonFiniteError: for a loss that is NaN or infinite, naming what made it so.
        OptionError: for something else than an unrolled network, or figures that cannot be asked for.
        StateError: as the call itself does.
        CellError: as the call itself does.

    Source: Y. Bengio et al., "Learning long-term dependencies with gradient descent is difficult", IEEE TNN 5 (1994);
    R. Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013.

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.unroll(ur.RNNCell(3, 16))
        >>> found = ur.diagnose(rnn, torch.randn(200, 4, 3), lambda outputs, state: outputs[-1].square().mean())
        >>> found.verdict.kind, found.layers[0].reach.thousandth < 50
        ('vanishing', True)
    """
    _check(loss, probes, horizon, lyapunov)
    with torch.random.fork_rng():
        run = copies(rnn, inputs, state, lengths=lengths, resets=resets, context=context)
        named = run.named_networks()
        steps = max(len(one) for _, one in named)
        if steps < 2:
            raise InputError(f"a diagnosis needs rows of at least 2 steps, got {steps}; gradients have no way to go")
        value = loss(run.outputs, run.state)
        _refuse_bad(value, run)
        grads = run.observe(value)
        if not is_finite(list(grads.values())):
            raise (
                first_bad_value(run)
                or first_bad_gradient(run)
                or NonFiniteError(
                    "a gradient is NaN or infinite, and no copy made it; look at how the loss takes the weights"
                )
            )
        layers = [_diagnosed(name, one, resets, probes, lyapunov) for name, one in named]
    trained = {id(parameter) for parameter in rnn.parameters()}
    norms = [float(torch.linalg.vector_norm(grad.to_dense())) for leaf, grad in grads.items() if id(leaf) in trained]
    given, cut = run.layout, horizon or getattr(rnn, "horizon", None)
    return Diagnosis(
        network=rnn._get_name(),
        T=steps,
        B=given.batch,
        horizon=cut,
        loss=float(value.detach()),
        grad_norm=math.hypot(*norms),
        layers=tuple(layers),
        verdict=verdict_of(layers, [one.cell for _, one in named], cut),
    )


def _refuse_bad(value: Any, run: Any) -> None:
    """No figure can be read off a NaN; the operation that made it is the diagnosis."""
    if isinstance(value, Tensor) and not is_finite([value]):
        told = value.detach().flatten()[0].item()
        raise first_bad_value(run) or NonFiniteError(
            f"the loss is {told}, while all outputs and states are finite; look at how it is computed"
        )


def _check(loss: Any, probes: int, horizon: int | None, lyapunov: int | None) -> None:
    if not callable(loss):
        raise OptionError(f"loss must be a function loss(outputs, state) of a scalar, got a {type(loss).__name__}")
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise GradientError("a diagnosis needs gradients, and they are off here; call it outside of torch.no_grad()")
    for name, value in (("probes", probes), ("horizon", horizon), ("lyapunov", lyapunov)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(f"{name} must be a positive integer, got {value!r}")


def _diagnosed(name: str, run: Copies, resets: Tensor | None, probes: int, lyapunov: int | None) -> LayerDiagnosis:
    walk = Walk(run, resets)
    lag = lag_profile(walk, probes)
    units, missing = unit_figures(run)
    jacobian: JacobianProfile | None = None
    exponents: Lyapunov | None = None
    try:
        jacobian, exponents = measure_tangents(trajectory_of(walk, _ROWS), lyapunov)
    except UnmeasurableError as error:
        missing += [Missing(figure, str(error)) for figure in ("jacobian", "lyapunov")]
    if lag is None:
        missing += [Missing(figure, _why_no_lag(run)) for figure in ("lag", "reach")]
    return LayerDiagnosis(
        name=name,
        cell=name_of(run.cell),
        flow=gradient_flow(run),
        lag=lag,
        reach=None if lag is None else reach(lag),
        weights=weight_shares(run),
        jacobian=jacobian,
        lyapunov=exponents,
        units=units,
        missing=_sorted(missing),
    )


def _why_no_lag(run: Copies) -> str:
    if any(x.is_floating_point() or x.is_complex() for x in leaves(run[0].state)):
        return "the loss takes nothing of this layer's outputs, or of its last state nothing that has rows"
    return "the state has no floating numbers"


def _sorted(missing: Sequence[Missing]) -> tuple[Missing, ...]:
    return tuple(sorted(missing, key=lambda one: one.figure))
