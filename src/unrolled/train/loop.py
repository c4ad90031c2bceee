"""Training, from top to bottom."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from unrolled.errors import DivergedError
from unrolled.train.config import TrainConfig
from unrolled.train.diagnosing import diagnosis_of
from unrolled.train.model import CharacterModel
from unrolled.train.run import Run
from unrolled.train.text import Split, Vocabulary, each_window, window_count
from unrolled.trees import map_leaves


@dataclass(frozen=True)
class Update:
    """One step of the optimiser: loss in nats per character, gradient norm before clipping."""

    number: int
    total: int
    loss: float
    grad_norm: float
    characters_per_second: float


@dataclass(frozen=True)
class Epoch:
    """One pass over the training text: bits per character on the training and the validation text."""

    number: int
    total: int
    train_bits: float
    validation_bits: float


class TrainingObserver(Protocol):
    """Learns how training goes."""

    def updated(self, update: Update) -> None:
        """After each update."""

    def epoch_ended(self, epoch: Epoch) -> None:
        """After each epoch."""


def train_model(
    config: TrainConfig, split: Split, run: Run, observer: TrainingObserver
) -> tuple[CharacterModel, Vocabulary]:
    """Train a character model by BPTT, its state carried from window to window.

    Every update is written to the run's metrics; the model is saved before the first update, after every epoch and
    when interrupted.

    Args:
        config: the options.
        split: the text.
        run: where metrics and model go.
        observer: learns of every update and epoch.

    Returns:
        The trained model and its characters.

    Raises:
        DivergedError: at the first loss or gradient norm that is not finite; the model saved last stays.
        KeyboardInterrupt: after saving, if the user interrupts.
    """
    torch.manual_seed(config.seed)
    vocabulary = Vocabulary.of(split.train)
    numbers = vocabulary.encode(split.train).to(config.device)
    validation = vocabulary.encode(split.validation).to(config.device)
    total = window_count(len(numbers), config.batch, config.window) * config.epochs
    model = CharacterModel(config, len(vocabulary)).to(config.device)
    number = 0
    try:
        run.save_model(model, vocabulary)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _one_cycle(done / total))
        for epoch in range(1, config.epochs + 1):
            state, losses, lengths = None, 0.0, 0
            model.train()
            for characters, following in each_window(numbers, config.batch, config.window):
                started = time.perf_counter()
                loss, state = model.loss(characters, following, state)
                model.zero_grad()
                loss.backward()
                norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.clip))
                nats, state = float(loss.detach()), map_leaves(Tensor.detach, state)
                del loss  # and with it the graph, before the next window makes another
                check_finite(f"update {number + 1}", config, run, {"loss": nats, "gradient norm": norm})
                optimizer.step()
                schedule.step()
                number += 1
                speed = characters.numel() / (time.perf_counter() - started)
                run.log(kind="update", number=number, loss=nats, grad_norm=norm)
                if config.watch and number % config.watch == 0:
                    run.log(kind="diagnosis", number=number, **diagnosis_of(model, validation, config).to_dict())
                observer.updated(Update(number, total, nats, norm, speed))
                losses, lengths = losses + nats * len(characters), lengths + len(characters)
            bits = bits_per_character(model, validation, config)
            check_finite(f"the validation of epoch {epoch}", config, run, {"bits per character": bits})
            ended = Epoch(epoch, config.epochs, losses / lengths / math.log(2), bits)
            run.log(kind="epoch", number=epoch, train_bits=ended.train_bits, validation_bits=bits)
            run.save_model(model, vocabulary)
            observer.epoch_ended(ended)
    except KeyboardInterrupt:
        run.save_model(model, vocabulary)
        run.log(kind="interrupted", number=number)
        raise
    return model, vocabulary


def _one_cycle(done: float) -> float:
    """Learning rate over its peak: up during the first twentieth, then down along a cosine, to a hundredth."""
    return min(done / 0.05 + 0.01, 0.505 + 0.495 * math.cos(math.pi * min(done, 1.0)))


def check_finite(where: str, config: TrainConfig, run: Run, figures: dict[str, float]) -> None:
    """Stop a training that came to NaN or infinity: no later update could mend it.

    Raises:
        DivergedError: if one of the figures is not finite.
    """
    if not all(map(math.isfinite, figures.values())):
        found = ", ".join(f"{name} {figure:g}" for name, figure in figures.items())
        raise DivergedError(
            f"training diverged at {where}: {found}, which must be finite; lower --learning-rate (it is "
            f"{config.learning_rate:g}) or --clip (it is {config.clip:g}); {run.path} keeps the model saved last"
        )


@torch.no_grad()
def bits_per_character(model: CharacterModel, numbers: Tensor, config: TrainConfig) -> float:
    """How well a model predicts a text, in bits per character, in evaluation mode and with its state carried on.

    Args:
        model: the model.
        numbers: the text as numbers, `[N]`.
        config: gives the window, and how many streams a long text is read in.
    """
    model.eval()
    # A stream has 4096 characters at least: with fewer, the fresh states at their beginnings would show in the score.
    streams = max(1, min(config.batch, len(numbers) // 4096))
    state, nats, count = None, 0.0, 0
    for characters, following in each_window(numbers, streams, max(config.window, 256)):
        loss, state = model.loss(characters, following, state)
        nats, count = nats + float(loss) * characters.numel(), count + characters.numel()
    return nats / count / math.log(2)
