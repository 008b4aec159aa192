"""Block tuning: nearer to the full-precision block on held-out batches, or left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_quantize import batches, divergence
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import tiny_model

from llmq import demo
from llmq.adapters import as_linears
from llmq.blocks import decoder_blocks, linears, record_calls, run_block
from llmq.calibrate import token_windows
from llmq.calls import Call
from llmq.errors import SchemeError
from llmq.objective import is_held_out
from llmq.quantize import Recipe, quantize
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.solvers.rtn import RTN
from llmq.tuning import ScaleTuning
from llmq.tuning_blocks import BlockTuning, tune_block

QUICK = BlockTuning(steps=12, rate=0.02, every=4)
Solved = dict[str, list[QuantizedWeight]]
Case = tuple[nn.Module, Solved, list[Tensor], list[Call], list[Tensor]]


@torch.no_grad()
def case(name: str, dtype: torch.dtype, scheme: QuantScheme, count: int = 7) -> Case:
    """Block 0 of a tiny model, rounded, with inputs that quantization has moved."""
    model: Any = tiny_model(name, dtype=dtype).eval()
    _, blocks = decoder_blocks(model)
    recording = record_calls(model, blocks, batches(model, count))
    block = as_linears(copy.deepcopy(blocks[0]))
    solved: Solved = {}
    for linear in linears(block):
        weight = block.get_parameter(f"{linear}.weight").data
        each = weight if weight.ndim == 3 else weight.unsqueeze(0)
        eye = torch.eye(weight.shape[-1])
        solved[linear] = [RTN().solve(W, eye, scheme) for W in each]
    calls = recording.calls[0]
    wanted = [run_block(block, x, call) for x, call in zip(recording.hidden, calls, strict=True)]
    g = torch.Generator().manual_seed(0)
    noises = [torch.randn(x.shape, generator=g).to(dtype) * x.std() for x in recording.hidden]
    hidden = [x + 0.01 * noise for x, noise in zip(recording.hidden, noises, strict=True)]
    return block, solved, hidden, calls, wanted


@torch.no_grad()
def miss(block: nn.Module, solved: Solved, batch: int, data: Case) -> float:
    """Mean squared distance of the quantized block's output on one batch."""
    work = copy.deepcopy(block).double()
    for name, results in solved.items():
        weight = work.get_parameter(f"{name}.weight").data
        for target, q in zip(weight if weight.ndim == 3 else [weight], results, strict=True):
            target.copy_(q.dequantize(torch.float64))
    _, _, hidden, calls, wanted = data
    call = calls[batch].to(torch.device("cpu"), torch.float64)
    output = run_block(work, hidden[batch].double(), call)
    return float((output - wanted[batch].double()).square().mean())


@pytest.mark.parametrize(
    "scheme", [QuantScheme(3, 32), QuantScheme(2, 64, symmetric=True)], ids=str
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral"])
def test_held_out_batches_gain(name, scheme):
    data = case(name, torch.float32, scheme)
    block, solved, hidden, calls, wanted = data
    tuned = tune_block(block, solved, hidden, calls, wanted, QUICK)
    assert tuned.keys() == solved.keys()
    judging = [b for b in range(7) if is_held_out(b, 7)]
    before, after = (sum(miss(block, s, b, data) for b in judging) for s in (solved, tuned))
    assert after < 0.95 * before
    for name, results in tuned.items():
        for new, old in zip(results, solved[name], strict=True):
            assert new.scheme == old.scheme
            assert new.scale.dtype == old.scale.dtype
            assert torch.equal(new.zero, old.zero)
            assert new.codes.dtype == torch.uint8
            assert int(new.codes.max()) <= scheme.qmax
    flipped = [not torch.equal(tuned[n][0].codes, solved[n][0].codes) for n in solved]
    assert sum(flipped) > len(flipped) // 2


def test_the_start_is_kept_if_nothing_is_better():
    block, solved, hidden, calls, wanted = case("llama", torch.bfloat16, QuantScheme(4, 32))
    how = BlockTuning(steps=4, rate=2.0, scale_rate=3.0, every=1)
    tuned = tune_block(block, solved, hidden, calls, wanted, how)
    for name, results in solved.items():
        for new, old in zip(tuned[name], results, strict=True):
            assert torch.equal(new.codes, old.codes)
            assert torch.equal(new.scale, old.scale)


def test_one_batch_leaves_nothing_to_judge_by():
    data = case("llama", torch.float32, QuantScheme(2, 32), count=1)
    block, solved, hidden, calls, wanted = data
    tuned = tune_block(block, solved, hidden, calls, wanted, QUICK)
    assert all(tuned[name] == solved[name] for name in solved)


def test_in_the_flow():
    """The next block reads what the tuned one returns; threads do not matter."""
    model: Any = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    windows = token_windows(demo.calibration_path(), tokenizer, seq_len=64, samples=28, seed=0)
    test = token_windows(demo.evaluation_path(), tokenizer, seq_len=64, samples=16)
    ids = list(windows.split(4))
    threads = torch.get_num_threads()
    found = []
    try:
        for count, block in ((1, None), (1, QUICK), (2, QUICK)):
            torch.set_num_threads(count)
            result = copy.deepcopy(model)
            list(quantize(result, ids, Recipe(QuantScheme(3, 32), RTN(), match=True, block=block)))
            found.append(result)
    finally:
        torch.set_num_threads(threads)
    plain, one, two = found
    assert all(torch.equal(t, two.state_dict()[key]) for key, t in one.state_dict().items())
    full, before, after = (copy.deepcopy(m).float() for m in (model, plain, one))
    assert divergence(full, after, test) < 0.95 * divergence(full, before, test)


def test_tuning_needs_the_full_precision_stream():
    for tuning in ({"block": BlockTuning()}, {"scales": ScaleTuning()}):
        with pytest.raises(SchemeError, match="match=True"):
            Recipe(**tuning)  # type: ignore[arg-type]
