"""Smoothing pairs: where a factor per channel can move from a tensor's readers to its producer.

If a tensor x is read only by linears and comes from a norm or from a linear whose rows scale it,
then dividing the producer's rows by s and multiplying the readers' columns by s changes nothing
in exact arithmetic. AWQ needs such pairs. They are not listed by architecture but guessed from
structure (who wrote this tensor, who reads it) and then proven: with a random s folded in, the
block must give the same output in float32. A guess that fails is dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmq.adapters import RoutedLinear, UnstackedExperts
from llmq.blocks import hooks, linears, run_block
from llmq.calls import Call
from llmq.moments import ROWS

TOLERANCE = 1e-4  # relative change of the block's output; a wrong pair changes it by percents


@dataclass(frozen=True)
class Pair:
    """A producer and the readers of its output.

    Attributes:
        producer: name of the norm or linear.
        kind: "norm" (scales by its weight), "norm+1" (scales by 1 + its weight) or "rows".
        rows: for "rows", which row of the producer makes channel k of the tensor, int64 (K,).
        readers: names of the modules that multiply the tensor by a matrix (N, K) or (E, N, K).
    """

    producer: str
    kind: Literal["norm", "norm+1", "rows"]
    rows: Tensor | None
    readers: tuple[str, ...]

    def tie(self, values: Tensor) -> Tensor:
        """Average `values` (K,) over channels that one producer row makes (grouped-query heads)."""
        if self.rows is None:
            return values
        size = int(self.rows.max()) + 1
        rows = self.rows.to(values.device)
        total = values.new_zeros(size).index_add_(0, rows, values)
        count = values.new_zeros(size).index_add_(0, rows, torch.ones_like(values))
        return (total / count.clamp(min=1))[rows]


@torch.no_grad()
def fold(block: nn.Module, pair: Pair, factors: Tensor) -> None:
    """Multiply the readers' columns by `factors` (K,) and divide the producer by them, in place."""
    for name in pair.readers:
        weight = block.get_parameter(f"{name}.weight").data
        wide = factors.to(weight.device).double()
        for W in weight if weight.ndim == 3 else [weight]:
            for rows in W.split(ROWS):
                rows.copy_(rows.double() * wide)
    own = dict(block.get_submodule(pair.producer).named_parameters(recurse=False))
    for kind in own.keys() & {"weight", "bias"}:
        parameter = own[kind]
        data = parameter.data.double()  # changed in place
        divisor = factors.to(parameter.device).double()
        if pair.rows is not None:
            by_row = torch.ones(len(data), dtype=data.dtype, device=data.device)
            by_row[pair.rows.to(data.device)] = divisor
            divisor = by_row if data.ndim == 1 else by_row[:, None]
        offset = 1 if kind == "weight" and pair.kind == "norm+1" else 0
        parameter.data.copy_(data.add_(offset).div_(divisor).sub_(offset))


@torch.no_grad()
def proven_pairs(block: nn.Module, hidden: Tensor, call: Call) -> list[Pair]:
    """All smoothing pairs of a block that hold, found and proven on one small input.

    Args:
        block: as `adapters.as_linears` makes it; not changed.
        hidden: (B, T, D), a few tokens are enough.
        call: the rest of the block's arguments.
    """
    exact = copy.deepcopy(block).float()
    hidden = hidden.float()
    call = call.to(hidden.device, torch.float32)
    expected = run_block(exact, hidden, call)
    proven: list[Pair] = []
    taken: set[str] = set()
    for pair in _candidates(exact, hidden, call):
        if taken.isdisjoint(pair.readers) and _holds(exact, pair, hidden, call, expected):
            proven.append(pair)
            taken.update(pair.readers)
    return proven


def _holds(block: nn.Module, pair: Pair, hidden: Tensor, call: Call, expected: Tensor) -> bool:
    K = block.get_parameter(f"{pair.readers[0]}.weight").shape[-1]
    generator = torch.Generator().manual_seed(0)
    factors = pair.tie(torch.rand(K, generator=generator, dtype=torch.float64).to(hidden.device))
    saved = {n: p.data.clone() for n, p in block.named_parameters() if _of(pair, n)}
    fold(block, pair, torch.exp(factors - 0.5))
    change = run_block(block, hidden, call) - expected
    for name, data in saved.items():
        block.get_parameter(name).data.copy_(data)
    return bool(change.norm() <= TOLERANCE * (expected - hidden).norm())


def _of(pair: Pair, parameter: str) -> bool:
    return parameter.rpartition(".")[0] in (pair.producer, *pair.readers)


@dataclass
class _Seen:
    """One tensor that is read by matrices: who read it and which norm wrote it."""

    readers: list[str]
    norms: list[str]
    turn: int  # how many linears had run before


def _candidates(block: nn.Module, hidden: Tensor, call: Call) -> Iterator[Pair]:
    tensors, order = _observe(block, hidden, call)
    head_dims = {getattr(m, "head_dim", None) for m in block.modules()}
    for seen in tensors:
        readers = tuple(seen.readers)
        for norm in seen.norms:
            yield Pair(norm, "norm", None, readers)
            yield Pair(norm, "norm+1", None, readers)
        K = block.get_parameter(f"{readers[0]}.weight").shape[-1]
        for producer in reversed(order[: seen.turn]):
            N = block.get_parameter(f"{producer}.weight").shape[0]
            for rows in _row_maps(N, K, head_dims):
                yield Pair(producer, "rows", rows, readers)


def _row_maps(N: int, K: int, head_dims: set[Any]) -> Iterator[Tensor]:
    """Ways in which N rows can make K channels: all, one half (fused gate/up), repeated heads."""
    if N == K:
        yield torch.arange(K)
    elif N == 2 * K:
        yield torch.arange(K, 2 * K)
        yield torch.arange(K)
    elif N < K and K % N == 0:
        for width in head_dims:
            if isinstance(width, int) and N % width == 0:
                heads = torch.arange(N).view(-1, 1, width)
                yield heads.expand(-1, K // N, -1).reshape(-1)


def _observe(block: nn.Module, hidden: Tensor, call: Call) -> tuple[list[_Seen], list[str]]:
    """Every tensor that matrices read, in order, and all plain linears in execution order."""
    order: list[str] = []
    written: dict[tuple[int, int], list[str]] = {}
    read: dict[tuple[int, int], _Seen] = {}
    alive = []

    def key(x: Tensor) -> tuple[int, int]:
        alive.append(x)
        return x.data_ptr(), x.numel()

    def on_write(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                written.setdefault(key(output), []).append(name)

        return hook

    def on_read(reader: str, is_linear: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                where = key(args[0])
                norms = written.get(where, [])
                read.setdefault(where, _Seen([], norms, len(order))).readers.append(reader)
            if is_linear:
                order.append(reader)

        return hook

    handles = []
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, UnstackedExperts):
            reader = on_read(f"{name}.gate_up_proj", is_linear=False)
            handles.append(module.register_forward_pre_hook(reader))
        elif isinstance(weight, Tensor) and weight.ndim == 2:
            reader = on_read(name, isinstance(module, nn.Linear))
            handles.append(module.register_forward_pre_hook(reader))
        elif isinstance(weight, Tensor) and weight.ndim == 1:
            handles.append(module.register_forward_hook(on_write(name)))
    with hooks(*handles):
        run_block(block, hidden, call)
    matrices = linears(block)
    tensors = [t for t in read.values() if any(name in matrices for name in t.readers)]
    return tensors, [name for name in order if not isinstance(matrices[name], RoutedLinear)]
