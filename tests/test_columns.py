"""GPTQ's and AWQ's layouts against bytes packed by plain loops, and against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from llmq.errors import FormatError, SchemeError
from llmq.formats import awq, columns, compressed_tensors as ct, gptq
from llmq.scheme import BITS, GROUP_SIZES, QuantizedWeight, QuantScheme

SCHEMES = [QuantScheme(b, g, s) for b in gptq.BITS for g in GROUP_SIZES for s in (True, False)]


def random_weight(scheme, N, K, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = K // scheme.group_width(K)

    def codes(*shape):
        return torch.randint(0, 2**scheme.bits, shape, dtype=torch.uint8, generator=generator)

    zero = codes(N, groups)
    if scheme.symmetric:
        zero.fill_(scheme.middle)
    scale = (torch.rand(N, groups, generator=generator) + 0.01) / 32
    return QuantizedWeight(scheme, codes(N, K), scale.to(dtype), zero)


def bits_of(value: int, count: int) -> list[int]:
    return [value >> i & 1 for i in range(count)]


def as_words(bits: list[int]) -> list[int]:
    """Signed 32-bit words of a little-endian stream of bits."""
    words = [
        sum(bit << i for i, bit in enumerate(bits[k : k + 32])) for k in range(0, len(bits), 32)
    ]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def plain_gptq(codes: np.ndarray, zero: np.ndarray, bits: int, version: int):
    """qweight and qzeros, one bit at a time."""
    N, K = codes.shape
    qweight = [
        as_words([b for k in range(K) for b in bits_of(int(codes[n, k]), bits)]) for n in range(N)
    ]
    qzeros = []
    for g in range(zero.shape[1]):
        values = [
            int(zero[n, g]) if version == 2 else (int(zero[n, g]) - 1) % 2**bits for n in range(N)
        ]
        qzeros.append(as_words([b for value in values for b in bits_of(value, bits)]))
    return np.array(qweight).T.tolist(), qzeros


def plain_awq(codes: np.ndarray) -> list[list[int]]:
    """Rows of words of a matrix (N, K): nibbles hold the items in the order below."""
    rows = []
    for k in range(codes.shape[1]):
        words = []
        for n in range(0, codes.shape[0], 8):
            eight = [int(codes[n + item, k]) for item in (0, 2, 4, 6, 1, 3, 5, 7)]
            words += as_words([b for value in eight for b in bits_of(value, 4)])
        rows.append(words)
    return rows


def assert_same(left: QuantizedWeight, right: QuantizedWeight) -> None:
    assert left.scheme == right.scheme
    assert torch.equal(left.codes, right.codes)
    assert torch.equal(left.zero, right.zero)
    assert torch.equal(left.scale.double(), right.scale.double())
    assert (left.order is None) == (right.order is None)
    assert left.order is None or right.order is None or torch.equal(left.order, right.order)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_gptq_packs_as_a_plain_loop_does(bits, version):
    q = random_weight(QuantScheme(bits, 32, symmetric=version == 1), 32, 64)
    tensors = gptq.write("m", q, version)
    qweight, qzeros = plain_gptq(q.codes.numpy(), q.zero.numpy(), bits, version)
    assert tensors["m.qweight"].tolist() == qweight
    assert tensors["m.qzeros"].tolist() == qzeros
    assert tensors["m.g_idx"].tolist() == [0] * 32 + [1] * 32
    assert tensors["m.scales"].dtype is torch.float16
    assert tensors["m.scales"].shape == (2, 32)
    assert torch.equal(tensors["m.scales"].T.bfloat16(), q.scale)
    assert all(t.dtype is torch.int32 for key, t in tensors.items() if key != "m.scales")
    assert all(t.is_contiguous() for t in tensors.values())


def test_golden_words_of_symmetric_zeros():
    q = random_weight(QuantScheme(4, 32, True), 8, 32)
    assert gptq.write("", q)["qzeros"].tolist() == [[0x77777777]]
    assert gptq.write("", q, 2)["qzeros"].tolist() == [[0x88888888 - 2**32]]
    assert awq.write("", q)["qzeros"].tolist() == [[0x88888888 - 2**32]]


def test_awq_packs_as_a_plain_loop_does():
    q = random_weight(QuantScheme(4, 32, False), 24, 64)
    tensors = awq.write("m", q)
    assert tensors["m.qweight"].tolist() == plain_awq(q.codes.numpy())
    assert tensors["m.qzeros"].tolist() == plain_awq(q.zero.numpy())
    assert set(tensors) == {"m.qweight", "m.qzeros", "m.scales"}
    counting = QuantizedWeight(
        QuantScheme(4, -1, True),
        torch.arange(8, dtype=torch.uint8).unsqueeze(1),
        torch.ones(8, 1),
        torch.full((8, 1), 8, dtype=torch.uint8),
    )
    assert awq.write("", counting)["qweight"].tolist() == [[0x75316420]]


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    seed=st.integers(0, 2**20),
)
def test_the_same_weights_in_every_layout_that_holds_them(scheme, rows, groups, dtype, seed):
    N, K = 32 * rows, groups * (96 if scheme.group_size == -1 else scheme.group_size)
    q = random_weight(scheme, N, K, dtype, seed)
    expected = q.dequantize()
    assert gptq.why_not(scheme, N, K) is None
    version = 1 if scheme.symmetric else 2
    back = gptq.read("m", gptq.write("m", q, version), scheme, version)
    assert_same(back, q)
    copies = [back]
    if awq.why_not(scheme, N, K) is None:
        copies.append(awq.read("m", awq.write("m", back), scheme))
    else:
        assert scheme.bits != 4
    copies += [ct.read("m", ct.write("m", copy), scheme) for copy in copies]
    for copy in copies:
        assert_same(copy, q)
        stored = QuantizedWeight(copy.scheme, copy.codes, copy.scale.to(dtype), copy.zero)
        assert torch.equal(stored.dequantize(), expected)
    assert torch.equal(gptq.read_zeros("m", gptq.write("m", q, version), scheme, version), q.zero)


@pytest.mark.parametrize("bits", gptq.BITS)
def test_version_1_wraps_zeros_and_is_refused_where_readers_disagree(bits):
    q = random_weight(QuantScheme(bits, 32, False), 32, 32)
    with pytest.raises(SchemeError, match="zero points of 0"):
        gptq.write("m", q)
    wild = gptq.write("m", q, 2)  # what a writer of version 1 makes of zeros from 0 to qmax
    wild["m.qzeros"] = ct.pack_bits((q.zero.T.int() - 1) & q.scheme.qmax, bits, dim=1)
    assert_same(gptq.read("m", wild, q.scheme), q)


def shuffled(seed: int, K: int) -> torch.Tensor:
    return torch.randperm(K, generator=torch.Generator().manual_seed(seed))


def test_inputs_ordered_by_importance():
    """`desc_act` as the paper's code does it: column k of the sorted matrix was input order[k]."""
    scheme, order = QuantScheme(4, 32, False), shuffled(1, 128)
    plain = random_weight(scheme, 16, 128, torch.float16)
    weight = torch.empty(16, 128, dtype=plain.scale.dtype)
    weight[:, order] = plain.dequantize()
    tensors = gptq.write(
        "m", QuantizedWeight(scheme, plain.codes, plain.scale, plain.zero, order), 2
    )
    g_idx = tensors["m.g_idx"]
    for k, source in enumerate(order.tolist()):
        assert g_idx[source] == k // 32
    # An independent reader: every input looks up its own group.
    codes = ct.unpack_bits(tensors["m.qweight"], 4, 128, dim=0).T.float()
    zero = ct.unpack_bits(tensors["m.qzeros"], 4, 16, dim=1).T.float()
    looked_up = (codes - zero[:, g_idx.long()]) * tensors["m.scales"].T.float()[:, g_idx.long()]
    assert torch.equal(looked_up.half(), weight)
    read = gptq.read("m", tensors, scheme, 2)
    assert read.order is not None
    assert torch.equal(read.dequantize(), weight)
    again = gptq.write("m", read, 2)
    assert all(torch.equal(again[key], value) for key, value in tensors.items())
    for other in (awq, ct):
        with pytest.raises(SchemeError, match="m: its inputs are ordered"):
            other.write("m", read)


