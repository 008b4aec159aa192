"""Feedback between rows, against least squares in float64; solvers see one part after the other."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.solvers.descent import Polished
from llmq.solvers.feedback import Feedback, _Rows, share_left, solve_rows
from llmq.solvers.gptq import GPTQ
from llmq.solvers.rtn import RTN

SCHEME = QuantScheme(2, 32, symmetric=False)


def moment(size: int, generator: torch.Generator, rank: int | None = None) -> Tensor:
    """Of correlated vectors, a few of which are large."""
    mix = torch.randn(size, rank or size, generator=generator)
    rows = torch.randn(4 * size, rank or size, generator=generator) @ mix.T
    return (
        rows.T @ (rows * (1 + 9 * torch.rand(len(rows), 1, generator=generator) ** 8)) / len(rows)
    )


def felt(W: Tensor, q: QuantizedWeight, G: Tensor, H: Tensor) -> float:
    """tr(G E H E^T)."""
    E = W.double() - q.dequantize(torch.float64)
    return float((G.double() @ E @ H.double() * E).sum())


@dataclass
class Noting:
    """Rounds to nearest and notes what it was given."""

    given: list[Tensor] = field(default_factory=list)

    def solve(self, W: Tensor, H: Tensor, scheme: QuantScheme) -> QuantizedWeight:
        self.given.append(W)
        return RTN().solve(W, H, scheme)


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 7, 24]))
def test_a_part_is_where_the_rest_could_make_good_what_is_lost(seed, parts):
    """If all rows not yet rounded were free, these would be their best values."""
    g = torch.Generator().manual_seed(seed)
    W, G, H = torch.randn(24, 32, generator=g), moment(24, g), moment(32, g)
    solver, damp = Noting(), 0.01
    [q] = solve_rows(solver, [W], [G], H, SCHEME, Feedback(parts, damp, rounds=0))
    order = G.diagonal().argsort(descending=True, stable=True)
    exact = (G.double() + damp * G.diagonal().double().mean() * torch.eye(24))[order][:, order]
    E = (W.double() - q.dequantize(torch.float64))[order]
    done = 0
    for part in solver.given:
        free = torch.linalg.solve(exact[done:, done:], exact[done:, :done] @ E[:done])
        wanted = W.double()[order][done:] + free
        torch.testing.assert_close(part.double(), wanted[: len(part)], atol=1e-3, rtol=1e-3)
        done += len(part)
    assert done == 24


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 5, 12]))
def test_a_part_that_is_visited_again_is_wanted_where_all_others_would_have_it(seed, size):
    """The least of tr(G E H E^T) over the rows of a part, whatever H is."""
    g = torch.Generator().manual_seed(seed)
    W, G, how = torch.randn(24, 32, generator=g), moment(24, g), Feedback(24 // size, damp=0.01)
    rows = _Rows(W, G, how)
    for number, own in enumerate(rows.parts):
        rows.take(number, RTN().solve(W[own], moment(32, g), SCHEME))
    exact = G.double() + how.damp * G.diagonal().double().mean() * torch.eye(24)
    E = W.double() - rows.value().dequantize(torch.float64)
    for number, own in enumerate(rows.parts):
        rest = torch.tensor([i for i in range(24) if i not in own.tolist()], dtype=torch.int64)
        pull = torch.linalg.solve(exact[own][:, own], exact[own][:, rest] @ E[rest])
        wanted = W[own].double() + pull
        torch.testing.assert_close(rows.again(number).double(), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_every_round_helps(seed):
    g = torch.Generator().manual_seed(seed)
    W, G, H = torch.randn(64, 64, generator=g), moment(64, g, 24), moment(64, g)
    lost = []
    for rounds in (0, 1, 2):
        [q] = solve_rows(Polished(), [W], [G], H, SCHEME, Feedback(rounds=rounds))
        lost.append(felt(W, q, G, H))
    assert lost[1] < 0.98 * lost[0]
    assert lost[2] < lost[1]


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_feels_less(seed):
    g = torch.Generator().manual_seed(seed)
    W, G, H = torch.randn(64, 64, generator=g), moment(64, g, 24), moment(64, g)
    plain = GPTQ().solve(W, H, SCHEME)
    lost = [felt(W, plain, G, H)]
    for parts in (2, 8, 64):
        [q] = solve_rows(GPTQ(), [W], [G], H, SCHEME, Feedback(parts, rounds=0))
        lost.append(felt(W, q, G, H))
    assert lost[3] < 0.8 * lost[0]
    assert max(lost[1:3]) < lost[0]


@pytest.mark.parametrize("how", [Feedback(), Feedback(parts=1)])
def test_without_moments_or_parts_nothing_changes(how):
    g = torch.Generator().manual_seed(0)
    first, second, H = (
        torch.randn(9, 32, generator=g),
        torch.randn(5, 32, generator=g),
        moment(32, g),
    )
    G = None if how.parts > 1 else moment(9, g)
    found = solve_rows(Polished(), [first, second], [G, None], H, SCHEME, how)
    for W, q in zip((first, second), found, strict=True):
        assert torch.equal(q.dequantize(), Polished().solve(W, H, SCHEME).dequantize())


def test_matrices_of_other_heights_and_moments_without_rank_are_solved_together():
    g = torch.Generator().manual_seed(0)
    matrices = [torch.randn(n, 32, generator=g) for n in (3, 17, 8, 1)]
    moments = [torch.zeros(3, 3), moment(17, g, 2), None, torch.ones(1, 1)]
    found = solve_rows(Polished(), matrices, moments, moment(32, g), SCHEME, Feedback(4))
    for W, q in zip(matrices, found, strict=True):
        assert q.shape == W.shape
        assert bool(q.dequantize().isfinite().all())


def test_the_factor_of_h_is_made_once(monkeypatch):
    from llmq.solvers import gptq

    made, real = [], gptq.factor
    monkeypatch.setattr(gptq, "factor", lambda *args: made.append(1) or real(*args))
    g = torch.Generator().manual_seed(0)
    W, G, H = torch.randn(64, 32, generator=g), moment(64, g), moment(32, g)
    solve_rows(Polished(), [W], [G], H, SCHEME, Feedback(8))
    assert len(made) == 1


@pytest.mark.parametrize("parts", [2, 8, 64])
def test_what_feedback_leaves_is_foreseen(parts):
    """Against rounding in earnest, on fine grids that no weight leaves."""
    g = torch.Generator().manual_seed(parts)
    W, G, H = torch.randn(64, 256, generator=g), moment(64, g), torch.eye(256)
    how, scheme = Feedback(parts, rounds=0), QuantScheme(6, 32)
    with_it, without = (
        felt(W, solve_rows(GPTQ(), [W], [moments], H, scheme, how)[0], G, H)
        for moments in (G, None)
    )
    assert share_left(G, how) == pytest.approx(with_it / without, rel=0.12)


def test_rows_that_do_not_interact_leave_all_and_equal_ones_little():
    how = Feedback(parts=8, damp=1e-3)
    assert share_left(torch.diag(torch.rand(24) + 0.1), how) == pytest.approx(1)
    assert share_left(torch.ones(24, 24) + 1e-3 * torch.eye(24), how) < 0.2
    assert share_left(torch.zeros(24, 24), how) == pytest.approx(1)  # nothing is felt
