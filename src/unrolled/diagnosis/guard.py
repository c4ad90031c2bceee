"""A guard over training: the first number that is not finite is traced to the copy and operation that made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unrolled.autograd_graph import differentiable
from unrolled.diagnosis.nonfinite import first_bad_gradient, first_bad_value, is_finite
from unrolled.errors import NonFiniteError
from unrolled.introspection.copies import Copies
from unrolled.introspection.layered import LayeredCopies, copies
from unrolled.networks.torch_layers import networks_of
from unrolled.trees import Tree, leaves, map_leaves


class Guard:
    """A guard over one network; made by `guard`. Leave its `with` block, or call `remove`, to end it."""

    def __init__(self, rnn: nn.Module) -> None:
        self._rnn, self._call = rnn, _Call((), {})
        self._returned: list[_Call] = []
        self._seen: set[str] = set()
        self._busy = False
        self._handles: list[RemovableHandle] = [
            rnn.register_forward_pre_hook(self._starts, with_kwargs=True),
            rnn.register_forward_hook(self._ends, with_kwargs=True),
        ]
        trained = [(name, parameter) for name, parameter in rnn.named_parameters() if parameter.requires_grad]
        self._trained = len(trained)
        for name, parameter in trained:
            self._handles.append(parameter.register_hook(self._weight_hook(f"the gradient of {name}")))

    def remove(self) -> None:
        """End it: nothing is watched or kept any more."""
        for handle in self._handles:
            handle.remove()
        self._call, self._returned = _Call((), {}), []

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _starts(self, rnn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._busy:
            self._call, self._returned = _Call(args, kwargs), []

    def _ends(self, rnn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: tuple[Tree, Tree]) -> None:
        if self._busy:
            return
        call, found = self._call, list(filter(differentiable, leaves(result)))
        if not is_finite(found):
            raise self._explained(lambda: self._run_again(call)) from None
        call.grads = [None] * len(found)
        for n, tensor in enumerate(found):
            if tensor.requires_grad:
                tensor.register_hook(self._grad_hook(call, n))

    def _grad_hook(self, call: _Call, n: int) -> Callable[[Tensor], None]:
        """A hook on one tensor that a call returned: what the loss takes of it is what the way back starts from."""

        def add(grad: Tensor) -> None:
            if not self._busy and self._handles:
                self._seen.clear()
                before = call.grads[n]
                call.grads[n] = grad if before is None else before + grad
                if call not in self._returned:
                    self._returned.append(call)

        return add

    def _weight_hook(self, what: str) -> Callable[[Tensor], None]:
        def watch(grad: Tensor) -> None:
            if (
                self._returned
                and not self._busy
                and not is_finite([grad.coalesce().values() if grad.is_sparse else grad])
            ):
                raise self._explained(self._back_again, what)
            self._seen.add(what)
            if len(self._seen) == self._trained and not self._busy:
                self._forget_grads()

        return watch

    def _forget_grads(self) -> None:
        """After the last weight's gradient: memory of the loss's gradients is there for the next step again."""
        for call in self._returned:
            call.grads = [None] * len(call.grads)
        self._returned = []

    def _explained(
        self, look: Callable[[], NonFiniteError | None], what: str = "the outputs or states"
    ) -> NonFiniteError:
        self._busy = True
        try:
            found = look()
        finally:
            self._busy = False
        return found or NonFiniteError(
            f"there is a NaN or an infinity in {what} of {self._rnn._get_name()}, but none when the reference engine "
            "runs it again; see whether the loss takes the weights another way too, and compare: ur.verify(rnn, inputs)"
        )

    def _run_again(self, call: _Call) -> NonFiniteError | None:
        with torch.no_grad():
            return first_bad_value(call.copies_of(self._rnn))

    def _back_again(self) -> NonFiniteError | None:
        for call in self._returned:
            with torch.enable_grad():
                run = call.copies_of(self._rnn)
                returned = filter(differentiable, leaves((run.outputs, run.state)))
                pairs = [(x, grad) for x, grad in zip(returned, call.grads, strict=True) if grad is not None]
                loss = sum(((x * grad.detach()).sum() for x, grad in pairs), torch.zeros(()))
                run.observe(loss)
                found = first_bad_value(run) or first_bad_gradient(run)
            if found is not None:
                return found
        return None


class _Call:
    """What is kept of one call, so that it can be made again: references, and the state of the random numbers."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.random = torch.random.get_rng_state()
        self.on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.grads: list[Tensor | None] = []

    def copies_of(self, rnn: nn.Module) -> Copies | LayeredCopies:
        """The copies of the same call by the reference engine, with the same random numbers."""
        with torch.random.fork_rng():
            torch.random.set_rng_state(self.random)
            if self.on_cuda:
                torch.cuda.set_rng_state_all(self.on_cuda)
            options = {**dict(zip(("inputs", "state"), self.args, strict=False)), **self.kwargs}
            inputs = options.pop("input") if "input" in options else options.pop("inputs")
            if "hx" in options:  # as torch.nn's layers call it
                options["state"] = options.pop("hx")
            return copies(rnn, map_leaves(Tensor.detach, inputs), **options)


def guard(rnn: nn.Module) -> Guard:
    """Watch a network while it trains, and stop at the first NaN or infinity, saying where it came from.

    Outputs, states and the gradients of weights are watched, by one sum over each. Where one is not finite, the call is
    made again by the reference engine with the same masks, and the error names the time step, the row, the operation of
    the cell and the values that went in. In the forward pass it is raised by the call, in the backward pass by
    `loss.backward()`, before any weight has changed.

    Between a call and the next one the guard keeps references to its inputs, state and context, and the state of the
    random numbers (5 KB); during the backward pass also to the loss's gradients by its outputs. What was passed must
    not be written to before that pass. A network with a horizon is traced back through all copies. Calls are watched;
    `rnn.windows`, which is none, is not.

    Args:
        rnn: what `unroll`, `stack` or `Bidirectional` made, or a `RNN`, `LSTM` or `GRU` layer of this package.

    Returns:
        A handle with `remove()`, which ends it as well when used as a context manager.

    Raises:
        OptionError: if `rnn` is no unrolled network.

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.unroll(ur.RNNCell(1, 1, bias=False, nonlinearity="relu"))
        >>> for weight in rnn.parameters():
        ...     weight.data.fill_(1e20)
        tensor([[1.0000e+20]])
        tensor([[1.0000e+20]])
        >>> with ur.guard(rnn):
        ...     try:
        ...         outputs, state = rnn(torch.ones(5, 2, 1))
        ...     except ur.NonFiniteError as error:
        ...         print(error.t, error.row, error.operation)
        1 0 aten.mm
    """
    networks_of(rnn, "guard", remedy="pass the network inside of it")
    return Guard(rnn)
