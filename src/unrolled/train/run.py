"""The run directory: config.json, metrics.jsonl, model.safetensors."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from unrolled.errors import ConfigError, RunError
from unrolled.train.config import TrainConfig
from unrolled.train.config_file import read_config
from unrolled.train.model import CharacterModel
from unrolled.train.text import Vocabulary

_CONFIG, _METRICS, _MODEL = "config.json", "metrics.jsonl", "model.safetensors"
_UNFINISHED = ".part"
_MOST_SAID = 300


class Run:
    """A run directory that exists.

    Args:
        path: where it is.
        made: whether it was made for this run, so that it may be removed with it.
    """

    def __init__(self, path: Path, *, made: bool = False) -> None:
        self.path, self._made = path, made

    @property
    def has_model(self) -> bool:
        """Whether a model was saved."""
        return (self.path / _MODEL).is_file()

    def discard(self) -> None:
        """Remove what the run wrote, and the directory if it was made for it and holds nothing else."""
        for name in (_CONFIG, _METRICS, _MODEL, _MODEL + _UNFINISHED, "page.html"):
            (self.path / name).unlink(missing_ok=True)
        if self._made and not any(self.path.iterdir()):
            self.path.rmdir()

    def log(self, **figures: Any) -> None:
        """Add a line to metrics.jsonl; a figure that JSON does not have (NaN, infinity) is refused."""
        with (self.path / _METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures, allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / _METRICS).read_text(encoding="utf-8").splitlines()]

    def save_model(self, model: nn.Module, vocabulary: Vocabulary) -> None:
        """Write model.safetensors whole or not at all: an interrupted write leaves the one before."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        _write_whole(self.path / _MODEL, save(tensors, metadata={"characters": vocabulary.characters}))


def _write_whole(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + _UNFINISHED)
    unfinished.write_bytes(content)
    unfinished.replace(path)


def create_run(config: TrainConfig) -> Run:
    """Make the run directory and write the config into it.

    Raises:
        RunError: if the directory holds anything already, or cannot be written.
    """
    path = Path(config.out) if config.out else _new_name(Path("runs"))
    try:
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise RunError(f"the run directory {path} is not empty; name a new one with --out, nothing is overwritten")
        (path / _CONFIG).write_text(config.to_json(), encoding="utf-8")
    except RunError:
        raise
    except OSError as error:
        raise RunError(
            f"the run directory {path} cannot be written: {error.strerror}; name another with --out"
        ) from error
    return Run(path, made=made)


def _new_name(parent: Path) -> Path:
    stem = time.strftime("%Y%m%d-%H%M%S")
    names = (parent / (stem if number == 1 else f"{stem}-{number}") for number in range(1, 1000))
    return next(path for path in names if not path.exists())


def load_run(path: Path) -> tuple[TrainConfig, CharacterModel, Vocabulary]:
    """Read a run back, as data only: nothing in the directory is executed.

    Args:
        path: a run directory that holds a saved model.

    Returns:
        The config, the model in evaluation mode on the CPU, and its characters.

    Raises:
        RunError: if the directory is no run, or its files do not fit together.
    """
    for name in (_CONFIG, _MODEL):
        if not (path / name).is_file():
            raise RunError(
                f"{path} is not a finished run: it has no {name}; make one with: unrolled train --out {path}"
            )
    try:
        config = TrainConfig.from_mapping({**read_config(path / _CONFIG), "device": "cpu"}, source=str(path / _CONFIG))
        with safe_open(path / _MODEL, framework="pt") as file:
            vocabulary = Vocabulary(_characters(file.metadata()))
            _refuse_other_shapes(config, vocabulary, {name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118 (not a dict)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = CharacterModel(config, len(vocabulary))
        model.load_state_dict(tensors)
    except (ConfigError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, OSError) as error:
        raise RunError(f"the run {path} cannot be read: {error!s:.{_MOST_SAID}}") from error
    return config, model.eval(), vocabulary


def _characters(metadata: dict[str, str] | None) -> str:
    if not metadata or "characters" not in metadata:
        raise ValueError(f"{_MODEL} does not say which characters it knows; it is not one that `unrolled train` wrote")
    return metadata["characters"]


def _refuse_other_shapes(config: TrainConfig, vocabulary: Vocabulary, found: dict[str, list[int]]) -> None:
    """Before a model of these sizes is given memory: a config may say anything."""
    try:
        with torch.device("meta"):
            model = CharacterModel(dataclasses.replace(config, memory=None), len(vocabulary))
    except RuntimeError as error:
        raise ValueError(f"{_CONFIG} asks for a model that no memory holds: {error}") from error
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in wanted.keys() | found.keys():
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{_CONFIG} and {_MODEL} do not fit together: {name:.80} is {found.get(name, 'not there')} where the "
                f"options say {wanted.get(name, 'that there is none')}"
            )
