"""8 bits per weight through the whole flow: quantize, load, stock transformers, other layouts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from llmq import api, demo, hf, measure
from llmq.convert import convert
from llmq.gguf_file import write_gguf
from llmq.stored import inspect_checkpoint

STOCK = """
import sys, torch, zoo
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error()
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.save(model(zoo.tiny_ids(seed=1)).logits, folder + "/stock.pt")
assert "compressed_tensors" in sys.modules and "llmq" not in sys.modules
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model at 8 bits: a scale per row, per group, and per group with zero points."""
    root = tmp_path_factory.mktemp("int8")
    settings: dict[str, Any] = {
        "channel": {"group_size": -1, "method": "gptq"},
        "group": {"group_size": 64},
        "zeros": {"group_size": 128, "symmetric": False, "quality": "fast"},
    }
    for name, options in settings.items():
        api.quantize(demo.model_path(), root / name, bits=8, samples=4, seq_len=64, **options)
    return {name: root / name for name in settings}


def test_8_bits_lose_next_to_nothing(checkpoints):
    for name, folder in checkpoints.items():
        found = measure.evaluate(folder, windows=4, seq_len=128, reference=demo.model_path())
        assert found.kl is not None
        assert found.kl < 1e-3, name
        assert found.top1 is not None
        assert found.top1 > 0.95, name


def test_what_is_stored(checkpoints):
    expected = {
        "channel": ("int8 row symmetric", 8 + 16 / 128),
        "group": ("int8 g64 symmetric", 8 + 16 / 64),
        "zeros": ("int8 g128 asymmetric", 8 + (16 + 8) / 128),
    }
    for name, (label, bits) in expected.items():
        rows = {row.name: row for row in inspect_checkpoint(checkpoints[name])}
        row = rows["model.layers.0.self_attn.q_proj"]
        assert row.scheme == label
        shape = 16 / row.weights * 8  # weight_shape
        assert 8 * row.bytes / row.weights == pytest.approx(bits + shape)


@torch.no_grad()
def test_stock_transformers_reads_them(checkpoints):
    folders = [str(checkpoints[name]) for name in ("channel", "group")]
    path = os.pathsep.join([str(Path(zoo.__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", STOCK, *folders],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for folder in folders:
        logits = hf.load(folder, backend="torch")(zoo.tiny_ids(seed=1)).logits
        assert torch.equal(torch.load(f"{folder}/stock.pt"), logits)


def test_other_layouts(checkpoints, tmp_path):
    assert convert(checkpoints["channel"], tmp_path / "gptq", "gptq").rounded_scales == 0
    ids = zoo.tiny_ids(seed=1)
    with torch.no_grad():
        found, wanted = (
            hf.load(folder, backend="torch")(ids).logits
            for folder in (tmp_path / "gptq", checkpoints["channel"])
        )
    assert torch.equal(found, wanted)
    for name in ("channel", "group"):
        done = write_gguf(checkpoints[name], tmp_path / f"{name}-gguf")
        assert done.notes[0] == "35 matrices in Q8_0"
        assert done.rounded_scales == 0
