"""Code books: tables, solver, files, loading, and who refuses them."""

import json
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from zoo import save_tiny, tiny_model

import llmq
from llmq import hf
from llmq.codebook import NF4, CodebookScheme, CodebookWeight, nearest
from llmq.errors import BackendError, FormatError, SchemeError
from llmq.formats import codebook, compressed_tensors
from llmq.formats.layouts import layout_of
from llmq.lookup import CodebookLinear
from llmq.nn import prepare
from llmq.page import stored_bits
from llmq.quantize import quantize
from llmq.recipe import Recipe
from llmq.solvers.books import Codebook, k_means

SCHEMES = [
    CodebookScheme(4, 64, book="nf4"),
    CodebookScheme(4, 32, book="nf4", outliers=0.01),
    CodebookScheme(4, -1, book="learned"),
    CodebookScheme(3, 64, book="learned", outliers=0.03),
    CodebookScheme(2, 32, book="learned", outliers=0.005),
]


def correlated(K: int) -> torch.Tensor:
    """A second moment whose columns are correlated and differ in size."""
    x = torch.randn(4 * K, K) @ torch.randn(K, K) * torch.rand(K).add(0.1)
    return x.T @ x / len(x)


def loss(W: torch.Tensor, q: CodebookWeight, H: torch.Tensor) -> float:
    delta = q.dequantize(torch.float64) - W.double()
    return float(((delta @ H.double()) * delta).sum())


