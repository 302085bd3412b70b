"""The typer app, and the one place where an error becomes a line on stderr and an exit code."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import __version__
from ..errors import BackendError, DivergenceError
from .bench import bench
from .classify import classify
from .compare import compare
from .diagnose import diagnose
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .inpaint import inpaint
from .options import INTERRUPTED
from .presets import models, presets
from .report import report
from .sample import sample
from .score import score
from .train import train

BAD_INPUT, DIVERGED = 2, 1
_UsageError: Any = typer.BadParameter.__mro__[1]  # UsageError of click, or of the copy of click that newer typer has


class Commands(TyperGroup):
    """Turns what a user can act on into one line; anything else is a fault of ours and keeps its traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        words = [*getattr(ctx, "_protected_args", ()), *ctx.args]
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _shown_once()
                return super().invoke(ctx)
        except _UsageError as error:
            if not words:  # `mgebm` alone: its help
                raise
            typer.echo(f"error: {_of_usage(error, words)}", err=True)
            raise typer.Exit(BAD_INPUT) from error
        except BrokenPipeError:  # `mgebm presets | head`: the reader closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except DivergenceError as error:
            _report(error)
            raise typer.Exit(DIVERGED) from error
        except (ValueError, OSError, ModuleNotFoundError, BackendError, MemoryError) as error:
            _report(error)
            raise typer.Exit(BAD_INPUT) from error
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            _report(error)
            raise typer.Exit(BAD_INPUT) from error


def _shown_once() -> Callable[..., None]:
    """Warnings as lines without the place in the code that Python shows; each once, whatever gives it again, as the
    second part of a run's images does."""
    shown = set[str]()

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            typer.echo(f"warning: {message}", err=True)

    return show


class Command(TyperCommand):
    """A command whose help is no wider than the terminal, its tables and examples too."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(fitted(self.help or "", formatter.width - formatter.current_indent))


def fitted(text: str, width: int) -> str:
    """Help whose paragraphs after a line of \\b, which are shown as they are, have lines of at most `width` characters:
    a command goes on behind a backslash, the line of a table in its last column."""
    paragraphs = text.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if paragraph.startswith("\b\n"):
            paragraphs[i] = "\n".join(_broken(line, width) for line in paragraph.split("\n"))
    return "\n\n".join(paragraphs)


def _broken(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    start = len(line) - len(line.lstrip())
    column = re.match(r" *\S+(?: \S+)*  +", line)
    command = line.lstrip().startswith("mgebm ")
    further = start + 4 if command or column is None or 2 * column.end() > width else column.end()
    head, indent = (line[: column.end()] if column and not command else line[:start]), " " * further
    lines = textwrap.wrap(
        line[len(head) :], width - 2 * command, initial_indent=head, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return (" \\\n" if command else "\n").join(lines)


def _of_usage(error: Any, words: Sequence[str]) -> str:
    """typer's three-line usage error as one line, with the value that was given."""
    message = error.format_message().strip().rstrip(".")
    options = [name for name in getattr(getattr(error, "param", None), "opts", ()) if name.startswith("--")]
    if options and error.message:  # without one: an option that was left out
        name, reason = options[0], error.message.strip().rstrip(".")
        given = _given(name, words)
        expected = reason.removeprefix("Input should be ").partition(", unable to")[0]
        message = f"{name}: must be {expected}, got {given}" if expected != reason and given else f"{name}: {reason}"
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path} -h" if context is not None else message


def _given(name: str, words: Sequence[str]) -> str | None:
    for word, after in zip(words, [*words[1:], None], strict=True):
        option, equals, value = word.partition("=")
        if option == name:
            return value if equals else after
    return None


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get memory: its own class on a GPU, a plain RuntimeError on a CPU."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _report(error: BaseException) -> None:
    if os.environ.get("MGEBM_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    typer.echo(f"error: {' '.join(_words(error).split()) or type(error).__name__}", err=True)


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"cannot read or write {error.filename}: {error.strerror}"
    asked = re.search(r"allocate memory: you tried to allocate (\d+) bytes", str(error))
    if asked:
        gigabytes = int(asked[1]) / 1e9
        return (
            f"memory: {gigabytes:,.1f} GB were asked for in one piece, which this machine cannot give; a smaller "
            "batch_size, width or size, or fewer samples at a time, need less"
        )
    return str(error)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mgebm_fast {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    name="mgebm",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Train multi-grid energy-based models of images, and sample them.

    \b
    A model that comes with the package, in seconds, and one of your own, in minutes:
      mgebm sample digits --num 64 --out digits.png
      mgebm train digits --out runs/digits
      mgebm sample runs/digits --num 64 --out samples.png
      mgebm evaluate runs/digits --num 1000

    Errors are one line and exit code 2 (1: training or sampling diverged). MGEBM_DEBUG=1 adds the traceback.
    """


for command in (
    train,
    sample,
    score,
    inpaint,
    evaluate,
    classify,
    compare,
    diagnose,
    export,
    report,
    bench,
    models,
    presets,
    doctor,
):
    app.command(cls=Command)(command)


class _LastingStream:
    """A text stream whose reader may go away: what cannot be written is lost, and nothing else is."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Send what the stream still holds, and all that follows, to the null device."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Output(_LastingStream):
    """stdout: the command ends where it cannot be written, with one line of an error unless its reader had enough."""

    def _give_up(self, error: OSError) -> None:
        super()._give_up(error)
        if isinstance(error, BrokenPipeError):
            raise SystemExit(0)
        typer.echo(f"error: cannot write to stdout: {error.strerror}", err=True)
        raise SystemExit(BAD_INPUT)


def secure_console() -> None:
    """Open closed standard streams on the null device, so that no file takes their descriptors; keep a command running
    when the reader of its messages on stderr is gone, and end it in good order when stdout cannot be written."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    if not isinstance(sys.stderr, _LastingStream):
        sys.stdout, sys.stderr = _Output(sys.stdout), _LastingStream(sys.stderr)  # type: ignore[assignment]


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `mgebm` and of `python -m mgebm_fast`."""
    secure_console()
    app(args=None if args is None else list(args), prog_name="mgebm")
