"""Diagnosis of a network on a batch: all that can be measured of one forward and backward pass, and what it means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.autograd_graph import differentiable
from unrolled.cells.contract import name_of
from unrolled.diagnosis.figures import JacobianProfile, Lyapunov, Reach
from unrolled.diagnosis.flow import gradient_flow, weight_shares
from unrolled.diagnosis.lag import lag_profile
from unrolled.diagnosis.nonfinite import first_bad_gradient, first_bad_value, is_finite
from unrolled.diagnosis.results import Diagnosis, LayerDiagnosis, Missing
from unrolled.diagnosis.tangents import Trajectory, UnmeasurableError, measure_tangents
from unrolled.diagnosis.timeline import Timeline
from unrolled.diagnosis.units import unit_figures
from unrolled.diagnosis.verdict import verdict_of
from unrolled.errors import GradientError, InputError, NonFiniteError, OptionError
from unrolled.introspection.copies import Copies
from unrolled.introspection.layered import LayeredCopies, copies
from unrolled.lengths import Lengths
from unrolled.trees import Tree, leaves


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
    _refuse_arguments(loss, probes, horizon, lyapunov)
    with torch.random.fork_rng():
        run = copies(rnn, inputs, state, lengths=lengths, resets=resets, context=context)
        networks = run.named_networks()
        steps = max(len(network) for _, network in networks)
        if steps < 2:
            raise InputError(f"a diagnosis needs rows of at least 2 steps, got {steps}; gradients have no way to go")
        value = loss(run.outputs, run.state)
        grads = _finite_gradients(run, value)
        layers = [_diagnosed(name, network, resets, probes, lyapunov) for name, network in networks]
    trained = {id(parameter) for parameter in rnn.parameters()}
    norms = [float(torch.linalg.vector_norm(grad.to_dense())) for leaf, grad in grads.items() if id(leaf) in trained]
    cut = horizon or (run.truncation.horizon if run.truncation else None)
    return Diagnosis(
        network=rnn._get_name(),
        T=steps,
        B=run.layout.batch,
        horizon=cut,
        loss=float(value.detach()),
        grad_norm=math.hypot(*norms),
        layers=tuple(layers),
        verdict=verdict_of(layers, [network.cell for _, network in networks], cut),
    )


def _refuse_arguments(loss: Any, probes: int, horizon: int | None, lyapunov: int | None) -> None:
    if not callable(loss):
        raise OptionError(f"loss must be a function loss(outputs, state) of a scalar, got a {type(loss).__name__}")
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise GradientError("a diagnosis needs gradients, and they are off here; call it outside of torch.no_grad()")
    for name, value in (("probes", probes), ("horizon", horizon), ("lyapunov", lyapunov)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(f"{name} must be a positive integer, got {value!r}")


def _finite_gradients(run: Copies | LayeredCopies, loss: Tensor) -> dict[Tensor, Tensor]:
    """The gradients of the leaves that a loss depends on, which the run's copies remember.

    Raises:
        NonFiniteError: where the loss or one of them is not finite: the operation that made it so is the diagnosis.
    """
    if isinstance(loss, Tensor) and not is_finite([loss]):
        value = loss.detach().flatten()[0].item()
        raise first_bad_value(run) or NonFiniteError(
            f"the loss is {value}, while all outputs and states are finite; look at how it is computed"
        )
    grads = run.observe(loss)
    if not is_finite(list(grads.values())):
        unknown = "a gradient is NaN or infinite, and no copy made it; look at how the loss takes the weights"
        raise first_bad_value(run) or first_bad_gradient(run) or NonFiniteError(unknown)
    return grads


def _diagnosed(name: str, run: Copies, resets: Tensor | None, probes: int, lyapunov: int | None) -> LayerDiagnosis:
    timeline = Timeline(run, resets)
    lag = lag_profile(timeline, probes)
    units, missing = unit_figures(run)
    jacobian: JacobianProfile | None = None
    exponents: Lyapunov | None = None
    try:
        jacobian, exponents = measure_tangents(Trajectory.of(timeline, rows=8), lyapunov)
    except UnmeasurableError as error:
        missing += [Missing(figure, str(error)) for figure in ("jacobian", "lyapunov")]
    if lag is None:
        why = "the state has no floating numbers"
        if any(map(differentiable, leaves(run[0].state))):
            why = "the loss takes nothing of this layer's outputs, or of its last state nothing that has rows"
        missing += [Missing(figure, why) for figure in ("lag", "reach")]
    return LayerDiagnosis(
        name=name,
        cell=name_of(run.cell),
        flow=gradient_flow(run),
        lag=lag,
        reach=None if lag is None else Reach.of(lag),
        weights=weight_shares(run),
        jacobian=jacobian,
        lyapunov=exponents,
        units=units,
        missing=tuple(sorted(missing, key=lambda one: one.figure)),
    )
