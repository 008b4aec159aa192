"""What commands of the command line share."""

from __future__ import annotations

import json
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

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


def numbers(option: str, text: str) -> list[int]:
    """ "1,4,16" -> [1, 4, 16]"""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"{text!r}: positive numbers with commas, such as 1,4,16.", param_hint=option
        )
    return [int(part) for part in parts]
