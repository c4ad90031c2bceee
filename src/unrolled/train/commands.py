"""The commands: their flags are derived from the config, their work is done elsewhere."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from unrolled.errors import ConfigError, UnrolledError
from unrolled.train.config import CELLS, TrainConfig
from unrolled.train.config_file import read_config
from unrolled.train.jobs import diagnose_run, draw_run, plan_run, verify_cells, verify_run
from unrolled.train.progress import terminal
from unrolled.train.run import Run, load_run
from unrolled.train.sampling import sample
from unrolled.train.training import train_run

app = typer.Typer(
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Unroll recurrent networks: train one on text, and use it.",
)


@app.callback()
def version_callback(
    version: Annotated[
        bool, typer.Option("--version", help="print the versions of unrolled and torch, and stop")
    ] = False,
) -> None:
    """Unroll recurrent networks: train one on text, and use it."""
    if version:
        print(f"unrolled {metadata.version('unrolled')}, torch {metadata.version('torch')}")
        raise typer.Exit


def train_command(file: Path | None, config: Path | None, **flags: Any) -> None:
    """Train a character language model by BPTT on FILE, any UTF-8 text (default: the text inside Python)."""
    values = read_config(config) if config else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    train_run(TrainConfig.from_mapping(values, source=str(config or "the command")), file, terminal())


def _with_config_flags(command: Any) -> Any:
    """Give the command one flag for each option; a flag that is not used leaves the config file's value."""
    hints = get_type_hints(TrainConfig)
    annotations: dict[str, Any] = {
        "file": Annotated[Path | None, typer.Argument(help="UTF-8 text", show_default=False)],
        "config": Annotated[Path | None, typer.Option(help="JSON or YAML file of options; flags go first")],
    }
    for option in dataclasses.fields(TrainConfig):
        default = "" if option.default is None else f" [default: {option.default}]"
        flag = typer.Option(help=option.metadata["help"] + default, show_default=False)
        annotations[option.name] = Annotated[hints[option.name] | None, flag]
    command.__signature__ = inspect.Signature([
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in annotations.items()
    ])  # fmt: skip
    command.__annotations__ = annotations
    return command


app.command("train")(_with_config_flags(train_command))


@app.command("sample")
def sample_command(
    run: Annotated[Path, typer.Argument(help="run directory of `unrolled train`")],
    prompt: Annotated[str, typer.Option(help="text to go on from")] = "",
    temperature: Annotated[float, typer.Option(help="1 follows the model's chances, 0 takes the likeliest")] = 0.7,
    length: Annotated[int, typer.Option(help="characters to write")] = 300,
    seed: Annotated[int, typer.Option(help="seed of the draw")] = 0,
) -> None:
    """Let a trained model write."""
    _, model, vocabulary = load_run(run)
    # Called before anything is printed: it refuses what it must refuse here, not with the first character.
    written = sample(model, vocabulary, prompt, length=length, temperature=temperature, seed=seed)
    sys.stdout.write(prompt)
    for character in written:
        sys.stdout.write(character)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command("verify")
def verify_command(
    run: Annotated[Path | None, typer.Argument(help="run directory; without it, all cells of this package")] = None,
) -> None:
    """Compare every engine with the reference, values and gradients; exit with 1 on a mismatch."""
    passed = True
    for name, found in verify_run(run) if run else verify_cells():
        print(f"{name}\n{found}\n", flush=True)
        passed = passed and found.passed
    raise typer.Exit(0 if passed else 1)


@app.command("plan")
def plan_command(
    run: Annotated[
        Path | None, typer.Argument(help="run directory; without it, the network of the options below")
    ] = None,
    cell: Annotated[str | None, typer.Option(help=f"recurrent cell: {', '.join(CELLS)} [default: lstm]")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="features of the hidden state [default: 256]")] = None,
    embedding_size: Annotated[int | None, typer.Option(help="features of an input [default: 64]")] = None,
    batch: Annotated[int | None, typer.Option(help="rows of a batch [default: 32]")] = None,
    steps: Annotated[
        int | None, typer.Option(help="steps of the sequence [default: the run's window, or 1000]")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="budget to mark the choice of, as 512MB or 10%")] = None,
) -> None:
    """Print what a memory budget costs in time: every schedule for the sequence, the chosen one marked."""
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    options = {"cell": cell, "hidden_size": hidden_size, "embedding_size": embedding_size, "batch": batch}
    options = {name: value for name, value in options.items() if value is not None}
    if run is not None and options:
        flag = next(iter(options)).replace("_", "-")
        raise ConfigError(f"--{flag} is for a network that is not trained yet, and {run} has its own; leave one out")
    config = TrainConfig.from_mapping({**options, "window": steps or 1000}, source="the command")
    print(plan_run(config, run, memory, steps))
    argument = f" {shlex.quote(str(run))}" if run else ""
    print(f"next: unrolled plan{argument} --memory 64MB, or unrolled train --memory 64MB")


@app.command("diagnose")
def diagnose_command(
    run: Annotated[Path, typer.Argument(help="run directory of `unrolled train`")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on; by default the run's own")] = None,
    json: Annotated[bool, typer.Option("--json", help="print all figures as JSON")] = False,
) -> None:
    """Tell how a trained network's gradients flow: a verdict, the figures behind it, and what may help."""
    with terminal(stderr=True).status("measuring"):
        found = diagnose_run(run, text)
    print(found.to_json(indent=2) if json else found)


@app.command("draw")
def draw_command(
    run: Annotated[Path, typer.Argument(help="run directory of `unrolled train`")],
    out: Annotated[
        Path | None, typer.Option(help="file: .html, .svg, .png, .pdf or .txt [default: RUN/page.html]")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on; by default the run's own")] = None,
    chart: Annotated[str | None, typer.Option(help="one chart as a picture: flow, lag, shares, memory, ...")] = None,
) -> None:
    """Draw a trained network: a page to unfold it in, with its gradients and a verdict, or one picture."""
    with terminal(stderr=True).status("measuring and drawing"):
        target = draw_run(run, out or (run / f"{chart}.svg" if chart else Run(run).page), text, chart)
    print(f"written: {target}")


def run_command(arguments: list[str] | None) -> int:
    """Run the command on its arguments (None: the process's own); print what is refused; return the exit code."""
    try:
        return app(args=arguments, prog_name="unrolled", standalone_mode=False) or 0
    except UnrolledError as error:
        terminal(stderr=True).print(f"unrolled: {error}", style="red", soft_wrap=True)
        return 2
    except typer.Abort:
        return 130
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        error.show()  # type: ignore[attr-defined]  # click's own usage errors
        return error.exit_code
