"""A character model measured and drawn on text that it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from unrolled.diagnosis.diagnose import diagnose
from unrolled.diagnosis.results import Diagnosis
from unrolled.drawing.draw import draw
from unrolled.errors import DataError
from unrolled.train.config import TrainConfig
from unrolled.train.model import CharacterModel
from unrolled.train.text import each_window
from unrolled.trees import Tree


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
        inputs, loss = _inputs_and_loss(model, numbers, config)
        return diagnose(model.rnn, inputs, loss, horizon=model.horizon)
    finally:
        model.train(training)


def draw_model(
    model: CharacterModel, numbers: Tensor, config: TrainConfig, target: Path, chart: str | None = None
) -> Path:
    """Draw a model's network, run on a text as numbers `[N]`, as a page, a picture or one chart.

    Raises:
        DataError: for a text that is too short for two steps.
        OptionError: for a file that cannot be drawn.
    """
    inputs, loss = _inputs_and_loss(model.eval(), numbers, config)
    measured = chart is not None or target.suffix.lower() == ".html"
    # The horizon of the diagnosis: one run has one verdict.
    draw(model.rnn, inputs, target, loss=loss if measured else None, chart=chart, horizon=model.horizon)
    return target


def _inputs_and_loss(
    model: CharacterModel, numbers: Tensor, config: TrainConfig
) -> tuple[Tensor, Callable[[Tensor, Tree], Tensor]]:
    """What the recurrent network of a model reads of a text, `[T, B, I]`, and the loss that it is trained on."""
    streams = min(8, config.batch, (len(numbers) - 1) // 2)
    if streams < 1:
        raise DataError(f"a diagnosis needs at least 3 characters, got {len(numbers)}; give a longer text")
    characters, following = next(each_window(numbers, streams, 4 * config.window))

    def loss(outputs: Tensor, state: Tree) -> Tensor:
        return F.cross_entropy(model.head(outputs).flatten(0, 1), following.flatten())

    return model.embedding(characters).detach(), loss