def test_nf4_is_the_paper_s():
    """Its appendix E: quantiles of N(0, 1), 8 below 0, 0 itself, 7 above, over the largest."""
    quantile, edge = NormalDist().inv_cdf, 0.9677083
    above = [quantile(edge + (0.5 - edge) * i / 8) for i in range(8)]
    below = [-quantile(edge + (0.5 - edge) * i / 7) for i in range(7)]
    values = sorted([*above, 0.0, *below])
    values = [v / values[-1] for v in values]
    torch.testing.assert_close(torch.tensor(NF4), torch.tensor(values), atol=2e-6, rtol=0)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dequantize_against_a_definition_in_loops(scheme, feedback):
    W, H = torch.randn(6, 64).bfloat16(), correlated(64)
    q = Codebook(feedback).solve(W, H, scheme)
    got, width = q.dequantize(), scheme.group_width(64)
    assert got.dtype == torch.bfloat16
    for n in range(6):
        kept = dict(zip(q.index[n].tolist(), q.value[n].tolist(), strict=True))
        assert len(kept) == scheme.kept(64)
        for k in range(64):
            row = q.book[n if len(q.book) > 1 else 0].float()
            entry = row[int(q.codes[n, k])] * q.scale[n, k // width].float()
            assert got[n, k].item() == kept.get(k, entry.bfloat16().item())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_plain_rounding_takes_the_nearest_entry(scheme):
    W = torch.randn(5, 64)
    q = Codebook(feedback=False).solve(W, correlated(64), scheme)
    grid = q.book.expand(5, -1).unsqueeze(1).double()  # (N, 1, C)
    grid = grid * q.scale.double().repeat_interleave(scheme.group_width(64), 1).unsqueeze(-1)
    best = (grid - W.double().unsqueeze(-1)).abs().amin(-1)  # (N, K)
    best.scatter_(1, q.index.long(), 0)
    got = (q.dequantize(torch.float64) - W.double()).abs()
    torch.testing.assert_close(got, best, atol=1e-6, rtol=0)
    assert float(q.scale.min()) > 0


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_feedback_changes_nothing_without_correlation(scheme):
    W = torch.randn(7, 64)
    plain, fed = (Codebook(f).solve(W, 3 * torch.eye(64), scheme) for f in (False, True))
    assert torch.equal(plain.dequantize(), fed.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_feedback_and_outliers_lose_less(scheme):
    W, H = torch.randn(32, 128) * torch.rand(128).add(0.2), correlated(128)
    lost = [loss(W, Codebook(f).solve(W, H, scheme), H) for f in (False, True)]
    assert lost[1] < 0.8 * lost[0]
    if scheme.outliers:
        without = CodebookScheme(scheme.bits, scheme.group_size, book=scheme.book)
        assert loss(W, Codebook(False).solve(W, H, scheme), H) < loss(
            W, Codebook(False).solve(W, H, without), H
        )


def test_a_learned_table_loses_less_than_nf4():
    W, H = torch.randn(32, 128).abs() * torch.rand(128), correlated(128)  # skewed rows
    lost = [
        loss(W, Codebook(False).solve(W, H, CodebookScheme(4, -1, book=book)), H)
        for book in ("learned", "nf4")
    ]
    assert lost[0] < 0.7 * lost[1]


def best_clusters(x: list[float], w: list[float], count: int) -> float:
    """The least weighted squared error of `count` values, by trying all cuts, in float64."""
    order = sorted(range(len(x)), key=x.__getitem__)
    least = float("inf")
    for cuts in combinations(range(1, len(x)), count - 1):
        total = 0.0
        for start, stop in zip((0, *cuts), (*cuts, len(x)), strict=True):
            part = order[start:stop]
            mean = sum(w[i] * x[i] for i in part) / sum(w[i] for i in part)
            total += sum(w[i] * (x[i] - mean) ** 2 for i in part)
        least = min(least, total)
    return least


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_k_means_ends_in_a_fixed_point_and_not_below_the_optimum(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 10, generator=generator) * 2 - 1
    w = torch.rand(1, 10, generator=generator) + 0.01
    book = k_means(x, w, torch.tensor([-1.0, -0.3, 0.3, 1.0]), 100)
    assert bool((book.diff() >= 0).all())
    codes = nearest(x, book)[0]
    error = (w.double() * (x.double() - book[:, codes].double()) ** 2).sum()
    assert float(error) >= best_clusters(x[0].tolist(), w[0].tolist(), 4) - 1e-6
    for entry in range(4):
        own = codes == entry
        if bool(own.any()):
            mean = (w[0, own] * x[0, own]).sum() / w[0, own].sum()
            torch.testing.assert_close(book[0, entry], mean, atol=1e-5, rtol=0)


def test_k_means_finds_clusters_that_are_there():
    centres = torch.tensor([-0.9, -0.2, 0.1, 0.8])
    x = (centres.repeat(16) + torch.randn(64) * 0.01).unsqueeze(0)
    book = k_means(x, torch.ones_like(x), torch.tensor([-1.0, -0.3, 0.3, 1.0]), 20)
    torch.testing.assert_close(book[0], centres, atol=0.01, rtol=0)


def test_extreme_weights():
    W = torch.zeros(4, 64)
    W[1] = 1e-38
    W[2, 5] = 3e38
    H = torch.eye(64) * 1e-30
    H[3] = 0
    for scheme in SCHEMES:
        assert bool(Codebook().solve(W, H, scheme).dequantize().isfinite().all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_read_undoes_write_and_config_too(scheme):
    q = Codebook(False).solve(torch.randn(6, 64).half(), torch.eye(64), scheme)
    tensors = codebook.write("a.b", q)
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        f"a.b.{suffix}": shape for suffix, shape in codebook.shapes(scheme, 6, 64).items()
    }
    got = codebook.read("a.b", tensors, scheme)
    assert got.scheme == scheme
    assert torch.equal(got.dequantize(), q.dequantize())
    stored = 8 * sum(t.nbytes for k, t in tensors.items() if not k.endswith("_shape"))
    assert stored / q.codes.numel() == pytest.approx(scheme.bits_per_weight(64))
    config = json.loads(json.dumps(compressed_tensors.config({scheme: ["Linear"]}, ["lm_head"])))
    assert layout_of(config).config.scheme_for("x") == scheme
    with pytest.raises(SchemeError, match="code book"):
        compressed_tensors.write("a.b", q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight_book": None}, "a.weight_book is missing"),
        ({"a.weight_outlier": torch.zeros(6, 3)}, r"weight_outlier is torch.float32 \(6, 3\)"),
        ({"a.weight_book": torch.zeros(6, 8, dtype=torch.int32)}, "expected floating point"),
        ({"a.weight_outlier_index": torch.full((6, 2), 64).int()}, "columns outside 0 to 63"),
        ({"a.weight_shape": torch.tensor([6, 65])}, "65 is not divisible"),
    ],
)
def test_read_names_the_tensor_that_is_wrong(change, message):
    scheme = CodebookScheme(3, 64, book="learned", outliers=0.03)
    q = Codebook(False).solve(torch.randn(6, 64), torch.eye(64), scheme)
    tensors = codebook.write("a", q) | change
    with pytest.raises(FormatError, match=message):
        codebook.read("a", {k: t for k, t in tensors.items() if t is not None}, scheme)


@pytest.mark.parametrize(
    "change",
    [{"book": "nf5"}, {"outliers": "many"}, {"outliers": 1.0}, {"num_bits": 8}, {"type": "int"}],
    ids=str,
)
def test_configs_that_make_no_sense(change):
    config = compressed_tensors.config({SCHEMES[0]: ["Linear"]}, [])
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(FormatError, match=r"config_groups\.group_0"):
        layout_of(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"book": "nf3"}, "use one of nf4, learned"),
        ({"book": "nf4", "bits": 3}, "'nf4' has 4 bits"),
        ({"book": "learned", "bits": 8}, "2, 3, 4 bits"),
        ({"symmetric": False}, "no zero points"),
        ({"outliers": 0.2}, "share of 0 to 0.05"),
    ],
)
def test_schemes_that_do_not_exist(options, message):
    with pytest.raises(SchemeError, match=message):
        CodebookScheme(**options)


