"""When a device has too little memory: one window at a time, then the CPU for one block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmq import ranks
from llmq.adapters import run_dtype
from llmq.calls import Call

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Windows(Sequence[Tensor]):
    """The windows of batches (B, T, D) one by one, (1, T, D), on another device."""

    def __init__(self, batches: Sequence[Tensor], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._where = [(b, row) for b, batch in enumerate(batches) for row in range(len(batch))]

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        b, row = self._where[index]
        return _moved(self._batches[b][row : row + 1], self._device)


def _moved(states: Tensor, device: torch.device) -> Tensor:
    return states.to(device, run_dtype(states.dtype, device))


@dataclass(frozen=True)
class Effort:
    """How a block is run.

    Attributes:
        device: where.
        single: one window at a time, instead of the batches as they are.
    """

    device: torch.device
    single: bool

    def states(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """Hidden states to run with; nothing is copied before it is asked for."""
        return Windows(batches, self.device) if self.single else batches

    def calls(self, calls: Sequence[Call], batches: Sequence[Tensor]) -> list[Call]:
        """The calls that belong to them."""
        dtype = run_dtype(batches[0].dtype, self.device)
        moved = [call.to(self.device, dtype) for call in calls]
        if not self.single:
            return moved
        pairs = zip(moved, batches, strict=True)
        return [piece for call, batch in pairs for piece in call.split(len(batch))]


class Retries:
    """Runs steps on a device with less and less at once, as long as its memory is too small.

    Once windows go one by one, they do so to the end; the CPU helps out for one block at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.efforts = [
            Effort(device, single=False),
            Effort(device, single=True),
            Effort(torch.device("cpu"), single=True),
        ]
        self._level = 0
        self._told: set[int] = set()

    def run(
        self,
        name: str,
        step: Callable[[Effort], T],
        first: Effort | None = None,
        together: bool = False,
    ) -> T:
        """What `step` returns.

        Args:
            name: of the block, for the one line that is logged.
            step: may raise torch.OutOfMemoryError, and must not have changed anything then.
            first: begin with this effort.
            together: all processes of the run take this step, and meet on the way; if one of them
                has too little memory, all begin again.

        Raises:
            torch.OutOfMemoryError: it does so on the CPU too.
        """
        level = self._level if first is None else self.efforts.index(first)
        if together:
            level = ranks.highest(level)
        attempt = partial(_and_meet, step) if together else step
        while True:
            try:
                return attempt(self.efforts[level])
            except torch.OutOfMemoryError as error:
                elsewhere = isinstance(error, ranks.OutOfMemoryElsewhere)
                if level + 1 == len(self.efforts):
                    raise
            # Here the exception, and with it all that its frames held, is gone.
            level += 1
            if not elsewhere:
                self._tell(name, level)
                if together:
                    with suppress(ranks.OutOfMemoryElsewhere):
                        ranks.meet(full=True)
            self._level = max(self._level, min(level, 1))
            if self.efforts[0].device.type == "cuda":
                torch.cuda.empty_cache()

    def _tell(self, name: str, level: int) -> None:
        if level not in self._told:
            self._told.add(level)
            how = "one window at a time from here on", "on the CPU where that is not enough"
            device = self.efforts[0].device
            logger.warning("%s: out of memory on %s; going on %s.", name, device, how[level - 1])


def _and_meet(step: Callable[[Effort], T], effort: Effort) -> T:
    found = step(effort)
    ranks.meet()
    return found
