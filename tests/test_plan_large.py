"""`llmq plan` for models that no test could write: their files are headers with a hole behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoConfig

from llmq import api

ROOT = Path(__file__).parents[1]
NAMES = {torch.bfloat16: "BF16", torch.int32: "I32", torch.int64: "I64"}
SHARD = 5 * 10**9
SEVENTY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
}


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """How the format's own library begins a file: wide types first, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor, end = tensors[name], offset + tensors[name].nbytes
        span = [offset, end]
        dtype, shape = NAMES[tensor.dtype], list(tensor.shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def matrices(sizes: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Every matrix that is quantized, as a checkpoint names it."""
    D, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    head = sizes.get("head_dim", D // heads)
    narrow = sizes["num_key_value_heads"] * head
    found = {}
    for i in range(sizes["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        found[f"{attention}.q_proj"] = (heads * head, D)
        found[f"{attention}.k_proj"] = found[f"{attention}.v_proj"] = (narrow, D)
        found[f"{attention}.o_proj"] = (D, heads * head)
        experts = sizes.get("num_experts")
        inner = sizes["moe_intermediate_size" if experts else "intermediate_size"]
        for each in [f"{mlp}.experts.{e}" for e in range(experts)] if experts else [mlp]:
            found[f"{each}.gate_proj"] = found[f"{each}.up_proj"] = (inner, D)
            found[f"{each}.down_proj"] = (D, inner)
    return found


def checkpoint(sizes: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors in bfloat16, on meta, in the order in which a model has them."""
    D, V = sizes["hidden_size"], sizes["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    own = matrices(sizes)
    for i in range(sizes["num_hidden_layers"]):
        block = f"model.layers.{i}"
        shapes |= {f"{n}.weight": s for n, s in own.items() if n.startswith(f"{block}.")}
        if "num_experts" in sizes:
            shapes[f"{block}.mlp.gate.weight"] = (sizes["num_experts"], D)
            head = (sizes["head_dim"],)
            shapes |= {f"{block}.self_attn.{x}_norm.weight": head for x in "qk"}
        shapes |= {f"{block}.{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (D,), "lm_head.weight": (V, D)}
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in shapes.items()
    }


def write(folder: Path, sizes: Mapping[str, Any]) -> Path:
    """A checkpoint without weights; its files have the right lengths and take no room."""
    folder.mkdir()
    kind = sizes["model_type"]
    rest = {key: value for key, value in sizes.items() if key != "model_type"}
    config = AutoConfig.for_model(
        kind, max_position_embeddings=8192, tie_word_embeddings=False, dtype="bfloat16", **rest
    )
    config.architectures = ["LlamaForCausalLM" if kind == "llama" else "Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    tensors = checkpoint(sizes)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD)
    for name, keys in split.filename_to_tensors.items():
        own = {key: tensors[key] for key in keys}
        start = header(own)
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(len(start) + sum(tensor.nbytes for tensor in own.values()))
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def quantized_bytes(sizes: Mapping[str, Any]) -> int:
    """Files and index of the result at 4 bits in symmetric groups of 128, reckoned anew."""
    tensors: dict[str, Tensor] = {}
    own = matrices(sizes)
    for key, tensor in checkpoint(sizes).items():
        name = key.removesuffix(".weight")
        if name not in own:
            tensors[key] = tensor
            continue
        N, K = own[name]
        shapes = {
            "packed": ((N, K // 8), torch.int32),
            "scale": ((N, K // 128), torch.bfloat16),
            "shape": ((2,), torch.int64),
        }
        for suffix, (shape, dtype) in shapes.items():
            tensors[f"{key}_{suffix}"] = torch.empty(shape, dtype=dtype, device="meta")
    numbers = {key: [part.zfill(4) for part in re.split(r"(\d+)", key)] for key in tensors}
    tensors = {key: tensors[key] for key in sorted(tensors, key=numbers.__getitem__)}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD)
    files = [{key: tensors[key] for key in keys} for keys in split.filename_to_tensors.values()]
    total = sum(len(header(file)) + sum(t.nbytes for t in file.values()) for file in files)
    where = dict(sorted(split.tensor_to_filename.items()))
    index = json.dumps({"metadata": split.metadata, "weight_map": where}, indent=2)
    return total + len(index) + 1


def slowness() -> float:
    """How many times longer plain Python takes here and now than where the limits were set."""
    start = time.process_time()
    table = {f"model.layers.{i}": {"shape": [i, 1], "dtype": "BF16"} for i in range(25_000)}
    assert json.loads(json.dumps(table)) == table
    return max(1.0, (time.process_time() - start) / 0.12)


def normal_seconds(run: Callable[[], Any], clock: Callable[[], float]) -> tuple[Any, float]:
    """What `run` gives, and its CPU seconds; those of a slow or a busy machine are worth less."""
    before = slowness()
    start = clock()
    found = run()
    taken = clock() - start
    return found, taken / max(before, slowness())


def test_eighty_layers_in_under_five_seconds(tmp_path: Path) -> None:
    source = write(tmp_path / "model", SEVENTY)
    assert sum(path.stat().st_size for path in source.iterdir()) > 140e9
    assert sum(path.stat().st_blocks * 512 for path in source.iterdir()) < 10e6
    options: dict[str, Any] = {"out": tmp_path / "out", "tensor_parallel": (1, 2, 4, 8)}
    found, taken = normal_seconds(
        lambda: api.plan(source, device="cpu", **options), time.process_time
    )
    assert taken < 5
    assert found.parameters == 70_553_706_496
    assert found.matrices == 560
    assert found.output_bytes == quantized_bytes(SEVENTY)
    assert found.outlook
    assert found.outlook.memory_bytes < 80e9


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SEVENTY, MIXTURE], ids=["dense", "experts"])
def test_the_whole_command_in_under_five_seconds(sizes: dict[str, Any], tmp_path: Path) -> None:
    """Of one processor, the start of Python and its libraries included."""
    source = write(tmp_path / "model", sizes)
    command = [sys.executable, "-m", "llmq", "plan", str(source), "--device", "cpu", "--json"]
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done, taken = normal_seconds(
        lambda: subprocess.run(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True
        ),
        lambda: sum(os.times()[2:4]),  # of processes that have ended
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["output_bytes"] == quantized_bytes(sizes)
    assert taken < 5, taken
