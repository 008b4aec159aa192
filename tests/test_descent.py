"""Coordinate descent: it never goes up, it ends where no single move helps, it is repeatable."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_solvers import SCHEMES, SEEDS, loss, problem
from torch import Tensor

from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.solvers.descent import Polished, descend, row_errors
from llmq.solvers.gptq import GPTQ
from llmq.solvers.rtn import RTN


@settings(max_examples=30, deadline=None)
@given(SEEDS, SCHEMES, st.sampled_from([RTN(), GPTQ()]), st.sampled_from([None, 40]))
def test_never_goes_up(seed, scheme, start, tokens):
    W, H = problem(seed, 5, 192, tokens)
    q = start.solve(W, H, scheme)
    before = row_errors(W, H, q)
    for sweeps in (1, 2, 4):
        after = row_errors(W, H, descend(W, H, q, sweeps))
        assert (after <= before * (1 + 1e-5) + 1e-12).all()
        before = after


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_never_worse_than_its_start_as_stored(dtype, bits):
    W, H = problem(1, 16, 128)
    scheme = QuantScheme(bits, 32)
    start = Polished().start.solve(W.to(dtype), H, scheme)
    polished = Polished().solve(W.to(dtype), H, scheme)
    assert polished.scale.dtype == dtype
    errors = row_errors(W.to(dtype), H, polished), row_errors(W.to(dtype), H, start)
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.98 * errors[1].sum()


@pytest.mark.parametrize("scheme", [QuantScheme(3, 32), QuantScheme(2, -1, True)])
def test_ends_where_no_single_step_helps(scheme):
    W, H = problem(2, 4, 64)
    q = descend(W, H, RTN().solve(W, H, scheme), 60)
    best = row_errors(W, H, q)
    for j in range(64):
        for step in (-1, 1):
            codes = q.codes.clone().int()
            codes[:, j] = (codes[:, j] + step).clamp(0, scheme.qmax)
            moved = dataclasses.replace(q, codes=codes.byte())
            assert (row_errors(W, H, moved) >= best * (1 - 1e-4)).all()
    for step in (-1e-3, 1e-3):
        for g in range(q.scale.shape[1]):
            scale = q.scale.clone()
            scale[:, g] *= 1 + step
            moved = dataclasses.replace(q, scale=scale)
            assert (row_errors(W, H, moved) >= best * (1 - 1e-4)).all()


def test_scales_reach_joint_least_squares():
    """A row's scales, codes fixed, against the normal equations in float64."""
    W, H = problem(3, 3, 128)
    scheme = QuantScheme(8, 32)
    q = RTN().solve(W, H, scheme)
    q = dataclasses.replace(q, scale=q.scale * 1.03)
    polished = descend(W, H, q, 40)

    def least_squares(q: QuantizedWeight, n: int) -> Tensor:
        columns = torch.zeros(128, 4, dtype=torch.float64)
        for g in range(4):
            own = slice(32 * g, 32 * (g + 1))
            columns[own, g] = q.codes[n, own].double() - q.zero[n, g].double()
        image = columns.T @ H.double()
        return torch.linalg.solve(image @ columns, image @ W[n].double())

    for n in range(3):
        expected = least_squares(polished, n)
        assert torch.allclose(polished.scale[n].double(), expected, rtol=1e-5)


def test_zero_rows_and_outliers():
    W, H = problem(4, 6, 64)
    W[0], W[1], W[2, 5], W[:, 9] = 0.0, 0.25, 1e4, 0.0
    H[7], H[:, 7] = 0.0, 0.0
    for scheme in (QuantScheme(4, 32), QuantScheme(2, -1, True)):
        q = Polished().solve(W, H, scheme)
        assert q.dequantize().isfinite().all()
        assert (q.dequantize()[0] == 0).all()
        assert loss(W, q, H) <= loss(W, RTN().solve(W, H, scheme), H)


@pytest.mark.parametrize("scheme", [QuantScheme(4, 64), QuantScheme(2, -1)])
def test_threads_do_not_matter(scheme, set_threads):
    W, H = problem(5, 300, 384)
    results = []
    for count in (1, 2):
        set_threads(count)
        results.append(Polished().solve(W, H, scheme))
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].scale, results[1].scale)
