"""The layout on disk against golden bytes and the independent compressed-tensors package."""

import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from hypothesis import given, settings, strategies as st

from llmq.errors import FormatError
from llmq.formats import compressed_tensors as ct
from llmq.scheme import BITS, GROUP_SIZES, QuantizedWeight, QuantScheme

SCHEMES = [QuantScheme(b, g, s) for b in BITS for g in GROUP_SIZES for s in (True, False)]


def random_codes(shape, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


def random_weight(scheme, N, K, dtype=torch.bfloat16, seed=0):
    groups = K // scheme.group_width(K)
    zero = random_codes((N, groups), scheme.bits, seed + 1)
    if scheme.symmetric:
        zero.fill_(scheme.middle)
    scale = torch.rand(N, groups, generator=torch.Generator().manual_seed(seed)) + 0.01
    return QuantizedWeight(scheme, random_codes((N, K), scheme.bits, seed), scale.to(dtype), zero)


GOLDEN = [
    (4, [0, 1, 2, 3, 4, 5, 6, 7], [0x76543210]),
    (4, [15] * 9, [-1, 15]),
    (8, [1, 2, 3, 255], [0xFF030201 - 2**32]),
    (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4 - 2**32]),
    # 3 bits: code 10 straddles words 0 and 1 (bits 30..32), code 21 words 1 and 2 (bits 63..65).
    (3, [0] * 10 + [7] + [0] * 10 + [5] + [0] * 10, [-(2**30), 1 - 2**31, 2]),
    (3, [1, 2, 3], [1 | 2 << 3 | 3 << 6]),
]


@pytest.mark.parametrize(("bits", "codes", "words"), GOLDEN)
def test_golden_words(bits, codes, words):
    packed = ct.pack_bits(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.dtype is torch.int32
    assert packed.tolist() == [words]
    assert ct.unpack_bits(packed, bits, len(codes)).tolist() == [codes]


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 40),
    columns=st.integers(1, 100),
    dim=st.sampled_from((0, 1, -1)),
    seed=st.integers(0, 2**20),
)
def test_packing_is_exact_and_agrees_with_the_independent_package(bits, rows, columns, dim, seed):
    codes = random_codes((rows, columns), bits, seed)
    packed = ct.pack_bits(codes, bits, dim)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(packed, pack_to_int32(signed, bits, dim % 2))
    assert packed.shape[dim] == ct.words(codes.shape[dim], bits)
    unpacked = ct.unpack_bits(packed, bits, codes.shape[dim], dim)
    assert torch.equal(unpacked, codes)
    theirs = unpack_from_int32(packed, bits, codes.shape, dim % 2)
    assert torch.equal(theirs.int() + 2 ** (bits - 1), unpacked.int())


def test_packing_keeps_leading_dimensions():
    codes = random_codes((3, 5, 64), 3)
    packed = ct.pack_bits(codes, 3)
    assert torch.equal(packed[1], ct.pack_bits(codes[1], 3))
    assert torch.equal(ct.unpack_bits(packed, 3, 64), codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_read_undoes_write(scheme):
    q = random_weight(scheme, N=24, K=256)
    tensors = ct.write("model.layer", q)
    assert ("model.layer.weight_zero_point" in tensors) is not scheme.symmetric
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    back = ct.read("model.layer", tensors, scheme)
    assert back.scheme == scheme
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale, q.scale)
    assert torch.equal(back.zero, q.zero)


