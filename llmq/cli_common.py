"""What commands of the command line share."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

AsJson = Annotated[
    bool, typer.Option("--json", help="End standard output with one JSON object on one line.")
]


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
