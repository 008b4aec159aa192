"""Decoding with a static cache finds the tokens that `generate` finds."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from zoo import ARCHITECTURES, save_tiny, tiny_ids, tiny_model

from llmq import decode as module, generate, graph
from llmq.decode import Decoder, decode, why_not
from llmq.errors import BackendError
from llmq.fuse import fuse_shared_inputs
from llmq.nn import PackedLinear, prepare
from llmq.scheme import QuantScheme
from llmq.source import open_model, open_tokenizer

NEW = 20


def plain(model: Any, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=model.generation_config.pad_token_id or 0,
    )


def packed(name: str) -> Any:
    """float32, so that rounding does not decide between tokens."""
    model: Any = tiny_model(name, torch.float32)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            model.set_submodule(path, PackedLinear.from_linear(layer, QuantScheme(4, 32)))
    prepare(model)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_tokens_as_generate(name: str) -> None:
    """Longer than the sliding windows of those that have them."""
    model: Any = tiny_model(name, torch.float32)
    ids = tiny_ids(2, 7)
    found = decode(model, ids, NEW)
    assert torch.equal(found, plain(model, ids))
    assert len(found.unique()) > 3  # not the same token again and again


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_compiled_packed_and_fused(name: str) -> None:
    model = packed(name)
    ids = tiny_ids(2, 5)
    expected = plain(model, ids)
    assert fuse_shared_inputs(model, input_ids=ids) > 0
    mode = "eager" if name == "qwen3_moe" else "compiled"  # stock experts wait for their rows
    assert torch.equal(decode(model, ids, NEW, mode=mode, backend="aot_eager"), expected)


def test_a_decoder_is_used_again_for_another_prompt() -> None:
    model: Any = tiny_model("gemma3", torch.float32)
    decoder = Decoder(model, 40)
    for seed in (0, 1, 2):
        ids = tiny_ids(3, 9, seed=seed)
        decoder.prefill(ids)
        found = [decoder.token.clone()]
        for _ in range(11):
            decoder.step()
            found.append(decoder.token.clone())
        expected = plain(model, ids, 12)[:, 9:]
        for row, truth in zip(torch.cat(found, 1), expected, strict=True):
            ended = (truth == model.generation_config.eos_token_id).nonzero()
            end = int(ended[0]) + 1 if len(ended) else 12
            assert torch.equal(row[:end], truth[:end])


@pytest.mark.parametrize("both", [True, False])
def test_sequences_that_end_are_padded_and_cut(both: bool) -> None:
    model: Any = tiny_model("llama", torch.float32)
    ids = tiny_ids(2, 7)
    model.generation_config.eos_token_id = None
    free = plain(model, ids, 40)[:, 7:]
    ends = [int(free[0, 4])] + ([int(free[1, 9])] if both else [])
    assert both or ends[0] not in free[1]
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = 3
    found = decode(model, ids, 40)
    assert torch.equal(found, plain(model, ids, 40))
    assert found.shape[1] == 7 + (10 if both else 40)


def test_fast_generation_takes_the_same_tokens(monkeypatch, tmp_path) -> None:
    folder = save_tiny("llama", tmp_path / "model", torch.float32)
    model, tokenizer = open_model(str(folder)), open_tokenizer(str(folder))
    modes = []

    def eager(model, ids, new, *, mode):
        modes.append(mode)  # inductor would take a minute here
        return decode(model, ids, new)

    monkeypatch.setattr(generate, "decode", eager)
    fast = generate.generate(model, tokenizer, "The", 12, fast=True)
    assert fast == generate.generate(model, tokenizer, "The", 12)
    assert modes == ["compiled"]
    with pytest.raises(BackendError, match="--temperature"):
        generate.generate(model, tokenizer, "The", 12, fast=True, temperature=0.5)


def test_the_step_that_is_captured_has_run_twice_before(monkeypatch) -> None:
    """The order that CUDA graphs ask for, with stand-ins that keep to their rules."""
    model: Any = tiny_model("qwen3", torch.float32)
    ids = tiny_ids(2, 7)
    expected = plain(model, ids)
    log = []

    def captured(step, device):
        log.append("captured")  # capturing carries nothing out

        def replay() -> None:
            log.append("replayed")
            step()

        return replay

    def beside(step, device):
        log.append("beside")
        step()

    @contextmanager
    def without_waiting():
        log.append("no waiting")
        yield
        log.append("waiting")

    monkeypatch.setattr(module, "captured", captured)
    monkeypatch.setattr(module, "beside", beside)
    monkeypatch.setattr(module, "without_waiting", without_waiting)
    monkeypatch.setattr(module, "why_not", lambda model, mode: None)
    assert torch.equal(decode(model, ids, NEW, mode="graph"), expected)
    taken = expected.shape[1] - 7 - 1
    assert log == [
        "beside", "no waiting", "beside", "waiting", "captured", *["replayed"] * (taken - 2),
    ]  # fmt: skip


def test_a_step_that_waits_for_the_gpu_is_refused(monkeypatch) -> None:
    model: Any = tiny_model("llama", torch.float32)
    monkeypatch.setattr(module, "why_not", lambda model, mode: None)
    monkeypatch.setattr(module, "without_waiting", nullcontext)
    for text, expected in (
        ("called a synchronizing CUDA operation", BackendError),
        ("an illegal memory access was encountered", RuntimeError),
    ):

        def beside(step, device, text=text):
            raise RuntimeError(text)

        monkeypatch.setattr(module, "beside", beside)
        with pytest.raises(expected) as caught:
            decode(model, tiny_ids(1, 3), 4, mode="graph")
        assert ("mode='graph': a step of this model waits" in str(caught.value)) == (
            expected is BackendError
        )


def test_a_step_that_cannot_be_compiled_is_refused() -> None:
    model: Any = tiny_model("opt", torch.float32)  # counts its positions on the host
    with pytest.raises(BackendError, match="cannot be compiled by torch; use mode='eager'"):
        decode(model, tiny_ids(1, 3), 4, mode="compiled", backend="eager")


def test_capture_and_warm_up_keep_to_torchs_rules(monkeypatch) -> None:
    log: list[str] = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other) -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(what):
        log.append(f"enter {what}")
        yield
        log.append(f"leave {what}")

    main = Stream("main")
    cuda = SimpleNamespace(
        Stream=Stream,
        current_stream=lambda: main,
        stream=lambda stream: within(stream.name),
        device=lambda device: within(str(device)),
        synchronize=lambda: log.append("synchronize"),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        graph=lambda graph: within("capture"),
        get_sync_debug_mode=lambda: 1,
        set_sync_debug_mode=lambda mode: log.append(f"mode {mode}"),
    )
    monkeypatch.setattr(graph.torch, "cuda", cuda)
    device = torch.device("cuda", 1)
    graph.beside(lambda: log.append("step"), device)
    assert log == [
        "enter cuda:1", "side waits for main", "enter side", "step", "leave side",
        "main waits for side", "leave cuda:1",
    ]  # fmt: skip
    log.clear()
    with pytest.raises(RuntimeError, match="made up"), graph.without_waiting():
        raise RuntimeError("made up")
    assert log == ["mode 2", "mode 1"]
    log.clear()
    replay = graph.captured(lambda: log.append("step"), device)
    replay()
    assert log == [
        "enter cuda:1", "synchronize", "enter capture", "step", "leave capture", "leave cuda:1",
        "replay",
    ]  # fmt: skip


def test_what_cannot_be_decoded_so_is_refused() -> None:
    model: Any = tiny_model("llama", torch.float32)
    assert "need a CUDA GPU" in (why_not(model, "graph") or "")
    assert "use one of eager" in (why_not(model, "quick") or "")  # type: ignore[arg-type]
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    assert "different devices" in (why_not(model, "eager") or "")
    model.hf_device_map = {"": "cpu"}
    assert why_not(model, "eager") is None
    with pytest.raises(BackendError, match="mode='graph': the model is on cpu"):
        decode(model, tiny_ids(1, 3), 2, mode="graph")
    model.generation_config.repetition_penalty = 1.1
    with pytest.raises(BackendError, match=r"repetition_penalty=1\.1"):
        decode(model, tiny_ids(1, 3), 2)
    model.generation_config.repetition_penalty = 1.0
    model.generation_config.suppress_tokens = [5]
    with pytest.raises(BackendError, match="suppress_tokens"):
        decode(model, tiny_ids(1, 3), 2)
