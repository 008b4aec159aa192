"""Faults that are put in on purpose: each is caught with its cause named, or repaired.

Whatever happens, no folder appears that looks finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import short_files
from safetensors.torch import load_file, save_file
from zoo import save_tiny, tiny_text

from llmq import api, gate, pipeline, stream
from llmq.errors import (
    CalibrationError,
    FormatError,
    IntegrityError,
    LlmqError,
    MemoryLimitError,
    NonFiniteError,
    OutputError,
    SourceError,
)
from llmq.formats import compressed_tensors
from llmq.journal import Workplace, workplace
from llmq.nn import PackedLinear
from llmq.scheme import QuantizedWeight
from llmq.solvers.gptq import GPTQ
from llmq.verify import check

OPTIONS: dict[str, Any] = {
    "method": "gptq",
    "group_size": 64,
    "samples": 4,
    "seq_len": 48,
    "device": "cpu",
}
TEXT = [tiny_text(300)]
UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("faults") / "model", torch.bfloat16)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def caught(tmp_path: Path) -> Callable[..., str]:
    """Quantize `src`, which must fail with `error` and leave no folder; the message."""

    def caught(src: Path, error: type[LlmqError], words: str, **options: Any) -> str:
        out = options.pop("out", tmp_path / "out")
        with pytest.raises(error, match=words) as raised:
            api.quantize(src, out, **{"calibration": TEXT, **OPTIONS, **options})
        assert not Path(out).exists()
        return str(raised.value)

    return caught


def change(folder: Path, edit: Callable[[Tensors], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sharded(folder: Path) -> list[Path]:
    """Split the weights of a folder into files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for half in range(2):
        name = f"model-{half + 1:05}-of-00002.safetensors"
        part = {k: v for i, (k, v) in enumerate(tensors.items()) if i % 2 == half}
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sorted(folder.glob("model-*.safetensors"))


