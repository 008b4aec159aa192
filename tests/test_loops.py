"""The solvers' innermost loops: where kernels have them, and that those are tried before."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from llmq.solvers import loops

CPU = torch.device("cpu")


def kernels(**wrong) -> types.ModuleType:
    """A module like `llmq_kernels.solve` whose functions are torch's, but for those given."""

    def round_columns(columns, debt, *rest):
        return loops._round_columns(columns, debt.clone(), *rest)

    def move_codes(codes, away, H, qmax):
        codes.copy_(loops._moved_codes(codes, away, H, qmax))

    made = types.ModuleType("llmq_kernels.solve")
    right = {
        "round_columns": round_columns,
        "trial_errors": loops._trial_errors,
        "move_codes": move_codes,
    }
    vars(made).update(right | wrong)
    return made


@pytest.fixture
def solve(monkeypatch):
    def use(**wrong):
        made = kernels(**wrong)
        monkeypatch.setitem(sys.modules, "llmq_kernels.solve", made)
        monkeypatch.setattr("llmq_kernels.solve", made, raising=False)

    return use


def test_kernels_that_agree_are_taken(solve):
    solve()
    assert loops.disagreement(CPU) is None


@pytest.mark.parametrize(
    ("name", "wrong", "what"),
    [
        ("round_columns", lambda columns, *rest: columns.byte(), "rounding"),
        ("trial_errors", lambda columns, U, scales, *rest: scales * torch.nan, "trials"),
        ("move_codes", lambda *rest: None, "descent"),
    ],
)
def test_kernels_that_compute_wrongly_are_found_out(solve, name, wrong, what):
    solve(**{name: wrong})
    assert what in loops.disagreement(CPU)


def test_a_gpu_without_kernels_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(loops.Triton, "why_not_on", lambda self, device: "it has no compiler.")
    loops._work.cache_clear()
    gpu = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match="slow on a GPU: it has no compiler"):
        assert not loops.by_kernels(gpu)
    assert not loops.by_kernels(gpu)  # a second warning would be an error
    loops._work.cache_clear()


def test_a_cpu_is_asked_nothing(monkeypatch):
    monkeypatch.setattr(loops, "_work", None)
    assert not loops.by_kernels(CPU)
