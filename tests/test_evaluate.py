"""Measurements against the definition in float64, and with a bound on memory."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch.nn import functional as F
from zoo import tiny_ids, tiny_model

from llmq.errors import CalibrationError, NonFiniteError, SourceError

# gemma2 caps its logits after the head, cohere2 scales them, gpt2 ties and opt shifts positions
NAMES = ["llama", "gemma2", "cohere2", "gpt2", "opt", "mixtral"]
WINDOWS = tiny_ids(5, 24)
evaluate = importlib.import_module("llmq.evaluate")  # `llmq.evaluate` is the function


def by_definition(model, reference, windows):
    """Per window: mean NLL, KL(reference || model), agreement; float64 (windows, 3)."""
    rows = []
    with torch.no_grad():
        for ids in windows:
            q, p = (m(input_ids=ids[None]).logits[0, :-1].double() for m in (model, reference))
            log_q, log_p = F.log_softmax(q, -1), F.log_softmax(p, -1)
            nll = -log_q[torch.arange(len(ids) - 1), ids[1:]]
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            same = (q.argmax(-1) == p.argmax(-1)).double()
            rows.append(torch.stack([nll.mean(), kl.mean(), same.mean()]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_definition(name: str) -> None:
    model, reference = tiny_model(name), tiny_model(name)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(1 + 0.02 * torch.randn(tensor.shape, generator=torch.Generator()))
    values = by_definition(model, reference, WINDOWS)
    mean, error = values.mean(0).tolist(), (values.std(0) / math.sqrt(5)).tolist()
    found = evaluate.evaluate(model, WINDOWS, reference)
    assert [found.nll, found.kl, found.top1] == pytest.approx(mean, rel=2e-4, abs=2e-6)
    assert [found.nll_stderr, found.kl_stderr, found.top1_stderr] == pytest.approx(
        error, rel=1e-3, abs=2e-6
    )
    assert found.perplexity == pytest.approx(math.exp(mean[0]), rel=2e-4)
    assert found.perplexity_stderr == pytest.approx(math.exp(mean[0]) * error[0], rel=1e-3)
    assert (found.windows, found.seq_len, found.tokens) == (5, 24, 5 * 23)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_is_at_no_distance_from_itself(name: str) -> None:
    model = tiny_model(name, torch.bfloat16)
    found = evaluate.evaluate(model, WINDOWS, model)
    assert found.kl == 0
    assert found.top1 == 1


def test_without_a_reference_there_is_no_distance() -> None:
    found = evaluate.evaluate(tiny_model("llama"), WINDOWS[:1])
    assert (found.kl, found.top1, found.kl_stderr) == (None, None, None)
    assert found.perplexity_stderr is None  # one window has no error bar
    assert not {"kl", "top1", "perplexity_stderr"} & set(found.to_json())


def test_logits_exist_only_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    whole = evaluate.evaluate(model, WINDOWS, model)
    monkeypatch.setattr(evaluate, "_SLICE_ENTRIES", 7 * model.config.vocab_size)
    rows = []
    model.lm_head.register_forward_hook(lambda m, args, out: rows.append(out.numel()))
    sliced = evaluate.evaluate(model, WINDOWS, model)
    probe, rest = rows[:4], rows[4:]  # two models, each proven on eight tokens in two ways
    assert max(probe) == 8 * model.config.vocab_size
    assert max(rest) == 7 * model.config.vocab_size
    assert sum(rest) == 2 * 5 * 23 * model.config.vocab_size
    assert sliced.nll == pytest.approx(whole.nll, rel=1e-5)


def test_a_model_that_gives_nan_is_named() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[3, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="windows 0 to 4"):
        evaluate.evaluate(model, WINDOWS)


def test_different_vocabularies_cannot_be_compared() -> None:
    with pytest.raises(SourceError, match="400 tokens in its vocabulary and the model 384"):
        evaluate.evaluate(tiny_model("llama"), WINDOWS, tiny_model("llama", vocab_size=400))


def test_paired_differences_are_those_of_the_definition() -> None:
    model, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    found = evaluate.evaluate(model, WINDOWS, reference)
    nll = [by_definition(m, m, WINDOWS)[:, 0] for m in (model, reference)]
    difference = nll[0] - nll[1]
    assert found.nll_difference == pytest.approx(float(difference.mean()), rel=1e-3)
    error = float(difference.std()) / math.sqrt(5)
    assert found.nll_difference_stderr == pytest.approx(error, rel=1e-3)
    assert found.reference_perplexity == pytest.approx(math.exp(float(nll[1].mean())), rel=1e-4)
    assert found.nll_difference_95 is not None
    low, high = found.nll_difference_95
    assert float(difference.min()) <= low < found.nll_difference < high <= float(difference.max())


def test_the_bootstrap_covers_what_it_says() -> None:
    """Of 300 samples of a skewed law, the interval holds the true mean about 95% of the time."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.empty(300, 100).exponential_(generator=generator)
    held = [
        low < 1 < high
        for low, high in (evaluate.bootstrap_interval(row, resamples=500) for row in samples)
    ]
    assert 0.88 < sum(held) / len(held) < 0.99


def test_the_histogram_counts_every_token() -> None:
    model, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    found = evaluate.evaluate(model, WINDOWS, reference)
    assert found.kl_histogram is not None
    edges, counts = found.kl_histogram["edges"], found.kl_histogram["counts"]
    assert len(edges) == len(counts) + 1
    assert sum(counts) == found.tokens
    with torch.no_grad():
        q, p = (F.log_softmax(m(WINDOWS).logits[:, :-1].double(), -1) for m in (model, reference))
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    inside = kl.clamp(edges[0] * 1.001, edges[-1] / 1.001)
    expected, _ = torch.histogram(inside, torch.tensor(edges, dtype=torch.float64))
    assert counts == expected.tolist()
    itself = evaluate.evaluate(model, WINDOWS, model).kl_histogram
    assert itself is not None
    assert itself["counts"][0] == found.tokens


def test_only_tokens_after_first_are_scored() -> None:
    model = tiny_model("llama")
    found = evaluate.evaluate(model, WINDOWS, first=12)
    with torch.no_grad():
        logits = model(input_ids=WINDOWS).logits[:, 12:-1].double()
    expected = F.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 13:].flatten())
    assert found.nll == pytest.approx(float(expected), rel=1e-5)
    assert found.tokens == 5 * 11
    with pytest.raises(CalibrationError, match="leave none to score"):
        evaluate.evaluate(model, WINDOWS, first=23)
