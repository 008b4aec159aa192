"""Write docs/cli.md from the command line itself: python docs/make_cli.py"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer.main

from llmq.cli import app

PAGE = Path(__file__).parent / "cli.md"


def page() -> str:
    """Every command with its help, arguments and options."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# The command line",
        "Written by `python docs/make_cli.py` from what `llmq --help` says; a test compares.",
        plain(group.help),
    ]
    for name, command in group.commands.items():
        parts += [f"## llmq {name}", plain(command.help), table(command.params)]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Help text without its markup, every example a code block of its own."""
    text = re.sub(r"\[/?bold\]", "**", text)
    paragraphs = [
        f"```sh\n{part}\n```" if part.startswith("llmq ") else part
        for part in re.split(r"\n\n+", text.strip())
    ]
    return "\n\n".join(paragraphs)


def table(params: list[Any]) -> str:
    """Arguments and options with their defaults."""
    lines = ["| | default | |", "|---|---|---|"]
    for param in params:
        if param.name == "help":
            continue
        is_argument = param.param_type_name == "argument"
        names = [param.name.upper()] if is_argument else [*param.opts, *param.secondary_opts]
        label = ", ".join(f"`{name}`" for name in names)
        default = getattr(param.default, "value", param.default)
        shown = "" if default in (None, False, ()) or callable(default) else f"`{default}`"
        said = (getattr(param, "help", "") or "").replace("|", "\\|")
        lines.append(f"| {label} | {shown} | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
