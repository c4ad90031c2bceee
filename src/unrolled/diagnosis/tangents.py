"""Tangents along a trajectory: Lyapunov exponents and Jacobian products, without a Jacobian in memory.

The trajectory is that of rows, each from its own first copy on, or over its longest stretch without a reset: a product
over a reset is zero. At each step some tangents `[R, D, m]` are pushed through the step by forward-mode derivatives and
made orthonormal again by a QR decomposition; the triangular factors hold how they grew. With as many tangents as a
row's state has entries their product is the whole Jacobian's; with fewer it is that of a random subspace, and the
leading singular value is found by one pass back from where that subspace arrived.

Sources: G. Benettin et al., "Lyapunov characteristic exponents for smooth dynamical systems", Meccanica 15 (1980);
N. Halko, P. Martinsson and J. Tropp, "Finding structure with randomness", SIAM Review 53 (2011), for the pass back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unrolled.cells.contract import name_of
from unrolled.diagnosis.figures import JacobianProfile, Lyapunov
from unrolled.diagnosis.statistics import median, quartiles
from unrolled.diagnosis.timeline import Timeline
from unrolled.errors import OptionError
from unrolled.introspection.single_copy import Copy
from unrolled.plan.independence import couples_rows
from unrolled.recording.events import UnrecordableError
from unrolled.recording.guards.twin import twin_of
from unrolled.trees import Tree, flatten, leaves, map_leaves, unflatten


class UnmeasurableError(Exception):
    """What cannot be measured; the message says why, and ends up in the result."""


@dataclass(frozen=True)
class Trajectory:
    """What some rows received, from each row's own first copy on, the longest row first.

    Attributes:
        cell: a copy of the cell, its parameters constants.
        inputs: for each step a tree of `[R, ...]`, with the rows that go on.
        states: likewise.
        context: `[R, ...]`, or None.
    """

    cell: nn.Module
    inputs: Sequence[Tree]
    states: Sequence[Tree]
    context: Tree

    @classmethod
    def of(cls, timeline: Timeline, rows: int) -> Trajectory:
        """That of some rows of a run, spread evenly over the batch; of each its longest stretch without a reset.

        Raises:
            UnmeasurableError: for a cell that couples rows, cannot be copied, or has no state that moves.
        """
        cell = _measurable_cell(timeline)
        many = max(timeline.sizes)
        picked = sorted({round(n * (many - 1) / max(rows - 1, 1)) for n in range(min(rows, many))})
        stretches = sorted(((row, _longest_stretch(timeline, row)) for row in picked), key=lambda pair: -len(pair[1]))
        stretches = [pair for pair in stretches if pair[1]]
        inputs, states = [], []
        with torch.no_grad():
            for j in range(len(stretches[0][1])):
                here = [(row, timeline.copies[ks[j]]) for row, ks in stretches if j < len(ks)]
                inputs.append(_rows_of(here, lambda copy: copy.input))
                states.append(_rows_of(here, lambda copy: copy.state))
            context = map_leaves(lambda x: x[[row for row, _ in stretches]], timeline.run.context)
        return cls(cell, inputs, states, context)

    def step(self, j: int, rows: int | None = None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Step j as a function of a row's floating state, one vector for each row, and where it is taken: `[R, D]`.

        Args:
            j: the step.
            rows: how many of the rows that go on; None for all.
        """
        input, state = map_leaves(lambda x: x[:rows], (self.inputs[j], self.states[j]))
        tensors, structure = flatten(state)
        floating = [n for n, x in enumerate(tensors) if x.is_floating_point()]
        sizes = [tensors[n][0].numel() for n in floating]
        context = () if self.context is None else (map_leaves(lambda x: x[: len(tensors[0])], self.context),)

        def vector_of(state: Sequence[Tensor]) -> Tensor:
            parts = [state[n] for n in floating]
            return torch.cat([x.flatten(1) if x.dim() > 1 else x.unsqueeze(1) for x in parts], 1)

        def run(vector: Tensor) -> Tensor:
            moved = list(tensors)
            for n, part in zip(floating, vector.split(sizes, 1), strict=True):
                moved[n] = part.reshape(tensors[n].shape).to(tensors[n].dtype)
            return vector_of(leaves(self.cell(input, unflatten(structure, moved), *context)[1]))

        return run, vector_of(tensors)

    def __len__(self) -> int:
        return len(self.states)


