"""The options of a training run: one frozen dataclass, from which flags, files and checks are derived."""

from __future__ import annotations

import dataclasses
import json
import reprlib
import sys
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch

from unrolled.bptt.checkpointing import checkpointing_of
from unrolled.bptt.truncation import truncation_of
from unrolled.cells import GRUCell, LSTMCell, RNNCell
from unrolled.errors import ConfigError, OptionError

CELLS = {"rnn": RNNCell, "lstm": LSTMCell, "gru": GRUCell}
"""The cells that can be trained, by the names they have in flags and files."""

SEEDS = 2**63
"""A seed is below this: torch's generators take no larger ones."""


def _option(default: Any, help: str, **checks: Any) -> Any:
    return field(default=default, metadata={"help": help, **checks})


@dataclass(frozen=True)
class TrainConfig:
    """What `unrolled train` does.

    Attributes are documented by their `help`, which is also that of the command's flags.

    Raises:
        ConfigError: for a value of the wrong type or out of its range.

    Example:
        >>> TrainConfig(cell="gru", epochs=1).hidden_size
        256
    """

    cell: str = _option("lstm", f"recurrent cell: {', '.join(CELLS)}", choices=CELLS)
    hidden_size: int = _option(256, "features of the hidden state", least=1)
    embedding_size: int = _option(64, "features of a character's embedding", least=1)
    window: int = _option(64, "characters per BPTT window; the state is carried from window to window", least=1)
    horizon: int | None = _option(
        None,
        "copies that gradients flow back through within a window (truncated BPTT); without it all of them",
        least=1,
    )
    stride: int | None = _option(
        None, "steps whose losses are taken together, at most the horizon; its default", least=1
    )
    memory: str | None = _option(
        None, "activation memory that the recurrent network may take, as 512MB or 10%: the rest is computed again"
    )
    batch: int = _option(32, "parallel streams that the training text is cut into", least=1)
    epochs: int = _option(8, "passes over the training text", least=1)
    learning_rate: float = _option(4e-3, "peak learning rate of Adam (one cycle)", above=0.0)
    clip: float = _option(1.0, "largest gradient norm; longer gradients are scaled down to it", above=0.0)
    dropout: float = _option(
        0.1, "share of the cell's outputs dropped before the head, in training", least=0.0, below=1.0
    )
    watch: int = _option(0, "updates from one diagnosis in metrics.jsonl to the next; 0 for none", least=0)
    seed: int = _option(0, "seed of initialisation, dropout and sampling", least=0, below=SEEDS)
    device: str = _option("cpu", "where to train: cpu, cuda, cuda:1, ...")
    out: str | None = _option(None, "run directory to make; by default a new one in runs/")

    def __post_init__(self) -> None:
        types = get_type_hints(TrainConfig)
        for option in dataclasses.fields(self):
            _check_option(option, types[option.name], getattr(self, option.name))
        self._check_device()
        self._check_horizon()

    def _check_device(self) -> None:
        try:
            if torch.empty(1, device=self.device).is_meta:
                raise ConfigError(f"device must be one that computes, got {self.device!r}; use cpu or cuda")
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device must be one that torch has here, got {self.device!r}: {error}") from error

    def _check_horizon(self) -> None:
        """Refuse here what the network would refuse once the text is read."""
        if self.horizon is not None and self.horizon > self.window:
            raise ConfigError(
                f"horizon must be at most the window, {self.window} steps, got {self.horizon}; gradients never flow "
                "back from one window to the one before: make the window longer"
            )
        try:
            truncation_of(self.horizon, self.stride)
            if self.memory is not None:
                checkpointing_of(self.memory, None, self.horizon)
        except OptionError as error:
            raise ConfigError(str(error)) from error

    def to_json(self) -> str:
        """The options as a JSON object, all but `out`: a saved config is where it says, and another run can use it."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if name != "out"}
        return json.dumps(options, indent=2) + "\n"

    @classmethod
    def from_mapping(cls, values: dict[str, Any], source: str) -> TrainConfig:
        """Make a config of named values.

        Raises:
            ConfigError: for a name that is no option, or a bad value.
        """
        known = [option.name for option in dataclasses.fields(cls)]
        unknown = [str(name) for name in values if name not in known]
        if unknown:
            names = f"{', '.join(unknown):.200}"
            raise ConfigError(f"{source} has unknown options: {names}; known are {', '.join(known)}")
        return cls(**values)


def _check_option(option: dataclasses.Field[Any], kind: Any, value: Any) -> None:
    def refuse(rule: str) -> None:
        raise ConfigError(f"{option.name} must be {rule}, got {reprlib.repr(value):.200}")

    rules = option.metadata
    if not isinstance(value, float | int if kind is float else kind) or isinstance(value, bool):
        refuse(f"of type {option.type}")
    if value is None:
        return
    if "choices" in rules and value not in rules["choices"]:
        refuse(f"one of {', '.join(rules['choices'])}")
    if "least" in rules and not value >= rules["least"]:
        refuse(f"at least {rules['least']}")
    if "above" in rules and not rules["above"] < value <= sys.float_info.max:
        refuse(f"above {rules['above']} and finite")
    if "below" in rules and not value < rules["below"]:
        refuse(f"below {rules['below']}")