def test_golden_tensors():
    scheme = QuantScheme(4, 32, symmetric=False)
    codes = (torch.arange(64) % 16).to(torch.uint8).view(2, 32)
    zero = torch.tensor([[3], [5]], dtype=torch.uint8)
    q = QuantizedWeight(scheme, codes, torch.tensor([[0.5], [2.0]]).half(), zero)
    tensors = ct.write("", q)
    low, high = 0x76543210, 0xFEDCBA98 - 2**32
    assert tensors["weight_packed"].tolist() == [[low, high, low, high]] * 2
    assert tensors["weight_zero_point"].tolist() == [[0x53]]
    assert tensors["weight_shape"].tolist() == [2, 32]
    assert tensors["weight_shape"].dtype is torch.int64
    assert tensors["weight_scale"].dtype is torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("m.weight_packed"), "m.weight_packed is missing"),
        (lambda t: t.pop("m.weight_zero_point"), "m.weight_zero_point is missing"),
        (lambda t: t.update({"m.weight_scale": torch.ones(16, 3)}), "m.weight_scale is"),
        (lambda t: t.update({"m.weight_packed": torch.ones(16, 16)}), "m.weight_packed is"),
        (lambda t: t.update({"m.weight_shape": torch.tensor([16, 100])}), "not divisible"),
    ],
)
def test_read_names_the_tensor_that_is_wrong(change, message):
    scheme = QuantScheme(4, 32, symmetric=False)
    tensors = ct.write("m", random_weight(scheme, 16, 128))
    change(tensors)
    with pytest.raises(FormatError, match=message):
        ct.read("m", tensors, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_config_round_trip_and_the_independent_package_agrees(scheme):
    written = json.loads(json.dumps(ct.config({scheme: ["Linear"]}, ["lm_head"])))
    parsed = ct.parse_config(written)
    assert parsed.scheme_for("model.layers.0.mlp.up_proj") == scheme
    assert parsed.scheme_for("lm_head") is None
    group = QuantizationConfig.model_validate(written).config_groups["group_0"]
    assert isinstance(group, QuantizationScheme)
    weights = group.weights
    assert weights is not None
    assert weights.num_bits == scheme.bits
    assert weights.symmetric is scheme.symmetric
    assert weights.strategy == ("channel" if scheme.group_size == -1 else "group")
    assert weights.group_size == (None if scheme.group_size == -1 else scheme.group_size)


def test_targets_exact_name_beats_pattern_beats_class():
    a, b, c = (QuantScheme(bits, 64, True) for bits in (2, 3, 8))
    groups = {a: ["Linear"], b: ["re:.*down_proj$"], c: ["model.layers.1.mlp.down_proj"]}
    config = ct.parse_config(ct.config(groups, ["re:.*lm_head", "model.layers.2.mlp.up_proj"]))
    assert config.scheme_for("model.layers.0.mlp.up_proj") == a
    assert config.scheme_for("model.layers.0.mlp.down_proj") == b
    assert config.scheme_for("model.layers.1.mlp.down_proj") == c
    assert config.scheme_for("model.layers.11.mlp.down_proj") == b  # a name is no prefix
    assert config.scheme_for("model.layers.2.mlp.up_proj") is None
    assert config.scheme_for("lm_head") is None
    only_names = ct.parse_config(ct.config({c: ["model.a"]}, []))
    assert only_names.scheme_for("model.ab") is None


def test_config_of_another_tool_is_read():
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    weights |= {"group_size": 128, "dynamic": False, "actorder": "static", "observer": "minmax"}
    config = ct.config({QuantScheme(): ["Linear"]}, [])
    config["config_groups"]["group_0"]["weights"] = weights
    config |= {"sparsity_config": {}, "transform_config": {}, "version": "0.17.0"}
    assert ct.parse_config(config).scheme_for("x") == QuantScheme(4, 128, True)


def edited(path, value):
    config = ct.config({QuantScheme(4, 128, True): ["Linear"]}, [])
    *parents, last = path
    target = config
    for key in parents:
        target = target[key]
    target[last] = value
    return config


GROUP = ("config_groups", "group_0")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("quant_method",), "gptq", "quant_method='gptq'"),
        (("config_groups",), {}, "empty"),
        (("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme"),
        (("sparsity_config",), {"format": "sparse-24"}, "sparse-24"),
        (GROUP, ["Linear"], "preset"),
        ((*GROUP, "format"), "float-quantized", "float-quantized"),
        ((*GROUP, "input_activations"), {"num_bits": 8}, "activations"),
        ((*GROUP, "weights", "type"), "float", "type='float'"),
        ((*GROUP, "weights", "dynamic"), True, "dynamic=True"),
        ((*GROUP, "weights", "strategy"), "tensor", "strategy='tensor'"),
        ((*GROUP, "weights", "num_bits"), 7, "bits=7"),
        ((*GROUP, "weights", "group_size"), 16, "group_size=16"),
        ((*GROUP, "weights", "actorder"), "group", "actorder='group'"),
    ],
)
def test_what_is_not_integer_weight_only_is_refused(path, value, message):
    with pytest.raises(FormatError, match=message):
        ct.parse_config(edited(path, value))
