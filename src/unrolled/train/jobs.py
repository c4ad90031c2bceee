"""The smaller jobs: the network of a run (or one that is not trained yet) planned, verified, diagnosed and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from unrolled import cells
from unrolled.bptt.memory_plan import MemoryPlan
from unrolled.cells.gates import GatedCell
from unrolled.diagnosis.results import Diagnosis
from unrolled.networks.bounded import plan_memory
from unrolled.networks.unroll import unroll
from unrolled.train.config import TrainConfig
from unrolled.train.diagnosing import diagnosis_of, draw_model
from unrolled.train.model import CharacterModel
from unrolled.train.run import Run, load_run
from unrolled.train.text import read_text, split_text
from unrolled.verification import Verification, verify


def plan_run(config: TrainConfig, run: Path | None, memory: str | None, steps: int | None) -> MemoryPlan:
    """The trade-off for the recurrent network of a run, in training.

    Args:
        config: says what network, and how many rows, if there is no run.
        run: a run directory, or None.
        memory: a budget to mark the choice of, as `unroll` takes it; the config's own by default.
        steps: T; the config's window by default.

    Raises:
        RunError: if the directory is no run.
        OptionError: for a budget that is none, or too small.
    """
    if run is not None:
        config, model, _ = load_run(run)
    else:
        model = CharacterModel(config, characters=1)
    rnn = unroll(model.rnn.cell, memory=memory or model.rnn.memory).train()
    inputs = torch.zeros(steps or config.window, config.batch, config.embedding_size, requires_grad=True)
    return plan_memory(rnn, inputs)


def verify_cells() -> Iterator[tuple[str, Verification]]:
    """Every cell of this package, with sizes that fit no vector width."""
    exported = (getattr(cells, name) for name in cells.__all__)
    makers = [found for found in exported if isinstance(found, type) and issubclass(found, GatedCell)]
    for make in makers:
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


def diagnose_run(path: Path, text: Path | None = None) -> Diagnosis:
    """Diagnose the model of a run on its own validation text, or on another one.

    Raises:
        RunError: if the directory is no run.
        DataError: if the text cannot be read, or is no longer the one that the run was trained on.
    """
    config, model, numbers = _load_with_text(path, text)
    return diagnosis_of(model, numbers, config)


def draw_run(path: Path, target: Path, text: Path | None = None, chart: str | None = None) -> Path:
    """Draw the network of a run as a page or a picture, or one chart, on its own validation text or on another one.

    Raises:
        RunError: if the directory is no run.
        DataError: if the text cannot be read, or is no longer the one that the run was trained on.
        OptionError: for a file that cannot be drawn.
    """
    config, model, numbers = _load_with_text(path, text)
    return draw_model(model, numbers, config, target, chart)


def _load_with_text(path: Path, file: Path | None) -> tuple[TrainConfig, CharacterModel, Tensor]:
    """A run's config and model, and a text as its numbers: that of a file, or what the run was validated on."""
    config, model, vocabulary = load_run(path)
    if file:
        text = read_text(file)
    else:
        text = split_text(Run(path).training_text(), batch=config.batch, window=config.window).validation
    return config, model, vocabulary.encode(text)
