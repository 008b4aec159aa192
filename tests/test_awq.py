"""Smoothing pairs are found, and what is found leaves the logits alone, on every architecture."""

import pytest
import torch
from zoo import ARCHITECTURES, tiny_model

from llmq.adapters import as_linears, shared_copy
from llmq.blocks import decoder_blocks, record_calls
from llmq.moments import second_moments
from llmq.scheme import QuantScheme
from llmq.solvers.awq import AWQ, _expected_error
from llmq.solvers.awq_pairs import Pair, fold, proven_pairs

# Pairs per block that hold in exact arithmetic. Not among them: producers that are followed by a
# function that does not pass a factor on (GELU, squared ReLU), residual streams, fused q/k/v.
PAIRS = {
    "phi3": 3,
    "gpt_neox": 2,
    "gpt2": 2,
    "falcon": 2,
    "cohere2": 3,
    "olmo2": 2,
    "arcee": 3,
    "nemotron": 3,
    "mixtral": 3,
    "qwen3_moe": 3,
    "gpt_oss": 3,
}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@torch.no_grad()
def test_pairs_leave_the_logits_alone(name):
    model = tiny_model(name, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, 24), generator=generator)
    before = model(ids).logits
    _, blocks = decoder_blocks(model)
    recording = record_calls(model, blocks, [ids])
    for block, calls in zip(blocks, recording.calls, strict=True):
        view = as_linears(shared_copy(block))
        pairs = proven_pairs(view, recording.hidden[0], calls[0])
        assert len(pairs) == PAIRS.get(name, 4)
        for pair in pairs:
            K = view.get_parameter(f"{pair.readers[0]}.weight").shape[-1]
            fold(view, pair, pair.tie(torch.rand(K, generator=generator) + 0.5))
    change = (model(ids).logits - before).norm() / before.norm()
    assert change < 1e-5


@torch.no_grad()
def test_a_wrong_pair_is_not_proven():
    model = tiny_model("llama", dtype=torch.float32).eval()
    _, blocks = decoder_blocks(model)
    recording = record_calls(model, blocks, [torch.arange(24)[None]])
    pairs = proven_pairs(blocks[0], recording.hidden[0], recording.calls[0][0])
    assert ("mlp.gate_proj", ("mlp.down_proj",)) not in [(p.producer, p.readers) for p in pairs]
    assert ("mlp.up_proj", ("mlp.down_proj",)) in [(p.producer, p.readers) for p in pairs]


@torch.no_grad()
def test_search_finds_the_outlier_channels():
    generator = torch.Generator().manual_seed(0)
    block = torch.nn.Module()
    block.norm = torch.nn.LayerNorm(64)
    block.linear = torch.nn.Linear(64, 48, bias=False)
    block.linear.weight.uniform_(-0.125, 0.125, generator=generator)
    x = torch.randn(512, 64, generator=generator)
    x[:, :4] *= 30
    [(H, _)] = second_moments([x])
    pair = Pair("norm", "norm", None, ("linear",))
    schemes = {"linear": QuantScheme(3, 32)}
    factors = AWQ().search(block, pair, H, schemes)
    assert factors is not None
    assert factors[:4].min() > 2 * factors[4:].max()
    plain = _expected_error(block.linear.weight, torch.ones(64), H, schemes["linear"])
    assert _expected_error(block.linear.weight, factors, H, schemes["linear"]) < 0.7 * plain


def test_tied_channels_get_one_factor():
    pair = Pair("v", "rows", torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]), ("o",))
    tied = pair.tie(torch.arange(8.0))
    assert tied.tolist() == [1, 2, 1, 2, 5, 6, 5, 6]