def test_the_layer_multiplies_by_the_matrix_and_learns_through_it():
    q = Codebook(False).solve(torch.randn(6, 64), torch.eye(64), SCHEMES[3])
    layer = CodebookLinear.from_quantized(q, torch.randn(6))
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = layer(x)
    assert layer.bias is not None
    torch.testing.assert_close(y, x @ q.dequantize().T + layer.bias)
    y.sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand_as(x))
    prepare(layer, "torch")
    with pytest.raises(BackendError, match="no kernel for code books"):
        prepare(layer, "cpu-int4")


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_quantized_saved_and_loaded_logits_are_bit_identical(name, tmp_path):
    model, ids = tiny_model(name), torch.arange(40).view(1, 40)
    recipe = Recipe(SCHEMES[3], Codebook(), lm_head=name == "llama")
    reports = list(quantize(model, [ids], recipe))
    assert all(0 < report.error < 0.5 for report in reports)
    want = model(input_ids=ids).logits
    hf.save(model, tmp_path / "packed")
    loaded: Any = llmq.load(tmp_path / "packed", dtype="auto")
    assert any(isinstance(module, CodebookLinear) for module in loaded.modules())
    assert torch.equal(loaded(input_ids=ids).logits, want)
    loaded.save_pretrained(tmp_path / "again")
    again: Any = llmq.load(tmp_path / "again", dtype="auto")
    assert torch.equal(again(input_ids=ids).logits, want)
    assert torch.equal(loaded.dequantize()(input_ids=ids).logits, want)


def test_the_command_line_and_everything_after_it(model, text, run, tmp_path):
    out = tmp_path / "out"
    options = ["--bits", "3", "--group-size", "64", "--codebook", "learned", "--outliers", "0.005"]
    options += ["--samples", "4", "--seq-len", "64", "--calibration", text, "--json"]
    status, said, error = run("quantize", model, out, *options)
    assert status == 0, error
    report = json.loads(said.splitlines()[-1])
    tensors = load_file(out / "model.safetensors")
    packed = sum(t.nbytes for key, t in tensors.items() if "_proj.weight_" in key)
    weights = sum(int(t.prod()) for key, t in tensors.items() if key.endswith("_shape"))
    assert report["bits_per_weight"] == pytest.approx(8 * packed / weights)
    assert (report["codebook"], report["outliers"]) == ("learned", 0.005)
    layers = json.loads((out / "quantization_report.json").read_text())["layers"]
    said = sum(stored_bits(x) * x["shape"][0] * x["shape"][1] for x in layers) / weights
    assert said == pytest.approx(report["bits_per_weight"], abs=0.02)  # weight_shape is beside it
    assert run("verify", out)[0] == 0
    status, said, _ = run("inspect", out)
    assert status == 0
    assert "learned 3-bit g64" in said
    status, _, error = run("convert", out, tmp_path / "gptq", "--format", "gptq")
    assert status == 1
    assert "without --codebook" in error
    assert not (tmp_path / "gptq").exists()
    card = run("push", out, "me/model", "--dry-run")[1]
    assert "vllm serve" not in card
    assert "compressed-tensors" not in card
    assert "a learned table of 3 bits per row, groups of 64, 0.50% of the weights beside it" in card
    llmq.load(out, dtype="bfloat16")(input_ids=torch.arange(8).view(1, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--codebook", "nf5"], "use one of nf4, learned"),
        (["--codebook", "nf4", "--asymmetric"], "no zero points"),
        (["--codebook", "nf4", "--quality", "best"], "scale or tune integers"),
        (["--codebook", "nf4", "--method", "awq"], "scale or tune integers"),
        (["--codebook", "nf4", "--bits", "3.5"], "one width for all layers"),
        (["--outliers", "0.01"], "only beside a code book"),
    ],
)
def test_what_does_not_go_together(model, text, run, options, message, tmp_path):
    out = tmp_path / "out"
    status, _, error = run("quantize", model, out, "--calibration", text, *options)
    assert status == 1
    assert message in error
    assert not out.exists()


def test_experts_are_refused(text, run, tmp_path):
    source = save_tiny("mixtral", tmp_path / "source", torch.bfloat16)
    quick = ["--samples", "4", "--seq-len", "64", "--group-size", "64", "--calibration", text]
    status, _, error = run("quantize", source, tmp_path / "out", "--codebook", "nf4", *quick)
    assert status == 1
    assert "code books do not hold stacked experts" in error


def test_a_file_that_lost_a_table_is_refused(tmp_path):
    model = tiny_model("llama")
    recipe = Recipe(SCHEMES[2], Codebook(False))
    list(quantize(model, [torch.arange(40).view(1, 40)], recipe))
    folder = Path(hf.save(model, tmp_path / "packed"))
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith("weight_book"))
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=f"{key} is missing"):
        llmq.load(folder)


def test_stock_transformers_refuses_it(tmp_path):
    """It must not fill the layers with random numbers."""
    compressed = pytest.importorskip("compressed_tensors")
    config = compressed_tensors.config({SCHEMES[0]: ["Linear"]}, ["lm_head"])
    with pytest.raises(ValueError, match="codebook"):
        compressed.quantization.QuantizationConfig.model_validate(config)
