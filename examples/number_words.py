"""An encoder-decoder with attention: number words to digits, "four hundred and seven" to "407".

The words are read by an unrolled GRU. Another one writes the digits, one a step, and looks back at the words at every
step; a row of the batch ends when it writes the end sign. Numbers below a million, of one to six digits as often as of
any other count. The numbers that the model is tested on are never trained on.

    python examples/number_words.py    # in half a minute: more than 99 of 100 right to the last digit

Source: D. Bahdanau, K. Cho, Y. Bengio, "Neural machine translation by jointly learning to align and translate", ICLR
(2015); the scores are the dot products of M.-T. Luong et al., EMNLP (2015).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unrolled as ur

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = ["<pad>", *ONES, *TENS, "hundred", "thousand", "and"]
LONGEST = 11  # "seven hundred and seventy seven thousand seven hundred and seventy seven"
DIGITS = 6
START = END = 10  # what stands before the first digit, and after the last one


def in_words(number: int) -> list[str]:
    """The words of a number below a million.

    Example:
        >>> " ".join(in_words(120407))
        'one hundred and twenty thousand four hundred and seven'
    """
    if number < 20:
        return [ONES[number]]
    if number < 100:
        return [TENS[number // 10 - 2]] + (in_words(number % 10) if number % 10 else [])
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = number % unit
    joint = ["and"] if 0 < rest < 100 else []
    return [*in_words(number // unit), name, *joint, *(in_words(rest) if rest else [])]


class Batch(NamedTuple):
    """Some numbers.

    Attributes:
        words: `[LONGEST, B]`, 0 where a row has ended.
        lengths: how many words each row has, `[B]`.
        signs: `[DIGITS + 1, B]`: its digits, then END up to the last step.
        written: how many signs each row has, one END among them, `[B]`.
    """

    words: Tensor
    lengths: Tensor
    signs: Tensor
    written: Tensor


def batch_of(numbers: Sequence[int]) -> Batch:
    """Numbers as what the model reads and what it is to write."""
    words = [torch.tensor([WORDS.index(word) for word in in_words(number)]) for number in numbers]
    padded = torch.zeros(LONGEST, len(numbers), dtype=torch.int64)
    signs = torch.full((DIGITS + 1, len(numbers)), END)
    for row, (number, told) in enumerate(zip(numbers, words, strict=True)):
        padded[: len(told), row] = told
        signs[: len(str(number)), row] = torch.tensor([int(digit) for digit in str(number)])
    lengths = torch.tensor([len(told) for told in words])
    return Batch(padded, lengths, signs, torch.tensor([len(str(number)) + 1 for number in numbers]))


class Decoder(nn.Module):
    """A cell that reads the digit before and gives out logits of the next one; its context is what was read.

    Args:
        hidden_size: H.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, hidden_size)
        self.gru = ur.GRUCell(2 * hidden_size, hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.head = nn.Linear(2 * hidden_size, 11)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Zeros `[B, H]`; the model starts from what the encoder ended with instead."""
        return self.gru.initial_state(batch_size, device, dtype)

    def forward(self, input: Tensor, state: Tensor, context: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Run one step: input int64 `[B]`, state `[B, H]`, context keys `[B, S, H]` and mask `[B, S]`."""
        scores = (context["keys"] @ self.query(state).unsqueeze(-1)).squeeze(-1)
        weights = scores.masked_fill(~context["mask"], -1e9).softmax(-1)
        read = (weights.unsqueeze(1) @ context["keys"]).squeeze(1)
        hidden, state = self.gru(torch.cat([self.embedding(input), read], -1), state)
        return self.head(torch.cat([hidden, read], -1)), state


class NumberReader(nn.Module):
    """The encoder and the decoder, each an unrolled cell.

    Args:
        hidden_size: H.
    """

    def __init__(self, hidden_size: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), hidden_size)
        self.encoder = ur.unroll(ur.GRUCell(hidden_size, hidden_size))
        self.decoder = ur.unroll(Decoder(hidden_size))

    def read(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What the decoder starts from, `[B, H]`, and its context."""
        outputs, ends = self.encoder(self.embedding(batch.words), lengths=batch.lengths)
        mask = torch.arange(LONGEST) < batch.lengths.unsqueeze(1)
        return ends, {"keys": outputs.transpose(0, 1), "mask": mask}

    def loss(self, batch: Batch) -> Tensor:
        """Nats per sign, teacher forced: at every step the right digit before is given."""
        state, context = self.read(batch)
        before = torch.cat([torch.full_like(batch.signs[:1], START), batch.signs[:-1]])
        logits, _ = self.decoder(before, state, lengths=batch.written, context=context)
        return ur.sequence_loss(F.cross_entropy, logits, batch.signs, batch.written)

    @torch.no_grad()
    def write(self, batch: Batch) -> list[str]:
        """The digits of each row, the likeliest at every step, until the model writes END."""
        state, context = self.read(batch)
        signs, lengths, _ = ur.generate(
            self.decoder,
            state,
            torch.full_like(batch.lengths, START),
            feed=lambda logits: logits.argmax(-1),
            until=lambda logits: logits.argmax(-1) == END,
            max_steps=DIGITS + 1,
            context=context,
        )
        rows = zip(signs.argmax(-1).T.tolist(), lengths.tolist(), strict=True)
        return ["".join(str(sign) for sign in row[:length] if sign != END) for row, length in rows]


def drawn(chance: random.Random, count: int, without: Iterable[int] = ()) -> list[int]:
    """Numbers drawn at random: first how many digits, then which."""
    found: list[int] = []
    without = frozenset(without)
    while len(found) < count:
        size = chance.randint(1, DIGITS)
        number = chance.randrange(10 ** (size - 1) if size > 1 else 0, 10**size)
        if number not in without:
            found.append(number)
    return found


def accuracy(model: NumberReader, numbers: Sequence[int]) -> float:
    """The share of numbers that are written right to the last digit."""
    told = model.write(batch_of(numbers))
    return sum(said == str(number) for said, number in zip(told, numbers, strict=True)) / len(numbers)


def train(model: NumberReader, steps: int, seed: int, held_out: Iterable[int], batch_size: int = 128) -> list[float]:
    """Train on numbers drawn at random, none of them held out; return the loss of each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    chance, losses, begun, held_out = random.Random(seed), [], time.monotonic(), frozenset(held_out)
    for step in range(steps):
        loss = model.loss(batch_of(drawn(chance, batch_size, held_out)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 99 or step == steps - 1:
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {step + 1:5,}  loss {mean:.4f} nats per sign  {time.monotonic() - begun:4.0f} s", flush=True)
    return losses


def held_out_numbers(count: int = 2000) -> list[int]:
    """Numbers to test on, the same ones always. Not below a hundred, where a word may have no other."""
    return [number for number in dict.fromkeys(drawn(random.Random(407), 2 * count)) if number >= 100][:count]


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, then test on numbers never trained on; return the share that is right to the last digit."""
    parser = argparse.ArgumentParser(description="Number words to digits.")
    parser.add_argument("--steps", type=int, default=1000, help="of training, 128 numbers each")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    torch.manual_seed(chosen.seed)
    model, held_out = NumberReader(), held_out_numbers()
    train(model, chosen.steps, chosen.seed, held_out)
    for number in held_out[:5]:
        print(f"{' '.join(in_words(number))}: {model.write(batch_of([number]))[0]}")
    right = accuracy(model, held_out)
    print(f"{right:.1%} of {len(held_out):,} numbers that were not trained on are right to the last digit")
    return right


if __name__ == "__main__":
    main()