def interrupted(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A run that was stopped after its first block."""
    flow = pipeline.quantize

    def stopping(*arguments: Any) -> Any:
        for count, report in enumerate(flow(*arguments)):
            if count == 8:  # a Llama block has seven matrices
                raise KeyboardInterrupt
            yield report

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize", stopping)
        with pytest.raises(KeyboardInterrupt):
            api.quantize(model, out, calibration=TEXT, **OPTIONS)
    assert not out.exists()
    work = Workplace(out)
    assert work.started() == 1
    return work


# The source


def test_a_nan_weight(model, caught):
    change(model, lambda tensors: tensors[UP].__setitem__((3, 5), float("nan")))
    words = rf"model.safetensors: {UP}: 1 of 24576 values are NaN or infinite, the first at \[3, 5"
    caught(model, NonFiniteError, words)


def test_an_infinite_weight_in_the_embeddings(model, caught):
    key = "model.embed_tokens.weight"
    change(model, lambda tensors: tensors[key].__setitem__((9, slice(None)), float("-inf")))
    caught(model, NonFiniteError, rf"{key}: 128 of 49152 values .* first at \[9, 0\]")


def test_a_truncated_shard(model, caught):
    path = sharded(model)[1]
    path.write_bytes(path.read_bytes()[:-100])
    caught(model, FormatError, r"model-00002-of-00002.safetensors: damaged")


def test_a_missing_shard(model, caught):
    sharded(model)[1].unlink()
    caught(model, FormatError, r"model-00002-of-00002.safetensors: missing")


def test_a_damaged_index(model, caught):
    sharded(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": [')
    caught(model, FormatError, r"index.json: damaged")


def test_a_missing_tensor(model, caught):
    change(model, lambda tensors: tensors.pop(UP))
    caught(model, FormatError, UP)


def test_a_wrong_shape(model, caught):
    change(model, lambda tensors: tensors.update({UP: tensors[UP][:64].clone()}))
    caught(model, SourceError, rf"{UP} has shape \(64, 128\)")


def test_a_corrupt_header(model, caught):
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[20:40] = bytes(20)
    path.write_bytes(content)
    caught(model, FormatError, r"model.safetensors: damaged")


def test_weights_in_a_format_that_is_not_read(model, caught):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    caught(
        model, SourceError, r"holds no model\.safetensors\. Load the model with transformers and"
    )


def test_a_source_that_changes_between_two_runs(model, caught, tmp_path, monkeypatch):
    work = interrupted(model, tmp_path / "out", monkeypatch)
    change(model, lambda tensors: tensors[UP].mul_(2))
    caught(model, OutputError, "source weights changed")
    assert work.started() == 1


def test_a_source_that_changes_during_a_run(model, caught, monkeypatch):
    flow = pipeline.quantize

    def meanwhile(*arguments: Any) -> Any:
        for count, report in enumerate(flow(*arguments)):
            if count == 2:
                path = model / "model.safetensors"
                path.write_bytes(path.read_bytes())
            yield report

    monkeypatch.setattr(pipeline, "quantize", meanwhile)
    caught(model, FormatError, "has changed while")


# The text


def test_the_tokenizer_of_another_model(model, caught):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        change(model, lambda tensors, key=key: tensors.update({key: tensors[key][:100].clone()}))
    caught(model, CalibrationError, "Use this model's own tokenizer")


def test_empty_text(model, caught):
    caught(model, CalibrationError, "0 tokens", calibration=[""])


def test_text_that_repeats_itself(model, caught):
    ids = torch.arange(2, 50).repeat(8)
    caught(model, CalibrationError, "Only 1 of 4 calibration windows", calibration=ids)


# The model


def test_an_exploding_activation(model, caught):
    change(model, lambda tensors: tensors[UP].fill_(3e38))
    caught(model, NonFiniteError, r"model\.layers\.1\.mlp\.down_proj: its input is NaN or inf")


def test_an_activation_that_explodes_but_stays_finite(model, caught):
    """A damaged exponent: the last matrix of a block is far too large."""
    key = "model.layers.1.mlp.down_proj.weight"
    change(model, lambda tensors: tensors[key].mul_(1e12))
    caught(model, NonFiniteError, r"model\.layers\.1: its output is .* times as large as its input")


def test_an_output_that_explodes_behind_the_last_matrix(model, caught):
    key = "model.layers.1.mlp.down_proj.weight"
    change(model, lambda tensors: tensors[key].fill_(3e38))
    caught(model, NonFiniteError, r"model\.layers\.1: its output is NaN or infinite")


def test_a_layer_of_zeros_is_no_fault(model, tmp_path):
    change(model, lambda tensors: tensors[UP].zero_())
    report = api.quantize(model, tmp_path / "out", calibration=TEXT, **OPTIONS)
    [layer] = [x for x in report["layers"] if x["name"] == UP.removesuffix(".weight")]
    assert layer["error"] == 0
    check(tmp_path / "out")


def test_dead_experts_are_solved_with_what_the_others_saw(tmp_path):
    """Two tokens, of which each goes to two of sixteen experts."""
    folder = save_tiny("qwen3_moe", tmp_path / "model", num_experts=16)
    options: dict[str, Any] = OPTIONS | {"samples": 1, "seq_len": 2}
    report = api.quantize(folder, tmp_path / "out", calibration=TEXT, **options)
    assert all(len(layer["starved"]) == 16 for layer in report["expert_coverage"])
    assert all(layer["fewest_tokens"] == 0 for layer in report["expert_coverage"])
    assert all(layer["error"] < 0.1 for layer in report["layers"])
    check(tmp_path / "out")


# The machine


def test_a_full_disk(model, caught, tmp_path):
    """The operating system refuses to let a file grow, as a full disk or a quota does."""
    with short_files(20_000):
        caught(model, OutputError, "cannot be written: File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_full_in_the_end_and_then_is_not(model, caught, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(stream, "write_companions", full)
        caught(model, OutputError, "No space left on device. Free some space")
    assert Workplace(tmp_path / "out").started() == 2
    api.quantize(model, tmp_path / "out", calibration=TEXT, **OPTIONS)
    check(tmp_path / "out")


def test_a_place_where_nothing_can_be_written(model, caught):
    caught(model, OutputError, "cannot be created", out="/proc/llmq/out")


def test_a_lack_of_memory_in_a_solver(model, caught, tmp_path, monkeypatch):
    solve = GPTQ.solve
    seen = []

    def hungry(self: GPTQ, *arguments: Any) -> QuantizedWeight:
        seen.append(1)
        if len(seen) >= 6:  # in the second block: four groups to a block
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return solve(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GPTQ, "solve", hungry)
        caught(model, MemoryLimitError, "Out of memory .* --activations disk")
    assert Workplace(tmp_path / "out").started() == 1
    api.quantize(model, tmp_path / "out", calibration=TEXT, activations="disk", **OPTIONS)


def test_two_writers(model, caught, tmp_path):
    with workplace(tmp_path / "out"):
        caught(model, OutputError, "another process is writing it")


# What an unfinished run has left


def test_a_damaged_journal(model, caught, tmp_path, monkeypatch):
    work = interrupted(model, tmp_path / "out", monkeypatch)
    path = work.folder / "journal.json"
    path.write_text(path.read_text().replace("gptq", "GPTQ"))
    caught(model, OutputError, "journal.json is damaged .* Start over with --fresh")
    api.quantize(model, tmp_path / "out", calibration=TEXT, fresh=True, **OPTIONS)


@pytest.mark.parametrize("pattern", ["part-*.safetensors", "stream-*.bin"])
def test_a_damaged_file_of_an_unfinished_run(model, caught, tmp_path, monkeypatch, pattern):
    work = interrupted(model, tmp_path / "out", monkeypatch)
    path = sorted(work.folder.glob(pattern))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    caught(model, OutputError, rf"{path.name} is not what the journal says.* --fresh")


# llmq itself, or the arithmetic of the machine


def test_packing_that_flips_a_bit(model, caught, monkeypatch):
    pack_bits = compressed_tensors.pack_bits

    def flipping(*arguments: Any, **options: Any) -> torch.Tensor:
        packed = pack_bits(*arguments, **options)
        packed[0, 0] ^= 4
        return packed

    monkeypatch.setattr(compressed_tensors, "pack_bits", flipping)
    caught(model, IntegrityError, r"layers\.0\..*weight_packed on disk is not what was solved")


def test_scales_that_are_lost_on_the_way(model, caught, monkeypatch):
    from_quantized = PackedLinear.from_quantized.__func__  # type: ignore[attr-defined]

    def losing(cls: Any, q: QuantizedWeight, bias: Any = None) -> PackedLinear:
        layer = from_quantized(cls, q, bias)
        layer.weight_scale.data = layer.weight_scale.data * 2
        return layer

    monkeypatch.setattr(PackedLinear, "from_quantized", classmethod(losing))
    caught(model, IntegrityError, r"weight_scale on disk is not what was solved")


def test_a_solver_that_returns_nan(model, caught, monkeypatch):
    solve = GPTQ.solve

    def failing(self: GPTQ, *arguments: Any) -> QuantizedWeight:
        q = solve(self, *arguments)
        q.scale[0] = float("nan")
        return q

    monkeypatch.setattr(GPTQ, "solve", failing)
    caught(model, IntegrityError, r"layers\.0\.self_attn\.\w+: its quantized weight is NaN")


def test_a_solver_that_is_worse_than_nothing(model, caught, monkeypatch):
    solve = GPTQ.solve

    def failing(self: GPTQ, *arguments: Any) -> QuantizedWeight:
        q = solve(self, *arguments)
        q.codes.copy_(q.codes.roll(1, 1))
        return q

    monkeypatch.setattr(GPTQ, "solve", failing)
    caught(model, IntegrityError, r"zeros would do as well")


def test_a_model_that_only_fails_as_a_whole(model, caught, tmp_path, monkeypatch):
    """Every layer has an error that could be, but together they are off."""
    monkeypatch.setattr(gate, "SLACK", 0.001)  # the blocks of a random model matter little
    solve = GPTQ.solve

    def failing(self: GPTQ, W: torch.Tensor, H: torch.Tensor, scheme: Any) -> QuantizedWeight:
        q = solve(self, W, H, scheme)
        q.scale.mul_(1.5)
        return q

    monkeypatch.setattr(GPTQ, "solve", failing)
    line = caught(model, IntegrityError, "nats per token from the original on 48 held-out tokens")
    assert "plain rounding is" in line
    log = (Workplace(tmp_path / "out").folder / "quantization_log.jsonl").read_text()
    assert json.loads(log.splitlines()[-1])["reason"] == "IntegrityError"


# What was delivered


def test_a_result_that_was_damaged_later(run, model, tmp_path):
    out = tmp_path / "out"
    api.quantize(model, out, calibration=TEXT, **OPTIONS)
    status, stdout, _ = run("verify", out)
    assert status == 0
    assert "as they were written" in stdout
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    status, _, stderr = run("verify", out)
    assert status == 1
    assert "model.safetensors: is not the file that was written" in stderr
    path.unlink()
    assert "model.safetensors: missing" in run("verify", out)[2]
    assert "holds no checksums" in run("verify", model)[2]
