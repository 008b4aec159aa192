"""Outputs of the parts of a block that will not change any more."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmq.blocks import Substitute, linears


class _Once(Substitute):
    """Takes the place of a part of a block that will not change any more.

    Computes its output for each of `count` batches once and repeats it when the batches come
    again, always in the same order.
    """

    def __init__(self, part: nn.Module, count: int):
        super().__init__(part)
        self._count = count
        self._turn = 0
        self._outputs: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        turn, self._turn = self._turn, (self._turn + 1) % self._count
        if len(self._outputs) < self._count:
            self._outputs.append(self.original(*args, **kwargs))
        return self._outputs[turn]


def keep_outputs(block: nn.Module, done: set[str], count: int) -> None:
    """Run parts of `block` once from now on, whose linears are all in `done`.

    After attention is quantized, runs up to the linears of the MLP need not compute it again; in
    full precision, nothing need be computed again from the last time on that it is looked into.
    `count` is the number of batches.
    """
    for name, part in list(block.named_children()):
        inside = {n for n in linears(block) if n.startswith(f"{name}.")}
        if inside and inside <= done:
            block.set_submodule(name, _Once(part, count))


def forget_outputs(block: nn.Module) -> None:
    """Undo `keep_outputs`."""
    for name, part in list(block.named_children()):
        if isinstance(part, _Once):
            block.set_submodule(name, part.original)
