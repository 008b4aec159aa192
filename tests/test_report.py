"""Reports, tables and the output folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmq import report, stored
from llmq.errors import FormatError, OutputError, SourceError
from llmq.formats import compressed_tensors
from llmq.output import staged_folder, writing
from llmq.scheme import QuantScheme, grouped, minmax_grid, round_to_grid


def write_checkpoint(folder: Path, scheme: QuantScheme) -> None:
    W = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    grid = minmax_grid(grouped(W, scheme), scheme, torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for index in (10, 2):
        q = round_to_grid(W, grid[0], grid[1], scheme, torch.bfloat16)
        q = replace(q, scale=q.scale.clone())
        tensors |= compressed_tensors.write(f"model.layers.{index}.fc", q)
    tensors["model.embed.weight"] = torch.zeros(10, 8, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    names = ["model.layers.2.fc", "model.layers.10.fc"]
    config = compressed_tensors.config({scheme: names}, [])
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


@pytest.mark.parametrize(
    "scheme",
    [QuantScheme(4, 32), QuantScheme(3, 64, True), QuantScheme(3, -1), QuantScheme(8, 128)],
)
def test_inspect_tells_every_layer_from_headers(tmp_path: Path, scheme: QuantScheme) -> None:
    write_checkpoint(tmp_path, scheme)
    layers = [{"name": "model.layers.2.fc", "error": 0.25}]
    report.write_report(tmp_path, {"layers": layers})
    second, tenth, others = stored.inspect_checkpoint(tmp_path)
    assert (second.name, tenth.name) == ("model.layers.2.fc", "model.layers.10.fc")
    assert second.shape == (32, 128)
    assert (second.error, tenth.error) == (0.25, None)
    group = "row" if scheme.group_size == -1 else f"g{scheme.group_size}"
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    assert second.scheme == f"int{scheme.bits} {group} {kind}"
    assert (others.weights, others.bytes, others.quantized) == (80, 160, False)
    shape_entry = 16 * 8 / (32 * 128)  # weight_shape: two int64
    bits = scheme.bits_per_weight(128) + shape_entry
    assert stored.bits_per_weight([second, tenth, others]) == pytest.approx(bits)


def test_bits_of_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 4, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert stored.bits_per_weight(stored.inspect_checkpoint(tmp_path)) == 16


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a folder with config"):
        stored.inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for damaged in (b"\xff" * 100, b"\x10" + b"\0" * 7 + b"x" * 20):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(FormatError, match="not a safetensors file"):
            stored.inspect_checkpoint(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        stored.inspect_checkpoint(tmp_path)


def test_a_layer_report_is_spelt_out() -> None:
    @dataclass(frozen=True)
    class Layer:
        name: str
        shape: tuple[int, int]
        scheme: QuantScheme
        error: float

    entry = report.layer_entry(Layer("fc", (2, 3), QuantScheme(3, 64), 0.5))
    assert entry == {
        "name": "fc",
        "shape": (2, 3),
        "bits": 3,
        "group_size": 64,
        "symmetric": False,
        "error": 0.5,
    }


def test_nan_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        report.write_report(tmp_path, {"error": float("nan")})


def test_numbers_for_people() -> None:
    assert report.with_error(12.3456, 0.0671, 2) == "12.35 +- 0.07"
    assert report.with_error(12.3456, None, 1) == "12.3"
    assert report.with_error(None, 1.0) == "-"
    sizes = [report.size(n) for n in (0, 999, 1000, 1_930_000, 5e12, 5e16)]
    assert sizes == ["0 B", "999 B", "1.00 kB", "1.93 MB", "5.00 TB", "50000 TB"]
    assert report.peak_memory_bytes("cpu") > 10_000_000


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with staged_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert os.listdir(out) == ["file"]
    assert os.listdir(tmp_path) == ["a"]


def test_an_empty_folder_may_be_filled_and_keeps_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "out" / "file").read_text() == "x"
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path, failure) -> None:
    def fill() -> None:
        with staged_folder(tmp_path / "a" / "b") as folder:
            (folder / "file").write_text("x")
            raise failure

    with pytest.raises(failure):
        fill()
    assert os.listdir(tmp_path) == []


def test_an_output_that_is_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out, message in ((tmp_path, "not empty"), (tmp_path / "file", "a file with this name")):
        with pytest.raises(OutputError, match=message), staged_folder(out):
            pass
    with pytest.raises(OutputError, match="cannot be created"), staged_folder("/proc/llmq"):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_an_output_error() -> None:
    def write() -> None:
        with writing("out"), open("/dev/full", "w") as stream:
            stream.write("x" * 100_000)

    with pytest.raises(OutputError, match="out: cannot be written: No space left on device"):
        write()
