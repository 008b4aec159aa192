"""Text that models write for their own calibration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import QUICK
from zoo import ARCHITECTURES, VOCAB, tiny_model, tiny_tokenizer

from llmq import api, survey, writing
from llmq.calibrate import token_stream
from llmq.errors import CalibrationError, NonFiniteError
from llmq.writing import ROWS, documents_of


def written(model: Any, **options: Any) -> list[str]:
    settings: dict[str, Any] = {"tokens": 200, "length": 24, **options}
    return documents_of(model, tiny_tokenizer(), **settings)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_writes(name: str) -> None:
    model: Any = tiny_model(name, torch.float32)
    before = torch.get_rng_state()
    found = written(model)
    assert torch.equal(before, torch.get_rng_state())
    assert len(token_stream(found, tiny_tokenizer())[0]) >= 200
    assert found == written(model)
    assert found != written(model, seed=1)
    assert all(text.strip() for text in found)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_models_distribution(temperature: float) -> None:
    """What was drawn is as likely, in one pass without a cache, as its distribution says."""
    model: Any = tiny_model("gemma2", torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3.0)  # far from uniform
        generator = torch.Generator().manual_seed(0)
        steps = list(writing._draw(model, 0, [], 64, temperature, generator))
        ids = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), *steps], 1)
        log = (model(input_ids=ids[:, :-1]).logits.double() / temperature).log_softmax(-1)
    chosen = log.gather(-1, ids[:, 1:, None])[..., 0]
    expected = (log.exp() * log).sum(-1)
    surprise = (chosen - expected).flatten()
    spread = (log.exp() * (log - expected[..., None]) ** 2).sum(-1).flatten()
    assert len(surprise) == ROWS * 64
    assert abs(surprise.sum()) < 4 * spread.sum().sqrt()
    assert expected.mean() > -0.9 * math.log(VOCAB)  # uniform draws would fail here


def test_a_document_ends_where_the_model_ends_it() -> None:
    tokenizer: Any = tiny_tokenizer()
    ids = tokenizer("the old miller", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    assert writing._text([*ids, end, *ids], [end], tokenizer) == "the old miller"
    assert writing._text(ids, [end], tokenizer) == "the old miller"


@pytest.mark.parametrize(
    ("bos", "stated", "eos", "first", "ends"),
    [(1, 2, 3, 1, [3]), (None, 2, 3, 2, [3]), (None, None, 3, 3, [3]), (None, None, None, 7, [7])],
)
def test_where_documents_begin(bos, stated, eos, first, ends) -> None:
    model = SimpleNamespace(
        generation_config=SimpleNamespace(bos_token_id=stated, eos_token_id=ends)
    )
    tokenizer = SimpleNamespace(bos_token_id=bos, eos_token_id=eos)
    assert writing._borders(model, tokenizer) == (first, ends)


def test_what_cannot_write_says_so() -> None:
    model: Any = tiny_model("llama", torch.float32)
    with pytest.raises(CalibrationError, match=r"temperature=0.*above 0"):
        written(model, temperature=0.0)
    nothing = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(CalibrationError, match="no token that starts"):
        documents_of(model, nothing, tokens=10, length=8)
    model = tiny_model("llama", torch.float32)
    model.generation_config.eos_token_id = list(range(VOCAB))
    with pytest.raises(CalibrationError, match="ends its documents at once"):
        written(model)
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="logits are NaN"):
        written(model)


def test_write_and_calibrate_on_it_and_on_more(run, model: Path, text: Path, tmp_path) -> None:
    own, out = tmp_path / "own.jsonl", tmp_path / "out"
    status, stdout, stderr = run("write", model, own, "--samples", 4, "--seq-len", 64, "--json")
    assert status == 0, stderr
    said = json.loads(stdout.splitlines()[-1])
    rows = [json.loads(line)["text"] for line in own.read_text(encoding="utf-8").splitlines()]
    assert said["documents"] == len(rows)
    assert said["tokens"] >= 5 * 64
    both = ["--calibration", own, "--calibration", text]
    status, stdout, stderr = run("quantize", model, out, *both, "--json", *QUICK)
    assert status == 0, stderr
    report = json.loads(stdout.splitlines()[-1])
    assert report["calibration"]["text"] == f"own.jsonl, {text.name}"
    assert report["calibration"]["windows"] == 4
    assert f"--calibration own.jsonl --calibration {text.name}" in report["command"]


def test_bad_places_to_write_to(run, model: Path, tmp_path, monkeypatch) -> None:
    there = tmp_path / "there.jsonl"
    there.write_text("kept")
    for out, reason in ((there, "exists"), (tmp_path / "own.txt", ".jsonl")):
        status, _, stderr = run("write", model, out, "--samples", 1, "--seq-len", 16)
        assert (status, stderr.count("\n")) == (1, 1)
        assert reason in stderr
    assert there.read_text() == "kept"
    with pytest.raises(CalibrationError, match="at least 1 window"):
        api.write(model, tmp_path / "own.jsonl", samples=0)
    monkeypatch.setattr(survey, "open_model", lambda *_: pytest.fail("known before the work"))
    for folder in (there, tmp_path / "none"):
        status, _, stderr = run("write", model, folder / "own.jsonl", "--samples", "1")
        assert (status, stderr.count("\n")) == (1, 1)
        assert "cannot be written" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.jsonl"]
