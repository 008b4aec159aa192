"""Each protocol beside a literal transcription of the recipe it names."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from zoo import tiny_model, tiny_text, tiny_tokenizer

import llmq
from llmq.errors import CalibrationError
from llmq.protocols import PROTOCOLS, read_windows

L = 32


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A raw file in the manner of wikitext: headings and blank lines."""
    path = tmp_path / "wiki.raw"
    path.write_text(f" \n = Title = \n \n{tiny_text(60)} \n")
    return path


def tokenizer_without_bos():
    from transformers import PreTrainedTokenizerFast

    inner = tiny_tokenizer().backend_tokenizer.__class__.from_str(
        tiny_tokenizer().backend_tokenizer.to_str()
    )
    from tokenizers import processors

    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def test_plain_windows_say_what_they_are(raw) -> None:
    made = read_windows("windows", raw, tiny_tokenizer(), seq_len=L, samples=3, described="a.txt")
    assert (made.ids.shape, made.first) == ((3, L), 0)
    assert made.sentence == (
        "a.txt: 3 non-overlapping windows of 32 tokens, no BOS, 93 tokens scored; "
        "+- is one standard error over windows."
    )
    with_bos = read_windows("windows", raw, tiny_tokenizer(), seq_len=L, bos=True, join="wikitext")
    assert "as rows joined by blank lines (GPTQ paper)" in with_bos.sentence
    assert "each starting with BOS" in with_bos.sentence
    assert (with_bos.ids[:, 0] == 0).all()


@pytest.mark.parametrize("bos", [True, False])
def test_wikitext2_is_that_of_the_paper(raw, bos) -> None:
    tokenizer = tiny_tokenizer() if bos else tokenizer_without_bos()
    # datasets' rows of the raw file: line breaks kept, blank lines empty
    rows = [line + "\n" if line.strip() else "" for line in raw.read_text().split("\n")[:-1]]
    stream = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids[0]
    count = len(stream) // L
    made = read_windows("wikitext2", raw, tokenizer, seq_len=L)
    assert torch.equal(made.ids, stream[: count * L].view(count, L))
    assert int(made.ids[0, 0] == 0) == bos
    assert ("BOS once" in made.sentence) == bos
    from_rows = read_windows("wikitext2", rows, tokenizer, seq_len=L)
    assert torch.equal(made.ids, from_rows.ids)


def test_c4_is_that_of_the_code(tmp_path) -> None:
    texts = [tiny_text(n, seed=n) for n in (1, 8, 2, 12, 5)]
    path = tmp_path / "c4.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = tiny_tokenizer()
    random.seed(0)
    crops = []
    for _ in range(7):
        while True:
            i = random.randint(0, len(texts) - 1)
            ids = tokenizer(texts[i], return_tensors="pt").input_ids
            if ids.shape[1] > L:
                break
        i = random.randint(0, ids.shape[1] - L - 1)
        crops.append(ids[0, i : i + L])
    state = random.getstate()
    made = read_windows("c4", str(path), tokenizer, seq_len=L, samples=7)
    assert torch.equal(made.ids, torch.stack(crops))
    assert random.getstate() == state  # the global generator is left alone
    with pytest.raises(CalibrationError, match="none of 5 documents is longer than 4096"):
        read_windows("c4", path, tokenizer, seq_len=4096)


@pytest.mark.parametrize("bos", [True, False])
def test_llama_cpp_scores_second_halves(raw, bos) -> None:
    tokenizer = tiny_tokenizer() if bos else tokenizer_without_bos()
    model = tiny_model("llama")
    stream = tokenizer(raw.read_text(), return_tensors="pt").input_ids[0]
    total = count = 0.0
    for i in range(len(stream) // L):
        chunk = stream[i * L : (i + 1) * L].clone()
        if bos:
            chunk[0] = tokenizer.bos_token_id
        with torch.no_grad():
            logits = model(input_ids=chunk[None]).logits[0].double()
        for j in range(L // 2, L - 1):  # as in tools/perplexity: logits j judge token j + 1
            total += float(F.cross_entropy(logits[j], chunk[j + 1]))
            count += 1
    found = llmq.evaluate(model, raw, tokenizer=tokenizer, seq_len=L, protocol="llama.cpp")
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.tokens == count
    assert "of their second halves scored" in found.protocol
    assert ("BOS in place of each first token" in found.protocol) == bos


def test_what_a_protocol_refuses(raw) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(CalibrationError, match=r"use one of windows, wikitext2, c4, llama\.cpp"):
        read_windows("wiki", raw, tokenizer, seq_len=L)
    with pytest.raises(CalibrationError, match="lays down join and bos"):
        read_windows("c4", raw, tokenizer, seq_len=L, bos=True)
    with pytest.raises(CalibrationError, match="text and a tokenizer"):
        read_windows("llama.cpp", torch.zeros(4, L, dtype=torch.int64), tokenizer, seq_len=L)
    with pytest.raises(CalibrationError, match="need 32000000"):
        read_windows("wikitext2", raw, tokenizer, seq_len=L, samples=10**6)


def test_the_command_line_names_every_protocol(run, model, raw) -> None:
    from llmq.cli_measure import Protocol

    assert [protocol.value for protocol in Protocol] == list(PROTOCOLS)
    options = ["--text", raw, "--seq-len", L, "--protocol", "wikitext2"]
    status, stdout, stderr = run("eval", model, *options)
    assert status == 0, stderr
    assert "wiki.raw as rows joined by blank lines (GPTQ paper)" in stdout
    assert "BOS once, at the start of the text" in stdout
