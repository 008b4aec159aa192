"""Where the flow takes decoder blocks from, and where it leaves them when they are packed."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from llmq.nn import Packed, PackedExperts, linear_from
from llmq.scheme import QuantizedWeight, QuantScheme


@dataclass(frozen=True)
class LayerReport:
    """What became of one matrix.

    Attributes:
        name: module name; experts of a stack are numbered, as in "...experts.3.down_proj".
        shape: (N, K).
        scheme: its number format.
        error: expected squared error of its output over that of the output, tr(D H D^T) /
            tr(W H W^T), for the inputs seen in calibration.
        tokens: calibration tokens that reached it.
        seconds: spent in the solver (shared equally by matrices that were solved together).
    """

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme
    error: float
    tokens: int
    seconds: float


def outputs_of(index: int) -> str:
    """Under which name that is put aside which tells how the loss feels a block's outputs."""
    return f"outputs-{index}"


class Store(Protocol):
    """Where the flow takes blocks from and where it leaves them.

    Attributes:
        start: how many blocks an interrupted run has finished; the flow goes on after them.
        done: the reports of those.
        prepared: whether everything is put aside that blocks are solved with.
        lean: whether memory is scarcer than time: nothing is kept that can be computed again.
    """

    lean: bool
    start: int
    done: list[LayerReport]
    prepared: bool

    def outer(self) -> AbstractContextManager[None]:
        """The model with the weights of everything but the blocks, for the length of a `with`."""
        ...

    def open(self, index: int) -> nn.Module:
        """Block `index` with its weights."""
        ...

    def look(self, index: int) -> nn.Module:
        """Block `index` with its weights, which will not be changed."""
        ...

    def put_aside(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors until they are asked for."""
        ...

    def take(self, name: str) -> Mapping[str, Tensor]:
        """What was put aside under this name."""
        ...

    def forget(self, name: str) -> None:
        """It is not needed any more."""
        ...

    def ready(self) -> None:
        """What is aside now is all that blocks are solved with; a run that is stopped has it."""
        ...

    def streams(self, count: int) -> Sequence[MutableSequence[Tensor]]:
        """Lists of hidden states, one (B, T, D) per batch, that the flow fills and updates.

        Empty if `start` is 0, else what leaves the last finished block.
        """
        ...

    def close(
        self,
        index: int,
        block: nn.Module,
        solved: Mapping[str, Sequence[QuantizedWeight]],
        reports: Sequence[LayerReport],
    ) -> None:
        """Take what became of block `index`; the streams hold what leaves it.

        What was put aside for it is not needed any more.
        """
        ...


class InMemory:
    """A model that is in memory and stays there."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._blocks = blocks
        self.lean = False
        self.start = 0
        self.done: list[LayerReport] = []
        self.prepared = False
        self._aside: dict[str, Mapping[str, Tensor]] = {}

    def outer(self) -> AbstractContextManager[None]:
        return nullcontext()

    def look(self, index: int) -> nn.Module:
        return self._blocks[index]

    def put_aside(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._aside[name] = tensors

    def take(self, name: str) -> Mapping[str, Tensor]:
        return self._aside[name]

    def forget(self, name: str) -> None:
        del self._aside[name]

    def ready(self) -> None:
        self.prepared = True

    def open(self, index: int) -> nn.Module:
        return self._blocks[index]

    def streams(self, count: int) -> Sequence[MutableSequence[Tensor]]:
        return [[] for _ in range(count)]

    def close(
        self,
        index: int,
        block: nn.Module,
        solved: Mapping[str, Sequence[QuantizedWeight]],
        reports: Sequence[LayerReport],
    ) -> None:
        self._aside.pop(outputs_of(index), None)
        for packed in pack(block, solved):
            packed.prepare()


def pack(block: nn.Module, solved: Mapping[str, Sequence[QuantizedWeight]]) -> list[Packed]:
    """Put packed modules where the solved linears and experts of `block` are; returns them."""
    made: list[Packed] = []
    for name, results in solved.items():
        parent, _, leaf = name.rpartition(".")
        device = next(block.parameters()).device
        if leaf == "gate_up_proj" and f"{parent}.down_proj" in solved and len(results) > 1:
            experts = block.get_submodule(parent)
            down = solved[f"{parent}.down_proj"]
            packed = PackedExperts.from_quantized(experts, results, down).to(device)
        elif len(results) > 1:
            continue  # the other half of an expert stack
        else:
            bias = getattr(block.get_submodule(name), "bias", None)
            packed = linear_from(results[0], bias).to(device)
        block.set_submodule(parent if len(results) > 1 else name, packed)
        made.append(packed)
    return made
