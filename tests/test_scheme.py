import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from llmq.errors import SchemeError
from llmq.scheme import BITS, QuantScheme, grouped, minmax_grid, round_to_grid, stored

SCHEMES = st.builds(
    QuantScheme, st.sampled_from(BITS), st.sampled_from([32, 64, -1]), st.booleans()
)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def matrix(seed: int, N: int, K: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp(torch.randn(N, 1, generator=generator))
    return torch.randn(N, K, generator=generator) * rows + torch.randn(1, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), SCHEMES, DTYPES)
def test_rounding_error_is_at_most_half_a_step(seed, N, scheme, dtype):
    W = matrix(seed, N, 128).to(dtype)
    scale, zero = minmax_grid(grouped(W.float(), scheme), scheme, dtype)
    q = round_to_grid(W.float(), scale, zero, scheme, dtype)
    delta = (q.dequantize(torch.float64) - W.double()).abs()
    step = q.scale.double().repeat_interleave(scheme.group_width(128), 1)
    # Scales are rounded to `dtype`, so the outermost code may fall short by qmax roundings of
    # the scale; the product is rounded to `dtype` once more.
    slack = scheme.qmax * torch.finfo(dtype).eps + 1e-5
    assert (delta <= step * (0.5 + slack) + W.double().abs() * torch.finfo(dtype).eps).all()
    assert q.codes.max() <= scheme.qmax
    assert q.zero.max() <= scheme.qmax
    assert q.scale.dtype == dtype
    assert (q.scale > 0).all()
    if scheme.symmetric:
        assert (q.zero == scheme.middle).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), SCHEMES, DTYPES)
def test_a_matrix_on_its_grid_stays_as_it_is(seed, scheme, dtype):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, scheme.qmax + 1, (4, 64), generator=generator)
    groups = 64 // scheme.group_width(64)
    scale = stored(torch.rand(4, groups, generator=generator) + 0.1, dtype, scheme.qmax)
    zero = torch.full((4, groups), float(scheme.middle))
    W = (grouped(codes.float(), scheme) - zero[..., None]) * scale[..., None]
    q = round_to_grid(W.flatten(1), scale, zero, scheme, dtype)
    assert torch.equal(q.codes.long(), codes)


def test_dequantize_by_hand():
    scheme = QuantScheme(4, 32, symmetric=False)
    W = torch.zeros(1, 32)
    W[0, :3] = torch.tensor([-1.0, 0.5, 2.0])
    scale, zero = minmax_grid(grouped(W, scheme), scheme, torch.float32)
    q = round_to_grid(W, scale, zero, scheme, torch.float32)
    assert q.scale.item() == pytest.approx(3 / 15)
    assert q.zero.item() == 5
    assert q.codes[0, :4].tolist() == [0, 7, 15, 5]  # 0.5 / 0.2 rounds half to even: 2
    assert torch.allclose(q.dequantize()[0, :4], torch.tensor([-1.0, 0.4, 2.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_extreme_groups_stay_finite(dtype, symmetric):
    scheme = QuantScheme(4, 32, symmetric)
    W = torch.zeros(5, 32)
    W[1] = 1e-30  # far below the smallest scale
    W[2] = -3.0  # constant
    W[3, 0] = 6e4  # one outlier
    W[4] = torch.finfo(torch.float16).max
    scale, zero = minmax_grid(grouped(W, scheme), scheme, dtype)
    restored = round_to_grid(W, scale, zero, scheme, dtype).dequantize(torch.float32)
    assert restored.isfinite().all()
    assert (restored[0] == 0).all()
    assert (restored[2] + 3).abs().max() < 0.25


def test_bits_per_weight():
    assert QuantScheme(4, 128, symmetric=True).bits_per_weight(4096) == 4.125
    assert QuantScheme(4, 32, symmetric=False).bits_per_weight(4096) == 4 + 20 / 32
    assert QuantScheme(8, -1, symmetric=True).bits_per_weight(1024) == 8 + 16 / 1024


@pytest.mark.parametrize("wrong", [{"bits": 7}, {"bits": 0}, {"group_size": 48}, {"group_size": 0}])
def test_unknown_schemes_are_refused(wrong):
    with pytest.raises(SchemeError, match="use one of"):
        QuantScheme(**wrong)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(SchemeError, match="in_features=96 is not divisible by group_size=64"):
        grouped(torch.zeros(2, 96), QuantScheme(4, 64))