def test_whole_groups_in_another_order_need_none():
    scheme = QuantScheme(4, 32, False)
    q = random_weight(scheme, 16, 96)
    tensors = gptq.write("m", q, 2)
    tensors["m.g_idx"] = torch.tensor([2, 0, 1]).repeat_interleave(32).int()
    read = gptq.read("m", tensors, scheme, 2)
    assert read.order is None
    assert torch.equal(read.scale.bfloat16(), q.scale[:, [2, 0, 1]])
    assert torch.equal(read.zero, q.zero[:, [2, 0, 1]])
    assert torch.equal(read.codes, q.codes)
    del tensors["m.g_idx"]
    assert_same(gptq.read("m", tensors, scheme, 2), q)


def test_scales_that_float16_does_not_hold():
    scheme = QuantScheme(4, 32, True)
    q = random_weight(scheme, 8, 64)
    assert columns.lossy_scales(q) == (0, 0.0)
    q.scale[0, 0], q.scale[1, 1], q.scale[2, 0] = 2.0**-17, 3.0e-6, 1.2e-38
    q.codes[2, :32] = 8  # all weights of this group are 0: any scale will do
    half = columns.half_scales(q)
    changed, largest = columns.lossy_scales(q)
    assert changed == 1
    assert largest == pytest.approx(abs(half[1, 1].item() / q.scale[1, 1].item() - 1))
    assert 0 < largest < 2**-7
    assert half[2, 0] == 1
    assert half[0, 0] == 2.0**-17
    q.scale[3, 0] = 1e6
    with pytest.raises(SchemeError, match="too large for float16"):
        gptq.write("m", q)


