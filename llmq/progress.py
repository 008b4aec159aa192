"""A progress bar on standard error, only when somebody looks at it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pace:
    """Tells how long the rest takes, from the times at which steps were finished.

    Args:
        start: when the first step began, in seconds.
        total: steps in all.
        before: how many of them were finished by an earlier run.
    """

    def __init__(self, start: float, total: int, before: int = 0) -> None:
        self._total = total
        self._start = self._last = (start, before)

    def note(self, now: float, done: int) -> None:
        """Take in that `done` steps are finished at the time `now`.

        If none is, the first one only begins now: what happens once before it says nothing.
        """
        if done > self._last[1]:
            self._last = (now, done)
        elif self._last == self._start:
            self._start = self._last = (now, done)

    def remaining(self) -> float | None:
        """Seconds from the last finished step to the end; None before the first one."""
        if self._last == self._start:
            return None
        rate = (self._last[0] - self._start[0]) / (self._last[1] - self._start[1])
        return rate * (self._total - self._last[1])


def duration(seconds: float) -> str:
    """ "1:02:03", "2:03" """
    hours, rest = divmod(round(seconds), 3600)
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
        pace = Pace(time.monotonic(), total, before)

        def advance(done: int) -> None:
            pace.note(time.monotonic(), done)
            seconds = pace.remaining()
            left = "-:--" if seconds is None else duration(seconds)
            progress.update(task, completed=max(done, before), left=left)

        yield advance
