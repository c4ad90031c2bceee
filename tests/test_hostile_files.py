"""Files that are no configs and no runs: told in words, before time or memory is spent on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import unrolled as ur
from unrolled.train.config import TrainConfig
from unrolled.train.config_file import read_config
from unrolled.train.model import CharacterModel
from unrolled.train.run import load_run
from unrolled.train.text import Vocabulary

BOMB = "\n".join(["cell:", "  - &a0 [lol, lol]", *(f"  - &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("bomb.yaml", BOMB, "aliases are not taken"),
        ("anchor.yml", "hidden_size: &h 3\nbatch: *h", "aliases are not taken, got \\*h"),
        ("large.yaml", "cell: " + "x" * 3_000_000, "at most"),
        ("large.json", json.dumps({"cell": "x" * 3_000_000}), "at most"),
        ("deep.json", '{"cell":' + "[" * 40_000 + "]" * 40_000 + "}", "nested too deep"),
        ("deep.yaml", "cell: " + "[" * 20_000 + "]" * 20_000, "nested too deep"),
    ],
)
def test_configs_that_are_none(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ur.ConfigError, match=says) as refused:
        read_config(tmp_path / name)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("values", [{"cell": "x" * 5000}, {"x" * 5000: 1}, {"hidden_size": ["y" * 5000] * 100}])
def test_what_is_refused_is_never_echoed_whole(values):
    with pytest.raises(ur.ConfigError) as refused:
        TrainConfig.from_mapping(values, source="a file")
    assert len(str(refused.value)) < 1000


def _run(folder: Path, config: TrainConfig, metadata: dict[str, str] | None, shapes: TrainConfig | None = None) -> Path:
    model = CharacterModel(shapes or config, len(Vocabulary("abc")))
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_text(config.to_json())
    return folder


SMALL = TrainConfig(hidden_size=4, embedding_size=2)
CHARACTERS = {"characters": "abc"}


def test_a_run_is_read_back(tmp_path):
    config, model, vocabulary = load_run(_run(tmp_path, SMALL, CHARACTERS))
    assert (config.hidden_size, vocabulary.characters, model.training) == (4, "abc", False)


@pytest.mark.parametrize("metadata", [None, {"letters": "abc"}])
def test_a_model_without_its_characters(tmp_path, metadata):
    with pytest.raises(ur.RunError, match="does not say which characters"):
        load_run(_run(tmp_path, SMALL, metadata))


def test_a_config_of_a_billion_units_is_held_against_the_tensors_first(tmp_path, monkeypatch):
    folder = _run(tmp_path, TrainConfig(hidden_size=100_000_000, embedding_size=2), CHARACTERS, shapes=SMALL)
    with pytest.raises(ur.RunError, match=r"do not fit together: .* where the options say"):
        load_run(folder)


def test_a_config_of_a_model_that_cannot_be(tmp_path):
    folder = _run(tmp_path, TrainConfig(hidden_size=10**12, embedding_size=2), CHARACTERS, shapes=SMALL)
    with pytest.raises(ur.RunError, match=r"no memory holds|do not fit together"):
        load_run(folder)


def test_a_deep_config_of_a_run(tmp_path):
    folder = _run(tmp_path, SMALL, CHARACTERS)
    (folder / "config.json").write_text("[" * 40_000 + "]" * 40_000)
    with pytest.raises(ur.RunError, match="nested too deep"):
        load_run(folder)


def test_a_model_that_is_cut_off(tmp_path):
    folder = _run(tmp_path, SMALL, CHARACTERS)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ur.RunError, match="cannot be read"):
        load_run(folder)
    assert torch.get_default_device().type == "cpu"
