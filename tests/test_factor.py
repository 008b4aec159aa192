"""Factors in float32 and what is solved with them: against float64, where that is hard, too."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmq import factor as module
from llmq.factor import divided, factor, inverted
from llmq.scheme import QuantizedWeight, QuantScheme, grouped, minmax_grid
from llmq.solvers.gptq import GPTQ

EPS = torch.finfo(torch.float32).eps


def moment(K: int, tokens: int, massive: int = 0, seed: int = 0) -> Tensor:
    """Of correlated inputs, some of whose channels are 1e4 times as large."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=g) / K**0.5 + torch.eye(K)
    X = torch.randn(tokens, K, generator=g) @ mix * torch.exp(torch.randn(K, generator=g))
    X[:, torch.randperm(K, generator=g)[:massive]] *= 1e4
    return X.T @ X / tokens


def damped(H: Tensor, damp: float) -> Tensor:
    H = H.double()
    return H + damp * H.diagonal().mean() * torch.eye(len(H))


HARD = [(96, 400, 0), (300, 20, 0), (300, 1200, 3), (300, 20, 3)]  # K, tokens, massive channels


@pytest.mark.parametrize("K", [1, 96, 600])  # also with more than is copied or computed at once
def test_the_factor_is_what_it_says(K):
    H = moment(K, 4 * K)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    before = H.clone()
    R = factor(H, 0.01, order)
    assert torch.equal(H, before)
    assert torch.equal(R, R.triu())
    expected = damped(H, 0.01)[order][:, order]
    assert (R.double() @ R.double().T - expected).norm() <= EPS * expected.norm()


@pytest.mark.parametrize(("K", "tokens", "massive"), HARD)
@pytest.mark.parametrize("panel", [32, 256])
def test_no_entry_is_further_off_than_float32_can_hold(K, tokens, massive, panel):
    H = moment(K, tokens, massive)
    with patch.object(module, "PANEL", panel), patch.object(module, "ROWS", 64):
        R = factor(H, 0.01)
    exact = torch.linalg.cholesky(damped(H, 0.01).flip(0, 1)).flip(0, 1)
    sizes = damped(H, 0.01).diagonal().sqrt()
    off = (R.double() @ R.double().T - damped(H, 0.01)).abs()
    assert (off <= 2 * EPS * sizes[:, None] * sizes).all()
    # Pivots decide how columns weigh: they must hold, however small they are.
    torch.testing.assert_close(R.diagonal().double(), exact.diagonal(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("K", "tokens", "massive"), HARD)
def test_dividing_by_the_damped_moment(K, tokens, massive):
    H = moment(K, tokens, massive)
    B = torch.randn(7, K, generator=torch.Generator().manual_seed(1)) @ H
    with patch.object(module, "PANEL", 64):
        found = divided(B, factor(H, 0.05))
    expected = torch.linalg.solve(damped(H, 0.05), B.double().T).T
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_inverting_a_small_triangle():
    R = factor(moment(64, 20, 2), 0.01)
    expected = torch.linalg.inv(R.double())
    torch.testing.assert_close(inverted(R).double(), expected, rtol=EPS, atol=0)


def test_damping_is_tripled_until_it_is_enough():
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05]))
    mean = 2.95 / 4
    R = factor(H, 0.01)
    assert float(R[0, 0]) ** 2 == pytest.approx(1 + 0.09 * mean)
    torch.testing.assert_close(R, factor(H, 0.09))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e6])
@pytest.mark.parametrize("place", [(0, 0), (299, 299), (3, 290)])
def test_what_is_no_second_moment_is_refused(bad, place):
    H = moment(300, 900)
    H[place] = H[place[::-1]] = bad
    with pytest.raises(ValueError, match=r"second moment \(300 columns\) (is not|has)"):
        factor(H, 0.01)


class Sizes(TorchDispatchMode):
    """Notes the bytes of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return result


def test_nothing_else_is_as_large_as_the_factor():
    K = 640
    H = torch.eye(K)
    with (
        patch.object(module, "PANEL", 64),
        patch.object(module, "ROWS", 64),
        Sizes() as sizes,
    ):
        R = factor(H, 0.01, torch.arange(K))
        divided(torch.ones(2, K), R)
    own = {H.untyped_storage().data_ptr(), R.untyped_storage().data_ptr()}
    others = [n for place, n in sizes.seen.items() if place not in own]
    assert max(others) <= 8 * 64 * K  # a panel in float64


def published(W: Tensor, H: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes of GPTQ as in its paper, all in float64: Cholesky of the inverse, later weights move.

    H is damped; grids (N, K/G) are given.
    """
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    W, codes = W.double().clone(), torch.zeros_like(W, dtype=torch.uint8)
    width = W.shape[1] // scale.shape[1]
    for j in range(W.shape[1]):
        s, z = scale[:, j // width].double(), zero[:, j // width].double()
        code = (W[:, j] / s).round().add(z).clamp(0, scheme.qmax)
        codes[:, j] = code
        error = (W[:, j] - (code - z) * s) / U[j, j]
        W[:, j:] -= error[:, None] * U[j, j:]
    return codes


@pytest.mark.parametrize(("K", "tokens", "massive"), [(384, 1280, 0), (384, 20, 0), (384, 40, 3)])
@pytest.mark.parametrize("group", [64, 128, -1])
def test_the_pass_gives_the_codes_of_gptq(K, tokens, massive, group):
    scheme = QuantScheme(3, group, symmetric=False)
    H = moment(K, tokens, massive)
    W = torch.randn(16, K, generator=torch.Generator().manual_seed(1))
    q = GPTQ(order="none", search=False).solve(W, H, scheme)
    codes = published(W, damped(H, 0.01), q.scale, q.zero, scheme)
    same = (codes == q.codes).float().mean()
    assert same > 0.99  # a tie of rounding may fall either way, and the rest of its row with it

    def loss(q: QuantizedWeight) -> float:
        delta = q.dequantize(torch.float64) - W.double()
        return float(((delta @ H.double()) * delta).sum())

    expected = loss(QuantizedWeight(scheme, codes, q.scale, q.zero))
    assert loss(q) == pytest.approx(expected, rel=0.01)
    if group == -1:
        scale, _ = minmax_grid(grouped(W, scheme), scheme, W.dtype)
        assert torch.equal(q.scale, scale)
