"""Backends against float64: at most twice the error of a dense matmul in the same dtype."""

import pytest
import torch
from torch.nn import functional as F

from llmq import backends
from llmq.backends import BACKENDS, CPU_INT4, TORCH, base
from llmq.errors import BackendError
from llmq.nn import PackedLinear
from llmq.scheme import BITS, QuantScheme, grouped, minmax_grid, round_to_grid

SCHEMES = [QuantScheme(b, g, s) for b in BITS for g in (32, 64, 128, -1) for s in (True, False)]
KERNEL = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_kernel = pytest.mark.skipif(not KERNEL, reason="no AVX2: the CPU has no int4 kernel")


def packed(scheme, N, K, dtype=torch.bfloat16, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(N, K, generator=generator) + 0.2
    scale, zero = minmax_grid(grouped(W, scheme), scheme, dtype)
    b = torch.randn(N, generator=generator).to(dtype) if bias else None
    return PackedLinear.from_quantized(round_to_grid(W, scale, zero, scheme, dtype), b)


def inputs(M, K, dtype=torch.bfloat16, kind="normal"):
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(M))
    x = {"normal": x, "positive": x.abs(), "negative": -x.abs()}[kind]
    return x.to(dtype)


def exact(layer, x):
    """(code - zero) * scale and the product, all in float64."""
    q = layer.quantized()
    codes = q.codes.double().unflatten(1, (q.scale.shape[1], -1))
    W = ((codes - q.zero.double().unsqueeze(-1)) * q.scale.double().unsqueeze(-1)).flatten(1)
    return F.linear(x.double(), W, None if layer.bias is None else layer.bias.double())


def error(y, truth):
    assert y.isfinite().all()
    return ((y.double() - truth).norm() / truth.norm()).item()


@pytest.fixture(autouse=True)
def _poison():
    """Every tensor that torch leaves uninitialised starts as NaN (or an extreme integer)."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dequantize_is_bitwise_the_definition(scheme):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer = packed(scheme, 40, 256, dtype)
        for out in (torch.bfloat16, torch.float16, torch.float32):
            fast = backends.dequantize(layer, out)
            assert torch.equal(fast, layer.quantized().dequantize(out))


def test_dequantize_in_slabs_is_the_same(monkeypatch):
    layer = packed(QuantScheme(4, 32, False), 40, 256)
    whole = backends.dequantize(layer, torch.bfloat16)
    monkeypatch.setattr(base, "SLAB", 7 * 256)  # 40 rows: five slabs and a rest
    assert torch.equal(backends.dequantize(layer, torch.bfloat16), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_torch_backend_is_exactly_the_dense_product(scheme, dtype):
    layer = packed(scheme, 37, 256, dtype, bias=True)
    for M in (1, 5):
        x = inputs(M, 256, dtype)
        assert torch.equal(layer(x), F.linear(x, layer.dequantize(), layer.bias))


@needs_kernel
@pytest.mark.parametrize("kind", ["normal", "positive", "negative"])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits < 8 or s.symmetric], ids=str)
def test_int4_kernel_against_float64(scheme, kind):
    for N, K in ((48, 256), (64, 384)):
        layer = packed(scheme, N, K)
        layer.prepare()
        assert layer.backend == CPU_INT4
        for M in (1, 3, 17, CPU_INT4.max_rows, CPU_INT4.max_rows + 1):
            x = inputs(M, K, kind=kind)
            truth = exact(layer, x)
            dense = error(F.linear(x, layer.dequantize()), truth)
            assert error(layer(x), truth) <= 2 * dense, (N, K, M)


@needs_kernel
def test_int4_kernel_with_bias_and_leading_dimensions():
    layer = packed(QuantScheme(4, 64, False), 48, 256, bias=True)
    x = inputs(6, 256)
    before = layer(x)
    layer.prepare("cpu-int4")
    y = layer(x.view(2, 3, 256))
    assert y.shape == (2, 3, 48)
    truth = exact(layer, x)
    assert error(y.view(6, 48), truth) <= 2 * error(before, truth)
    assert layer(x[:0]).shape == (0, 48)


@needs_kernel
def test_other_dtypes_and_many_rows_take_the_dense_path():
    layer = packed(QuantScheme(4, 64, True), 48, 256)
    layer.prepare("cpu-int4")
    for x in (inputs(2, 256, torch.float32), inputs(CPU_INT4.max_rows + 1, 256)):
        y = layer(x)
        assert y.dtype is x.dtype
        assert torch.equal(y, TORCH.matmul(x, layer))
    eight = packed(QuantScheme(8, 64, True), 48, 256)
    eight.prepare("cpu-int4")
    x = inputs(CPU_INT4.max_rows_of_two + 1, 256)
    assert torch.equal(eight(x), TORCH.matmul(x, eight))


@needs_kernel
def test_preparing_is_deterministic_and_changes_no_parameter():
    a, b = (packed(QuantScheme(4, 64, False), 48, 256, bias=True) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in a.state_dict().items()}
    a.prepare()
    b.prepare()
    x = inputs(3, 256)
    assert torch.equal(a(x), b(x))
    assert before.keys() == a.state_dict().keys()
    assert all(torch.equal(before[name], t) for name, t in a.state_dict().items())


@needs_kernel
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (packed(QuantScheme(4, 64), 48, 256, torch.float32), "dtype=torch.bfloat16"),
        (packed(QuantScheme(4, 64), 48, 256, torch.float16), "float16"),
        (packed(QuantScheme(8, 64, False), 48, 256), "8-bit zero points"),
        (packed(QuantScheme(4, 64), 20, 256), "out_features=20"),
        (packed(QuantScheme(4, -1), 48, 80), "in_features=80"),
        (PackedLinear(QuantScheme(4, 64), 256, 48, device="meta"), "meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_why_not(layer, reason):
    assert reason in (CPU_INT4.why_not(layer) or "")
    assert backends.choose(layer) == TORCH
    with pytest.raises(BackendError, match="cpu-int4"):
        backends.choose(layer, "cpu-int4")
    assert backends.choose(layer, "torch") == TORCH


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(BackendError, match=", ".join(b.name for b in BACKENDS)):
        backends.choose(packed(QuantScheme(4, 64), 48, 256), "marlin")


def test_there_is_a_backend_for_everything():
    assert TORCH in BACKENDS
    assert all(TORCH.why_not(packed(scheme, 20, 256)) is None for scheme in SCHEMES)
