"""torch's LSTM kernel inside of a step, written as the operations that it fuses: those can be partitioned and emitted.

Source: S. Hochreiter and J. Schmidhuber, "Long short-term memory" (1997), with the gates in torch.nn's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_Pair = tuple[Tensor, Tensor]


class UnfusedLayers(TorchFunctionMode):
    """A context in which `torch.nn.LSTM` is computed by simpler operations, with the same numbers but for rounding."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function; a layer of LSTMs over a padded batch by its formula."""
        if func is torch.lstm and not kwargs and isinstance(args[1], tuple | list):
            x, (h, c), weights, biases, layers, p, training, bidirectional, batch_first = args
            each = (4 if biases else 2) * layers * (2 if bidirectional else 1)
            if len(weights) == each:  # with a projection there are more
                by_cell = [weights[i : i + each // layers] for i in range(0, each, each // layers)]
                turned = x.transpose(0, 1) if batch_first else x
                y, h, c = _stacked(turned, (h, c), by_cell, p if training else 0.0, 2 if bidirectional else 1)
                return (y.transpose(0, 1) if batch_first else y), h, c
        return func(*args, **(kwargs or {}))


def _stacked(x: Tensor, states: _Pair, layers: Sequence[Any], p: float, directions: int) -> tuple[Tensor, ...]:
    """Layers over a sequence `[T, B, I]`: outputs `[T, B, directions * H]` and last states `[L * directions, B, H]`."""
    starts = list(zip(states[0].unbind(0), states[1].unbind(0), strict=True))
    ends: list[_Pair] = []
    for number, weights in enumerate(layers):
        each = len(weights) // directions
        outputs = []
        for direction in range(directions):
            of_direction = weights[direction * each : (direction + 1) * each]
            y, end = _one_direction(x, starts[len(ends)], of_direction, reverse=direction == 1)
            outputs.append(y)
            ends.append(end)
        x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
        if p and number < len(layers) - 1:
            x = F.dropout(x, p)
    h, c = zip(*ends, strict=True)
    return x, torch.stack(h), torch.stack(c)


def _one_direction(x: Tensor, state: _Pair, weights: Sequence[Tensor], *, reverse: bool) -> tuple[Tensor, _Pair]:
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    h, c = state
    found: list[Tensor] = []
    steps = x.unbind(0)
    for step in reversed(steps) if reverse else steps:
        i, f, g, o = (F.linear(step, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        found.append(h)
    return torch.stack(found[::-1] if reverse else found), (h, c)
