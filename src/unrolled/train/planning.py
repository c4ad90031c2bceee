"""What `unrolled plan` prints: memory against time for the network of a run, or for one that is to be trained."""

from __future__ import annotations

from pathlib import Path

import torch

from unrolled.bptt.memory_plan import MemoryPlan
from unrolled.networks.bounded import plan_memory
from unrolled.networks.unroll import unroll
from unrolled.train.config import TrainConfig
from unrolled.train.model import CharacterModel
from unrolled.train.run import load_run


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
