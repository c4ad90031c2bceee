"""What `unrolled diagnose` and `unrolled train --watch` measure: a character model on text that it has not seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from unrolled.diagnosis.diagnose import diagnose
from unrolled.diagnosis.results import Diagnosis
from unrolled.drawing.draw import draw
from unrolled.errors import DataError, RunError
from unrolled.train.config import TrainConfig
from unrolled.train.model import CharacterModel
from unrolled.train.run import Run, load_run
from unrolled.train.text import BUILT_IN, read_text, split_text
from unrolled.train.windows import each_window
from unrolled.trees import Tree

Loss: TypeAlias = Callable[[Tensor, Tree], Tensor]

_WINDOWS, _STREAMS = 4, 8


def diagnosis_of(model: CharacterModel, numbers: Tensor, config: TrainConfig) -> Diagnosis:
    """Diagnose a model without dropout, over more steps than a window has: what the window cuts off shows.

    Args:
        model: the model; it is left in the mode in which it was.
        numbers: a text as numbers, `[N]`: the first four windows of up to eight streams are read.
        config: gives the window, which is the horizon unless the network has one.

    Raises:
        DataError: for a text that is too short for two steps.
    """
    training = model.training
    model.eval()
    try:
        inputs, loss = sample_of(model, numbers, config)
        return diagnose(model.rnn, inputs, loss, horizon=horizon_of(model, config))
    finally:
        model.train(training)


def horizon_of(model: CharacterModel, config: TrainConfig) -> int:
    """How many copies gradients flow back through while the model is trained: a window's, unless it is cut within."""
    return model.rnn.horizon or config.window


def sample_of(model: CharacterModel, numbers: Tensor, config: TrainConfig) -> tuple[Tensor, Loss]:
    """What the recurrent network of a model reads of a text, `[T, B, I]`, and the loss that it is trained on.

    Raises:
        DataError: for a text that is too short for two steps.
    """
    streams = min(_STREAMS, config.batch, (len(numbers) - 1) // 2)
    if streams < 1:
        raise DataError(f"a diagnosis needs at least 3 characters, got {len(numbers)}; give a longer text")
    characters, following = next(each_window(numbers, streams, _WINDOWS * config.window))

    def loss(outputs: Tensor, state: Tree) -> Tensor:
        return F.cross_entropy(model.head(outputs).flatten(0, 1), following.flatten())

    return model.embedding(characters).detach(), loss


def diagnose_run(path: Path, text: Path | None = None) -> Diagnosis:
    """Diagnose the model of a run on its own validation text, or on another one.

    Raises:
        RunError: if the directory is no run.
        DataError: if the text cannot be read, or is no longer the one that the run was trained on.
    """
    config, model, numbers = loaded(path, text)
    return diagnosis_of(model, numbers, config)


def draw_run(path: Path, target: Path, text: Path | None = None, chart: str | None = None) -> Path:
    """Draw the network of a run as a page or a picture, or one chart, on its own validation text or on another one.

    Raises:
        RunError: if the directory is no run.
        DataError: if the text cannot be read, or is no longer the one that the run was trained on.
        OptionError: for a file that cannot be drawn.
    """
    config, model, numbers = loaded(path, text)
    return drawn(model, numbers, config, target, chart)


def drawn(model: CharacterModel, numbers: Tensor, config: TrainConfig, target: Path, chart: str | None = None) -> Path:
    """Draw a model's network on a text; see `draw`."""
    inputs, loss = sample_of(model.eval(), numbers, config)
    measured = chart is not None or target.suffix.lower() == ".html"
    # The horizon of the diagnosis: one run has one verdict.
    draw(model.rnn, inputs, target, loss=loss if measured else None, chart=chart, horizon=horizon_of(model, config))
    return target


def loaded(path: Path, text: Path | None) -> tuple[TrainConfig, CharacterModel, Tensor]:
    """A run's config and model, and a text as its numbers."""
    config, model, vocabulary = load_run(path)
    told = read_text(text) if text else split_text(_own_text(path), batch=config.batch, window=config.window).validation
    return config, model, vocabulary.encode(told)


def _own_text(path: Path) -> str:
    try:
        first = next(line for line in Run(path).metrics() if line["kind"] == "text")
        name, digest = str(first["file"]), str(first["sha256"])
    except (OSError, StopIteration, KeyError, TypeError, json.JSONDecodeError) as error:
        raise RunError(f"{path} does not say in metrics.jsonl which text it is of; name one with --text") from error
    text = read_text(None if name == BUILT_IN else Path(name))
    if hashlib.sha256(text.encode("utf-8")).hexdigest() != digest:
        raise DataError(f"text {name} is not the one that {path} was trained on, by its sha256; name one with --text")
    return text
