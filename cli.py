"""The command line: registers the subcommands and turns errors into one line."""

from __future__ import annotations

import functools
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import typer

from quant.commands import COMMANDS
from quant.distributed import print_error

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a user can cause into one line on stderr and exit code 2; Ctrl-C into 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with one_line_warnings():
                command(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output has gone, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (ValueError, OSError, MemoryError) as error:
            print_error(f"error: {' '.join(str(error).split())}")
            raise typer.Exit(2) from None
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported
                raise
            print_error(f"error: {gpu_is_full(error)}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print_error("interrupted; nothing was written under the final name")
            raise typer.Exit(130) from None

    return wrapped


def gpu_is_full(error: RuntimeError) -> str:
    """What torch tells of a GPU's memory in a paragraph."""
    wanted = re.search("[0-9.]+ [KMGT]iB", str(error))
    return (
        f"the GPU's memory is full{f' ({wanted[0]} more were wanted)' if wanted else ''}; use "
        "--device cpu, or with quantize --max-memory, and --resume to keep finished layers"
    )


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print warnings as lines on stderr: in full the first from each place in the code, which may
    speak of one linear of hundreds; in the end the number of the others.
    """
    seen: dict[tuple[str, int], list[str]] = {}

    def show(message: str, place: tuple[str, int]) -> None:
        if place not in seen:
            print(f"warning: {message}", file=sys.stderr)
        seen.setdefault(place, []).append(message)

    warnings.showwarning = lambda message, _, file, line, *__: show(str(message), (file, line))
    try:
        yield
    finally:
        for first, *others in seen.values():
            if others:
                print(f"warning: {len(others)} more like: {first}", file=sys.stderr)


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    """Quantize Llama 2 checkpoints to 4 bits with GPTQ, judge them, and run them."""
    if context.invoked_subcommand is None:
        print("Three commands to start with (each has --help):")
        print("  python cli.py quantize --bits 4   the bundled model, or yours with --model PATH")
        print("  python cli.py eval --ppl          how good is the result?")
        print('  python cli.py generate "def "     write text with it')


UsageError: Any = typer.BadParameter.__base__  # of the click that this typer brings


def usage_line(error: Any, words: list[str]) -> str:
    """What is wrong with the arguments, what would be right, and where to read on."""
    told = " ".join(error.format_message().split()).rstrip(".?")
    names = getattr(getattr(error, "param", None), "opts", [])
    given = [
        after if word in names else word.partition("=")[2]
        for word, after in pairwise([*words, ""])
        if word.partition("=")[0] in names
    ]
    if given and repr(given[-1]) not in told:  # the last is what counts
        told += f", not {given[-1]!r}"
    if commands := getattr(getattr(error.ctx, "command", None), "commands", None):
        told += f"; there are {', '.join(commands)}" if "ommand" in told else ""
    place = f"{error.ctx.command_path} --help" if error.ctx else "--help"
    return f"{told}; see: {place}"


GROUPS = {"bench": typer.Typer(help="Time kernels and whole models on this machine.")}
for name, group in GROUPS.items():
    app.add_typer(group, name=name)
for name, function in COMMANDS.items():
    first, _, second = name.partition(" ")
    if second:
        GROUPS[first].command(second)(one_line_errors(function))
    else:
        app.command(name)(one_line_errors(function))


def main() -> None:
    """Entry point of the console script."""
    for name in ("stdout", "stderr"):  # None where a shell's >&- closed it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows does not know every character
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False)
    except UsageError as error:
        print_error(f"error: {usage_line(error, sys.argv[1:])}")
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
