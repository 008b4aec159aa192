"""The zoo holds what the other tests count on."""

from __future__ import annotations

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_a_saved_model_comes_back_with_the_same_logits(name, tmp_path):
    model = zoo.tiny_model(name, torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(zoo.save_tiny(name, tmp_path, torch.bfloat16))
    with torch.no_grad():
        logits = model(zoo.tiny_ids()).logits
        assert torch.equal(loaded(zoo.tiny_ids()).logits, logits)
    assert logits.float().std() > 0.5
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


def test_every_parameter_is_random():
    for name in zoo.ARCHITECTURES:
        for key, parameter in zoo.tiny_model(name).named_parameters():
            assert parameter.std() > 0.01, f"{name}: {key}"


def test_every_input_width_is_a_multiple_of_64():
    for name in zoo.ARCHITECTURES:
        for key, module in zoo.tiny_model(name).named_modules():
            if isinstance(module, torch.nn.Linear):
                assert module.in_features % 64 == 0, f"{name}: {key}"


def test_the_seed_decides_the_model_and_nothing_else_does():
    first, again, other = (zoo.tiny_model("llama", seed=seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rounded = zoo.tiny_model("llama", torch.bfloat16).lm_head.weight
    assert torch.equal(first.bfloat16(), rounded)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    zoo.tiny_model("llama")
    assert torch.rand(1) == expected


def test_tokenizer_round_trip(tmp_path):
    tokenizer = zoo.tiny_tokenizer()
    text = "The old miller waits. \n\té€"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert max(ids) < zoo.VOCAB == len(tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == ids
