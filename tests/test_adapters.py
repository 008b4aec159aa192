"""Matrices of mixtures as linears."""

from __future__ import annotations

import torch
from hypothesis import given, strategies as st

from llmq.adapters import RoutedLinear


@given(counts=st.lists(st.integers(0, 70), min_size=1, max_size=5))
def test_padding_changes_no_row(counts):
    generator = torch.Generator().manual_seed(sum(counts))
    weight = torch.randn(len(counts), 6, 8, generator=generator)
    bias = torch.randn(len(counts), 6, generator=generator)
    rows = [torch.randn(t, 8, generator=generator) for t in counts]
    found = RoutedLinear(weight, bias)(rows)
    for x, W, b, y in zip(rows, weight.double(), bias.double(), found, strict=True):
        assert y.shape == (len(x), 6)
        torch.testing.assert_close(y.double(), x.double() @ W.T + b, rtol=1e-5, atol=1e-5)


def test_few_shapes_reach_the_product(monkeypatch):
    """oneDNN keeps a kernel for each of them."""
    seen = set()
    product = torch.nn.functional.linear

    def watched(x, W, b):
        seen.add(len(x))
        return product(x, W, b)

    monkeypatch.setattr("llmq.adapters.F.linear", watched)
    linear = RoutedLinear(torch.ones(1, 2, 3), None)
    for t in range(2049):
        assert linear([torch.ones(t, 3)])[0].shape == (t, 2)
    assert len(seen) <= 4 * 11 + 1
    assert max(seen) == 2048
