"""What the library tries out before a call: nobody notices it, and it draws none of the user's random numbers."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator

from unrolled.internals import DispatchMode, saved_hooks_hidden, uncached, unwatched


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """A context for what is tried out before a call: hooks on saved tensors, modes and anomaly mode do not see it.

    It draws no random numbers of torch's, and is not in inference mode even where the call is.
    """
    with (
        unwatched(),
        torch.inference_mode(False),
        saved_hooks_hidden(),
        torch.autograd.set_detect_anomaly(False),
        uncached(),
        OwnDraws(),
    ):
        yield


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """A context in which a step is tried out: nobody hears its warnings, which the call itself gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers: fused attention is tagged as if it did, dropout or not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if func is torch.ops.aten.native_dropout.default:
        return given["train"] is not False  # with p = 0 too, on the CPU
    dropout = [argument for argument in func._schema.arguments if argument.name == "dropout_p"]
    return not dropout or bool(given.get("dropout_p", dropout[0].default_value))


class _Own(threading.local):
    drawing = False


_own = _Own()


class OwnDraws(DispatchMode):
    """A context in which torch's random numbers come from generators of its own, the same ones each time.

    So do those of generators that are passed by hand.

    Setting torch's generator back afterwards would let other threads draw numbers again that they have drawn meanwhile.

    Args:
        seed: of the generators.

    Example:
        >>> before = torch.get_rng_state()
        >>> with OwnDraws():
        ...     one = torch.rand(3)
        >>> with OwnDraws():
        ...     other = torch.nn.functional.dropout(torch.ones(3)), torch.rand(3)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._generators: dict[torch.device, Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, with a generator where it draws and was given none."""
        kwargs = kwargs or {}
        if _own.drawing or not draws(func, args, kwargs):
            return func(*args, **kwargs)
        _own.drawing = True  # torch does not tell one generator from another here: contexts around this one let it be
        try:
            drawing = _with_generator(func)
            if drawing is None:
                return self._by_torchs_own(func, args, kwargs)
            return drawing(*args, **{**kwargs, "generator": self._generator(_device(args, kwargs))})
        finally:
            _own.drawing = False

    def _generator(self, device: torch.device) -> Generator:
        if device not in self._generators:
            self._generators[device] = Generator(device if device.type != "meta" else "cpu").manual_seed(self.seed)
        return self._generators[device]

    def _by_torchs_own(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The few operations that take no generator: torch's is set back after each."""
        number = int(torch.randint(1 << 30, (), generator=self._generator(torch.device("cpu"))))
        with torch.random.fork_rng():
            torch.manual_seed(number)
            return func(*args, **kwargs)


def _with_generator(func: Any) -> Any:
    """The overload of an operation that takes a generator besides its own arguments; None if there is none."""
    names = [argument.name for argument in func._schema.arguments]
    for other in (func, *(getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads())):
        taken = [argument.name for argument in other._schema.arguments]
        if "generator" in taken and [n for n in taken if n != "generator"] == [n for n in names if n != "generator"]:
            return other
    return None


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    tensors = (arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
