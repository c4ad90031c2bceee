"""Text out of a trained model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unrolled.errors import DataError, DivergedError, OptionError
from unrolled.train.config import SEEDS
from unrolled.train.model import CharacterModel
from unrolled.train.text import Vocabulary


def sample(
    model: CharacterModel, vocabulary: Vocabulary, prompt: str = "", *, length: int, temperature: float, seed: int
) -> Iterator[str]:
    """Write on from a prompt, character by character.

    Args:
        model: a trained model, in evaluation mode.
        vocabulary: its characters.
        prompt: what to go on from; a line break if empty.
        length: how many characters to write.
        temperature: 1 follows the model's chances, less is safer, 0 always takes the likeliest.
        seed: of the draw.

    Returns:
        One character at a time.

    Raises:
        OptionError: for a negative temperature or length, or a seed that torch cannot take.
        DataError: if the prompt has characters that the model never saw.
        DivergedError: with the first character, if the model's weights give no chances.
    """
    if not 0 <= temperature < float("inf"):
        raise OptionError(f"temperature must be 0 or more and finite, got {temperature}")
    if length < 0:
        raise OptionError(f"length must be 0 or more, got {length}")
    if not 0 <= seed < SEEDS:
        raise OptionError(f"seed must be 0 or more and below {SEEDS}, got {seed}")
    if unknown := vocabulary.missing(prompt):
        raise DataError(f"the prompt has characters that the model never saw in training: {unknown!r}; leave them out")
    return _each_character(model, vocabulary, prompt or "\n", length, temperature, seed)


@torch.no_grad()
def _each_character(
    model: CharacterModel, vocabulary: Vocabulary, prompt: str, length: int, temperature: float, seed: int
) -> Iterator[str]:
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    numbers = vocabulary.encode(prompt).to(device).unsqueeze(1)
    state = None
    for _ in range(length):
        logits, state = model(numbers, state)
        number = _drawn_number(logits[-1, 0].cpu().double(), temperature, generator)
        yield vocabulary.decode(number)
        numbers = torch.tensor([[number]], device=device)


def _drawn_number(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    logits[0] = float("-inf")  # number 0 stands for unknown characters: nothing to be written
    largest = logits.max()
    if not largest.isfinite():
        raise DivergedError(
            f"a model's largest logit must be finite to draw from, got {float(largest)}: its training diverged; "
            "train it anew with a lower --learning-rate"
        )
    if temperature == 0:
        return int(logits.argmax())
    # The largest becomes 0 before it is divided, and the others at most -inf: no temperature is too small.
    chances = torch.softmax((logits - largest) / temperature, -1)
    return int(torch.multinomial(chances, 1, generator=generator))
