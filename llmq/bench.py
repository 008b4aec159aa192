"""How fast a model reads and writes, and how near that is to what the memory allows.

    bench             a packed model, beside the original if there is one
    read_bandwidth    bytes per second that this device reads, measured by reading
    bytes_per_step    what one decoding step must read

Decoding reads every weight once per step, whatever the batch: the time that takes at the measured
bandwidth is the roof that `of_roof` refers to. Prompts are random tokens; speed does not depend
on what they say.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from llmq.decode import Decoder, Mode, cache_bytes
from llmq.errors import SourceError
from llmq.fuse import Part, fuse_shared_inputs, head_scheme, pack_head
from llmq.nn import (
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    is_stacked_experts,
    packed_modules,
)
from llmq.progress import progress_bar
from llmq.source import check_path, context_length, open_model, pick_device

WARM_STEPS = 3  # compile, allocate, capture


@dataclass(frozen=True)
class Row:
    """One model, one batch size, one prompt length.

    Attributes:
        model: "packed" or "reference".
        batch, prompt: sequences, and tokens in the prompt of each.
        mode: how a step was carried out, see `llmq.decode`.
        prefill_tokens_per_s: prompt tokens read per second.
        decode_tokens_per_s: new tokens per second, all sequences together.
        bytes_per_step: weights and cache that one decoding step must read.
        of_roof: the time that reading them takes at the measured bandwidth, over the time taken.
        memory_bytes: tensors that the model holds, repacked weights included.
        peak_bytes: highest use of GPU memory in this row; None on a CPU.
    """

    model: str
    batch: int
    prompt: int
    mode: str
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    bytes_per_step: int
    of_roof: float
    memory_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Report:
    """What `bench` found.

    Attributes:
        device: its name.
        bandwidth: bytes per second, see `read_bandwidth`.
        rows: one per model, batch size and prompt length.
        left_out: prompt lengths that the model has no positions for.
    """

    device: str
    bandwidth: float
    rows: tuple[Row, ...]
    left_out: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    src: str,
    *,
    reference: str | None = None,
    batches: Sequence[int] = (1, 4, 16),
    prompts: Sequence[int] = (128, 2048),
    tokens: int = 64,
    repeats: int = 3,
    compiled: bool = False,
    head_bits: int | None = None,
    device: str = "auto",
    progress: bool = False,
) -> Report:
    """Tokens per second of a model, beside its original.

    Args:
        src: folder or Hub name. Packed layers that read one tensor are fused.
        reference: the full-precision model, run in the same dtype.
        batches: sequences at once.
        prompts: tokens per prompt; those that do not fit the model's context are left out.
        tokens: new tokens per sequence; the median of `repeats` counts.
        compiled: put the step through torch.compile, which takes a minute for every row.
        head_bits: 8 or 4: round the output layer of the packed model too, see `hf.load`.
        device: "auto" = the GPU if there is one.
        progress: show a bar on standard error if that is a terminal.

    Raises:
        LlmqError: see `llmq.errors`.
    """
    where = torch.device(pick_device(device))
    mode: Mode = "graph" if where.type == "cuda" else "eager"
    if compiled:
        mode = "compiled graph" if where.type == "cuda" else "compiled"
    roof = read_bandwidth(where)
    model = open_model(check_path(src), str(where))
    limit = context_length(model.config)
    fitting = [p for p in prompts if limit is None or p + WARM_STEPS + tokens <= limit]
    if not fitting:
        raise SourceError(
            f"{src}: prompts of {', '.join(map(str, prompts))} tokens and {tokens} new ones do "
            f"not fit its context of {limit} tokens; give shorter ones."
        )
    models = {"packed": (src, dtype_of(model))}
    if reference is not None:
        models["reference"] = (reference, dtype_of(model))
    rows: list[Row] = []
    total = len(models) * len(batches) * len(fitting)
    with progress_bar("Measuring", total, show=progress) as advance:
        for label, (source, dtype) in models.items():
            if label == "reference":
                del model  # one at a time in memory
                model = open_model(check_path(source), str(where)).to(dtype)  # type: ignore[arg-type]
            prepare_for_decoding(model, head_bits if label == "packed" else None)
            for batch in batches:
                for prompt in fitting:
                    rows.append(measure(model, label, batch, prompt, tokens, repeats, mode, roof))
                    advance(len(rows))
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    return Report(name, roof, tuple(rows), tuple(p for p in prompts if p not in fitting))


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights or scales."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def prepare_for_decoding(model: PreTrainedModel, head_bits: int | None) -> None:
    """Fuse packed layers and, if asked to, pack the output layer, in place."""
    head = model.get_output_embeddings()
    if head_bits is not None and isinstance(head, nn.Linear):
        pack_head(model, head_scheme(head.in_features, head_bits))
    if any(isinstance(module, PackedLinear) for _, module in packed_modules(model)):
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        fuse_shared_inputs(model, input_ids=ids)


def measure(
    model: PreTrainedModel,
    label: str,
    batch: int,
    prompt: int,
    tokens: int,
    repeats: int,
    mode: Mode,
    bandwidth: float,
) -> Row:
    """One row; see `bench`."""
    device = model.device
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (batch, prompt), generator=generator).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    decoder = Decoder(model, prompt + WARM_STEPS + tokens, mode)
    decoder.prefill(ids)
    reading, writing = [], []
    for _ in range(repeats):
        reading.append(seconds(lambda: decoder.prefill(ids), device))
        for _ in range(WARM_STEPS):
            decoder.step()
        writing.append(seconds(decoder.step, device, times=tokens))
    needed = bytes_per_step(model, decoder.cache, batch)
    step = statistics.median(writing)
    return Row(
        model=label,
        batch=batch,
        prompt=prompt,
        mode=mode,
        prefill_tokens_per_s=batch * prompt / statistics.median(reading),
        decode_tokens_per_s=batch / step,
        bytes_per_step=needed,
        of_roof=needed / bandwidth / step,
        memory_bytes=held_bytes(model),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def seconds(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Per call, of `times` in a row, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times


def read_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes per second: the best of a few sums over, and copies of, a tensor beyond the caches.

    Args:
        device: to measure.
        size: of the tensor in bytes (default: 1 GiB on a GPU, 256 MiB on a CPU).
    """
    count = (size or (1 << 30 if device.type == "cuda" else 1 << 28)) // 4
    data, other = (torch.ones(count, device=device) for _ in range(2))
    sums = min(seconds(data.sum, device) for _ in range(5))
    copies = min(seconds(lambda: other.copy_(data), device) for _ in range(5))
    return data.nbytes / min(sums, copies / 2)  # a copy writes as much as it reads


