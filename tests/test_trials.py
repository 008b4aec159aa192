"""Grids that are tried: against GPTQ's pass itself, and against every grid of the shortlist."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from llmq.factor import factor, inverted
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.solvers import loops, trials
from llmq.solvers.gptq import GPTQ
from llmq.solvers.grid import by_column, shortlist
from llmq.solvers.trials import tried_grid

SEEDS = st.integers(0, 10**6)
SCHEMES = st.builds(
    QuantScheme, st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64]), st.booleans()
)


def problem(seed: int, N: int, K: int) -> tuple[Tensor, Tensor]:
    """Weights (N, K) and the second moment (K, K) of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=g) / K**0.5 + torch.eye(K)
    X = torch.randn(4 * K, K, generator=g) @ mix * torch.exp(torch.randn(K, generator=g))
    return torch.randn(N, K, generator=g), X.T @ X / len(X)


def loss(W: Tensor, q: QuantizedWeight, H: Tensor) -> Tensor:
    """Per row, float64 (N,)."""
    delta = q.dequantize(torch.float64) - W.double()
    return ((delta @ H.double()) * delta).sum(1)


def passed(columns: Tensor, U: Tensor, scale: float, zero: float, qmax: int) -> float:
    """GPTQ over one row, in float64, as in the paper: the sum of squared scaled errors."""
    w, total = columns.double().clone(), 0.0
    for i in range(len(w)):
        code = min(max(round(float(w[i]) / scale) + zero, 0), qmax)
        error = (float(w[i]) - (code - zero) * scale) / float(U[i, i])
        total += error * error
        w[i + 1 :] -= error * U[i, i + 1 :].double()
    return total


@settings(max_examples=20, deadline=None)
@given(SEEDS, SCHEMES)
def test_the_grid_is_the_best_of_all_that_were_tried(seed, scheme):
    G = scheme.group_size
    W, H = problem(seed, 3, G)
    U = inverted(factor(H, 0.01))
    columns = W.T.contiguous()
    scale, zero = tried_grid(columns, U, scheme, torch.float32, 4)
    weights = U.diagonal().double().pow(-2).float()
    scales, zeros = shortlist(W, scheme, torch.float32, by_column(weights), 4)
    for n in range(len(W)):
        found = passed(columns[:, n], U, float(scale[n]), float(zero[n]), scheme.qmax)
        for s, z in zip(scales[:, n].tolist(), zeros[:, n].tolist(), strict=True):
            # A tie of rounding may fall either way in float32.
            assert found <= 1.01 * passed(columns[:, n], U, s, z, scheme.qmax)


@settings(max_examples=20, deadline=None)
@given(SEEDS, SCHEMES)
def test_what_the_pass_loses_is_the_error_of_the_layer(seed, scheme):
    G = scheme.group_size
    W, H = problem(seed, 5, G)
    U = inverted(factor(H, 0.01))
    q = GPTQ(damp=0.01, order="none", trials=4).solve(W, H, scheme)
    H = H + 0.01 * H.diagonal().mean() * torch.eye(G)
    columns, qmax = W.T.contiguous(), scheme.qmax
    lost = loops.trial_errors(columns, U, q.scale.T.float(), q.zero.T.float(), qmax)[0]
    torch.testing.assert_close(lost.double(), loss(W, q, H), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_trials_lower_the_error_of_gptq(bits, symmetric):
    scheme, ratios = QuantScheme(bits, 32, symmetric), []
    for seed in range(4):
        W, H = problem(seed, 32, 128)
        plain, tried = (GPTQ(trials=count).solve(W, H, scheme) for count in (0, 8))
        ratios.append(loss(W, tried, H).sum() / loss(W, plain, H).sum())
    assert torch.stack(ratios).log().mean().exp() < 0.98


def test_rows_are_tried_in_parts_that_do_not_matter(monkeypatch):
    scheme = QuantScheme(3, 32, symmetric=False)
    W, H = problem(0, 20, 64)
    whole = GPTQ(trials=8).solve(W, H, scheme)
    monkeypatch.setattr(trials, "AT_ONCE", 3 * 16 * 32)  # three rows at once
    parts = GPTQ(trials=8).solve(W, H, scheme)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero, parts.zero)


def test_whole_rows_and_static_order_are_not_tried():
    W, H = problem(0, 4, 256)
    for solver, scheme in (
        (GPTQ(), QuantScheme(4, -1, symmetric=True)),
        (GPTQ(order="static"), QuantScheme(4, 32, symmetric=True)),
    ):
        plain, tried = (replace(solver, trials=n).solve(W, H, scheme) for n in (0, 8))
        assert torch.equal(plain.codes, tried.codes)
        assert torch.equal(plain.scale, tried.scale)
