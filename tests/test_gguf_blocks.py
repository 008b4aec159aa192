"""GGUF's blocks against the `gguf` package's own reader."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_columns import random_weight

from llmq.errors import SchemeError
from llmq.formats import gguf as layout, kquants
from llmq.scheme import BITS, QuantScheme
from llmq.solvers.rtn import RTN

gguf = pytest.importorskip("gguf")
from gguf import GGMLQuantizationType, quants  # noqa: E402

KINDS: dict[int, kquants.Kind] = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K"}


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from((32, 64, 128, -1)),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_the_package_reads_the_weights_that_were_there(bits, group, symmetric, seed):
    scheme = QuantScheme(bits, group, symmetric)
    q = random_weight(scheme, 8, 256, seed=seed)
    if layout.why_not(scheme, 8, 256):
        assert (bits, symmetric) == (8, False)
        return
    kind = layout.block_type(scheme, 256)
    stored, change = layout.blocks(q, kind)
    assert change == 0
    assert stored.shape == (8, layout.row_bytes(kind, 256))
    found = quants.dequantize(stored, GGMLQuantizationType[kind])
    groups = q.codes.unflatten(1, (q.scale.shape[1], -1)).float()
    expected = ((groups - q.zero.unsqueeze(-1)) * q.scale.float().unsqueeze(-1)).flatten(1).numpy()
    if kind in ("Q4_1", "Q5_1"):
        offset = (q.zero.float() * q.scale.float()).repeat_interleave(256 // q.scale.shape[1], 1)
        assert (abs(found - expected) <= 2.0**-11 * offset.numpy() + 1e-7).all()
    else:
        assert (found == expected).all()


def test_sizes_are_those_of_the_package():
    for kind, sizes in layout.BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == sizes


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from([(2, True), (2, False), (3, True), (4, True), (4, False), (5, False)]),
    group=st.sampled_from((32, 64, 128, -1)),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
    seed=st.integers(0, 2**20),
)
def test_the_package_reads_the_super_blocks_that_were_written(scheme, group, dtype, seed):
    bits, symmetric = scheme
    q = random_weight(QuantScheme(bits, group, symmetric), 6, 512, dtype, seed)
    kind = KINDS[bits]
    found = kquants.project(q, kind)
    read = quants.dequantize(found.bytes().numpy(), GGMLQuantizationType[kind])
    assert torch.equal(torch.tensor(read), found.weight())
    assert torch.equal(found.codes.flatten(1), q.codes)
    # No weight moves by more than what rounding scale and offset to these integers can do.
    exact = replace(q, scale=q.scale.float()).dequantize()
    largest = q.scale.float().amax(1, keepdim=True)
    most = {2: 1 / 15, 3: 1 / 31, 4: 1 / 63, 5: 1 / 63}[bits] * 2**bits * largest
    assert ((found.weight() - exact).abs() <= most).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_that_are_multiples_stay(bits):
    q = random_weight(QuantScheme(bits, 32, True), 4, 512)
    whole = torch.randint(1, {2: 15, 3: 31, 4: 63}[bits] + 1, q.scale.shape)
    whole[:, ::8] = {2: 15, 3: 31, 4: 63}[bits]
    q = replace(q, scale=whole * 2.0**-9)
    found = kquants.project(q, KINDS[bits])
    assert torch.equal(found.weight(), q.dequantize())


def test_solved_matrices_barely_move():
    """The grid that rounding chooses, on weights like those of trained models."""
    W = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    limits = {(4, False): 0.03, (3, True): 0.02, (2, True): 0.03, (2, False): 0.15}
    for (bits, symmetric), limit in limits.items():
        scheme = QuantScheme(bits, 32, symmetric)
        q = RTN().solve(W, torch.empty(0), scheme)
        kind = layout.block_type(scheme, 1024, k_quants=True)
        assert kind == KINDS[bits]
        _, change = layout.blocks(q, kind)
        error = (q.dequantize() - W).norm() / W.norm()
        assert 0 < change < min(limit, 0.5 * error)


def test_rounding_of_dense_matrices():
    W = torch.randn(9, 512, generator=torch.Generator().manual_seed(1)) * 0.05
    W[2] = 0
    W[3, :40] *= 100
    # One end of a group of Q6_K is a step short; its scale moves by half a unit of its block's.
    kinds: tuple[tuple[Literal["Q8_0", "Q6_K"], float, float], ...]
    kinds = (("Q8_0", 1 / 254, 0), ("Q6_K", 1 / 31, 1 / 254))
    for kind, step, unit in kinds:
        stored = layout.rounded(W, kind)
        found = torch.tensor(quants.dequantize(stored, GGMLQuantizationType[kind]))
        width = 32 if kind == "Q8_0" else 16
        groups, errors = (t.unflatten(1, (-1, width)) for t in (W, (found - W).abs()))
        block = W.abs().unflatten(1, (-1, 256)).amax(-1).repeat_interleave(256 // width, 1)
        most = step * groups.abs().amax(-1) + unit * block
        assert (errors <= 1.01 * most.unsqueeze(-1) + 1e-7).all()
    package = quants.quantize(W.numpy(), GGMLQuantizationType.Q8_0)
    theirs = torch.tensor(quants.dequantize(package, GGMLQuantizationType.Q8_0))
    ours = torch.tensor(quants.dequantize(layout.rounded(W, "Q8_0"), GGMLQuantizationType.Q8_0))
    assert (ours - W).norm() < 1.001 * (theirs - W).norm()


def test_what_fp16_cannot_hold_is_refused():
    q = random_weight(QuantScheme(4, 32, False), 2, 256, torch.float32)
    with pytest.raises(SchemeError, match="too large for float16"):
        kquants.project(replace(q, scale=q.scale * 1e9), "Q4_K")
    tiny = replace(q, scale=q.scale * 1e-9)  # too small: zeros, and no NaN
    assert (kquants.project(tiny, "Q4_K").weight() == 0).all()


def test_what_no_block_holds():
    assert "asymmetric 8 bits" in str(layout.why_not(QuantScheme(8, 32, False), 8, 64))
    assert "in_features=80" in str(layout.why_not(QuantScheme(4, -1, True), 8, 80))
