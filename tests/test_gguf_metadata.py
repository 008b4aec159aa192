"""Rotary embeddings and tokenizers in GGUF, against definitions in plain Python."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import zoo
from test_convert import checkpoint
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from llmq.errors import SchemeError
from llmq.gguf_file import FILE, write_gguf
from llmq.gguf_metadata import add_tokenizer, rope_factors
from llmq.scheme import QuantScheme

pytest.importorskip("gguf")
from gguf import GGMLQuantizationType, GGUFReader

SYMMETRIC = QuantScheme(4, 32, True)


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
