"""GGUF: blocks against the `gguf` package's own reader, files against transformers' loader."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import zoo
from hypothesis import given, settings, strategies as st
from test_columns import random_weight
from test_convert import checkpoint
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from llmq import hf
from llmq.convert import open_checkpoint
from llmq.errors import SchemeError
from llmq.formats import gguf as layout, kquants
from llmq.gguf_file import FILE, write_gguf
from llmq.gguf_metadata import add_tokenizer, rope_factors
from llmq.nn import packed_modules
from llmq.scheme import BITS, QuantScheme
from llmq.solvers.rtn import RTN

gguf = pytest.importorskip("gguf")
from gguf import GGMLQuantizationType, GGUFReader, quants  # noqa: E402

SYMMETRIC = QuantScheme(4, 32, True)
ASYMMETRIC = QuantScheme(4, 64, False)
KINDS: dict[int, kquants.Kind] = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K"}


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
    if kind == "Q4_1":
        offset = (q.zero.float() * q.scale.float()).repeat_interleave(256 // q.scale.shape[1], 1)
        assert (abs(found - expected) <= 2.0**-11 * offset.numpy() + 1e-7).all()
    else:
        assert (found == expected).all()


def test_sizes_are_those_of_the_package():
    for kind, sizes in layout.BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == sizes


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from([(2, True), (2, False), (3, True), (4, True), (4, False)]),
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
    most = {2: 1 / 15, 3: 1 / 31, 4: 1 / 63}[bits] * 2**bits * largest
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


def dequantized(folder: Path) -> Any:
    """The model that `folder` packs, dense and in float32."""
    model = hf.load(folder, dtype=torch.float32)  # products in float32, as llama.cpp takes them
    weights: dict[str, Any] = {name: packed.dequantize() for name, packed in packed_modules(model)}  # type: ignore[operator]
    dense: Any = AutoModelForCausalLM.from_pretrained(folder.parent / "source", dtype=torch.float32)
    for name, weight in weights.items():
        dense.get_submodule(name).weight.data = weight
    return dense


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("llama", SYMMETRIC),
        ("llama", ASYMMETRIC),
        ("llama", QuantScheme(8, -1, True)),
        ("mistral", SYMMETRIC),
        ("qwen2", QuantScheme(3, 64, False)),
    ],
)
def test_transformers_reads_the_file(name, scheme, tmp_path):
    packed = checkpoint(tmp_path, name, scheme)
    written = write_gguf(packed, tmp_path / "gguf")
    assert written.rounded_scales == 0
    kind = layout.block_type(scheme, 256)
    assert written.notes[0] == f"14 matrices in {kind}"
    assert list((tmp_path / "gguf").iterdir()) == [tmp_path / "gguf" / FILE]
    read: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file=FILE, dtype=torch.float32
    )
    expected = dequantized(packed)
    if name == "mistral":
        expected.config.sliding_window = None  # not a part of llama.cpp's "llama"
        assert "sliding window" in str(written.notes)
    ids = zoo.tiny_ids(1, 8, seed=1)
    with torch.no_grad():
        found, wanted = read(ids).logits, expected(ids).logits
    tolerance = 1e-3 if kind == "Q4_1" else 1e-5  # fp16 embeddings hold tiny bf16 exactly
    assert (found - wanted).norm() < tolerance * wanted.norm()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file=FILE)
    text = "The old miller follows two letters before dawn."
    assert tokenizer(text).input_ids[-8:] == zoo.tiny_tokenizer()(text).input_ids[-8:]


def test_qwen3_and_metadata(tmp_path):
    packed = checkpoint(tmp_path, "qwen3", SYMMETRIC)
    write_gguf(packed, tmp_path / "gguf")
    reader = GGUFReader(tmp_path / "gguf" / FILE)
    opened, config = open_checkpoint(packed), open_checkpoint(packed).config
    found = {tensor.name: tensor for tensor in reader.tensors}
    key = "model.layers.1.self_attn.q_proj"  # qwen3's rows stay as they are
    weight = quants.dequantize(found["blk.1.attn_q.weight"].data, GGMLQuantizationType.Q4_0)
    assert torch.equal(torch.tensor(weight).bfloat16(), opened.read(key).dequantize())
    assert "output.weight" not in found  # tied
    assert found["blk.0.attn_q_norm.weight"].tensor_type == GGMLQuantizationType.F32
    assert len(found) == len(opened.dense()) + len(opened.schemes)

    def value(field: str):
        return reader.fields[field].contents()

    assert value("general.architecture") == "qwen3"
    assert value("qwen3.attention.key_length") == config["head_dim"]
    assert value("qwen3.rope.freq_base") == config["rope_parameters"]["rope_theta"]
    assert value("tokenizer.ggml.pre") == "gpt-2"
    assert value("tokenizer.ggml.add_bos_token") is True
    assert len(value("tokenizer.ggml.tokens")) == config["vocab_size"]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_small_blocks_and_small_embeddings(name, tmp_path, run):
    sizes = {"hidden_size": 256, "intermediate_size": 320, "head_dim": 64}
    packed = checkpoint(tmp_path, name, ASYMMETRIC, sizes)
    plain = write_gguf(packed, tmp_path / "plain")
    assert plain.notes[0] == "14 matrices in Q4_1"
    status, out, error = run(
        "convert", packed, tmp_path / "small", "--format", "gguf", "--k-quants",
        "--embeddings", "q6_k", "--json",
    )  # fmt: skip
    assert status == 0, error
    done = json.loads(out)
    assert done["rounded_scales"] == 0
    assert sorted(done["notes"][0].split(", ")) == [
        "12 matrices in Q4_K",
        "2 matrices in Q4_1",  # down_proj: 320 is no multiple of 256
        "2 matrices in Q6_K",
    ]
    assert "rounded to q6_k" in done["notes"][1]
    assert "rounded the scales of 12 matrices" in str(done["notes"])
    sizes = [(tmp_path / f / FILE).stat().st_size for f in ("small", "plain")]
    assert sizes[0] < 0.8 * sizes[1]
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / f, gguf_file=FILE, dtype=torch.float32)
        for f in ("small", "plain")
    ]
    with torch.no_grad():
        found, wanted = (model(zoo.tiny_ids(1, 8, seed=1)).logits for model in models)
    assert 0 < (found - wanted).norm() < 0.1 * wanted.norm()


def test_embeddings_that_do_not_fit_are_refused(tmp_path, run):
    packed = checkpoint(tmp_path, "llama", SYMMETRIC)
    with pytest.raises(SchemeError, match=r"hidden_size=128 is not divisible by 256. Use q8_0"):
        write_gguf(packed, tmp_path / "gguf", embeddings="q6_k")
    status, _, error = run("convert", packed, tmp_path / "awq", "--format", "awq", "--k-quants")
    assert status == 1
    assert "--k-quants" in error
    assert not (tmp_path / "awq").exists()


def llama3(head_dim: int, theta: float, rope: dict[str, float]) -> list[float]:
    """The factors that llama.cpp's converter describes for Llama 3.1, in plain Python."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * theta ** (i / head_dim)
        if wave < high:
            factors.append(1.0)
        elif wave > low:
            factors.append(rope["factor"])
        else:
            share = rope["original_max_position_embeddings"] / wave - rope["low_freq_factor"]
            share /= rope["high_freq_factor"] - rope["low_freq_factor"]
            factors.append(1 / ((1 - share) / rope["factor"] + share))
    return factors


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_rope_of_llama_3(tmp_path):
    packed = checkpoint(tmp_path, "llama", SYMMETRIC, {"rope_parameters": LLAMA3})
    write_gguf(packed, tmp_path / "gguf")
    found = {t.name: t for t in GGUFReader(tmp_path / "gguf" / FILE).tensors}["rope_freqs.weight"]
    assert found.tensor_type == GGMLQuantizationType.F32
    expected = llama3(32, 10000.0, LLAMA3)  # type: ignore[arg-type]
    assert found.data.tolist() == pytest.approx(expected, rel=1e-5)
    assert len({round(f, 3) for f in expected}) > 3  # all three branches
    config = AutoConfig.from_pretrained(packed)
    with pytest.raises(SchemeError, match="knows it for llama, not for qwen2"):
        rope_factors(config, "qwen2")