@pytest.mark.parametrize("layout", [gptq, awq])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("m.qweight"), "m.qweight is missing"),
        (lambda t: t.pop("m.qzeros"), "m.qzeros is missing"),
        (lambda t: t.pop("m.scales"), "m.scales is missing"),
        (lambda t: t.update({"m.scales": torch.ones(3, 32)}), "m.scales is"),
        (lambda t: t.update({"m.qzeros": torch.ones(4, 4)}), "m.qzeros is torch.float32"),
        (lambda t: t.update({"m.qweight": torch.zeros(13, 4, dtype=torch.int32)}), "divisible"),
    ],
)
def test_read_names_the_tensor_that_is_wrong(layout, change, message):
    scheme = QuantScheme(4, 32, symmetric=True)
    tensors = layout.write("m", random_weight(scheme, 32, 128))
    change(tensors)
    with pytest.raises(FormatError, match=message):
        layout.read("m", tensors, scheme)


@pytest.mark.parametrize(
    ("g_idx", "message"),
    [
        ([0] * 32 + [4] * 32, "names groups 0 to 4, but there are 2"),
        ([0] * 31 + [1] * 33, "groups of different sizes"),
        ([0] * 60, r"m.g_idx is torch.int32 \(60,\)"),
    ],
)
def test_a_g_idx_that_makes_no_sense_is_refused(g_idx, message):
    scheme = QuantScheme(4, 32, symmetric=True)
    tensors = gptq.write("m", random_weight(scheme, 32, 64))
    tensors["m.g_idx"] = torch.tensor(g_idx, dtype=torch.int32)
    with pytest.raises(FormatError, match=message):
        gptq.read("m", tensors, scheme)


