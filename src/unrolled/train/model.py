"""The character language model: an embedding, an unrolled cell and a head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled.networks.bounded import plan_memory
from unrolled.networks.unroll import unroll
from unrolled.train.config import CELLS, TrainConfig
from unrolled.trees import Tree


class CharacterModel(nn.Module):
    """Predicts each character from all those before it.

    Args:
        config: says which cell, and the sizes.
        characters: V, how many characters there are.

    Attributes:
        horizon: how many copies gradients flow back through in training: a window's, or fewer (truncated BPTT).

    Example:
        >>> import torch
        >>> model = CharacterModel(TrainConfig(hidden_size=8), characters=5)
        >>> logits, state = model(torch.zeros(7, 2, dtype=torch.int64))
        >>> logits.shape
        torch.Size([7, 2, 5])
    """

    def __init__(self, config: TrainConfig, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, config.embedding_size)
        cell = CELLS[config.cell](config.embedding_size, config.hidden_size)
        self.rnn = unroll(cell, horizon=config.horizon, stride=config.stride, memory=_memory_of(config, cell))
        self.horizon = self.rnn.horizon or config.window
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden_size, characters)

    def forward(self, characters: Tensor, state: Tree = None) -> tuple[Tensor, Tree]:
        """Read characters `[T, B]` (int64); return the next ones' logits `[T, B, V]`, and the state to go on from."""
        outputs, state = self.rnn(self.embedding(characters), state)
        return self.head(self.dropout(outputs)), state

    def loss(self, characters: Tensor, following: Tensor, state: Tree = None) -> tuple[Tensor, Tree]:
        """The mean loss in nats of predicting the characters `[T, B]` that follow others, and the state after them."""
        logits, state = self(characters, state)
        return F.cross_entropy(logits.flatten(0, 1), following.flatten()), state


def _memory_of(config: TrainConfig, cell: nn.Module) -> str | int | None:
    """The memory budget; a share is one of what a whole window takes, so that a shorter last one has room as well."""
    if config.memory is None or not config.memory.strip().endswith("%"):
        return config.memory
    window = torch.zeros(config.window, config.batch, config.embedding_size, requires_grad=True)
    return math.ceil(plan_memory(unroll(cell, memory=config.memory), window).chosen.bytes)
