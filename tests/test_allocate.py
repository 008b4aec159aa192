"""The knapsack against all allocations; predictions against what rounding does to a model."""

import copy
import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_quantize import batches, divergence
from zoo import tiny_model

from llmq import allocate as knapsack, demo
from llmq.allocate import Choice, allocate
from llmq.errors import NonFiniteError, SchemeError
from llmq.mixing import parse_size
from llmq.quantize import Recipe, quantize
from llmq.scheme import QuantScheme
from llmq.sensitivity import WIDTHS, Sensitivity, allocation, predicted, sensitivities
from llmq.solvers.descent import Polished

CHOICES = st.dictionaries(
    st.sampled_from(WIDTHS),
    st.builds(Choice, st.integers(1, 60), st.floats(0, 10)),
    min_size=1,
)
UNITS = st.lists(CHOICES, min_size=1, max_size=5).map(
    lambda rows: {str(i): row for i, row in enumerate(rows)}
)


def totals(units: Any, chosen: Any) -> tuple[int, float]:
    picked = [units[name][key] for name, key in chosen.items()]
    return sum(c.cost for c in picked), sum(c.loss for c in picked)


@settings(max_examples=200, deadline=None)
@given(UNITS, st.integers(5, 250))
def test_nothing_within_the_budget_is_better(units, budget):
    every = [
        totals(units, dict(zip(units, keys, strict=True)))
        for keys in itertools.product(*units.values())
    ]
    possible = [loss for cost, loss in every if cost <= budget]
    if not possible:
        with pytest.raises(SchemeError, match="too small"):
            allocate(units, budget)
        return
    cost, loss = totals(units, allocate(units, budget))
    assert cost <= budget
    assert loss == pytest.approx(min(possible), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(UNITS, st.integers(5, 250))
def test_a_coarse_budget_is_kept(units, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "STEPS", 10)
        try:
            chosen = allocate(units, budget)
        except SchemeError:
            return
    assert totals(units, chosen)[0] <= budget


def trained() -> tuple[Any, torch.Tensor, torch.Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmq.calibrate import token_windows

    model = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    calibration = token_windows(demo.calibration_path(), tokenizer, seq_len=128, samples=96, seed=0)
    test = token_windows(demo.evaluation_path(), tokenizer, seq_len=128, samples=16)
    return model, calibration, test


def test_mixed_widths_beat_uniform_ones_and_predictions_hold():
    model, calibration, test = trained()
    batches = calibration.split(4)
    units = sensitivities(model, batches, 64, False)
    assert {n for u in units for n in u.names} == {
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n
    }
    found = {}
    for label, bits in (
        ("mixed", allocation(units, 3.0)),
        ("uniform", {n: 3 for u in units for n in u.names}),
    ):
        result = copy.deepcopy(model)
        schemes = {name: QuantScheme(b, 64) for name, b in bits.items()}
        list(quantize(result, batches, Recipe(solver=Polished(), schemes=schemes)))
        found[label] = divergence(model, result, test)
        assert 0.5 < predicted(units, bits, matched=False) / found[label] < 1.5
    assert found["mixed"] < 0.9 * found["uniform"]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_fused_layers_share_a_width(name):
    model: Any = tiny_model(name, dtype=torch.float32).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    units = sensitivities(model, batches(model, 1), 32, True)
    bits = allocation(units, 3.4)
    if name == "llama":
        for i in range(2):
            stem = f"model.layers.{i}."
            assert len({bits[f"{stem}self_attn.{n}_proj"] for n in "qkv"}) == 1
            assert bits[f"{stem}mlp.gate_proj"] == bits[f"{stem}mlp.up_proj"]
    assert all(unit.kl[8] < unit.kl[4] < unit.kl[2] for unit in units)
    weights = sum(unit.weights * bits[unit.names[0]] for unit in units)
    assert weights <= 3.4 * sum(unit.weights for unit in units)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    schemes = {n: QuantScheme(b, 32, True) for n, b in bits.items()}
    reports = list(quantize(model, batches(model), Recipe(schemes=schemes, match=True)))
    assert {r.scheme.bits for r in reports} == set(bits.values())


def test_an_overflow_is_an_error():
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1e38)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        sensitivities(model, batches(model, 1), 32, True)


def test_one_width_for_all_where_several_gain_next_to_nothing():
    def units(ratio: float) -> list[Sensitivity]:
        losses = {bits: 4.0**-bits for bits in WIDTHS}
        scales = {"a": 1.0, "b": ratio}
        return [
            Sensitivity((n,), 64, {b: k * x for b, x in losses.items()}) for n, k in scales.items()
        ]

    assert allocation(units(4.2), 4) == {"a": 4, "b": 4}  # with 3 and 5 bits 5.05 instead of 5.2
    assert allocation(units(40.0), 4) == {"a": 3, "b": 5}
    assert allocation(units(4.2), 4.5) == {"a": 4, "b": 5}


@pytest.mark.parametrize(
    ("text", "size"), [(1000, 1000), ("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("2k", 2000)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "5PB", "1.2.3", ".", "-3"])
def test_other_sizes_are_refused(text):
    with pytest.raises(SchemeError, match="500MB"):
        parse_size(text)
