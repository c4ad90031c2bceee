"""Runs with a backward pass of their own, under autograd: one Function for truncated and checkpointed BPTT."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from unrolled.autograd_graph import nodes_behind
from unrolled.errors import GradientError
from unrolled.trees import Tree, flatten, unflatten


@dataclass
class Expiry:
    """Whether a run may still be differentiated.

    Attributes:
        reason: why it may not, or None as long as it may.
        run: the run, as long as anything else holds it.
    """

    reason: str | None = None
    run: weakref.ref[DifferentiableRun] | None = None

    def expire(self, reason: str) -> None:
        """Free the graphs; a backward pass that needs them is refused with this reason."""
        self.reason = reason
        run = None if self.run is None else self.run()
        if run is not None:
            run.release()


class DifferentiableRun:
    """A run that computes its gradients itself.

    Attributes:
        NO_GRAPH: why its gradients cannot be differentiated, and what to do instead.
        expiry: whether it may still be differentiated.
    """

    NO_GRAPH: ClassVar[str]
    expiry: Expiry

    @property
    def protected(self) -> Sequence[Tensor]:
        """Tensors that must not be written into before the backward pass."""
        return ()

    @property
    def differentiable(self) -> list[bool]:
        """For each leaf of the results whether a gradient flows back from it."""
        raise NotImplementedError

    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of what it reads, from those of the results' leaves."""
        raise NotImplementedError

    def release(self) -> None:
        """Free the graphs."""

    def attach(self, outputs: Tree, last: Tree, read: Sequence[Tensor]) -> tuple[Tree, Tree]:
        """The results such that autograd comes back to this run for the gradients of what it read.

        The results lead to the run, which therefore must not hold them: autograd's cycles are never collected.
        """
        (shown, structure), (ends, kind) = flatten(outputs), flatten(last)
        found = _OwnBackward.apply(self, [*shown, *ends], *read)
        return unflatten(structure, found[: len(shown)]), unflatten(kind, found[len(shown) :])


class _OwnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: DifferentiableRun, results: list[Tensor], *read: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.expiry, ctx.no_graph = run.expiry, run.NO_GRAPH
        # The run hangs on a saved tensor: it goes when autograd lets go of what was saved.
        token = torch.empty(0)
        token.run = run
        ctx.save_for_backward(token, *run.protected)
        ctx.mark_non_differentiable(*(x for x, flows in zip(results, run.differentiable, strict=True) if not flows))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.expiry.reason is not None:
            raise GradientError(ctx.expiry.reason)
        if torch.is_grad_enabled():
            raise GradientError(ctx.no_graph)
        token, *_ = ctx.saved_tensors  # to read them refuses those that were written into since
        if not hasattr(token, "run"):
            raise GradientError(
                "saved_tensors_hooks replaced what the backward pass goes by; call a network with memory=, checkpoint= "
                "or stride < horizon outside of them: its own memory is bounded already"
            )
        return (None, None, *token.run.backward(grads))


def reason_expired(loss: Tensor) -> str | None:
    """Why a loss can no longer be differentiated, if it depends on a run that has expired."""
    expiries = (getattr(node, "expiry", None) for node in nodes_behind([loss]))
    return next((found.reason for found in expiries if isinstance(found, Expiry) and found.reason is not None), None)
