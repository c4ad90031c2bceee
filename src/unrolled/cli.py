"""The command: its flags are derived from the config, its work is done elsewhere."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from unrolled.errors import UnrolledError
from unrolled.train.config import TrainConfig, read_config
from unrolled.train.job import run_job
from unrolled.train.run import load_run
from unrolled.train.sampling import sample as write_on

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Unroll recurrent networks: train one on text, and use it.",
)


@app.callback()
def _commands() -> None:
    """Keep `train` a subcommand even if it were the only one."""


def train(file: Path | None, config: Path | None, **flags: Any) -> None:
    """Train a character language model by BPTT on FILE, any UTF-8 text (default: the text inside Python)."""
    values = read_config(config) if config else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    run_job(TrainConfig.from_mapping(values, source=str(config or "the command")), file, Console(highlight=False))


def _with_config_flags(command: Any) -> Any:
    """Give the command one flag for each option; a flag that is not used leaves the config file's value."""
    hints = get_type_hints(TrainConfig)
    parameters = [
        _parameter("file", Annotated[Path | None, typer.Argument(help="UTF-8 text", show_default=False)]),
        _parameter("config", Annotated[Path | None, typer.Option(help="JSON or YAML file of options; flags go first")]),
    ]
    for option in dataclasses.fields(TrainConfig):
        default = "" if option.default is None else f" [default: {option.default}]"
        flag = typer.Option(help=option.metadata["help"] + default, show_default=False)
        parameters.append(_parameter(option.name, Annotated[hints[option.name] | None, flag]))
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


app.command()(_with_config_flags(train))


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="run directory of `unrolled train`")],
    prompt: Annotated[str, typer.Option(help="text to go on from")] = "",
    temperature: Annotated[float, typer.Option(help="1 follows the model's chances, 0 takes the likeliest")] = 0.7,
    length: Annotated[int, typer.Option(help="characters to write")] = 300,
    seed: Annotated[int, typer.Option(help="seed of the draw")] = 0,
) -> None:
    """Let a trained model write."""
    _, model, vocabulary = load_run(run)
    sys.stdout.write(prompt)
    for character in write_on(model, vocabulary, prompt, length=length, temperature=temperature, seed=seed):
        sys.stdout.write(character)
        sys.stdout.flush()
    sys.stdout.write("\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; what it refuses is told on one line, with exit code 2. Ctrl-C gives 130."""
    try:
        code = app(args=arguments, prog_name="unrolled", standalone_mode=False)
    except UnrolledError as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"unrolled: {error}", style="red")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        error.show()  # type: ignore[attr-defined]  # click's own usage errors
        code = error.exit_code
    sys.exit(code or 0)
