"""Super-blocks solved on their grid: solver, files, loading, GGUF, and who refuses them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from zoo import save_tiny, tiny_ids, tiny_model

import llmq
from llmq import hf
from llmq.convert import open_checkpoint
from llmq.errors import BackendError, FormatError, IntegrityError, SchemeError
from llmq.formats import compressed_tensors, superblocks
from llmq.formats.gguf import BLOCKS, rope_rows
from llmq.formats.kquants import GROUP, MIDDLE, TOP, SuperBlocks, project
from llmq.formats.layouts import layout_of
from llmq.gguf_file import FILE, write_gguf
from llmq.ladder import QUALITIES, in_scheme, with_plain_rows
from llmq.nn import SuperBlockLinear, prepare
from llmq.number_formats import scheme_from
from llmq.page import stored_bits
from llmq.quantize import quantize
from llmq.report import layer_entry
from llmq.scheme import QuantScheme
from llmq.solvers.affine import errors, fitted, rounded_pass
from llmq.solvers.descent import Polished, row_errors
from llmq.solvers.superblock_descent import Descent
from llmq.solvers.superblocks import OnSuperBlocks, block_order
from llmq.store import LayerReport
from llmq.superblocks import KINDS, SuperBlockScheme, SuperBlockWeight, weight_of

SCHEMES = [SuperBlockScheme.of_bits(bits) for bits in (4, 3, 2, 5, 6)]
WIDE = {"hidden_size": 256, "intermediate_size": 320, "head_dim": 64}
WIDER = WIDE | {"intermediate_size": 512}


def correlated(K: int) -> torch.Tensor:
    """A second moment whose columns are correlated and differ in size."""
    x = torch.randn(4 * K, K) @ (torch.randn(K, K) / K**0.5 + torch.eye(K) / 2)
    x *= torch.rand(K).add(0.1)
    return x.T @ x / len(x)


def anything(scheme: SuperBlockScheme, N: int, S: int, seed: int = 0) -> SuperBlockWeight:
    """Every field random in the whole of its range."""
    generator = torch.Generator().manual_seed(seed)
    kind = KINDS[scheme.bits]
    top, C = TOP[kind], 256 // GROUP[kind]

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    signed = kind in MIDDLE
    low = -top - 1 if signed else 0
    lows = whole(0, 0 if signed else top, N, S, C).short()
    steps = torch.randn(2, N, S, 1, generator=generator).half()
    scales = whole(low, top, N, S, C).short()
    codes = whole(0, scheme.qmax, N, S, 256).byte()
    return weight_of(SuperBlocks(kind, codes, steps[0], scales, steps[1] * (not signed), lows))


def total(W: torch.Tensor, H: torch.Tensor, q: Any) -> float:
    return float(row_errors(W, H, q).sum())


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SCHEMES), st.integers(0, 2**31))
def test_the_package_gguf_reads_the_same_bits(scheme, seed):
    gguf = pytest.importorskip("gguf")
    q = anything(scheme, 3, 2, seed)
    tensors = superblocks.write("a.b", q)
    kind = gguf.GGMLQuantizationType[scheme.kind]
    found = gguf.quants.dequantize(tensors["a.b.weight_packed"].numpy(), kind)
    assert torch.equal(torch.tensor(found), q.dequantize())
    assert torch.equal(superblocks.checked(q), tensors["a.b.weight_packed"])
    again = superblocks.read("a.b", tensors, scheme)
    for name, tensor in vars(again).items():
        same = getattr(q, name)
        assert torch.equal(tensor, same) if isinstance(tensor, torch.Tensor) else tensor == same
    assert torch.equal(q.rows(slice(1, 2)).dequantize(), q.dequantize()[1:2])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_schemes_configs_and_sizes(scheme):
    width, size = BLOCKS[KINDS[scheme.bits]]
    assert scheme.bits_per_weight(512) == size * 8 / width
    tensors = superblocks.write("a", anything(scheme, 6, 2))
    assert tensors["a.weight_packed"].nbytes * 8 / (6 * 512) == scheme.bits_per_weight(512)
    config = json.loads(json.dumps(compressed_tensors.config({scheme: ["Linear"]}, ["lm_head"])))
    assert layout_of(config).config.scheme_for("x") == scheme
    entry = layer_entry(LayerReport("x", (6, 512), scheme, 0.1, 1, 1.0))
    assert stored_bits(entry) == scheme.bits_per_weight(512)
    assert scheme_from(json.loads(json.dumps(entry))) == scheme
    for change in ({"kind": "Q7_K"}, {"num_bits": 8}, {"group_size": 64}, {"type": "int"}):
        config["config_groups"]["group_0"]["weights"] |= change
        with pytest.raises(FormatError, match=r"config_groups\.group_0"):
            layout_of(config)
    with pytest.raises(SchemeError, match="super-blocks"):
        compressed_tensors.write("a.b", anything(scheme, 2, 1))


def test_stock_transformers_refuses_it():
    """It must not fill the layers with random numbers."""
    compressed = pytest.importorskip("compressed_tensors")
    config = compressed_tensors.config({SCHEMES[0]: ["Linear"]}, ["lm_head"])
    with pytest.raises(ValueError, match="k-quants"):
        compressed.quantization.QuantizationConfig.model_validate(config)


@pytest.mark.parametrize("middle", [None, 4])
def test_the_pass_is_the_one_of_the_definition(middle):
    """In float64, weight by weight: what R says is lost is |D R|^2."""
    torch.manual_seed(3)
    R = torch.linalg.cholesky(correlated(16).double().flip(0, 1)).flip(0, 1)  # upper
    W, scale = torch.randn(16, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) * 0.3
    offset = scale * (4 if middle else 3.3)
    codes, lost, error = rounded_pass(W, torch.zeros_like(W), R, scale, offset, 7)
    for n in range(5):
        D = torch.zeros(16, dtype=torch.float64)
        for j in range(16):
            wanted = W[j, n] + (D[:j] @ R[:j, j]) / R[j, j]
            code = ((wanted + offset[n]) / scale[n]).round().clamp(0, 7)
            assert codes[j, n] == code
            D[j] = W[j, n] - (code * scale[n] - offset[n])
        torch.testing.assert_close(lost[:, n], D)
        torch.testing.assert_close(error[n], (D @ R).square().sum())


@pytest.mark.parametrize(("qmax", "middle"), [(15, None), (3, None), (7, 4)])
def test_fitted_grids_are_near_the_best_of_a_fine_search(qmax, middle):
    x, weights = torch.randn(20, 32), torch.rand(32) + 0.1
    found = errors(x, weights, *fitted(x, weights, qmax, middle), qmax)
    reach = x.abs().amax(1)
    scales = torch.linspace(0.02, 1.2, 200).view(-1, 1, 1) * 2 * reach / qmax
    if middle is not None:
        scales = torch.cat([scales, -scales])
        offsets = scales * middle
    else:
        offsets = torch.linspace(0, 1.2, 60).view(1, -1, 1) * reach
    grids = torch.broadcast_tensors(scales, offsets)
    best = torch.stack(
        [errors(x, weights, s, o, qmax).amin(0) for s, o in zip(*grids, strict=True)]
    ).amin(0)
    assert float(found.sum()) < 1.1 * float(best.sum())


def test_columns_are_rounded_in_whole_super_blocks_and_groups():
    order = block_order(torch.rand(768), 32)
    assert sorted(order.tolist()) == list(range(768))
    for width in (256, 32):
        assert all(len(set(part.tolist())) == 1 for part in (order // width).split(width))


@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=str)  # none is projected into Q6_K
def test_solving_on_the_grid_loses_less_than_projecting(scheme):
    W = (torch.randn(12, 512) * torch.rand(12, 1).add(0.3)).bfloat16()
    H = correlated(512)
    plain = Polished(sweeps=2).solve(W, H, QuantScheme(scheme.bits, 32, scheme.symmetric))
    projected = total(W, H, weight_of(project(plain, KINDS[scheme.bits])))
    alone = total(W, H, OnSuperBlocks(feedback=False, sweeps=0).solve(W, H, scheme))
    start = OnSuperBlocks(sweeps=0).solve(W, H, scheme)
    q = OnSuperBlocks(sweeps=2).solve(W, H, scheme)
    assert isinstance(q, SuperBlockWeight)
    assert total(W, H, q) < 0.9 * projected
    assert total(W, H, q) < 0.9 * total(W, H, start) < 0.9 * alone
    assert bool((row_errors(W, H, q) <= row_errors(W, H, start)).all())
    assert torch.equal(superblocks.checked(q), superblocks.write("", q)["weight_packed"])


@pytest.mark.parametrize("scheme", [*SCHEMES[:3], SCHEMES[4]], ids=str)
def test_descent_keeps_its_books_and_never_goes_up(scheme):
    W, H = torch.randn(6, 512), correlated(512)
    q = OnSuperBlocks(feedback=False, sweeps=0).solve(W, H, scheme)
    state, before = Descent(W, H, q), row_errors(W, H, q)
    for _ in range(3):
        delta = W.T - state.value().dequantize().T
        residual = H[256:] @ delta
        own = delta[256:].clone()
        state.move_steps(1, own, residual)
        state.steps = state.steps.half().float()
        moved = W.T - state.value().dequantize().T
        torch.testing.assert_close(own, moved[256:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(residual, H[256:] @ moved, atol=1e-4, rtol=1e-3)
        stepped = row_errors(W, H, state.value())
        assert bool((stepped <= before * (1 + 1e-5)).all())
        state.sweep()
        after = row_errors(W, H, state.value())
        assert bool((after <= stepped * (1 + 1e-5)).all())
        before = after
    whole = state.whole[0]
    assert bool((state.codes >= 0).all())
    assert bool((state.codes <= scheme.qmax).all())
    assert float(whole.max()) <= TOP[KINDS[scheme.bits]]


def test_a_lone_weight_moves_to_its_best_place():
    """Where one more step of any code, multiple or low would help, none is left."""
    scheme = SCHEMES[2]
    W, H = torch.randn(1, 256), correlated(256)
    state = Descent(W, H, OnSuperBlocks(sweeps=0).solve(W, H, scheme))
    for _ in range(30):
        state.sweep()
    q = state.value()
    least = total(W, H, q) * (1 - 1e-5)
    for name, top in (("codes", 3), ("multiples", 15), ("lows", 15)):
        tensor = getattr(q, name)
        for k in range(0, tensor.shape[1], 1 if name != "codes" else 16):
            for move in (-1, 1):
                moved = tensor.clone()
                moved[0, k] = min(max(int(moved[0, k]) + move, 0), top)
                assert total(W, H, replace(q, **{name: moved})) >= least


def test_extreme_weights():
    W = torch.zeros(5, 256)
    W[1] = 1e-38
    W[2, 5] = 6e4
    W[3] = torch.rand(256) + 5  # no weight near 0
    H = torch.eye(256) * 1e-30
    H[3] = 0
    for scheme in SCHEMES:
        q = OnSuperBlocks(sweeps=2).solve(W, H, scheme)
        found = q.dequantize()
        assert bool(found.isfinite().all())
        assert float(found[0].abs().max()) == 0
        assert float((found[3] - W[3]).abs().max()) < 1.5
        with pytest.raises(SchemeError, match="too large for float16"):
            OnSuperBlocks().solve(W * 2, H, scheme)
        with pytest.raises(SchemeError, match="not divisible"):
            OnSuperBlocks().solve(W[:, :64], H[:64, :64], scheme)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight_packed": None}, "a.weight_packed is missing"),
        ({"a.weight_packed": torch.zeros(6, 144)}, "expected uint8"),
        ({"a.weight_packed": torch.zeros(6, 84, dtype=torch.uint8)}, r"expected uint8 \(6, 288\)"),
        ({"a.weight_shape": torch.tensor([6, 320])}, "in_features=320 is not divisible"),
    ],
)
def test_read_names_the_tensor_that_is_wrong(change, message):
    tensors = superblocks.write("a", anything(SCHEMES[0], 6, 2)) | change
    with pytest.raises(FormatError, match=message):
        superblocks.read("a", {k: t for k, t in tensors.items() if t is not None}, SCHEMES[0])


def test_schemes_that_do_not_exist():
    for arguments in ((8, 32, False, "Q4_K"), (4, 64, False, "Q4_K"), (3, 16, False, "Q3_K")):
        with pytest.raises(SchemeError):
            SuperBlockScheme(*arguments)
    q = anything(SCHEMES[0], 2, 1)
    with pytest.raises(IntegrityError, match="multiples"):
        superblocks.checked(replace(q, multiples=q.multiples + 64))


def test_the_layer_multiplies_by_the_matrix():
    q = OnSuperBlocks(feedback=False, sweeps=0).solve(
        torch.randn(6, 256), torch.eye(256), SCHEMES[0]
    )
    layer = SuperBlockLinear.from_quantized(q, torch.randn(6))
    x = torch.randn(2, 3, 256, requires_grad=True)
    y = layer(x)
    assert layer.bias is not None
    torch.testing.assert_close(y, x @ q.dequantize().T + layer.bias)
    y.sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand_as(x))
    assert torch.equal(layer.to(torch.bfloat16).dequantize(), q.dequantize())  # nothing is cast
    prepare(layer, "torch")
    with pytest.raises(BackendError, match="no kernel for super-blocks"):
        prepare(layer, "cpu-int4")


def test_quantized_saved_and_loaded_logits_are_bit_identical(tmp_path):
    model: Any = tiny_model("qwen2", torch.bfloat16, **WIDE)
    ids = tiny_ids(1, 40)
    recipe, line = with_plain_rows(in_scheme(QUALITIES["fast"], SCHEMES[2]), model)
    assert line is not None
    assert "down_proj (320 inputs)" in line
    assert isinstance(recipe.solver, OnSuperBlocks)
    recipe = replace(recipe, solver=replace(recipe.solver, sweeps=1, plain=Polished(sweeps=1)))
    reports = list(quantize(model, [ids], recipe))
    plain = QuantScheme(4, 32, symmetric=True)
    assert {r.scheme for r in reports if "down_proj" in r.name} == {plain}
    assert {r.scheme for r in reports if "down_proj" not in r.name} == {SCHEMES[2]}
    assert all(0 < report.error < 0.5 for report in reports)
    want = model(input_ids=ids).logits
    hf.save(model, tmp_path / "packed")
    loaded: Any = llmq.load(tmp_path / "packed", dtype="auto")
    assert sum(isinstance(module, SuperBlockLinear) for module in loaded.modules()) == 12
    assert torch.equal(loaded(input_ids=ids).logits, want)
    loaded.save_pretrained(tmp_path / "again")
    again: Any = llmq.load(tmp_path / "again", dtype="auto")
    assert torch.equal(again(input_ids=ids).logits, want)
    assert torch.equal(loaded.dequantize()(input_ids=ids).logits, want)


def test_the_command_line_and_everything_after_it(text, run, tmp_path):
    gguf = pytest.importorskip("gguf")
    source = save_tiny("llama", tmp_path / "source", torch.bfloat16, **WIDER)
    out = tmp_path / "out"
    options = ["--bits", "3", "--k-quants", "--method", "gptq", "--calibration", text]
    options += ["--samples", "4", "--seq-len", "64", "--skip", "v_proj", "--json"]
    status, said, error = run("quantize", source, out, *options)
    assert status == 0, error
    report = json.loads(said.splitlines()[-1])
    assert (report["k_quants"], report["group_size"], report["symmetric"]) == ("Q3_K", 16, True)
    assert report["bits_per_weight"] == pytest.approx(110 / 32, abs=0.01)
    assert "--k-quants" in report["command"]
    assert run("verify", out)[0] == 0
    status, said, _ = run("inspect", out)
    assert status == 0
    assert "Q3_K" in said
    status, _, error = run("convert", out, tmp_path / "gptq", "--format", "gptq")
    assert status == 1
    assert "Use --format gguf" in error
    card = run("push", out, "me/model", "--dry-run")[1]
    assert "vllm serve" not in card
    assert "super-blocks of llama.cpp (Q3_K)" in card
    assert "--format gguf" in card

    done = write_gguf(out, tmp_path / "gguf")
    assert done.notes[0] == "12 matrices in Q3_K"
    assert not any("rounded the scales" in note for note in done.notes)
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "gguf" / FILE).tensors}
    opened = open_checkpoint(out)
    heads = {"q": opened.config["num_attention_heads"], "k": opened.config["num_key_value_heads"]}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "down_proj": "ffn_down", "up_proj": "ffn_up"}
    packed = load_file(out / "model.safetensors")
    for leaf, called in names.items():
        [name] = [n for n in opened.schemes if "layers.1." in n and n.endswith(leaf)]
        tensor = found[f"blk.1.{called}.weight"]
        weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        wanted = opened.read(name).dequantize()
        if leaf[0] in heads:
            wanted = wanted[rope_rows(len(wanted), heads[leaf[0]])]
        else:  # a copy of the checkpoint's bytes
            assert torch.equal(torch.tensor(tensor.data), packed[f"{name}.weight_packed"])
        assert torch.equal(weight, wanted)
    llmq.load(out, dtype="bfloat16")(input_ids=torch.arange(8).view(1, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "8"], "K-quants have 2, 3, 4, 5, 6 bits"),
        (["--bits", "3.5"], "give whole bits"),
        (["--group-size", "64"], "Q4_K has groups of 32"),
        (["--bits", "3", "--asymmetric"], "Q3_K has no zero points"),
        (["--codebook", "nf4"], "give one of the two"),
        (["--quality", "best"], "K-quants are made by"),
        (["--method", "awq"], "K-quants are made by"),
        (["--samples", "4", "--seq-len", "64"], "no layer divides"),  # rows of 128
    ],
)
def test_what_does_not_go_together(model, text, run, options, message, tmp_path):
    out = tmp_path / "out"
    status, _, error = run("quantize", model, out, "--calibration", text, "--k-quants", *options)
    assert status == 1
    assert message in error
    assert not out.exists()


def test_experts_and_rows_that_fit_no_block_are_refused(text, run, tmp_path):
    quick = ["--samples", "4", "--seq-len", "64", "--k-quants", "--calibration", text]
    source = save_tiny("mixtral", tmp_path / "experts", torch.bfloat16, **WIDER)
    status, _, error = run("quantize", source, tmp_path / "out", *quick)
    assert status == 1
    assert "super-blocks do not hold stacked experts" in error
    odd = save_tiny("llama", tmp_path / "odd", torch.bfloat16, **WIDE | {"intermediate_size": 330})
    status, _, error = run("quantize", odd, tmp_path / "out", *quick)
    assert status == 1
    assert "--skip down_proj" in error
    assert not Path(tmp_path / "out").exists()
