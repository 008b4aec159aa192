"""The embedded model is what it says: trained, finite, divisible by every group, small."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmq import demo


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.model_path())


def test_it_is_small_and_16_bit():
    weights = demo.model_path() / "model.safetensors"
    assert weights.stat().st_size < 3_000_000
    stored = AutoModelForCausalLM.from_pretrained(demo.model_path())
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}


def test_every_group_size_divides_every_linear(model):
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert all(m.in_features % 128 == 0 for m in linears)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_tokenizer_gives_back_the_text(tokenizer):
    text = demo.evaluation_path().read_text(encoding="utf-8")[:20_000]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_evaluation_text_is_not_in_the_calibration_text():
    seen = set(demo.calibration_path().read_text(encoding="utf-8").split("\n\n"))
    held_out = demo.evaluation_path().read_text(encoding="utf-8").split("\n\n")
    long = [speech for speech in held_out if len(speech) > 80]
    assert len(long) > 100
    assert not seen.intersection(long)


def test_it_is_trained(model, tokenizer):
    """Held-out perplexity per byte (4.5 was measured); a guess by letter frequency gives 28."""
    text = demo.evaluation_path().read_text(encoding="utf-8")[:20_000]
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert math.exp(loss * len(ids) / len(text.encode())) < 5.0
