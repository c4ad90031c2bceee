"""Text out of a trained model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unrolled.errors import DataError, OptionError
from unrolled.train.model import CharacterModel
from unrolled.train.text import Vocabulary

__all__ = ["sample"]


@torch.no_grad()
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

    Yields:
        One character at a time.

    Raises:
        OptionError: for a negative temperature or length.
        DataError: if the prompt has characters that the model never saw.
    """
    if not 0 <= temperature < float("inf"):
        raise OptionError(f"temperature must be 0 or more and finite, got {temperature}")
    if length < 0:
        raise OptionError(f"length must be 0 or more, got {length}")
    if strangers := vocabulary.missing(prompt):
        raise DataError(
            f"the prompt has characters that the model never saw in training: {strangers!r}; leave them out"
        )
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    numbers = vocabulary.encode(prompt or "\n").to(device).unsqueeze(1)
    state = None
    for _ in range(length):
        logits, state = model(numbers, state)
        number = _draw(logits[-1, 0].float().cpu(), temperature, generator)
        yield vocabulary.decode(number)
        numbers = torch.tensor([[number]], device=device)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    logits[0] = float("-inf")  # number 0 stands for unknown characters: nothing to be written
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
