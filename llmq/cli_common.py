"""What commands of the command line share."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmq import cli_help

if TYPE_CHECKING:
    from rich.console import Console


class Join(str, Enum):
    """How documents become one text."""

    documents = "documents"
    wikitext = "wikitext"


class Quality(str, Enum):
    """Rungs of the ladder."""

    fast = "fast"
    balanced = "balanced"
    best = "best"


class Method(str, Enum):
    """How codes are found."""

    rtn = "rtn"
    gptq = "gptq"
    awq = "awq"
    awq_gptq = "awq+gptq"


class Activations(str, Enum):
    """Where hidden states are kept."""

    memory = "memory"
    disk = "disk"


# Options of more than one command; where a name was taken by an enum, it ends in Option.
AnyModel = Annotated[str, typer.Argument(help="Quantized or not: folder or Hub name.")]
Original = Annotated[str, typer.Argument(help="Full-precision model: folder or Hub name.")]
NewFolder = Annotated[Path, typer.Argument(help="Folder to create.")]
Bits = Annotated[
    float, typer.Option(help="8, 6, 5, 4, 3 or 2 bits per weight; between them, an average.")
]
Mixed = Annotated[bool, typer.Option("--mixed", help="Bits are an average even if a whole number.")]
GroupSize = Annotated[
    int, typer.Option(help="Weights that share a scale: 32, 64, 128; -1 = a whole row.")
]
Symmetric = Annotated[bool, typer.Option("--symmetric/--asymmetric")]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", help=f"To calibrate on: {cli_help.TEXT} Repeatable: equal parts of each."
    ),
]
Samples = Annotated[int, typer.Option(help="Windows of calibration text.")]
SeqLen = Annotated[
    int | None, typer.Option(help="Tokens per window. (default: 512, or the model's limit)")
]
Seed = Annotated[int, typer.Option(help="Which windows of the text are used.")]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Layers to leave as they are; repeatable."),
]
TuneScales = Annotated[
    int | None,
    typer.Option(
        metavar="STEPS", help="Tune all scales together in the end. (default: by quality)"
    ),
]
ActivationsOption = Annotated[
    Activations, typer.Option(help="Where the calibration's hidden states are kept.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="End standard output with one JSON object on one line.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto = the GPU if there is one.")]
JoinOption = Annotated[
    Join, typer.Option(help="wikitext: the text is a raw file of wikitext; join rows as papers do.")
]
Bos = Annotated[bool | None, typer.Option("--bos/--no-bos", help="Start windows with BOS.")]


def start(as_json: bool) -> Console:
    """Keep the libraries quiet; where people read: standard error if a program reads the output."""
    from rich.console import Console
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Console(stderr=as_json)


def finish(result: dict[str, Any], as_json: bool) -> None:
    """The last line of standard output, if a program reads it."""
    if as_json:
        print(json.dumps(result, allow_nan=False, default=str))


def source(texts: list[str] | None) -> str | list[Path] | None:
    """What `--calibration` was given: nothing, one source of text or several."""
    if not texts:
        return None
    return texts[0] if len(texts) == 1 else [Path(text) for text in texts]


def numbers(option: str, text: str) -> list[int]:
    """ "1,4,16" -> [1, 4, 16]"""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"{text!r}: positive numbers with commas, such as 1,4,16.", param_hint=option
        )
    return [int(part) for part in parts]
