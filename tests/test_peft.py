"""Adapters on packed weights: gradients, training, saving, and corrections without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_backends import needs_kernel
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from zoo import save_tiny, tiny_ids, tiny_model

import llmq
from llmq import hf
from llmq.correction import correct, low_rank
from llmq.errors import FormatError, SchemeError, SourceError
from llmq.nn import PackedLinear
from llmq.scheme import QuantScheme

pytest.importorskip("peft")
import peft

from llmq.peft import (
    PackedLora,
    get_peft_model,
    load_adapter,
    prepare_for_training,
)

SMALL: dict[str, Any] = {"samples": 4, "seq_len": 64, "group_size": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text) -> tuple[Path, Path]:
    """A tiny model and its 3-bit checkpoint."""
    root = tmp_path_factory.mktemp("peft")
    source = save_tiny("llama", root / "source")
    llmq.quantize(source, root / "packed", method="rtn", bits=3, calibration=str(text), **SMALL)
    return source, root / "packed"


@pytest.fixture
def model(folders):
    return hf.load(folders[1])


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu-int4", marks=needs_kernel)])
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_gradients_equal_those_of_the_dense_layer(bits, backend, rows) -> None:
    generator = torch.Generator().manual_seed(bits)
    dense = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    layer = PackedLinear.from_linear(dense, QuantScheme(bits, 32, symmetric=True))
    layer.prepare(backend)
    x = torch.randn(2, rows, 64, generator=generator).bfloat16().requires_grad_()
    g = torch.randn(2, rows, 32, generator=generator).bfloat16()
    layer(x).backward(g)
    twin = x.detach().clone().requires_grad_()
    F.linear(twin, layer.dequantize(), dense.bias).backward(g)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=0)
    assert layer.weight_scale.grad is None


def test_gradcheck() -> None:
    """Finite differences in float64, twice for the second layer's sake."""
    dense = torch.nn.Linear(32, 8)
    layer = PackedLinear.from_linear(dense, QuantScheme(4, 32)).double()
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_gradients_pass_through_packed_experts() -> None:
    dense = tiny_model("qwen3_moe")
    packed = tiny_model("qwen3_moe")
    from llmq.quantize import Recipe, quantize
    from llmq.solvers.rtn import RTN

    list(quantize(packed, [tiny_ids()], Recipe(QuantScheme(8, 32, True), RTN())))
    grads = []
    for model in (dense, packed):
        embedded = model.get_input_embeddings()(tiny_ids()).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        assert embedded.grad is not None
        grads.append(embedded.grad)
    cosine = F.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0)
    assert cosine > 0.99


def test_training_moves_only_the_adapter(model) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = get_peft_model(prepare_for_training(model), lora(target_modules="all-linear"))
    layers = [m for m in wrapped.modules() if isinstance(m, PackedLora)]
    assert len(layers) == 14
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    ids, losses = tiny_ids(), []
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
    wrapped.train()
    for _step in range(6):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in wrapped.named_parameters():
        if "lora_" not in name:
            bare = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[bare])


def test_checkpointing_changes_no_gradient(folders) -> None:
    grads = []
    for checkpointing in (False, True):
        model = prepare_for_training(hf.load(folders[1]), checkpointing)
        torch.manual_seed(0)
        wrapped = get_peft_model(model, lora(init_lora_weights=False))
        wrapped.train()
        ids = tiny_ids()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in wrapped.parameters() if p.requires_grad])
    assert len(grads[0]) == 28
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_an_adapter_comes_back_as_it_was(model, folders, tmp_path) -> None:
    wrapped = get_peft_model(model, lora(init_lora_weights=False))
    wrapped.eval()
    ids = tiny_ids()
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        with wrapped.disable_adapter():
            plain = wrapped(input_ids=ids).logits
    assert not torch.equal(expected, plain)
    wrapped.save_pretrained(tmp_path)
    fresh = hf.load(folders[1])
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, plain)
        again = load_adapter(fresh, tmp_path)(input_ids=ids).logits
    assert torch.equal(again, expected)


def test_the_trainer_takes_a_step(model, tmp_path) -> None:
    wrapped = get_peft_model(model, lora())
    ids = tiny_ids(4)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=wrapped, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    assert trainer.train().global_step == 2
    B = [p for name, p in wrapped.named_parameters() if "lora_B" in name]
    assert any(bool(p.abs().sum() > 0) for p in B)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"lora_bias": True}])
