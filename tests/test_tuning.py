"""Scale tuning: the gradient, what may change and what may not, and going on after a stop."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_journal import OPTIONS, TEXT, bytes_of
from test_quantize import batches, divergence
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from zoo import save_tiny, tiny_model

from llmq import api, demo
from llmq.calibrate import token_windows
from llmq.errors import SchemeError
from llmq.journal import Workplace
from llmq.ladder import QUALITIES, in_scheme, with_tuning
from llmq.needs import memory
from llmq.nn import PackedLinear
from llmq.operations import operations
from llmq.outlook import job, shape
from llmq.quantize import Recipe, quantize
from llmq.refine import held_back
from llmq.scheme import QuantScheme
from llmq.solvers.gptq import GPTQ
from llmq.solvers.rtn import RTN
from llmq.superblocks import SuperBlockScheme
from llmq.tunable import Tunable
from llmq.tuning import Progress, ScaleTuning, tune_scales

QUICK = ScaleTuning(steps=12, rate=1e-2, every=3)


def rounded(model: Any, scheme: QuantScheme) -> Any:
    result = copy.deepcopy(model)
    list(quantize(result, batches(model), Recipe(scheme, RTN())))
    return result


def answers_of(model: nn.Module, ids: list[Tensor]) -> Any:
    return lambda b, rows: model(input_ids=ids[b][rows], use_cache=False).logits


def tuned(model: Any, packed: Any, how: ScaleTuning = QUICK, count: int = 7) -> Progress:
    ids = batches(model, count)
    return tune_scales(packed, ids, answers_of(model, ids), how)


@pytest.mark.parametrize(
    "scheme", [QuantScheme(3, 32), QuantScheme(8, 64, symmetric=True)], ids=str
)
def test_the_gradient_is_that_of_the_scales(scheme):
    g = torch.Generator().manual_seed(0)
    layer = PackedLinear.from_linear(nn.Linear(128, 48), scheme)
    x = torch.randn(2, 5, 128, generator=g, requires_grad=True)
    out = torch.randn(2, 5, 48, generator=g)
    made = Tunable(layer)
    (made(x) * out).sum().backward()
    q = layer.quantized()
    theta = torch.zeros(q.scale.shape, dtype=torch.float64, requires_grad=True)
    centred = q.codes.double() - q.zero.double().repeat_interleave(128 // q.scale.shape[1], 1)
    scales = (q.scale.detach().double() * theta.exp()).repeat_interleave(128 // q.scale.shape[1], 1)
    y = x.detach().double().requires_grad_()
    ((y @ (centred * scales).T) * out.double()).sum().backward()
    assert made.theta.grad is not None
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(made.theta.grad.double(), theta.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "gpt_oss", "falcon"])
def test_only_scales_change_and_held_out_text_gains(name):
    model: Any = tiny_model(name, dtype=torch.bfloat16).eval()
    packed = rounded(model, QuantScheme(2, 32))
    before = {key: tensor.clone() for key, tensor in packed.state_dict().items()}
    full = copy.deepcopy(model).float()
    progress = tuned(full, packed)
    assert progress.best < 0.99 * progress.start
    after = packed.state_dict()
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert all(key.endswith("_scale") for key in changed)
    assert len(changed) > 5
    assert all(before[key].dtype == after[key].dtype for key in changed)
    ids = batches(model, 7)[-1]
    found = divergence(full, copy.deepcopy(packed).float(), ids)
    assert found < divergence(full, rounded(model, QuantScheme(2, 32)).float(), ids)


def test_the_start_is_kept_if_nothing_is_better():
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    packed = rounded(model, QuantScheme(4, 32))
    before = {key: tensor.clone() for key, tensor in packed.state_dict().items()}
    progress = tuned(model, packed, ScaleTuning(steps=30, rate=3.0, every=2))
    assert progress.best == progress.start
    assert progress.step == 6  # three looks without progress
    assert all(torch.equal(before[key], value) for key, value in packed.state_dict().items())


def test_one_batch_leaves_nothing_to_judge_by():
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    packed = rounded(model, QuantScheme(2, 32))
    before = copy.deepcopy(packed.state_dict())
    ids = batches(model, 1)
    tune_scales(packed, ids, answers_of(model, ids), QUICK)
    assert all(torch.equal(before[key], value) for key, value in packed.state_dict().items())


def test_a_step_takes_whole_windows_and_no_held_out_ones():
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    packed = rounded(model, QuantScheme(2, 32))
    ids = batches(model, 7)
    (rows, length), seen = ids[0].shape, []

    def answers(b: int, piece: slice) -> Tensor:
        seen.append((b, piece.stop - piece.start))
        return answers_of(model, ids)(b, piece)

    how = ScaleTuning(steps=6 * rows, tokens=length, every=6 * rows)
    tune_scales(packed, ids, answers, how)
    judged = [(b, n) for b, n in seen if b == 6]
    assert judged == [(6, rows)] * 2  # before and after
    trained = [b for b, n in seen if b != 6 and n == 1]
    assert sorted(trained) == sorted([*range(6)] * rows)  # every window once


def test_rates_fall_with_bits_and_steps():
    how = ScaleTuning(steps=10, rate=8e-3)
    assert how.rate_at(0, 2) == 4e-3
    rates = [how.rate_at(step, 2) for step in range(1, 10)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.05 * rates[0]
    assert [how.rate_at(3, bits) * 2**bits for bits in (3, 4, 8)] == [4 * how.rate_at(3, 2)] * 3


@pytest.mark.parametrize(
    ("name", "bits", "mixed", "asked", "steps"),
    [
        ("balanced", 4, False, None, None),
        ("balanced", 3, False, None, None),
        ("balanced", 3, True, None, 90),
        ("balanced", 2.5, True, None, 90),
        ("balanced", 2, False, None, 90),
        ("balanced", 2, False, 0, None),
        ("balanced", 4, False, 7, 7),
        ("fast", 2, False, None, None),
        ("best", 2, False, None, 240),
        ("best", 4, False, None, 240),
        ("best", 4, False, 0, None),
    ],
)
def test_when_scales_are_tuned(name, bits, mixed, asked, steps):
    found = with_tuning(QUALITIES[name], bits, mixed, asked).scales
    assert (found.steps if found else None) == steps


def test_what_cannot_be_tuned_is_refused():
    with pytest.raises(SchemeError, match="tune_scales=-1"):
        with_tuning(QUALITIES["balanced"], 4, False, -1)
    for recipe in (QUALITIES["fast"], in_scheme(QUALITIES["balanced"], SuperBlockScheme(4))):
        assert with_tuning(recipe, 2, False, None) == recipe
        assert with_tuning(recipe, 2, False, 0) == recipe
        with pytest.raises(SchemeError, match="after --quality balanced or best"):
            with_tuning(recipe, 2, False, 5)


def test_two_bits_are_tuned_unless_told_not_to(source, tmp_path):
    options = {**BEST, "quality": "balanced"}
    tuned = api.quantize(source, tmp_path / "tuned", **options)
    plain = api.quantize(source, tmp_path / "plain", tune_scales=0, **options)
    assert tuned["scale_tuning"]["steps"] == 90
    assert plain["scale_tuning"] is None


def test_solvers_do_not_see_what_judges_scales(source, tmp_path, monkeypatch):
    short(monkeypatch)
    assert [held_back(n) for n in (1, 2, 12, 31, 32, 128)] == [0, 1, 1, 1, 2, 8]
    seen: dict[str, Any] = {}

    def solving(model, ids, *rest):
        seen["solved"] = torch.cat(list(ids))
        return quantize(model, ids, *rest)

    def judging(model, ids, answers, how, **rest):
        seen["judged"], seen["rest"] = ids[-1], torch.cat(list(ids[:-1]))
        full: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        expected = full(input_ids=ids[-1], use_cache=False).logits
        found = answers(len(ids) - 1, slice(0, len(ids[-1])))
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
        return tune_scales(model, ids, answers, how, **rest)

    monkeypatch.setattr("llmq.pipeline.quantize", solving)
    monkeypatch.setattr("llmq.refine.tune_scales", judging)
    api.quantize(source, tmp_path / "out", quality="best", **BEST)
    assert torch.equal(seen["solved"], seen["rest"])
    assert len(seen["solved"]) == 11
    assert len(seen["judged"]) == 1
    assert not (seen["solved"] == seen["judged"]).all(1).any()


def test_threads_do_not_matter(set_threads):
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    found = []
    for count in (1, 2):
        set_threads(count)
        packed = rounded(model, QuantScheme(2, 32))
        tuned(model, packed, ScaleTuning(steps=2, rate=1e-2, every=1), count=2)
        found.append(packed.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


BEST: dict[str, Any] = {**OPTIONS, "samples": 12, "bits": 2, "calibration": TEXT}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("tuning") / "model", torch.bfloat16)


def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps, from roundings that leave them something to gain on a random model."""
    plain = Recipe(QUALITIES["best"].scheme, RTN(), match=True)
    monkeypatch.setitem(QUALITIES, "balanced", plain)
    monkeypatch.setitem(QUALITIES, "best", replace(plain, scales=QUICK))


