"""`unrolled diagnose` and `unrolled train --watch`: the same figures as from Python, from a run and during training."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch

from unrolled.cli import main
from unrolled.train.config import TrainConfig
from unrolled.train.diagnosing import diagnosis_of
from unrolled.train.run import load_run
from unrolled.train.text import split_text

TEXT = "".join(pydoc_data.topics.topics[name] for name in ("for", "class", "with", "try"))
TINY = ["--hidden-size", "8", "--embedding-size", "4", "--window", "8", "--batch", "16", "--epochs", "1"]


def command(capsys: Any, *arguments: Any) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.fixture
def trained(tmp_path: Path, capsys: Any) -> Path:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    code, *_ = command(capsys, "train", text, "--out", tmp_path / "run", "--watch", 10, *TINY)
    assert code == 0
    return tmp_path / "run"


def test_a_run_is_diagnosed_on_its_own_validation_text(trained: Path, capsys: Any) -> None:
    config, model, vocabulary = load_run(trained)
    numbers = vocabulary.encode(split_text(TEXT, batch=16, window=8).validation)
    wanted = diagnosis_of(model, numbers, config)
    assert (wanted.T, wanted.horizon) == (32, 8)
    code, printed, _ = command(capsys, "diagnose", trained)
    assert (code, printed) == (0, f"{wanted}\n")
    code, printed, _ = command(capsys, "diagnose", trained, "--json")
    assert code == 0
    assert json.loads(printed) == wanted.to_dict()


def test_watching_writes_the_same_figures_and_changes_no_number(trained: Path, tmp_path: Path, capsys: Any) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "diagnosis"]
    updates = [line for line in lines if line["kind"] == "update"]
    assert [line["number"] for line in found] == list(range(10, len(updates) + 1, 10))
    assert found[0]["layers"][0]["reach"]["measured"] == 32
    assert found[0]["verdict"]["kind"] in ("healthy", "cut by truncation", "vanishing")
    command(capsys, "train", tmp_path / "text.txt", "--out", tmp_path / "other", *TINY)
    unwatched = [json.loads(line) for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in unwatched if line["kind"] == "update"] == updates


def test_another_text_can_be_named_and_a_changed_one_is_refused(trained: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT[:500], encoding="utf-8")
    code, printed, _ = command(capsys, "diagnose", trained, "--text", other)
    assert code == 0
    assert "gradient flow" in printed
    (tmp_path / "text.txt").write_text(TEXT + "!", encoding="utf-8")
    code, _, told = command(capsys, "diagnose", trained)
    assert code == 2
    assert "is not the one that" in told
    other.write_text("ab", encoding="utf-8")
    code, _, told = command(capsys, "diagnose", trained, "--text", other)
    assert code == 2
    assert "needs at least 3 characters, got 2" in told
    (trained / "metrics.jsonl").unlink()
    code, _, told = command(capsys, "diagnose", trained)
    assert code == 2
    assert "does not say in metrics.jsonl which text it is of" in told


def test_a_run_is_drawn_as_a_page_a_picture_or_a_chart(trained: Path, tmp_path: Path, capsys: Any) -> None:
    (trained / "page.html").unlink()  # which training wrote
    code, printed, _ = command(capsys, "draw", trained)
    assert (code, printed) == (0, f"written: {trained / 'page.html'}\n")
    assert "<!doctype html>" in (trained / "page.html").read_text()
    for out, chart in ((tmp_path / "net.svg", []), (trained / "lag.svg", ["--chart", "lag"])):
        code, printed, _ = command(capsys, "draw", trained, *chart, *([] if chart else ["--out", out]))
        assert (code, printed) == (0, f"written: {out}\n")
        assert "<svg" in out.read_text()
    code, _, told = command(capsys, "draw", trained, "--chart", "other")
    assert code == 2
    assert "chart must be one of 'flow', 'lag'" in told


def test_a_model_stays_in_its_mode() -> None:
    from unrolled.train.model import CharacterModel

    config = TrainConfig(hidden_size=4, window=4, batch=2)
    model, numbers = CharacterModel(config, 5), torch.randint(0, 5, (40,))
    for mode in (True, False):
        diagnosis_of(model.train(mode), numbers, config)
        assert model.training is mode
        assert all(parameter.grad is None for parameter in model.parameters())
