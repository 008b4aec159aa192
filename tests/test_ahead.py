"""The next block is read while one is worked on: one, no more, and no thread is left behind."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import save_tiny, tiny_text

from llmq import adapters, api, pipeline
from llmq.adapters import run_copy, run_dtype
from llmq.ahead import Ahead, read_ahead
from llmq.blocks import replaced
from llmq.errors import SourceError
from llmq.hf.streaming import StoredModel
from llmq.ladder import METHODS
from llmq.needs import memory
from llmq.verify import CHECKSUMS

LONG = 100  # seconds, for what another thread does at once on any machine


class Reader:
    """Tells what it read, when, in which thread; some blocks fail."""

    def __init__(self, bad: dict[int, Exception] | None = None) -> None:
        self.bad = bad or {}
        self.seen: list[tuple[int, str]] = []
        self.blocks: list[weakref.ref[nn.Module]] = []
        self.was_read = {i: threading.Event() for i in range(9)}

    def __call__(self, index: int) -> nn.Module:
        self.seen.append((index, threading.current_thread().name))
        self.was_read[index].set()
        if index in self.bad:
            raise self.bad[index]
        block = nn.Linear(2, 2, device="meta")
        self.blocks.append(weakref.ref(block))
        return block

    def alive(self, most: int) -> bool:
        """Whether no more blocks than that are in memory, as soon as the thread rests."""
        end = time.monotonic() + LONG
        while sum(block() is not None for block in self.blocks) > most:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if "reads-ahead" in t.name]


def test_the_next_block_is_there_before_it_is_asked_for() -> None:
    reader = Reader()
    with read_ahead(reader, 4, "meta") as read:
        for index in range(4):
            block = read(index)
            if index < 3:
                assert reader.was_read[index + 1].wait(LONG)  # nobody has asked for it
            assert reader.alive(2)
            del block
    assert [index for index, _ in reader.seen] == [0, 1, 2, 3]
    assert [thread.startswith("llmq-reads-ahead") for _, thread in reader.seen[1:]] == [True] * 3
    assert reader.alive(0)
    assert not threads()


def test_blocks_out_of_their_order() -> None:
    """A run that goes on looks at block 0, then at a later one; a new one at block 0 twice."""
    for order in ([0, 0, 1, 2], [0, 5, 6]):
        reader = Reader()
        ahead = Ahead(reader, 8)
        for index in order:
            block = ahead.block(index)
            assert reader.was_read[index].is_set()
            assert reader.was_read[index + 1].wait(LONG)
            del block
            assert reader.alive(1)
        ahead.close()
        assert reader.alive(0)
        assert max(index for index, _ in reader.seen) == order[-1] + 1


def test_what_fails_in_the_thread_is_raised_in_the_flow() -> None:
    reader = Reader({2: SourceError("model.layers.2.* cannot be read: gone")})

    def run() -> None:
        with read_ahead(reader, 5, "meta") as read:
            for index in range(5):
                read(index)

    with pytest.raises(SourceError, match=r"layers\.2\.\* cannot be read: gone"):
        run()
    assert [index for index, _ in reader.seen] == [0, 1, 2]
    assert not threads()


def test_an_interrupted_run_waits_for_the_thread() -> None:
    reader, begun, release = Reader(), threading.Event(), threading.Event()

    def slow(index: int) -> nn.Module:
        if index == 1:
            begun.set()
            assert release.wait(LONG)
        return reader(index)

    def run() -> None:
        with read_ahead(slow, 5, "meta") as read:
            read(0)
            assert begun.wait(LONG)
            threading.Timer(0.2, release.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not threads()
    assert reader.alive(0)


def test_on_a_cpu_nothing_is_read_ahead() -> None:
    reader = Reader()
    with read_ahead(reader, 5, "cpu") as read:
        assert read is reader


OPTIONS: dict[str, Any] = {"method": "gptq", "group_size": 64, "samples": 4, "seq_len": 64}


def test_a_run_that_reads_ahead_writes_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    source = save_tiny("llama", tmp_path / "model", torch.bfloat16, num_hidden_layers=3)
    options = OPTIONS | {"calibration": [tiny_text(300)], "device": "cpu"}
    api.quantize(source, tmp_path / "a", **options)
    seen: list[int] = []

    def noted(read: Any, count: int, device: str) -> Any:
        return read_ahead(lambda i: seen.append(i) or read(i), count, "meta")

    monkeypatch.setattr(pipeline, "read_ahead", noted)
    api.quantize(source, tmp_path / "b", **options)
    assert sorted(set(seen)) == [0, 1, 2]
    assert (tmp_path / "a" / CHECKSUMS).read_text() == (tmp_path / "b" / CHECKSUMS).read_text()


def test_a_folder_that_goes_away(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "model")
    stored = StoredModel(source)
    with replaced(stored.blocks, [nn.Identity(), nn.Identity()]):  # while calls are recorded
        assert stored.block(1).self_attn.q_proj.weight.shape == (128, 128)  # type: ignore[union-attr]
    (source / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model\.layers\.1\.\* cannot be read: .* goes on when"):
        stored.block(1)


def test_a_copy_to_run_is_of_its_own() -> None:
    block = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).half()
    block[0].weight = nn.Parameter(torch.randn(4, 3).T.half())  # a view, as of a Conv1D
    copy = run_copy(block, torch.device("cpu"))
    for (name, a), (_, b) in zip(
        block.state_dict().items(), copy.state_dict().items(), strict=True
    ):
        assert a.data_ptr() != b.data_ptr(), name
        assert a.stride() == b.stride(), name
        learned = name in dict(block.named_parameters())
        assert b.dtype == (run_dtype(a.dtype, a.device) if learned else a.dtype), name
        assert torch.equal(b, a.to(b.dtype)), name


def test_memory_that_is_read_ahead_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_cpu_multiplies", lambda dtype: True)
    from test_plan import big_llama, job_of  # the same model

    from llmq import outlook
    from llmq.hf.outline import outline

    config, _ = big_llama(4)
    shape = outlook.shape(outline(config, torch.bfloat16), METHODS["gptq"])
    jobs = [
        outlook.job(METHODS["gptq"], 128, 512, False, False, device) for device in ("cpu", "cuda")
    ]
    assert jobs[0] == job_of(METHODS["gptq"])
    for one, two in zip(*(memory(shape, job) for job in jobs), strict=True):
        more = two.on_host - one.on_host
        assert one.device == two.device
        outside = one.name in ("checking the source", "comparing logits", "ending")
        assert more == (0 if outside else 2 * shape.block_bytes)
    most = max(phase.on_host for phase in memory(shape, jobs[1]))
    assert most < 3 * shape.block_bytes  # the packed block among them
