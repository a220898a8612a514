"""What the verbs share: declarations of options, and helpers that read their values and print results."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.errors import UserError
from expunge.extensions import import_file
from expunge.files import to_json
from expunge.progress import Progress

# -- options, one declaration each: `def command(model: Model, out: Out, seed: Seed = 0, ...)` -------------------

Model = Annotated[str, typer.Option("--model", "-m", help="Trained model: a local folder or a hub name.")]
Original = Annotated[str | None, typer.Option("--original", help="The model before unlearning.")]
Reference = Annotated[
    list[str] | None,
    typer.Option("--reference", metavar="FOLDER", help="Model retrained without the forget set; repeat for more."),
]
Data = Annotated[str | None, typer.Option("--data", "-d", help="Dataset by name; see 'expunge ls datasets'.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder with a local copy of the dataset.")]
DataOption = Annotated[
    list[str] | None, typer.Option("--data-option", metavar="KEY=VALUE", help="Option of the dataset; repeat for more.")
]
Delete = Annotated[
    list[str] | None,
    typer.Option(
        "--delete",
        help="What to forget instead: subject=NAME, sample=ID (repeat), subjects=N or samples=N; only=image|text.",
    ),
]
Forget = Annotated[
    Path | None, typer.Option("--forget", help="File of the samples to forget: JSONL, JSON, CSV, TSV or Parquet.")
]
Retain = Annotated[Path | None, typer.Option("--retain", help="File of training samples to keep.")]
Holdout = Annotated[
    Path | None, typer.Option("--holdout", help="File of samples like those to forget, never trained on.")
]
Utility = Annotated[Path | None, typer.Option("--utility", help="File of other knowledge that must stay.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder: a new one, or the one to continue.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Lora = Annotated[
    str | None,
    typer.Option("--lora", metavar="KEY=VALUE,...", help="Train low-rank adapters, not all weights: 'r=8,alpha=16'."),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.", min=0)]
DataSeed = Annotated[int, typer.Option("--data-seed", help="Seed of generated data and of what --delete draws.", min=0)]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Samples per step.", min=1)]
Epochs = Annotated[
    float | None, typer.Option("--epochs", help="Passes over the data; the method's own if none.", min=0)
]
LearningRate = Annotated[
    float | None, typer.Option("--learning-rate", help="Peak learning rate; by the model's size if none.", min=0)
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="auto (the model's chat template, if it has one), chat, plain, or a text with {prompt}, {target}.",
    ),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of the method; repeat for more.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and the cost; do nothing.")]


def command_of(name: str, function: Callable[..., Any]) -> Any:
    """The parser of one verb: options from the signature, help from the docstring.

    The lines after ``Example:`` or ``Examples:`` keep their breaks.
    """
    application = typer.Typer(add_completion=False, rich_markup_mode=None)
    # A lone backspace character before a paragraph is the parser's sign to leave its lines alone.
    text = re.sub(r"\n\n(Examples?:\n)", "\n\n\b\n\\1", inspect.getdoc(function) or "")
    application.command(name=name, help=text, context_settings={"help_option_names": ["--help", "-h"]})(function)
    return typer.main.get_command(application)


# -- values ------------------------------------------------------------------------------------------------------


def key_values(given: Iterable[str] | None, option: str = "--set") -> dict[str, str]:
    """``["lr=1e-5", "beta=0.1"]`` as a dictionary of strings; the receiver's fields give them their types.

    >>> key_values(["beta=0.1", "template={prompt} = {target}"])
    {'beta': '0.1', 'template': '{prompt} = {target}'}

    Raises:
        UserError: no ``=``, no key, or a key given twice.
    """
    values: dict[str, str] = {}
    for item in given or ():
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UserError(f"{option} {item!r} is not key=value: write for example {option} {key or 'key'}=1.")
        if key in values:
            raise UserError(f"{option} gives '{key}' twice ({values[key]} and {value.strip()}): give it once.")
        values[key] = value.strip()
    return values


def function_of(text: str, option: str) -> Callable[[str], str]:
    """The function of ``path/to/file.py:name``.

    Raises:
        UserError: not of that form, no such file, or no such function in it.
    """
    path, colon, name = text.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise UserError(f"{option} '{text}' is not path/to/file.py:name: give the file and the function in it.")
    found = getattr(sys.modules[import_file(path, "function")], name, None)
    if not callable(found):
        raise UserError(f"'{path}' has no function called '{name}': check the name in {option}.")
    chosen: Callable[[str], str] = found
    return chosen


def commas(text: str | None) -> list[str]:
    """``"npo, ga"`` as a list; nothing, and empty places, give nothing.

    >>> commas("npo, ga,")
    ['npo', 'ga']
    """
    return [item.strip() for item in (text or "").split(",") if item.strip()]


def pairs(text: str | None, option: str) -> dict[str, str]:
    """``"r=8,alpha=16"`` as a dictionary of strings; a place without ``=`` belongs to the value before it.

    >>> pairs("r=8,targets=q_proj,v_proj", "--lora")
    {'r': '8', 'targets': 'q_proj,v_proj'}

    Raises:
        UserError: see :func:`key_values`.
    """
    items: list[str] = []
    for item in commas(text):
        if "=" in item or not items:
            items.append(item)
        else:
            items[-1] += f",{item}"
    return key_values(items, option)


def existing(path: Path | None, option: str) -> Path | None:
    """``path`` itself, if it is a file.

    Raises:
        UserError: it is not.
    """
    if path is not None and not path.is_file():
        raise UserError(
            f"{option} '{path}' is no file: give one with a sample per line, e.g. {option.lstrip('-')}.jsonl."
        )
    return path


# -- output ------------------------------------------------------------------------------------------------------


def progress(quiet: bool, event: Callable[..., None] | None = None) -> Progress:
    """Progress for a verb; ``event`` is the open run's."""
    return Progress(quiet=quiet, event=event)


def emit(obj: Any, text: str, as_json: bool) -> None:
    """The result on standard output: one JSON object, or the text for people."""
    sys.stdout.write((to_json(obj, indent=2) if as_json else text.rstrip("\n")) + "\n")


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), indent: int = 0) -> str:
    """Aligned columns; the last one is wrapped to the width of the terminal (100 when there is none)."""
    lines = [list(header), *map(list, rows)] if header else list(map(list, rows))
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    margin = indent + sum(width + 2 for width in widths)
    room = max(30, shutil.get_terminal_size((100, 24)).columns - margin)
    text: list[str] = []
    for line in lines:
        start = " " * indent + "".join(f"{cell:<{width}}  " for cell, width in zip(line, widths, strict=False))
        wrapped = textwrap.wrap(line[-1], room, break_long_words=False, break_on_hyphens=False) or [""]
        text += [(start + wrapped[0]).rstrip(), *(" " * margin + more for more in wrapped[1:])]
    return "\n".join(text) + "\n"
