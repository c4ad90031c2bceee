"""The main job, whole: text in, trained model, score beside simpler things, and a sample."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from unrolled.errors import UnrolledError
from unrolled.train.baselines import baselines
from unrolled.train.config import TrainConfig
from unrolled.train.diagnosing import drawn
from unrolled.train.loop import bits_per_character, check_finite, train
from unrolled.train.model import CharacterModel
from unrolled.train.planning import plan_run
from unrolled.train.progress import ProgressBar, score_table
from unrolled.train.run import Run, create_run
from unrolled.train.sampling import sample
from unrolled.train.text import BUILT_IN, Split, Vocabulary, read_text, split_text

PAGE = "page.html"
"""The page's name in a run directory."""

_PROMPT = "The "
_SAMPLE = 300


def run_job(config: TrainConfig, file: Path | None, console: Console) -> Run:
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
    try:
        _introduce(text, split, str(file or BUILT_IN), run, console)
        with ProgressBar(console) as bar:
            model, vocabulary = train(config, split, run, bar)
        _score(model, vocabulary, split, config, run, console)
        _show(model, vocabulary, config, run, console)
        _draw(model, vocabulary, split, config, run, console)
    except KeyboardInterrupt:
        _tell_interrupted(run, console)
        raise
    return run


def _introduce(text: str, split: Split, name: str, run: Run, console: Console) -> None:
    """Record which text the run is of (its sha256 is that of the file, but for a byte order mark), and print it."""
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    run.log(kind="text", file=name, characters=len(text), sha256=digest, torch=torch.__version__)
    console.print(
        f"Text {name}: {len(text):,} characters, {len(set(text))} different; "
        f"{len(split.train):,} to train on, {len(split.validation):,} to validate, {len(split.test):,} to test",
        soft_wrap=True,
    )


def _score(
    model: CharacterModel, vocabulary: Vocabulary, split: Split, config: TrainConfig, run: Run, console: Console
) -> None:
    with console.status("scoring on the test text"):
        bits = bits_per_character(model, vocabulary.encode(split.test).to(config.device), config)
        others = baselines(split)
    check_finite("the test", config, run, {"bits per character": bits})
    run.log(kind="test", bits=bits, **{other.name: other.bits for other in others})
    console.print(score_table(f"this {config.cell}, {config.hidden_size} hidden", bits, others))


def _show(model: CharacterModel, vocabulary: Vocabulary, config: TrainConfig, run: Run, console: Console) -> None:
    """Print a sample, which starts like a sentence where the text has such letters, and what to do next."""
    prompt = "" if vocabulary.missing(_PROMPT) else _PROMPT
    written = "".join(sample(model, vocabulary, prompt, length=_SAMPLE, temperature=0.7, seed=config.seed))
    console.print(Text.assemble("\n", ("a sample", "bold"), " (temperature 0.7)"))
    console.print(Text(prompt + written), soft_wrap=True)
    console.print(f"\nwritten: {run.path} (config.json, metrics.jsonl, model.safetensors)", soft_wrap=True)
    options = f" --prompt {shlex.quote(prompt)}" if prompt else ""
    console.print(f"{_next_command(run)}{options} --temperature 0.5", soft_wrap=True)


def _draw(
    model: CharacterModel, vocabulary: Vocabulary, split: Split, config: TrainConfig, run: Run, console: Console
) -> None:
    """Write the page into the run directory, or say how to come by it."""
    try:
        with console.status("drawing the page"):
            page = drawn(model, vocabulary.encode(split.validation).to(config.device), config, run.path / PAGE)
        console.print(f"a page to look at: {page}", soft_wrap=True)
    except UnrolledError as error:
        console.print(f"no page was written: {error}", soft_wrap=True)


def _tell_interrupted(run: Run, console: Console) -> None:
    if run.has_model:
        console.print(f"interrupted; the model as it is now is in {run.path}\n{_next_command(run)}", soft_wrap=True)
    else:
        run.discard()
        console.print(
            f"interrupted before there was a model; what was written to {run.path} is removed", soft_wrap=True
        )


def _next_command(run: Run) -> str:
    return f"next: unrolled sample {shlex.quote(str(run.path))}"