def bytes_per_step(model: PreTrainedModel, cache: Cache, batch: int) -> int:
    """Bytes that one decoding step must read: weights, once for all sequences, and the cache.

    Packed weights count as they are stored in a checkpoint. Of embeddings a step reads a row per
    sequence; of stacked experts at most those that its tokens can choose.
    """
    config = model.config.get_text_config()
    total = 0
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        taken = sum(p.nbytes for p in own)
        if isinstance(module, nn.Embedding | PackedEmbedding):
            taken = sum(min(p.nbytes, batch * p[0].nbytes) for p in own)
        elif isinstance(module, PackedExperts) or is_stacked_experts(module):
            count = own[0].shape[0]
            chosen = batch * getattr(config, "num_experts_per_tok", count)
            taken = taken * min(count, chosen) // count
        total += taken
    return total + cache_bytes(cache)


def held_bytes(model: nn.Module) -> int:
    """Memory of every tensor that the model holds: parameters, buffers, what backends repacked."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers(), *_repacked(model)):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _repacked(model: nn.Module) -> Iterator[Tensor]:
    for _, module in packed_modules(model):
        if isinstance(module, PackedExperts):
            yield from module.repacked()
        else:
            yield from module.prepared
            if isinstance(module.backend, Part):
                yield from module.backend.shared.fused.prepared
