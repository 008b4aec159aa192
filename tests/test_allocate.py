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
    for label, schemes in (
        ("mixed", allocation(units, 3.0, QuantScheme(4, 64))),
        ("uniform", {n: QuantScheme(3, 64) for u in units for n in u.names}),
    ):
        result = copy.deepcopy(model)
        list(quantize(result, batches, Recipe(solver=Polished(), schemes=schemes)))
        found[label] = divergence(model, result, test)
        assert 0.5 < predicted(units, schemes, matched=False) / found[label] < 1.5
    assert found["mixed"] < 0.9 * found["uniform"]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_fused_layers_share_a_width(name):
    model: Any = tiny_model(name, dtype=torch.float32).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    units = sensitivities(model, batches(model, 1), 32, True)
    asked = QuantScheme(4, 32, True)
    schemes = allocation(units, 3.4, asked)
    if name == "llama":
        for i in range(2):
            stem = f"model.layers.{i}."
            assert len({schemes[f"{stem}self_attn.{n}_proj"] for n in "qkv"}) == 1
            assert schemes[f"{stem}mlp.gate_proj"] == schemes[f"{stem}mlp.up_proj"]
    assert all(unit.kl[8] < unit.kl[4] < unit.kl[2] for unit in units)
    stored = sum(u.weights * schemes[u.names[0]].bits_per_weight(u.columns) for u in units)
    assert stored <= (3.4 + 16 / 32) * sum(unit.weights for unit in units)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    reports = list(quantize(model, batches(model), Recipe(schemes=schemes, match=True)))
    assert {r.scheme for r in reports} == set(schemes.values())


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
            Sensitivity((n,), 64, 64, {b: k * x for b, x in losses.items()})
            for n, k in scales.items()
        ]

    def widths(ratio: float, bits: float) -> dict[str, int]:
        found = allocation(units(ratio), bits, QuantScheme(4, 64))
        return {name: scheme.bits for name, scheme in found.items()}

    assert widths(4.2, 4) == {"a": 4, "b": 4}  # with 3 and 5 bits 5.05 instead of 5.2
    assert widths(40.0, 4) == {"a": 3, "b": 5}
    assert widths(4.2, 4.5) == {"a": 4, "b": 5}


def test_larger_groups_pay_for_bits():
    kl = {bits: 5.0**-bits for bits in WIDTHS}
    wider = {64: {bits: 1.25 * lost for bits, lost in kl.items()}}
    units = [Sensitivity((name,), 4096, 128, kl, wider) for name in "abc"]
    asked = QuantScheme(4, 32, symmetric=False)
    found = allocation(units, 3.5, asked)
    given = sorted((scheme.bits, scheme.group_size) for scheme in found.values())
    assert given == [(3, 32), (4, 64), (4, 64)]  # with groups of 32 alone 3, 3 and 4 bits
    budget = 3 * 4096 * (3.5 + (16 + 3.5) / 32)
    assert sum(4096 * s.bits_per_weight(128) for s in found.values()) <= budget
    assert predicted(units, found, matched=False) == pytest.approx(2 * 1.25 / 5**4 + 1 / 5**3)
    dear = {64: {bits: 9 * lost for bits, lost in kl.items()}}
    units = [Sensitivity((name,), 4096, 128, kl, dear) for name in "abc"]
    assert {s.group_size for s in allocation(units, 3.5, asked).values()} == {32}


def test_only_groups_that_rows_divide_into_are_tried():
    model: Any = tiny_model("llama", dtype=torch.float32).eval()
    larger = {32: {128: [64, 128], 192: [64]}, 64: {128: [128], 192: []}, -1: {128: [], 192: []}}
    for asked, by_columns in larger.items():
        units = sensitivities(model, batches(model, 1), asked, True)
        assert {unit.columns: sorted(unit.wider) for unit in units} == by_columns


@pytest.mark.parametrize(
    ("text", "size"), [(1000, 1000), ("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("2k", 2000)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "5PB", "1.2.3", ".", "-3"])
def test_other_sizes_are_refused(text):
    with pytest.raises(SchemeError, match="500MB"):
        parse_size(text)


def test_layers_with_groups_of_their_own_are_written_and_read(tmp_path):
    from llmq import api
    from llmq.card import _introduction
    from llmq.nn import packed_modules

    out = tmp_path / "mixed"
    few = {"samples": 16, "seq_len": 64, "group_size": 32, "symmetric": False}
    report = api.quantize(demo.model_path(), out, bits=3.5, quality="fast", **few)
    given = {layer["name"]: (layer["bits"], layer["group_size"]) for layer in report["layers"]}
    sizes = sorted({size for _, size in given.values()})
    assert len(sizes) > 1
    padding = 1.002  # ten zero points of 3 bits in a word of 32
    assert report["bits_per_weight"] <= (3.5 + (16 + 3.5) / 32) * padding
    read: dict[str, Any] = {name: m.scheme for name, m in packed_modules(api.load(out))}
    assert {name: (s.bits, s.group_size) for name, s in read.items()} == given
    assert f"groups of {' and '.join(map(str, sizes))}" in _introduction(report, None)
