"""Work that concerns nobody but the library: whoever looks on at a call sees the call itself and nothing else."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from unrolled.draws import OwnDraws
from unrolled.internals import saved_hooks_hidden, uncached, unwatched


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
