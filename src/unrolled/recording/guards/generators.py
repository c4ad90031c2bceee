"""Generators of random numbers other than torch's default ones: their states, as plain values to put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
"""What random numbers come from."""


def state_of(generator: Any) -> Any:
    """The state of a generator as plain values, equal to that of another moment if nothing was drawn.

    Example:
        >>> import random
        >>> generator = random.Random(0)
        >>> before = state_of(generator)
        >>> drawn = generator.random()
        >>> state_of(generator) == before
        False
        >>> set_state(generator, before)
        >>> generator.random() == drawn
        True
    """
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, np.random.Generator):
        generator = generator.bit_generator
    if isinstance(generator, np.random.BitGenerator):
        return _comparable(generator.state)
    if isinstance(generator, np.random.RandomState):
        return _comparable(generator.get_state(legacy=False))
    return generator.getstate()


def set_state(generator: Any, state: Any) -> None:
    """Set a generator to a state that `state_of` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _restored(state)
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = _restored(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_restored(state))
    else:
        generator.setstate(state)


def whose(kind: type) -> str:
    """Whose random numbers a kind of generator draws, in words."""
    module = kind.__module__.partition(".")[0].removeprefix("_")
    return {"random": "Python's", "numpy": "numpy's", "torch": "a torch.Generator"}.get(module, module)


def _comparable(state: Any) -> Any:
    """A state with each array as its dtype and bytes: arrays are not equal or unequal, but entry by entry."""
    if isinstance(state, dict):
        return {key: _comparable(value) for key, value in state.items()}
    return (state.dtype.str, state.tobytes()) if isinstance(state, np.ndarray) else state


def _restored(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _restored(value) for key, value in state.items()}
    return np.frombuffer(state[1], dtype=state[0]) if isinstance(state, tuple) else state
