"""The flow on every architecture: everything is quantized, and better than by rounding."""

import copy
from collections import deque
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import ARCHITECTURES, tiny_model

from llmq.blocks import decoder_blocks
from llmq.errors import NonFiniteError, SchemeError
from llmq.nn import PackedExperts, PackedLinear
from llmq.quantize import LayerReport, Recipe, quantizable, quantize
from llmq.report import expert_coverage
from llmq.scheme import QuantScheme
from llmq.solvers.awq import AWQ
from llmq.solvers.gptq import GPTQ
from llmq.solvers.rtn import RTN
from llmq.store import InMemory

SCHEME = QuantScheme(4, 32)


def batches(model: Any, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    return [torch.randint(0, vocab, (4, 48), generator=generator) for _ in range(count)]


@torch.no_grad()
def divergence(model: nn.Module, other: nn.Module, ids: torch.Tensor) -> float:
    p, q = (m(ids).logits.double().log_softmax(-1) for m in (model, other))
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean")) / ids.shape[1]


def quantized(model: Any, recipe: Recipe) -> tuple[Any, list[LayerReport]]:
    result = copy.deepcopy(model)
    return result, list(quantize(result, batches(model), recipe))


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture(name):
    model: Any = tiny_model(name, dtype=torch.float32).eval()
    rounded, _ = quantized(model, Recipe(SCHEME, RTN()))
    solved, reports = quantized(model, Recipe(SCHEME, GPTQ()))
    ids = batches(model, 1)[0]
    assert divergence(model, solved, ids) < divergence(model, rounded, ids)
    stacks = [m for m in solved.modules() if isinstance(m, PackedExperts)]
    packed = sum(isinstance(m, PackedLinear) for m in solved.modules())
    matrices = packed + sum(2 * m.num_experts for m in stacks)
    assert len(reports) == len({r.name for r in reports}) == matrices
    assert len(quantizable(model)) == packed + 2 * len(stacks)
    assert all(0 < r.error < 0.05 for r in reports)
    dense = [n for n, m in solved.named_modules() if isinstance(m, nn.Linear)]
    assert set(dense) <= {"lm_head", "embed_out"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_awq_before_any_solver(name):
    model: Any = tiny_model(name, dtype=torch.float32).eval()
    ids = batches(model, 1)[0]
    plain, _ = quantized(model, Recipe(SCHEME, RTN()))
    awq, _ = quantized(model, Recipe(SCHEME, RTN(search=True), AWQ()))
    assert divergence(model, awq, ids) < divergence(model, plain, ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model: Any = tiny_model("llama", dtype=dtype).eval()
    result, reports = quantized(model, Recipe(QuantScheme(4, 64, symmetric=True)))
    layer = result.model.layers[0].mlp.down_proj
    assert layer.weight_scale.dtype == dtype
    assert result(batches(model)[0]).logits.isfinite().all()
    assert len(reports) == 14


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon"])
def test_output_layer_too(name):
    model: Any = tiny_model(name, dtype=torch.float32).eval()
    ids = batches(model, 1)[0]
    result, reports = quantized(model, Recipe(QuantScheme(8, 32), lm_head=True))
    rounded, _ = quantized(model, Recipe(QuantScheme(8, 32), RTN(), lm_head=True))
    assert isinstance(result.get_output_embeddings(), PackedLinear)
    assert isinstance(result.get_input_embeddings(), nn.Embedding)
    assert reports[-1].name == "lm_head"
    assert divergence(model, result, ids) < divergence(model, rounded, ids)


def test_skipped_layers_stay_as_they_are():
    model: Any = tiny_model("mixtral", dtype=torch.float32).eval()
    recipe = Recipe(SCHEME, RTN(), skip=("o_proj", "model.layers.1.mlp.experts.*"))
    result, reports = quantized(model, recipe)
    assert isinstance(result.model.layers[0].self_attn.o_proj, nn.Linear)
    assert isinstance(result.model.layers[0].mlp.experts, PackedExperts)
    assert not isinstance(result.model.layers[1].mlp.experts, PackedExperts)
    assert torch.equal(
        result.model.layers[1].mlp.experts.gate_up_proj,
        model.model.layers[1].mlp.experts.gate_up_proj,
    )
    assert not any("o_proj" in r.name for r in reports)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_starved_experts_are_solved_and_counted(name):
    model: Any = tiny_model(name, dtype=torch.float32).eval()
    result = copy.deepcopy(model)
    reports = list(quantize(result, [torch.tensor([[7]])], Recipe(SCHEME)))  # a single token
    ids = batches(model)[0]
    rounded, _ = quantized(model, Recipe(SCHEME, RTN()))
    assert divergence(model, result, ids) < 3 * divergence(model, rounded, ids)
    coverage = expert_coverage(reports)
    assert len(coverage) == len(model.model.layers)
    for layer in coverage:
        assert layer["fewest_tokens"] == 0
        assert layer["most_tokens"] == 1
        assert layer["starved"] == list(range(layer["experts"]))


def test_every_routed_token_is_counted():
    model: Any = tiny_model("qwen3_moe", dtype=torch.float32).eval()
    _, reports = quantized(model, Recipe(SCHEME, RTN()))
    counts = [r.tokens for r in reports if r.name.endswith("gate_up_proj")]
    routed = sum(b.numel() for b in batches(model)) * model.config.num_experts_per_tok
    assert sum(counts) == routed * len(model.model.layers)


def test_a_group_that_does_not_divide_changes_nothing():
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(SchemeError) as caught:
        list(quantize(model, batches(model), Recipe(QuantScheme(4, 128))))
    message = str(caught.value)
    assert "model.layers.0.mlp.down_proj (in_features=192)" in message
    assert "group_size=64 or 32 or -1" in message
    assert "--skip 'mlp.down_proj'" in message
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_overflowing_activations_name_the_layer():
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1e38)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj"):
        list(quantize(model, batches(model), Recipe(SCHEME)))


@torch.no_grad()
def test_every_matrix_is_solved_for_the_inputs_that_it_will_see():
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}

    class Spy(RTN):
        def solve(self, W, H, scheme):
            seen[str(len(seen))] = H
            return super().solve(W, H, scheme)

    result, _ = quantized(model, Recipe(QuantScheme(2, 32), Spy()))
    layer, sums = result.model.layers[1].mlp.down_proj, []
    layer.register_forward_pre_hook(lambda _, args: sums.append(args[0].flatten(0, 1)))
    for ids in batches(result):
        result(ids)
    rows = torch.cat(sums).double()
    expected = rows.T @ rows / len(rows)
    assert (seen["7"] - expected).norm() < 1e-5 * expected.norm()


def test_same_input_same_result():
    model: Any = tiny_model("qwen3", dtype=torch.float32).eval()
    a, _ = quantized(model, Recipe(SCHEME))
    b, _ = quantized(model, Recipe(SCHEME))
    for (n, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), n


def run_with(model: Any, lean: bool, runs: list[int]) -> Any:
    """`model` quantized to the full-precision stream; `runs` grows with every look at an MLP."""
    result = copy.deepcopy(model)
    store = InMemory(decoder_blocks(result)[1])
    store.lean = lean
    for module in result.modules():
        if isinstance(activation := getattr(module, "act_fn", None), nn.Module):
            activation.register_forward_hook(lambda *_: runs.append(1))
    deque(quantize(result, batches(model), Recipe(SCHEME, match=True), store=store), maxlen=0)
    return result


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_what_is_kept_changes_nothing(name):
    model: Any = tiny_model(name, dtype=torch.float32).eval()
    kept, lean = run_with(model, False, []), run_with(model, True, [])
    for (n, x), y in zip(kept.state_dict().items(), lean.state_dict().values(), strict=True):
        assert torch.equal(x, y), n


def test_the_full_precision_block_computes_its_parts_once():
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    kept: list[int] = []
    lean: list[int] = []
    run_with(model, False, kept)
    run_with(model, True, lean)
    blocks = len(decoder_blocks(model)[1])
    assert len(lean) - len(kept) == blocks * len(batches(model))
