"""What a network finds around it, kept so that it finds the same when it is run again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

RandomState: TypeAlias = tuple[Tensor, ...]
"""The state of torch's default generators, the CPU's first."""


class Surroundings:
    """Autocast and torch's random numbers, for tensors on some devices.

    Args:
        tensors: what is computed with.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        kinds = {tensor.device for tensor in tensors}
        self._cuda = sorted((device for device in kinds if device.type == "cuda"), key=str)
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in sorted({device.type for device in kinds})
            if torch.amp.is_autocast_available(kind)
        ]
        self._latest: RandomState = ()

    def random(self) -> RandomState:
        """The generators as they are; states that are equal share their memory."""
        found = (torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda))
        if len(self._latest) != len(found) or not all(map(torch.equal, self._latest, found)):
            self._latest = found
        return self._latest

    def seed(self, random: RandomState) -> None:
        """Set the generators back."""
        torch.set_rng_state(random[0])
        for device, state in zip(self._cuda, random[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Autocast as it was; random numbers that are drawn inside leave the generators as they were."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=self._cuda))
            for kind, dtype, enabled, cached in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached))
            yield
