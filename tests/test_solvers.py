"""Solvers against definitions: an exhaustive search, a textbook loop, and their own invariances."""

import dataclasses
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from llmq.scheme import QuantizedWeight, QuantScheme, grouped, minmax_grid
from llmq.solvers.descent import Polished
from llmq.solvers.gptq import GPTQ, column_order
from llmq.solvers.grid import by_block, by_column, search_grid
from llmq.solvers.rtn import RTN

SEEDS = st.integers(0, 10**6)
SCHEMES = st.builds(
    QuantScheme, st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64, -1]), st.booleans()
)


def problem(seed: int, N: int, K: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Weights (N, K) and the second moment (K, K) of correlated inputs with outlier channels."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(N, K, generator=g)
    mix = torch.randn(K, K, generator=g) * 0.3 / K**0.5 + torch.eye(K)
    sizes = torch.exp(torch.randn(K, generator=g))
    X = (torch.randn(tokens or 4 * K, K, generator=g) @ mix) * sizes
    return W, X.T @ X / len(X)


def loss(W: Tensor, q: QuantizedWeight, H: Tensor) -> float:
    delta = q.dequantize(torch.float64) - W.double()
    return float(((delta @ H.double()) * delta).sum())


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([1, 3, 8]), SCHEMES)
def test_gptq_with_uncorrelated_equal_inputs_is_rounding(seed, N, scheme):
    W, _ = problem(seed, N, 128)
    a = GPTQ(search=False).solve(W, 3 * torch.eye(128), scheme)
    b = RTN().solve(W, torch.eye(128), scheme)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.zero, b.zero)


@settings(max_examples=25, deadline=None)
@given(SEEDS, SCHEMES, st.sampled_from(["group", "static", "none"]), st.booleans())
def test_only_the_direction_of_h_matters(seed, scheme, order, search):
    W, H = problem(seed, 4, 128)
    solver = GPTQ(order=order, search=search)
    a, b = solver.solve(W, H, scheme), solver.solve(W, 4 * H, scheme)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)


@settings(max_examples=25, deadline=None)
@given(SEEDS, SCHEMES, st.booleans())
def test_rows_do_not_interact(seed, scheme, search):
    W, H = problem(seed, 6, 64)
    whole = GPTQ(search=search).solve(W, H, scheme)
    for part in (slice(0, 1), slice(1, 6)):
        alone = GPTQ(search=search).solve(W[part], H, scheme)
        # Not bit for bit: matrix products of other shapes add in another order.
        assert (alone.codes == whole.codes[part]).float().mean() > 0.9
        assert loss(W[part], alone, H) == pytest.approx(
            loss(
                W[part],
                dataclasses.replace(
                    whole, codes=whole.codes[part], scale=whole.scale[part], zero=whole.zero[part]
                ),
                H,
            ),
            rel=0.05,
        )


@settings(max_examples=25, deadline=None)
@given(SEEDS, SCHEMES, st.sampled_from(["group", "static", "none"]))
def test_gptq_beats_rounding(seed, scheme, order):
    W, H = problem(seed, 8, 128)
    q = GPTQ(order=order).solve(W, H, scheme)
    baseline = loss(W, RTN().solve(W, H, scheme), H)
    assert loss(W, q, H) <= baseline * (1.0 if scheme.bits < 8 else 1.02)


@settings(max_examples=25, deadline=None)
@given(SEEDS, SCHEMES)
def test_searched_grids_beat_min_max_in_their_own_measure(seed, scheme):
    W, H = problem(seed, 8, 128)
    groups = grouped(W, scheme)
    block = by_block(H, groups.shape[-1])

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        codes = (groups / scale[..., None]).round() + zero[..., None]
        delta = (codes.clamp(0, scheme.qmax) - zero[..., None]) * scale[..., None] - groups
        return (block(delta) * delta).sum(-1)

    plain = error(*minmax_grid(groups, scheme, torch.float32))
    searched = error(*search_grid(groups, scheme, torch.float32, block))
    assert (searched <= plain * (1 + 1e-4) + 1e-9).all()
    assert searched.sum() < plain.sum() or scheme.bits == 8


