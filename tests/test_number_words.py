"""The encoder-decoder example: its words, its padding, its loss, and how well it reads numbers that it never saw."""

from __future__ import annotations

import doctest
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from matching import assert_match

PATH = Path(__file__).parents[1] / "examples" / "number_words.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("number_words", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["number_words"] = module
    spec.loader.exec_module(module)
    return module


def test_numbers_are_said_as_people_say_them(example):
    said = {
        0: "zero",
        13: "thirteen",
        20: "twenty",
        407: "four hundred and seven",
        700: "seven hundred",
        1001: "one thousand and one",
        90210: "ninety thousand two hundred and ten",
        777777: "seven hundred and seventy seven thousand seven hundred and seventy seven",
    }
    assert {number: " ".join(example.in_words(number)) for number in said} == said
    assert doctest.testmod(example).failed == 0


def test_no_two_numbers_are_said_alike_and_none_is_too_long(example):
    said = [tuple(example.in_words(n)) for n in (*range(20000), *range(20000, 10**6, 7))]
    assert len(set(said)) == len(said)
    assert {word for words in said for word in words} <= set(example.WORDS)
    assert max(map(len, said)) == example.LONGEST


def test_a_row_reads_and_writes_the_same_in_any_company(example):
    model = example.NumberReader(16).double()
    numbers = [7, 407, 123456, 90210]
    ends, context = model.read(example.batch_of(numbers))
    for row, number in enumerate(numbers):
        end, alone = model.read(example.batch_of([number]))
        words = len(example.in_words(number))
        assert_match(ends[row], end[0])
        assert_match(context["keys"][row, :words], alone["keys"][0, :words])
        assert context["mask"][row].sum() == words
    together = model.write(example.batch_of(numbers))
    assert together == [model.write(example.batch_of([number]))[0] for number in numbers]


def test_the_loss_is_that_of_the_digits_and_one_end(example):
    model = example.NumberReader(16).double()
    batch = example.batch_of([407])
    state, context = model.read(batch)
    logits = []
    for sign in (example.START, 4, 0, 7):
        out, state = model.decoder.cell(torch.tensor([sign]), state, context)
        logits.append(out)
    by_hand = F.cross_entropy(torch.cat(logits), torch.tensor([4, 0, 7, example.END]))
    assert_match(model.loss(batch), by_hand)


def test_what_is_written_is_cut_at_the_end_sign_and_nowhere_else(example, monkeypatch):
    def telling(*signs: int) -> list[str]:
        logits = F.one_hot(torch.tensor(signs), 11).unsqueeze(1)
        monkeypatch.setattr(example.ur, "generate", lambda *_, **__: (logits, torch.tensor([len(signs)]), None))
        return example.NumberReader(4).write(example.batch_of([5]))

    assert telling(1, 0, example.END) == ["10"]
    assert telling(2, 2, 2, 2, 2, 1, 0) == ["2222210"]


def test_held_out_numbers_are_never_drawn(example):
    held_out = example.held_out_numbers()
    assert len(set(held_out)) == 2000
    assert min(held_out) >= 100
    chance = example.random.Random(0)
    assert not set(example.drawn(chance, 5000, held_out)) & set(held_out)
    lengths = torch.tensor([len(str(n)) for n in example.drawn(chance, 6000)]).bincount()[1:]
    assert (lengths - 1000).abs().max() < 5 * (6000 * 5 / 36) ** 0.5


def test_it_begins_to_learn(example, capsys):
    torch.manual_seed(0)
    losses = example.train(example.NumberReader(64), 80, 0, example.held_out_numbers(), batch_size=64)
    assert losses[0] > 2.2
    assert sum(losses[-5:]) / 5 < 1.0
    assert "step    80" in capsys.readouterr().out


@pytest.mark.slow
def test_it_reads_numbers_that_it_never_saw(example):
    assert example.main([]) >= 0.99
