"""The run directory: config.json, metrics.jsonl, model.safetensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from unrolled.errors import ConfigError, DataError, RunError
from unrolled.train.config import TrainConfig
from unrolled.train.config_file import read_config
from unrolled.train.model import CharacterModel
from unrolled.train.text import BUILT_IN, Vocabulary, read_text


class Run:
    """A run directory that exists.

    Args:
        path: where it is.
        made: whether it was made for this run, so that it may be removed with it.

    Attributes:
        config: the file of the options.
        metrics: the file of the figures, one JSON object a line.
        model: the file of the model that was saved last.
        page: the file that the network is drawn in.
    """

    def __init__(self, path: Path, *, made: bool = False) -> None:
        self.path, self._made = path, made
        self.config, self.metrics = path / "config.json", path / "metrics.jsonl"
        self.model, self._unfinished_model = path / "model.safetensors", path / "model.safetensors.part"
        self.page = path / "page.html"

    def discard(self) -> None:
        """Remove what the run wrote, and the directory if it was made for it and holds nothing else."""
        for file in (self.config, self.metrics, self.model, self._unfinished_model, self.page):
            file.unlink(missing_ok=True)
        if self._made and not any(self.path.iterdir()):
            self.path.rmdir()

    def log(self, **figures: Any) -> None:
        """Add a line to metrics.jsonl; a figure that JSON does not have (NaN, infinity) is refused."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures, allow_nan=False) + "\n")

    def save_model(self, model: nn.Module, vocabulary: Vocabulary) -> None:
        """Write model.safetensors whole or not at all: an interrupted write leaves the one before."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        self._unfinished_model.write_bytes(save(tensors, metadata={"characters": vocabulary.characters}))
        self._unfinished_model.replace(self.model)

    def training_text(self) -> str:
        """The text that the run was trained on.

        Raises:
            RunError: if metrics.jsonl does not name it.
            DataError: if it cannot be read, or is no longer the same.
        """
        try:
            lines = [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]
            first = next(line for line in lines if line["kind"] == "text")
            name, digest = str(first["file"]), str(first["sha256"])
        except (OSError, StopIteration, KeyError, TypeError, json.JSONDecodeError) as error:
            raise RunError(
                f"{self.path} does not say in metrics.jsonl which text it is of; name one with --text"
            ) from error
        text = read_text(None if name == BUILT_IN else Path(name))
        if hashlib.sha256(text.encode("utf-8")).hexdigest() != digest:
            raise DataError(
                f"text {name} is not the one that {self.path} was trained on, by its sha256; name one with --text"
            )
        return text


def create_run(config: TrainConfig) -> Run:
    """Make the run directory and write the config into it.

    Raises:
        RunError: if the directory holds anything already, or cannot be written.
    """
    path = Path(config.out) if config.out else _new_path(Path("runs"))
    try:
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise RunError(f"the run directory {path} is not empty; name a new one with --out, nothing is overwritten")
        run = Run(path, made=made)
        run.config.write_text(config.to_json(), encoding="utf-8")
    except RunError:
        raise
    except OSError as error:
        raise RunError(
            f"the run directory {path} cannot be written: {error.strerror}; name another with --out"
        ) from error
    return run


def _new_path(parent: Path) -> Path:
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
    run = Run(path)
    for file in (run.config, run.model):
        if not file.is_file():
            raise RunError(
                f"{path} is not a finished run: it has no {file.name}; make one with: unrolled train --out {path}"
            )
    try:
        config = TrainConfig.from_mapping({**read_config(run.config), "device": "cpu"}, source=str(run.config))
        with safe_open(run.model, framework="pt") as file:
            metadata = file.metadata()
            if not metadata or "characters" not in metadata:
                raise ValueError(
                    f"{run.model.name} does not say which characters it knows; it is not one that `unrolled train` "
                    "wrote"
                )
            vocabulary = Vocabulary(metadata["characters"])
            _refuse_other_shapes(config, vocabulary, {name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118 (not a dict)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = CharacterModel(config, len(vocabulary))
        model.load_state_dict(tensors)
    except (ConfigError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, OSError) as error:
        raise RunError(f"the run {path} cannot be read: {error!s:.300}") from error
    return config, model.eval(), vocabulary


def _refuse_other_shapes(config: TrainConfig, vocabulary: Vocabulary, found: dict[str, list[int]]) -> None:
    """Refuse sizes that do not fit before memory is allocated for them: a config may say anything."""
    try:
        with torch.device("meta"):
            model = CharacterModel(dataclasses.replace(config, memory=None), len(vocabulary))
    except RuntimeError as error:
        raise ValueError(f"config.json asks for a model that no memory holds: {error}") from error
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in wanted.keys() | found.keys():
        if wanted.get(name) != found.get(name):
            got, options = found.get(name, "not there"), wanted.get(name, "that there is none")
            raise ValueError(
                f"config.json and model.safetensors do not fit together: {name:.80} is {got} where the options say "
                f"{options}"
            )
