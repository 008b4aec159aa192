"""Targets against least squares on the tokens themselves; sums against what blocks compute."""

import copy
from typing import Any

import pytest
import torch
from test_quantize import SCHEME, batches, divergence, quantized
from torch import Tensor
from zoo import tiny_model

from llmq import demo
from llmq.adapters import as_linears
from llmq.blocks import decoder_blocks, linears, record_calls, run_block
from llmq.errors import NonFiniteError
from llmq.factor import divided, factor
from llmq.moments import damped
from llmq.objective import FITTING, MOST, Drift, Matching, best_share, damping
from llmq.quantize import Recipe, quantize
from llmq.residual import enters_a_sum, reads_and_sums
from llmq.solvers.descent import Polished

Streams = tuple[Tensor, Tensor, Tensor, Tensor]


def streams(seed: int, tokens: int, K: int, N: int, moved: float) -> Streams:
    """Quantized and full inputs (t, K) and residuals (t, N), with a drift that depends on x~."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=g) / K**0.5
    drift = torch.randn(K, K, generator=g) / K**0.5
    lost = torch.randn(K, N, generator=g) / K**0.5
    x = torch.randn(tokens, K, generator=g) @ mix
    noise = torch.randn(tokens, K, generator=g) * 0.3
    h = torch.randn(tokens, N, generator=g)
    return x, x + moved * x @ drift + noise, h, h + moved * x @ lost


def drift_of(data: Streams, start: int, stop: int, *matrices: Tensor) -> Drift:
    x, full_x, h, full_h = (t[start:stop] for t in data)
    drift = Drift({str(i): W for i, W in enumerate(matrices)})
    drift.add(x, full_x, full_h - h)
    return drift


def matching(data: Streams, split: int, *matrices: Tensor) -> Matching:
    fit = drift_of(data, 0, split, *matrices)
    return Matching(fit, drift_of(data, split, len(data[0]), *matrices))


def shift_of(drift: Drift, name: str, W: Tensor) -> Tensor:
    H = drift.inputs.mean()
    R = factor(H, damping(FITTING, drift.inputs.count, len(H)))
    return divided(drift.pull(name, W), R)


def share_of(problem: Matching, W: Tensor) -> float:
    judge = problem.judge
    return best_share(shift_of(problem.fit, "0", W), judge.inputs.mean(), judge.pull("0", W))


def test_no_token_counts_more_than_twenty_times_the_mean():
    x, full_x, h, full_h = streams(3, 400, 8, 3, 1.0)
    for data in (x, full_x):
        data[7] *= 1000
    X, missing = x.double(), (full_h - h).double()
    size = X.square().sum(1)
    weight = (MOST * size.mean() / size).clamp(max=1)
    assert weight[7] < 0.1
    assert (weight == 1).sum() == 399
    weighted = X * weight[:, None]
    for rows in (3, 9):  # summed up behind the matrix, or before it
        W = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
        missing = torch.randn(400, rows, generator=torch.Generator().manual_seed(1))
        found = Drift({"W": W})
        found.add(x, full_x, missing)
        assert (found.D is None) == (rows == 3)
        behind = (full_x.double() - X) @ W.double().T + missing
        for got, wanted in (
            (found.inputs.mean() * 400, X.T @ weighted),
            (found.pull("W", W) * 400, behind.T @ weighted),
        ):
            assert (got - wanted).norm() < 1e-5 * wanted.norm()
    silent = Drift({"W": torch.zeros(2, 8)})
    silent.add(torch.zeros(4, 8), torch.zeros(4, 8))
    assert silent.finite()


def test_the_full_target_is_least_squares_on_the_tokens():
    K, N = 24, 5
    data = streams(0, 4000, K, N, 1.0)
    x, full_x, h, full_h = (t.double() for t in data)
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    got = W + shift_of(drift_of(data, 0, 4000, W), "0", W)
    wanted = full_x @ W.double().T + full_h - h
    # Damping pulls towards W: rows sqrt(lambda) I with the answer W.
    H = x.T @ x / len(x)
    weight = (damping(FITTING, 4000, K) * H.diagonal().mean() * len(x)).sqrt()
    rows = torch.cat([x, weight * torch.eye(K, dtype=torch.float64)])
    answers = torch.cat([wanted, weight * W.double().T])
    expected = torch.linalg.lstsq(rows, answers).solution.T
    assert (got.double() - expected).norm() < 1e-4 * (expected - W.double()).norm()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("tokens", "moved"), [(60, 0.0), (60, 1.0), (2000, 0.3)])
def test_never_worse_on_held_out_tokens(seed, tokens, moved):
    K, N = 24, 5
    data = streams(seed, tokens, K, N, moved)
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    problem = matching(data, tokens * 3 // 4, W)
    share = share_of(problem, W)
    x, full_x, h, full_h = (t[tokens * 3 // 4 :].double() for t in data)

    def error(W_new: Tensor) -> float:
        missed = full_x @ W.double().T + full_h - h - x @ W_new.double().T
        return float(missed.square().sum())

    found = error(problem.settled({"0": W}).targets["0"])
    assert found <= error(W)
    if moved == 0.3:
        assert share == 0.75
        assert found < 0.9 * error(W)


def test_all_tokens_tell_where_to_go():
    K, N = 24, 5
    data = streams(1, 2000, K, N, 0.3)
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    problem = matching(data, 1500, W, 2 * W)
    wanted = W + share_of(problem, W) * shift_of(drift_of(data, 0, 2000, W), "0", W)
    got = problem.settled({"0": W, "1": 2 * W}).targets
    assert (got["0"] - wanted).norm() < 2e-3 * (wanted - W).norm()  # tokens are weighted per batch
    assert (got["1"] - got["0"]).norm() > 0.5 * W.norm()


def test_streams_that_agree_leave_the_weights_alone():
    x, _, h, _ = streams(0, 500, 24, 5, 0.0)
    W = torch.randn(5, 24).half()
    target = matching((x, x, h, h), 400, W).settled({"0": W}).targets["0"]
    assert target.dtype == W.dtype
    assert torch.equal(target, W)


def test_damping_follows_the_number_of_tokens():
    assert damping(0.16, 16 * 64, 64) == damping(3.0, 10**9, 64) == 0.01
    assert damping(0.16, 8 * 64, 64) == pytest.approx(0.02)
    assert damping(3.0, 50 * 64, 64) == pytest.approx(0.06)
    assert damping(0.16, 0, 64) == damping(3.0, 30 * 64, 64) == 0.1


@pytest.mark.parametrize(("tokens", "added"), [(300, 0.09), (1000, 0.062), (10**5, 0.0)])
def test_solvers_get_more_on_the_diagonal_where_tokens_were_few(tokens, added):
    W = torch.randn(5, 24)
    data = streams(0, tokens, 24, 5, 1.0)
    H, extra, _ = matching(data, tokens * 3 // 4, W).settled({"0": W})
    assert extra == pytest.approx(added, abs=1e-9)
    mean = drift_of(data, 0, tokens, W).inputs.mean()
    torch.testing.assert_close(H, mean, rtol=0.02, atol=0.02)  # tokens are weighted per batch
    before = H.clone()
    with damped(H, extra):
        wanted = added * before.diagonal().mean() * torch.eye(24)
        torch.testing.assert_close(H - before, wanted, rtol=1e-3, atol=1e-5)
    assert torch.equal(H, before)


SUMS = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen2": {"self_attn.o_proj", "mlp.down_proj"},
    "opt": {"self_attn.out_proj", "fc2"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "gpt_neox": {"attention.dense", "mlp.dense_4h_to_h"},
    "gemma2": set(),  # normalised before they are added
    "olmo2": set(),
    "glm4": set(),
}


@torch.no_grad()
@pytest.mark.parametrize("name", list(SUMS))
def test_sums_are_seen(name):
    model: Any = tiny_model(name, dtype=torch.float64).eval()
    _, blocks = decoder_blocks(model)
    recording = record_calls(model, blocks, batches(model, 1))
    block = as_linears(copy.deepcopy(blocks[0]))
    hidden, call = recording.hidden[0], recording.calls[0][0]
    found = {n for n in linears(block) if enters_a_sum(block, n, hidden, call)}
    assert found == SUMS[name]
    last = [n for n in linears(block) if n in found][-1:]
    for n in last:  # what the last one writes into is the block's output
        [(x, other)] = reads_and_sums(block, n, [hidden], [call])
        assert other is not None
        out = run_block(block, hidden, call)
        if name != "gpt_neox":  # attention is added to it after the MLP
            added = other.flatten(0, -2) + block.get_submodule(n)(x).flatten(0, -2)
            assert torch.allclose(added, out.flatten(0, -2))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon", "mixtral", "gpt_oss"])
def test_matching_on_other_architectures(name):
    model: Any = tiny_model(name, dtype=torch.float32).eval()
    ids = batches(model, 4)[3]
    plain, _ = quantized(model, Recipe(SCHEME, Polished()))
    matched, reports = quantized(model, Recipe(SCHEME, Polished(), match=True))
    assert all(r.error < 0.05 for r in reports)
    # Random weights and few tokens: matching can gain nothing here, but must not harm.
    assert divergence(model, matched, ids) < 1.3 * divergence(model, plain, ids)


def test_matching_lowers_the_divergence_of_a_trained_model():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmq.calibrate import token_windows

    model: Any = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    text = demo.calibration_path()
    calibration = token_windows(text, tokenizer, seq_len=128, samples=64, seed=0)
    test = token_windows(demo.evaluation_path(), tokenizer, seq_len=128, samples=16)
    found = {}
    for match in (False, True):
        result = copy.deepcopy(model)
        scheme = SCHEME.__class__(3, 64)
        list(quantize(result, calibration.split(16), Recipe(scheme, Polished(), match=match)))
        found[match] = divergence(model, result, test)
    assert found[True] < 0.85 * found[False]


def test_an_overflow_names_the_layer():
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1e38)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj"):
        list(quantize(model, batches(model), Recipe(SCHEME, match=True)))


def test_threads_do_not_matter(set_threads):
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    results = []
    for count in (1, 2):
        set_threads(count)
        results.append(quantized(model, Recipe(SCHEME, Polished(), match=True))[0])
    a, b = (result.state_dict() for result in results)
    assert all(torch.equal(a[name], b[name]) for name in a)