def test_tuning_changes_scales_alone(source, tmp_path, monkeypatch):
    short(monkeypatch)
    report = api.quantize(source, tmp_path / "best", quality="best", **BEST)
    still = replace(QUALITIES["best"], scales=replace(QUICK, rate=0.0))
    monkeypatch.setitem(QUALITIES, "best", still)
    api.quantize(source, tmp_path / "still", quality="best", **BEST)
    best, start = (load_file(tmp_path / x / "model.safetensors") for x in ("best", "still"))
    assert best.keys() == start.keys()
    changed = {key for key in best if not torch.equal(best[key], start[key])}
    assert changed
    assert all(key.endswith(".weight_scale") for key in changed)
    tuning = report["scale_tuning"]
    assert tuning["kl_after"] < tuning["kl_before"]
    saved = json.loads((tmp_path / "best" / "quantization_report.json").read_text())
    assert saved["scale_tuning"] == tuning
    assert "by tuning scales" in (tmp_path / "best" / "quantization_report.html").read_text()
    log = (tmp_path / "best" / "quantization_log.jsonl").read_text()
    assert log.count('"event": "tuning"') == 4


@pytest.mark.parametrize("looks", [0, 2])
def test_a_stopped_tuning_goes_on(source, tmp_path, monkeypatch, looks):
    short(monkeypatch)
    log = Workplace.log
    seen = []

    def stopping(self: Workplace, event: str, **fields: Any) -> None:
        seen.append(event)
        if event == "tuning" and seen.count("tuning") > looks:
            raise KeyboardInterrupt
        log(self, event, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "log", stopping)
        with pytest.raises(KeyboardInterrupt):
            api.quantize(source, tmp_path / "stopped", quality="best", **BEST)
    assert not (tmp_path / "stopped").exists()
    steps = []

    def noting(self: Workplace, event: str, **fields: Any) -> None:
        steps.append(fields.get("step"))
        log(self, event, **fields)

    monkeypatch.setattr(Workplace, "log", noting)
    api.quantize(source, tmp_path / "stopped", quality="best", **BEST)
    assert [step for step in steps if step] == [3, 6, 9, 12][looks + 1 :]
    api.quantize(source, tmp_path / "whole", quality="best", **BEST)
    assert bytes_of(tmp_path / "stopped") == bytes_of(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stopped", "whole"]


def test_a_trained_model_gains_on_text_that_nobody_saw():
    from transformers import AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    windows = token_windows(demo.calibration_path(), tokenizer, seq_len=128, samples=32, seed=0)
    test = token_windows(demo.evaluation_path(), tokenizer, seq_len=128, samples=16)
    packed = copy.deepcopy(model)
    ids = list(windows.split(4))
    list(quantize(packed, ids, Recipe(QuantScheme(2, 64, symmetric=True), GPTQ())))
    before = divergence(model, packed, test)
    tune_scales(packed, ids, answers_of(model, ids), ScaleTuning(steps=16, every=8))
    assert divergence(model, packed, test) < 0.95 * before


def test_a_plan_counts_the_tuning():
    model: Any = tiny_model("llama", dtype=torch.bfloat16)
    found = {}
    for name in ("balanced", "best"):
        recipe = QUALITIES[name]
        wanted = job(recipe, windows=32, window=64, lean=False, scan=False)
        of = shape(model, recipe)
        phases = {phase.name: phase.on_device for phase in memory(of, wanted)}
        found[name] = phases, operations(of, wanted)["float32"]
    assert found["best"][0].keys() - found["balanced"][0].keys() == {"tuning scales"}
    assert found["best"][0]["tuning scales"] > 0
    assert found["best"][1] > found["balanced"][1]
