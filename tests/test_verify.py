"""The unpacking that checks the packing, and the sums of what was delivered."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file

from llmq import shards
from llmq.errors import FormatError, NonFiniteError, SourceError
from llmq.formats.bits import pack_bits
from llmq.verify import CHECKSUMS, check, seal, unpack


@given(
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(0, 10**6),
)
def test_unpacks_what_is_packed(bits, rows, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    packed = pack_bits(torch.from_numpy(codes), bits).numpy()
    assert np.array_equal(unpack(packed, bits, columns), codes)


def test_files_are_those_of_the_safetensors_library(tmp_path):
    tensors = {
        "b.weight_packed": torch.arange(15, dtype=torch.int32).view(5, 3),
        "b.weight_shape": torch.tensor([5, 12]),
        "a.weight": torch.randn(3, 5).bfloat16(),
        "é": torch.randn(7),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(2, 2).half(),
        "flags": torch.tensor([True, False]),
    }
    digest = shards.write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == shards.file_hash(tmp_path / "ours")
    assert shards.file_bytes(tensors) == (tmp_path / "ours").stat().st_size


def test_files_are_put_together(tmp_path):
    parts = [{f"{x}{i}": torch.randn(3, i + 1) for i in range(4)} for x in "ab"]
    found = {}
    for number, part in enumerate(parts):
        shards.write(tmp_path / str(number), part)
        found |= shards.entries(tmp_path / str(number))
    chosen = {key: found[key] for key in ("b3", "a0", "b1")}
    digest = shards.combine(chosen, tmp_path / "whole")
    assert digest == shards.file_hash(tmp_path / "whole")
    whole = load_file(tmp_path / "whole")
    assert {k: v.tolist() for k, v in whole.items()} == {
        k: (parts[0] | parts[1])[k].tolist() for k in chosen
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_the_first_value_that_is_not_finite(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 64)  # several reads per tensor
    values = torch.zeros(40, 6)
    values[17, 4] = values[33, 1] = float("nan")
    shards.write(tmp_path / "model.safetensors", {"w": values.to(dtype), "a": torch.ones(3)})
    with pytest.raises(NonFiniteError, match=r"w: 2 of 240 values .* first at \[17, 4\]"):
        shards.check_source([tmp_path / "model.safetensors"])


def test_every_byte_counts(tmp_path):
    path = tmp_path / "model.safetensors"
    shards.write(path, {"w": torch.arange(8, dtype=torch.int32)})
    before = shards.check_source([path])
    assert before == shards.check_source([path])
    shards.write(path, {"w": torch.arange(1, 9, dtype=torch.int32)})
    assert before != shards.check_source([path])


def test_sums_are_those_of_sha256sum(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "template").write_text("hello")
    shards.write(tmp_path / "model.safetensors", {"w": torch.ones(2, 2)})
    seal(tmp_path, {})
    subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS], cwd=tmp_path, check=True)
    assert check(tmp_path) == ["config.json", "deep/template", "model.safetensors"]
    shards.write(tmp_path / "more.safetensors", {"x": torch.ones(2, 2)})
    with pytest.raises(FormatError, match=r"does not know more\.safetensors"):
        check(tmp_path)
    (tmp_path / "more.safetensors").unlink()
    (tmp_path / "deep" / "template").write_text("hallo")
    with pytest.raises(FormatError, match="template: is not the file that was written"):
        check(tmp_path)
    with pytest.raises(SourceError, match="no such folder"):
        check(Path("/nowhere"))
