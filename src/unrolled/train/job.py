"""The main job, whole: text in, trained model, score beside simpler things, and a sample."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from unrolled.train.baselines import baselines
from unrolled.train.config import TrainConfig
from unrolled.train.loop import bits_per_character, train
from unrolled.train.progress import ProgressBar, score_table
from unrolled.train.run import Run, create_run
from unrolled.train.sampling import sample
from unrolled.train.text import BUILT_IN, read_text, split_text

__all__ = ["run_job"]

_SAMPLE = 300


def run_job(config: TrainConfig, file: Path | None, console: Console) -> Run:
    """Train on a text, score the model, print a sample, and say where everything is.

    Args:
        config: the options.
        file: a UTF-8 text; None for the one inside Python.
        console: where progress and results are printed.

    Returns:
        The run directory.

    Raises:
        DataError: for a text that cannot be trained on; nothing is written.
        RunError: for a run directory that cannot be used.
        KeyboardInterrupt: if the user interrupts, once the model is saved.
    """
    text = read_text(file)
    split = split_text(text, batch=config.batch, window=config.window)
    run = create_run(config)
    console.print(
        f"Text {file or BUILT_IN}: {len(text):,} characters, {len(set(text))} different; "
        f"{len(split.train):,} to train on, {len(split.validation):,} to validate, {len(split.test):,} to test"
    )
    try:
        with ProgressBar(console) as bar:
            model, vocabulary = train(config, split, run, bar)
    except KeyboardInterrupt:
        console.print(
            f"interrupted; the model as it is now is in {run.path}\nnext: unrolled sample {run.path}", soft_wrap=True
        )
        raise
    with console.status("scoring on the test text"):
        bits = bits_per_character(model, vocabulary.encode(split.test).to(config.device), config)
        others = baselines(split)
    run.log(kind="test", bits=bits, **{other.name: other.bits for other in others})
    console.print(score_table(f"this {config.cell}, {config.hidden_size} hidden", bits, others))
    written = "".join(sample(model, vocabulary, length=_SAMPLE, temperature=0.7, seed=config.seed))
    console.print("\n[bold]a sample[/bold] (temperature 0.7)")
    console.print(Text(written), soft_wrap=True)
    console.print(f"\nwritten: {run.path} (config.json, metrics.jsonl, model.safetensors)", soft_wrap=True)
    console.print(f"next: unrolled sample {run.path} --prompt 'The ' --temperature 0.5", soft_wrap=True)
    return run