def _measurable_cell(timeline: Timeline) -> nn.Module:
    """A copy of the cell, its parameters constants.

    Raises:
        UnmeasurableError: for a cell whose rows have no Jacobians of their own, or that cannot be copied.
    """
    first, cell = timeline.copies[0], timeline.run.cell
    tensors = leaves(first.state)
    if not any(x.is_floating_point() for x in tensors):
        raise UnmeasurableError("the state has no floating numbers")
    if any(x.dim() == 0 or len(x) != timeline.sizes[0] for x in tensors):
        raise UnmeasurableError("the state has leaves without rows, so that no row has a Jacobian of its own")
    try:
        twin = twin_of(cell).requires_grad_(False)
    except UnrecordableError as error:
        raise UnmeasurableError(f"{name_of(cell)} {error}") from error
    if couples_rows(twin, first.input, first.state, timeline.run.context_of(first)):
        raise UnmeasurableError("rows depend on each other in a step, so that no row has a Jacobian of its own")
    return twin


def _longest_stretch(timeline: Timeline, row: int) -> list[int]:
    """The longest run of copies that a row passes without a reset between two of them."""
    stretches: list[list[int]] = [[]]
    for k, (size, fresh) in enumerate(zip(timeline.sizes, timeline.fresh, strict=True)):
        if row < size:
            if fresh is not None and bool(fresh[row]):
                stretches.append([])
            stretches[-1].append(k)
    return max(stretches, key=len)


def _rows_of(rows: Sequence[tuple[int, Copy]], tree_of: Callable[[Copy], Tree]) -> Tree:
    """One row of each of several copies, as one tree."""
    numbers, copies = zip(*rows, strict=True)
    if all(copy is copies[0] for copy in copies):
        return map_leaves(lambda x: x[list(numbers)].detach(), tree_of(copies[0]))
    found = [map_leaves(lambda x, row=row: x[row : row + 1].detach(), tree_of(copy)) for row, copy in rows]
    return map_leaves(lambda *x: torch.cat(x), *found)


def measure_tangents(
    trajectory: Trajectory, exponents: int | None, *, profile: bool = True
) -> tuple[JacobianProfile | None, Lyapunov]:
    """The Jacobian products from each row's first copy on, and the leading Lyapunov exponents.

    Args:
        trajectory: at least two steps.
        exponents: how many exponents; None for four, or as many as there are.
        profile: whether Jacobian products are asked for; without them no more tangents are sent than exponents.

    Returns:
        A JacobianProfile (None without `profile`) and a Lyapunov.

    Raises:
        OptionError: for more exponents than a row's state has entries.
        UnmeasurableError: if a step cannot be differentiated forwards, or its numbers are not finite.
    """
    size = trajectory.step(0)[1].shape[1]
    if exponents is not None and not 1 <= exponents <= size:
        raise OptionError(
            f"lyapunov must be from 1 to the {size} numbers that a row's state of {name_of(trajectory.cell)} has, "
            f"got {exponents}; take fewer exponents"
        )
    wanted = min(4, size) if exponents is None else exponents
    try:
        with torch.no_grad():
            # Up to 32 tangents: with as many as the state has entries the products are exact.
            tangents = _Tangents(trajectory, max(wanted, min(size, 32)) if profile else wanted)
            tangents.push(_lags(len(trajectory)) if profile else ())
            return (tangents.profile() if profile else None), tangents.lyapunov(wanted)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "random operation" in reason:
            reason = "it draws random numbers; dropout over time is a wrapper: DropoutCell, ZoneoutCell"
        raise UnmeasurableError(f"a step cannot be differentiated forwards: {reason}") from error


def _lags(steps: int, most: int = 24) -> tuple[int, ...]:
    """Lags from 1 to T: all of them, or some evenly on a logarithmic scale."""
    if steps <= most:
        return tuple(range(1, steps + 1))
    return tuple(sorted({round(steps ** (n / (most - 1))) for n in range(most)}))