def test_what_packed_layers_do_not_have(model, change) -> None:
    with pytest.raises(SchemeError, match="plain LoRA"):
        get_peft_model(model, lora(**change))


def test_merging_is_refused(model) -> None:
    wrapped = get_peft_model(model, lora())
    with pytest.raises(SchemeError, match="cannot be merged"):
        wrapped.merge_and_unload()
    with pytest.raises(SchemeError, match="no packed linear"):
        get_peft_model(tiny_model("llama"), lora())


@pytest.mark.parametrize("change", [{"intermediate_size": 256}, {"num_hidden_layers": 3}])
def test_an_adapter_of_another_model_is_refused(change, folders, tmp_path, text) -> None:
    other = save_tiny("llama", tmp_path / "other", **change)
    llmq.quantize(other, tmp_path / "packed", method="rtn", calibration=str(text), **SMALL)
    get_peft_model(hf.load(tmp_path / "packed"), lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FormatError, match="an adapter of another base model"):
        load_adapter(hf.load(folders[1]), tmp_path / "adapter")
    with pytest.raises(SourceError, match="no LoRA adapter"):
        load_adapter(hf.load(folders[1]), tmp_path / "nothing")


def test_a_low_rank_correction_is_the_best_there_is() -> None:
    """Against the Eckart-Young bound in float64, and against perturbations."""
    generator = torch.Generator().manual_seed(0)
    E = torch.randn(20, 12, generator=generator, dtype=torch.float64)
    X = torch.randn(300, 12, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
    H = X.T @ X / 300
    A, B = low_rank(E, H, 5)
    assert (A.shape, B.shape) == ((5, 12), (20, 5))

    def loss(A, B):
        return float((X @ (E - B.double() @ A.double()).T).square().sum() / 300)

    root = torch.linalg.cholesky(H)
    bound = float(torch.linalg.svdvals(E @ root)[5:].square().sum())
    assert loss(A, B) == pytest.approx(bound, rel=1e-5)
    for _trial in range(20):
        noise = 1e-2 * torch.randn(A.shape, generator=generator)
        assert loss(A + noise, B) > bound
    dead = H.clone()
    dead[3], dead[:, 3] = 0, 0  # an input that is always zero
    assert all(part.isfinite().all() for part in low_rank(E, dead, 5))
    A, B = low_rank(E, H, 16)  # more than there is
    torch.testing.assert_close((B @ A).double(), E, rtol=0, atol=1e-5)


def test_a_correction_brings_the_logits_closer(folders, tmp_path) -> None:
    source, packed = folders
    original = hf.load(source)
    ids = tiny_ids(16, 64)
    out = correct(original, hf.load(packed), ids, tmp_path / "adapter", rank=16)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (16, 16, "LORA")
    plain, corrected = hf.load(packed), load_adapter(hf.load(packed), out)
    kls = []
    with torch.no_grad():
        held_out = tiny_ids(8, 64, seed=9)
        p = F.log_softmax(original(held_out).logits, -1)
        for model in (plain, corrected):
            q = F.log_softmax(model(input_ids=held_out).logits, -1)
            kls.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert kls[1] < 0.6 * kls[0]
    # peft alone loads it, onto the dequantized model, with the same result
    dense = plain.dequantize()
    stock = peft.PeftModel.from_pretrained(dense, str(out))
    with torch.no_grad():
        mine, theirs = (m(input_ids=held_out).logits for m in (corrected, stock))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_corrections_of_what_does_not_belong_together(folders, tmp_path, text) -> None:
    source, packed = folders
    ids = tiny_ids(2, 32)
    for other, message in (
        (tiny_model("llama", intermediate_size=256), "in the original and"),
        (tiny_model("gpt2"), "no such layer"),
    ):
        with pytest.raises(SourceError, match=message):
            correct(other, hf.load(packed), ids, tmp_path / "x")
    with pytest.raises(SchemeError, match="no rounding of the original"):
        correct(tiny_model("llama", seed=5), hf.load(packed), ids, tmp_path / "x")
    with pytest.raises(SchemeError, match="rank=0"):
        correct(hf.load(source), hf.load(packed), ids, tmp_path / "x", rank=0)
    assert not (tmp_path / "x").exists()
