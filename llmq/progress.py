"""A progress bar on standard error, only when somebody looks at it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], label: str, *, total: int, show: bool) -> Iterable[T]:
    """`items`, with a bar and the time that remains if `show` and standard error is a terminal."""
    if not show:
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    return rich_track(
        items, label, total=total, console=console, transient=True, disable=not console.is_terminal
    )
