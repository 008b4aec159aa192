"""Read the next block while one is worked on, where the device is not the CPU.

There a solver leaves the CPU with nothing to do. Where it does not, a thread that reads would only
be in its way: the files are mapped, and the system keeps them in memory as long as there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

Read = Callable[[int], nn.Module]


class Ahead:
    """Blocks in their order, each read while the one before it is worked on: never more than one.

    Args:
        read: gives a block by its number; is called in another thread.
        count: how many there are.
        pinned: put weights into memory that a GPU reads while the CPU goes on.
    """

    def __init__(self, read: Read, count: int, pinned: bool = False) -> None:
        self._read = read
        self._count = count
        self._pinned = pinned
        self._thread = ThreadPoolExecutor(1, "llmq-reads-ahead")
        self._next: tuple[int, Future[nn.Module]] | None = None

    def block(self, index: int) -> nn.Module:
        """Block `index`; the one after it is read from now on.

        What `read` raises in the thread is raised here.
        """
        if self._next and self._next[0] == index:
            block = self._next[1].result()
            self._next = None
        else:
            block = self._load(index)
        later = index + 1
        if later < self._count and not (self._next and self._next[0] == later):
            self._forget()
            self._next = later, self._thread.submit(self._load, later)
        return block

    def close(self) -> None:
        """Wait for the thread; what it has read is forgotten."""
        self._forget()
        self._thread.shutdown()

    def _forget(self) -> None:
        if self._next:
            self._next[1].cancel()
        self._next = None

    def _load(self, index: int) -> nn.Module:
        block = self._read(index)
        if self._pinned:
            for parameter in block.parameters():
                parameter.data = parameter.data.pin_memory()
        return block


@contextmanager
def read_ahead(read: Read, count: int, device: str) -> Iterator[Read]:
    """`read`, or on a device that is not the CPU something like it that reads ahead.

    At the end, for whatever reason, no thread is left.

    Args:
        read: gives a block by its number.
        count: how many there are.
        device: where blocks are worked on.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        yield read
        return
    ahead = Ahead(read, count, pinned=kind == "cuda")
    try:
        yield ahead.block
    finally:
        ahead.close()
