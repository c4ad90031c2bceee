"""What running steps again takes: the same random numbers and autocast, stored states, and checks of what came out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from unrolled.errors import GradientError
from unrolled.trees import Structure, Tree, flatten, leaves, unflatten

RandomState: TypeAlias = tuple[Tensor, ...]
"""The state of torch's default generators, the CPU's first, and of those that are passed by hand."""


class AmbientState:
    """Autocast and torch's random numbers, for tensors on some devices.

    Args:
        tensors: what is computed with.
        generators: from which steps draw besides the default ones.
    """

    def __init__(self, tensors: Iterable[Tensor], generators: Sequence[Generator] = ()) -> None:
        self._by_hand = generators
        devices = {tensor.device for tensor in tensors}
        self._cuda = sorted((device for device in devices if device.type == "cuda"), key=str)
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in sorted({device.type for device in devices})
            if torch.amp.is_autocast_available(kind)
        ]
        self._latest: RandomState = ()

    def random(self) -> RandomState:
        """The generators as they are; states that are equal share their memory."""
        found = (
            torch.get_rng_state(),
            *(torch.cuda.get_rng_state(device) for device in self._cuda),
            *(generator.get_state() for generator in self._by_hand),
        )
        if len(self._latest) != len(found) or not all(map(torch.equal, self._latest, found)):
            self._latest = found
        return self._latest

    def seed(self, random: RandomState) -> None:
        """Set the generators back."""
        (cpu, *cuda), by_hand = random[: 1 + len(self._cuda)], random[1 + len(self._cuda) :]
        torch.set_rng_state(cpu)
        for device, state in zip(self._cuda, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        self._set_by_hand(by_hand)

    def _set_by_hand(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self._by_hand, states, strict=True):
            generator.set_state(state)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A context with autocast as it was; random numbers drawn inside leave the generators as they were."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=self._cuda))
            stack.callback(self._set_by_hand, [generator.get_state() for generator in self._by_hand])
            for kind, dtype, enabled, cached in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached))
            yield


class Slots:
    """Stored states, in memory that is made once: small tensors that stay would cut the heap to pieces.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._memory: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
        self._stored: dict[int, tuple[list[Tensor], Structure, RandomState]] = {}

    @torch.no_grad()
    def store(self, slot: int, state: Tree, random: RandomState) -> None:
        """Keep a copy of a state, and of the random numbers to come."""
        tensors, structure = flatten(state)
        kept = [self._place(n, slot, leaf).copy_(leaf) for n, leaf in enumerate(tensors)]
        self._stored[slot] = kept, structure, random

    def restore(self, slot: int) -> tuple[Tree, RandomState]:
        """What is in a slot, where it stays."""
        kept, structure, random = self._stored[slot]
        return unflatten(structure, kept), random

    def _place(self, number: int, slot: int, leaf: Tensor) -> Tensor:
        """Memory for a leaf with its rows, of which an earlier step may have had more."""
        key = number, leaf.shape[1:], leaf.dtype
        rows = leaf.shape[0] if leaf.dim() else 1
        memory = self._memory.get(key)
        if memory is None or memory.shape[1] < rows:
            memory = leaf.new_empty((self._count, rows, *leaf.shape[1:]))
            self._memory[key] = memory
        return memory[slot, :rows] if leaf.dim() else memory[slot, 0]


@dataclass(frozen=True)
class Checksum:
    """What is kept of a tree of tensors to tell whether it comes out the same again.

    Attributes:
        leaves: for each leaf a sum with alternating signs, and the norm.

    Example:
        >>> Checksum.of(torch.tensor([3.0, 4.0]))
        Checksum(leaves=((-1.0, 5.0),))
    """

    leaves: tuple[tuple[float, float], ...]

    @classmethod
    @torch.no_grad()
    def of(cls, tree: Tree) -> Checksum:
        """The checksum of a tree: two passes over it."""
        flat = [(torch.view_as_real(leaf) if leaf.is_complex() else leaf).flatten() for leaf in leaves(tree)]
        numbers = [x if x.dtype in (torch.float32, torch.float64) else x.double() for x in flat]
        found = [y.double() for x in numbers for y in (x[::2].sum() - x[1::2].sum(), torch.linalg.vector_norm(x))]
        both = torch.stack(found).tolist() if found else []
        return cls(tuple(zip(both[::2], both[1::2], strict=True)))

    def matches(self, before: Checksum) -> bool:
        """Whether two checksums are of the same numbers, but for rounding."""
        for now, (total, norm) in zip(self.leaves, before.leaves, strict=True):
            for a, b in zip(now, (total, norm), strict=True):
                # In norms, rounding moves the sum of the same numbers by less than this, other numbers by about one.
                near = a == b or abs(a - b) <= 1e-3 * norm
                if not near and not (math.isnan(a) and math.isnan(b)):
                    return False
        return True


class VersionCheck:
    """Tensors that must not be written into until a backward pass: autograd itself looks after those with a gradient.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._versions = {name: (x, x._version) for name, x in tensors.items() if not x.is_inference()}

    def check(self) -> None:
        """Refuse a backward pass if one of them was written into.

        Raises:
            GradientError: naming it.
        """
        for name, (tensor, version) in self._versions.items():
            if tensor._version != version:
                raise GradientError(
                    f"{name} has been modified by an inplace operation since the forward pass, whose steps are run "
                    "again for the backward pass; write into it after backward, or leave memory= and checkpoint= out"
                )
