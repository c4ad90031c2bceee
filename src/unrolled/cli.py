"""The command's outermost layer: how it ends, whatever happens inside."""

from __future__ import annotations

import io
import os
import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command; what it refuses is printed on one line, with exit code 2. Ctrl-C gives 130."""
    _replace_unprintable()
    try:
        # Imported here, so that Ctrl-C is caught while this is still loading.
        from unrolled.train.commands import run_command

        code = run_command(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        _drop_output()
        code = 1
    sys.exit(code)


def _replace_unprintable() -> None:
    """Print `?` for what the terminal's encoding lacks: a model may write any character of its text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _drop_output() -> None:
    """Send the rest nowhere: Python flushes at exit, and would complain that nobody reads any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
