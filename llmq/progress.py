"""A progress bar on standard error, only when somebody looks at it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def remaining(elapsed: float, done: int, total: int, before: int = 0) -> str:
    """The time that the rest takes at the average speed so far: "1:02:03"; "-:--" at first.

    Args:
        elapsed: seconds so far.
        done: steps that are finished, `before` of them before the clock started.
        total: steps in all.
    """
    if done <= before:
        return "-:--"
    seconds = round(elapsed * (total - done) / (done - before))
    hours, rest = divmod(seconds, 3600)
    minutes = f"{rest // 60:02}" if hours else str(rest // 60)
    return f"{hours}:{minutes}:{rest % 60:02}" if hours else f"{minutes}:{rest % 60:02}"


@contextmanager
def progress_bar(
    label: str, total: int, *, show: bool, before: int = 0
) -> Iterator[Callable[[int], None]]:
    """A bar with the time that remains; yields a function that takes how much is done.

    Nothing is shown unless `show` and standard error is a terminal. `before` steps were finished
    by an earlier run.
    """
    if not show:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
    )

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns,
        TextColumn("{task.fields[left]} left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(label, total=total, completed=before, left="-:--")
        start = time.monotonic()

        def advance(done: int) -> None:
            left = remaining(time.monotonic() - start, done, total, before)
            progress.update(task, completed=max(done, before), left=left)

        yield advance
