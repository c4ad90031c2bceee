"""What `unrolled verify` runs: the networks of a run, or every cell of this package at a small size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from unrolled import cells
from unrolled.networks.unroll import unroll
from unrolled.train.run import load_run
from unrolled.verification import Verification, verify

_CELLS = (
    cells.RNNCell,
    cells.LSTMCell,
    cells.GRUCell,
    cells.PeepholeLSTMCell,
    cells.LayerNormLSTMCell,
    cells.MinGRUCell,
    cells.SLSTMCell,
)


def verify_cells() -> Iterator[tuple[str, Verification]]:
    """Every cell of this package, with sizes that fit no vector width."""
    for make in _CELLS:
        torch.manual_seed(0)
        yield make.__name__, verify(unroll(make(5, 19)), torch.randn(12, 3, 5))


def verify_run(run: Path) -> Iterator[tuple[str, Verification]]:
    """The network of a run on characters that it knows.

    Raises:
        RunError: if the directory is no run.
    """
    config, model, vocabulary = load_run(run)
    characters = torch.arange(config.window * 2).view(-1, 2) % len(vocabulary)
    with torch.no_grad():
        inputs = model.embedding(characters)
    yield f"{config.cell} of {run}", verify(model.rnn, inputs)