def test_rope_that_llama_cpp_stretches(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    yarn["original_max_position_embeddings"] = 32
    packed = checkpoint(tmp_path, "qwen2", SYMMETRIC, {"rope_parameters": yarn})
    write_gguf(packed, tmp_path / "gguf")
    fields = GGUFReader(tmp_path / "gguf" / FILE).fields
    prefix = "qwen2.rope.scaling"
    assert fields[f"{prefix}.type"].contents() == "yarn"
    assert fields[f"{prefix}.factor"].contents() == 4.0
    assert fields[f"{prefix}.original_context_length"].contents() == 32
    config = json.loads((packed / "config.json").read_text())
    config["rope_parameters"] |= {"attention_factor": 1.5}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(SchemeError, match=r"rope attention_factor=1\.5"):
        write_gguf(packed, tmp_path / "other")


class Written:
    """What would be written: every `add_*` call."""

    def __init__(self):
        self.values = {}

    def __getattr__(self, name):
        return lambda value: self.values.update({name.removeprefix("add_"): value})


def sentencepiece(prepend: bool) -> PreTrainedTokenizerFast:
    """A tokenizer built like that of Llama 2 and Mistral."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("a", "t")]
    tokens += [left + right for left, right in merges] + ["\u2581", "t", "h", "e", "a"]
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", "\u2581")]
    steps = [normalizers.Prepend("\u2581"), *steps] if prepend else steps
    tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's BPE: join the neighbours whose token scores highest, leftmost first."""
    parts = list(text)
    while True:
        joined = [(scores[tokens.index(a + b)], -i) for i, (a, b) in enumerate(pairwise(parts))
                  if a + b in tokens]  # fmt: skip
        if not joined:
            return [tokens.index(part) for part in parts]
        i = -max(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("prepend", [True, False])
def test_scores_of_sentencepiece_merge_as_its_merges_do(prepend):
    tokenizer = sentencepiece(prepend)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    written: Any = Written()
    notes = add_tokenizer(written, tokenizer, parts, len(tokenizer) + 3)
    found = written.values
    assert notes == []
    assert found["tokenizer_model"] == "llama"
    assert found["add_space_prefix"] is prepend
    kinds = [int(kind) for kind in found["token_types"]]
    assert kinds[:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    assert kinds[-4:] == [1, 5, 5, 5]
    for text in ("the heat", "that tea ate the hat", "aaaa  thehe"):
        spaced = ("\u2581" if prepend else "") + text.replace(" ", "\u2581")
        ids = by_score(spaced, found["token_list"], found["token_scores"])
        assert ids == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [pre_tokenizers.ByteLevel(use_regex=False)],
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel()],
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()],
        [pre_tokenizers.Metaspace()],
    ],
)
def test_other_tokenizers_are_refused(steps):
    tokenizer = zoo.tiny_tokenizer()
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [json.loads(step.__getstate__()) for step in steps],
    }
    with pytest.raises(SchemeError, match=r"tokenizer.json: llmq writes GGUF for BPE"):
        add_tokenizer(Written(), tokenizer, parts, len(tokenizer))


def test_what_has_no_place_in_gguf_leaves_nothing(tmp_path, run):
    packed = checkpoint(tmp_path, "gemma2", SYMMETRIC)
    with pytest.raises(SchemeError, match="model_type='gemma2'"):
        write_gguf(packed, tmp_path / "gguf")
    llama = checkpoint(tmp_path / "llama", "llama", QuantScheme(8, 32, False))
    status, _, error = run("convert", llama, tmp_path / "gguf", "--format", "gguf")
    assert status == 1
    assert "no block holds asymmetric 8 bits" in error
    assert not (tmp_path / "gguf").exists()
    assert not list(tmp_path.glob(".*"))
