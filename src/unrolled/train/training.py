"""The main job, whole: text in, trained model, score next to simpler models, and a sample."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from unrolled.errors import UnrolledError
from unrolled.train.baselines import baselines
from unrolled.train.config import TrainConfig
from unrolled.train.diagnosing import draw_model
from unrolled.train.jobs import plan_run
from unrolled.train.loop import bits_per_character, check_finite, train_model
from unrolled.train.model import CharacterModel
from unrolled.train.progress import ProgressBar, score_table
from unrolled.train.run import Run, create_run
from unrolled.train.sampling import sample
from unrolled.train.text import BUILT_IN, Split, Vocabulary, read_text, split_text


def train_run(config: TrainConfig, file: Path | None, console: Console) -> Run:
    """Train on a text, score the model, print a sample, and say where everything is.

    Args:
        config: the options.
        file: a UTF-8 text; None for the one inside Python.
        console: where progress and results are printed, made by `terminal`.

    Returns:
        The run directory.

    Raises:
        DataError: for a text that cannot be trained on; nothing is written.
        RunError: for a run directory that cannot be used.
        DivergedError: if the loss is no longer finite; the model saved last stays.
        KeyboardInterrupt: if the user interrupts, once the model is saved, or the directory removed if there is none.
    """
    text = read_text(file)
    split = split_text(text, batch=config.batch, window=config.window)
    if config.memory is not None:
        plan_run(config, None, None, None)  # refuses a budget that is too small before there is a run
    run = create_run(config)
    job = _TrainingJob(config, split, run, console)
    try:
        job.introduce(text, str(file or BUILT_IN))
        with ProgressBar(console) as bar:
            model, vocabulary = train_model(config, split, run, bar)
        job.score(model, vocabulary)
        job.show_sample(model, vocabulary)
        job.draw_page(model, vocabulary)
    except KeyboardInterrupt:
        job.end_interrupted()
        raise
    return run


@dataclass(frozen=True)
class _TrainingJob:
    """What is printed and written around the training of one run."""

    config: TrainConfig
    split: Split
    run: Run
    console: Console

    def introduce(self, text: str, name: str) -> None:
        """Record which text the run is of (its sha256 is that of the file, but for a byte order mark), and print it."""
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self.run.log(kind="text", file=name, characters=len(text), sha256=digest, torch=torch.__version__)
        train, validation, test = len(self.split.train), len(self.split.validation), len(self.split.test)
        self._print(
            f"Text {name}: {len(text):,} characters, {len(set(text))} different; "
            f"{train:,} to train on, {validation:,} to validate, {test:,} to test"
        )

    def score(self, model: CharacterModel, vocabulary: Vocabulary) -> None:
        """Record and print the model's score on the test text, and those of simpler models."""
        with self.console.status("scoring on the test text"):
            numbers = vocabulary.encode(self.split.test).to(self.config.device)
            bits = bits_per_character(model, numbers, self.config)
            others = baselines(self.split)
        check_finite("the test", self.config, self.run, {"bits per character": bits})
        self.run.log(kind="test", bits=bits, **{other.name: other.bits for other in others})
        self.console.print(score_table(f"this {self.config.cell}, {self.config.hidden_size} hidden", bits, others))

    def show_sample(self, model: CharacterModel, vocabulary: Vocabulary) -> None:
        """Print a sample, which starts like a sentence where the text has such letters, and what to do next."""
        prompt = "" if vocabulary.missing("The ") else "The "
        written = "".join(sample(model, vocabulary, prompt, length=300, temperature=0.7, seed=self.config.seed))
        self.console.print(Text.assemble("\n", ("a sample", "bold"), " (temperature 0.7)"))
        self.console.print(Text(prompt + written), soft_wrap=True)
        self._print(f"\nwritten: {self.run.path} (config.json, metrics.jsonl, model.safetensors)")
        options = f" --prompt {shlex.quote(prompt)}" if prompt else ""
        self._print(f"{self._next_command()}{options} --temperature 0.5")

    def draw_page(self, model: CharacterModel, vocabulary: Vocabulary) -> None:
        """Write the page into the run directory, or say how to get it."""
        try:
            with self.console.status("drawing the page"):
                numbers = vocabulary.encode(self.split.validation).to(self.config.device)
                page = draw_model(model, numbers, self.config, self.run.page)
            self._print(f"a page to look at: {page}")
        except UnrolledError as error:
            self._print(f"no page was written: {error}")

    def end_interrupted(self) -> None:
        """Say where the model is; remove the run if there is none yet."""
        if self.run.model.is_file():
            self._print(f"interrupted; the model as it is now is in {self.run.path}\n{self._next_command()}")
        else:
            self.run.discard()
            self._print(f"interrupted before there was a model; what was written to {self.run.path} is removed")

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def _next_command(self) -> str:
        return f"next: unrolled sample {shlex.quote(str(self.run.path))}"
