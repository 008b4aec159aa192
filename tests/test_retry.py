"""A device that runs out of memory: smaller batches, then the CPU; the same answer in the end."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ARCHITECTURES, tiny_ids, tiny_model

from llmq.blocks import (
    decoder_blocks,
    linears,
    record_calls,
    run_block,
)
from llmq.kept import forget_outputs, keep_outputs
from llmq.ladder import METHODS, QUALITIES
from llmq.quantize import Recipe, quantize
from llmq.retry import Windows
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.solvers.awq import AWQ
from llmq.solvers.awq_pairs import Pair
from llmq.solvers.gptq import GPTQ

SCHEME = QuantScheme(4, 64)
BATCHES = tiny_ids(12, 24).split(3)
TOLD = "out of memory on cpu; going on one window at a time from here on."
TOLD_CPU = "out of memory on cpu; going on on the CPU where that is not enough."


@dataclass(frozen=True)
class Hungry:
    """GPTQ that runs out of memory at some of its calls."""

    at: tuple[int, ...]
    calls: list[int] = field(default_factory=list)

    def solve(self, W: Tensor, H: Tensor, scheme: QuantScheme) -> QuantizedWeight:
        self.calls.append(1)
        if len(self.calls) in self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return GPTQ().solve(W, H, scheme)


class NarrowGate(nn.Module):
    """An activation function that has room for one window."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return nn.functional.silu(x)


def run(model: Any, recipe: Recipe, batches: Any = BATCHES) -> tuple[dict[str, Tensor], list[str]]:
    """The state of a quantized copy, and what was solved."""
    model = copy.deepcopy(model)
    names = [report.name for report in quantize(model, batches, recipe)]
    return model.state_dict(), names


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@torch.no_grad()
def test_windows_one_by_one_are_the_batch(name: str) -> None:
    """Masks and rotary angles of every architecture are cut as they must be."""
    model: Any = tiny_model(name)
    _, blocks = decoder_blocks(model)
    ids = tiny_ids(3, 24)
    recording = record_calls(model, blocks, [ids])
    [hidden] = recording.hidden
    windows = Windows([hidden], torch.device("cpu"))
    assert len(windows) == 3
    for i, block in enumerate(blocks):
        [call] = recording.calls[i]
        whole = run_block(block, hidden, call)
        parts = [run_block(block, w, c) for w, c in zip(windows, call.split(3), strict=True)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["gptq", "balanced"])
def test_a_solver_without_memory_gets_smaller_batches(recipe, caplog) -> None:
    model = tiny_model("llama")
    chosen = (METHODS | QUALITIES)[recipe]
    kind = {"scheme": SCHEME, "match": chosen.match}
    solver = Hungry((2,))
    with caplog.at_level(logging.WARNING, "llmq.retry"):
        state, names = run(model, Recipe(solver=solver, **kind))
    assert caplog.messages == [f"model.layers.0: {TOLD}"]
    assert len(solver.calls) == 2 + 2 * 4  # groups of a block
    expected, same_names = run(model, Recipe(**kind), [w for b in BATCHES for w in b.split(1)])
    assert names == same_names
    assert same(state, expected)


@dataclass(frozen=True)
class Counting(AWQ):
    """AWQ that counts its calls."""

    seen: list[int] = field(default_factory=list)

    def smooth(
        self, block: Any, work: Any, schemes: Any, hidden: Any, calls: Any, probe: Any
    ) -> list[Pair]:
        self.seen.append(1)
        return super().smooth(block, work, schemes, hidden, calls, probe)


def test_channels_are_scaled_once() -> None:
    awq = Counting()
    _, names = run(tiny_model("llama"), Recipe(SCHEME, Hungry((2, 3)), awq))
    assert len(names) == 14
    assert len(awq.seen) == 2  # blocks


def test_a_block_that_does_not_fit_is_solved_on_the_cpu(caplog) -> None:
    model = tiny_model("llama")
    with caplog.at_level(logging.WARNING, "llmq.retry"):
        state, names = run(model, Recipe(SCHEME, Hungry((1, 2, 7))))  # 7: in the second block
    assert caplog.messages == [f"model.layers.0: {TOLD}", f"model.layers.0: {TOLD_CPU}"]
    expected, _ = run(model, Recipe(SCHEME), [w for b in BATCHES for w in b.split(1)])
    assert len(names) == 14
    assert same(state, expected)


def test_nothing_helps() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        run(tiny_model("llama"), Recipe(SCHEME, Hungry((1, 2, 3))))


def test_a_forward_pass_without_memory_gets_smaller_batches(caplog) -> None:
    model: Any = tiny_model("llama")
    expected, _ = run(model, Recipe(SCHEME), [w for b in BATCHES for w in b.split(1)])
    model.model.layers[1].mlp.act_fn = NarrowGate()
    with caplog.at_level(logging.WARNING, "llmq.retry"):
        state, names = run(model, Recipe(SCHEME))
    assert caplog.messages == [f"model.layers.1: {TOLD}"]
    assert len(names) == 14
    before = {key: value for key, value in state.items() if ".layers.1." not in key}
    first, _ = run(tiny_model("llama"), Recipe(SCHEME))
    assert all(torch.equal(value, first[key]) for key, value in before.items())
    assert state.keys() == expected.keys()


@torch.no_grad()
def test_outputs_that_were_kept_are_forgotten() -> None:
    model: Any = tiny_model("llama")
    _, blocks = decoder_blocks(model)
    recording = record_calls(model, blocks, BATCHES)
    block, call = copy.deepcopy(blocks[0]), recording.calls[0][0]
    before = run_block(block, recording.hidden[0], call)
    keep_outputs(block, {name for name in linears(block) if "attn" in name}, len(BATCHES))
    for hidden in recording.hidden:
        run_block(block, hidden, call)
    run_block(block, recording.hidden[0], call)
    assert not torch.equal(run_block(block, recording.hidden[0], call), before)  # out of turn
    forget_outputs(block)
    assert torch.equal(run_block(block, recording.hidden[0], call), before)