class _Tangents:
    """Tangents on their way along a trajectory.

    Attributes:
        growth: for each step the logarithms of how much each tangent grew, `[R, m]`.
        products: for each lag asked for the product of all triangular factors, `[R, m, m]`, its scale's logarithm
            `[R]`, and where the tangents arrived, `[R, D, m]`.
    """

    def __init__(self, trajectory: Trajectory, many: int) -> None:
        self.trajectory, self.many = trajectory, many
        at = trajectory.step(0)[1]
        self.size = at.shape[1]
        start = torch.eye(self.size, dtype=torch.float64)
        if many < self.size:
            # Always the same subspace: one network has one set of figures.
            drawn = torch.randn(self.size, many, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            start = torch.linalg.qr(drawn).Q
        self.start = start.to(at).expand(len(at), self.size, many)
        self.growth: list[Tensor] = []
        self.products: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def push(self, lags: Sequence[int]) -> None:
        """Push the tangents through all steps; keep the products over these lags."""
        tangents = self.start
        product = torch.eye(self.many).to(tangents).expand(len(tangents), self.many, self.many)
        scale = tangents.new_zeros(len(tangents))
        for j in range(len(self.trajectory)):
            step, at = self.trajectory.step(j)
            rows = len(at)
            pushed = self._pushed(step, at, tangents[:rows])
            if not pushed.isfinite().all():
                raise UnmeasurableError(f"the derivatives of step {j} of a row are not finite")
            tangents, factor = torch.linalg.qr(pushed)
            self.growth.append(factor.diagonal(dim1=1, dim2=2).abs().log())
            product, scale = self._rescaled(factor @ product[:rows], scale[:rows])
            if j + 1 in lags:
                self.products[j + 1] = product, scale, tangents

    def profile(self) -> JacobianProfile:
        """Norms and leading singular values of the products, lag by lag."""
        figures = []
        for lag, (product, scale, arrived) in sorted(self.products.items()):
            size = scale.double().exp()
            norms = torch.linalg.matrix_norm(product).double() * size * math.sqrt(self.size / self.many)
            if self.many < self.size:
                leading = self._leading(lag, arrived)
                # What was pushed is in the product too: its own norm is a bound from below as well.
                leading = torch.maximum(leading, torch.linalg.matrix_norm(product, 2).double() * size)
            else:
                leading = torch.linalg.matrix_norm(product, 2).double() * size
            figures.append((lag, median(norms), *quartiles(leading)))
        lags, norm, lower, middle, upper = zip(*figures, strict=True)
        return JacobianProfile(lags, norm, lower, middle, upper, len(self.start), self.size, self.many)

    def _leading(self, lag: int, arrived: Tensor) -> Tensor:
        """The leading singular value within the subspace in which the tangents arrived, `[R]`: one pass back."""
        cotangents, scale = arrived, arrived.new_zeros(len(arrived))
        for j in range(lag - 1, -1, -1):
            _, pull = torch.func.vjp(*self.trajectory.step(j, len(arrived)))
            cotangents = torch.func.vmap(lambda one, pull=pull: pull(one)[0], in_dims=2, out_dims=2)(cotangents)
            cotangents, scale = self._rescaled(cotangents, scale)
        return torch.linalg.matrix_norm(cotangents, 2).double() * scale.double().exp()

    def lyapunov(self, many: int) -> Lyapunov:
        """The mean growth of each tangent, after the first quarter of the steps, in which the tangents turn."""
        steps = len(self.growth)
        burn_in = steps // 4
        rows = len(self.growth[burn_in])
        totals = torch.zeros(rows, many, dtype=torch.float64)
        counts = torch.zeros(rows, 1, dtype=torch.float64)
        for growth in self.growth[burn_in:]:
            totals[: len(growth)] += growth[:, :many].double().cpu()
            counts[: len(growth)] += 1
        each = totals / counts
        errors = each.std(0) / math.sqrt(rows) if rows > 1 else torch.zeros(many)
        order = each.mean(0).argsort(descending=True)
        exponents, errors = each.mean(0)[order], errors[order]
        return Lyapunov(tuple(exponents.tolist()), tuple(errors.tolist()), steps - burn_in, burn_in, rows)

    @staticmethod
    def _rescaled(matrices: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices divided by their largest entries, whose logarithms are added to the scale: none runs over."""
        largest = matrices.abs().amax((1, 2)).clamp_min(torch.finfo(matrices.dtype).tiny)
        return matrices / largest[:, None, None], scale + largest.log()

    @staticmethod
    def _pushed(step: Callable[[Tensor], Tensor], at: Tensor, tangents: Tensor) -> Tensor:
        """The step's derivative along tangents `[R, D, m]`."""

        def along(tangent: Tensor) -> Tensor:
            with warnings.catch_warnings():
                # torch's own formulas for forward-mode derivatives are scripted when they are first used.
                warnings.filterwarnings("ignore", ".*torch.jit.script")
                pushed: Tensor = torch.func.jvp(step, (at,), (tangent,))[1]
            return pushed

        if tangents.shape[2] == 1:
            return along(tangents[..., 0].contiguous()).unsqueeze(2)
        return torch.func.vmap(along, in_dims=2, out_dims=2)(tangents)