def test_what_does_not_fit_is_refused():
    assert "4 bits, not 8" in str(awq.why_not(QuantScheme(8, 32), 32, 64))
    assert "out_features=36" in str(awq.why_not(QuantScheme(4, 32), 36, 64))
    assert "whole words" in str(gptq.why_not(QuantScheme(3, 32), 16, 96))
    with pytest.raises(SchemeError, match="m: 16 x 96 codes of 3 bits"):
        gptq.write("m", random_weight(QuantScheme(3, 32, True), 16, 96))
    with pytest.raises(SchemeError, match="m: AWQ holds 4 bits"):
        awq.write("m", random_weight(QuantScheme(2, 32, True), 32, 96))
    tensors = gptq.write("m", random_weight(QuantScheme(4, 32, False), 32, 96), 2)
    with pytest.raises(FormatError, match=r"m.qzeros is not 8 throughout"):
        gptq.read("m", tensors, QuantScheme(4, 32, True), 2)


A, B = QuantScheme(4, 64, True), QuantScheme(8, 32, True)


def test_gptq_config_names_what_differs():
    qkv = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    schemes = {"model.layers.0.mlp.down_proj": A} | dict.fromkeys(qkv, B)
    schemes |= {f"model.layers.1.self_attn.{x}_proj": A for x in "qkvo"}
    skipped = [
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    ]
    written = gptq.config(schemes, skipped)
    assert {k: written[k] for k in ("bits", "group_size", "sym", "desc_act", "lm_head")} == {
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
    }
    assert written["checkpoint_format"] == "gptq"
    assert r"-:^model\.layers\.0\.mlp\.gate$" in written["dynamic"]
    assert r"-:^model\.layers\.0\.mlp\.gate_up_proj$" in written["dynamic"]
    fused = r"+:^model\.layers\.0\.self_attn\.qkv_proj$"
    assert written["dynamic"][fused] == {"bits": 8, "group_size": 32, "sym": True}
    parsed = gptq.parse_config(written)
    for name, scheme in schemes.items():
        found = parsed.scheme_for(name)
        assert found == QuantScheme(scheme.bits, scheme.group_size, False)
    assert gptq.version_of(gptq.config({"x": A}, [], 2)) == 2


def test_awq_config():
    written = awq.config({"a.up_proj": A, "lm_head": A}, ["a.gate"])
    assert written["modules_to_not_convert"] == ["a.gate"]
    assert written["lm_head"] is True
    assert awq.config({"a.up_proj": A}, [])["modules_to_not_convert"] == ["lm_head"]
    assert awq.parse_config(written).scheme_for("x") == QuantScheme(4, 64, False)
    with pytest.raises(SchemeError, match=r"one group size, not \[64, 128\]"):
        awq.config({"a": A, "b": QuantScheme(4, 128, True)}, [])
    with pytest.raises(SchemeError, match=r"would take a\.gate_proj for a\.gate"):
        awq.config({"a.gate_proj": A}, ["a.gate"])


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (gptq, {"quant_method": "awq"}, "expected 'gptq'"),
        (gptq, {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        (gptq, {"pack_dtype": "int8"}, "pack_dtype='int8'"),
        (gptq, {"bits": 5}, "bits=5"),
        (gptq, {"group_size": 1024}, "group_size=1024"),
        (gptq, {"dynamic": {"a": {"bits": 6}}}, "bits=6"),
        (awq, {"version": "gemv"}, "version='gemv'"),
        (awq, {"zero_point": False}, "zero_point=false"),
        (awq, {"bits": 8}, "bits=8"),
        (awq, {"group_size": None}, "group_size=None"),
    ],
)
def test_configs_of_layouts_that_are_not_read(layout, changes, message):
    with pytest.raises(FormatError, match=message):
        layout.parse_config(layout.config({"x": A}, []) | changes)


@pytest.mark.parametrize("bits", sorted(set(BITS) - set(gptq.BITS)))
def test_widths_that_gptq_stores_otherwise_are_refused(bits):
    scheme = QuantScheme(bits, 32, True)
    assert gptq.why_not(scheme, 32, 32) == f"GPTQ layouts hold 2, 3, 4, 8 bits, not {bits}"
    assert awq.why_not(scheme, 32, 32) == f"AWQ holds 4 bits, not {bits}"