def textbook(W: Tensor, H: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
    """Optimal brain quantization, left to right, one row at a time, inverse updated by OBS."""
    codes = torch.zeros_like(W)
    for n in range(len(W)):
        w, inverse = W[n].clone(), torch.linalg.inv(H)
        for j in range(len(w)):
            code = (w[j] / scale[n, 0]).round().add(zero[n, 0]).clamp(0, qmax)
            codes[n, j] = code
            error = (w[j] - (code - zero[n, 0]) * scale[n, 0]) / inverse[j, j]
            w -= error * inverse[j]
            inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
            inverse[j, j] = 1.0  # column j is done: keep it out of later updates
            inverse[j, j + 1 :] = inverse[j + 1 :, j] = 0.0
    return codes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("symmetric", [True, False])
def test_against_the_textbook(seed, symmetric):
    scheme = QuantScheme(3, -1, symmetric)
    W, H = problem(seed, 4, 8)
    H = H.double() + torch.eye(8).double() * (0.01 * H.diagonal().mean())
    scale, zero = minmax_grid(grouped(W, scheme), scheme, torch.float32)
    expected = textbook(W.double(), H, scale.double(), zero.double(), scheme.qmax)
    q = GPTQ(damp=0.0, order="none", search=False).solve(W, H.float(), scheme)
    assert torch.equal(q.codes.double(), expected)


def test_not_far_from_the_best_of_all_codes():
    scheme = QuantScheme(2, -1)
    W, H = problem(1, 3, 6)
    q = GPTQ(search=False).solve(W, H, scheme)
    best = 0.0
    grid = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.float64)
    for n in range(3):
        delta = (grid - q.zero[n].double()) * q.scale[n].double() - W[n].double()
        best += float(((delta @ H.double()) * delta).sum(-1).min())
    assert loss(W, q, H) <= 1.5 * best
    assert loss(W, RTN().solve(W, H, scheme), H) > loss(W, q, H)


def test_column_order_keeps_groups_together():
    order = column_order(torch.rand(128), 32, "group")
    assert order.sort().values.tolist() == list(range(128))
    assert all(len(set((part // 32).tolist())) == 1 for part in order.split(32))


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_fewer_tokens_than_columns(tokens):
    W, H = problem(3, 4, 64, tokens)
    q = GPTQ().solve(W, H, QuantScheme(4, 32))
    assert q.dequantize().isfinite().all()
    assert loss(W, q, H) <= loss(W, RTN().solve(W, H, QuantScheme(4, 32)), H)


def test_dead_columns_are_rounded_not_zeroed():
    W, H = problem(4, 4, 64)
    H[5], H[:, 5] = 0, 0
    q = GPTQ().solve(W, H, QuantScheme(4, 32))
    step = q.scale[:, 0]
    assert ((q.dequantize()[:, 5] - W[:, 5]).abs() <= 0.51 * step).float().mean() >= 0.75
    zero = GPTQ().solve(W, torch.zeros_like(H), QuantScheme(4, 32))
    assert (zero.dequantize() - W).abs().max() < 1


@pytest.mark.parametrize("solver", [RTN(), RTN(search=True), GPTQ(), Polished()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hard_weights_give_finite_answers(solver, dtype):
    W, H = problem(5, 6, 64)
    W[0] = 0.0
    W[1] = 0.7
    W[2, 3] = 1e4
    W[3] = 1e-7
    W[:, 9] = 0.0
    H[9, 9] *= 1e8
    for scheme in (QuantScheme(4, 32), QuantScheme(2, -1, True)):
        q = solver.solve(W.to(dtype), H, scheme)
        assert q.dequantize(torch.float32).isfinite().all()
        assert (q.dequantize()[0] == 0).all()
        assert loss(W, q, H) <= loss(W, RTN().solve(W.to(dtype), H, scheme), H) * 1.001


def test_grid_weights_protect_heavy_columns():
    W = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    heavy = torch.ones(32)
    heavy[:4] = 1e4
    scheme = QuantScheme(2, 32)
    scale, zero = search_grid(W[:, None], scheme, torch.float32, by_column(heavy))
    codes = ((W / scale).round() + zero).clamp(0, 3)
    delta = ((codes - zero) * scale - W).square().mean(0)
    assert delta[:4].mean() < 0.5 * delta[4:].mean()
