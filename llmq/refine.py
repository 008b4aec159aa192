"""After the last block: tune the scales of a finished run, from files to files.

The result is loaded packed, `tuning.tune_scales` moves its scales towards the answers that the
full-precision stream of hidden states gives, and they are written in the place of the old ones. A
run that is stopped goes on at the last look at held-out text, which the journal names. A few
windows of the calibration text are held back from the solvers for that: on text that they have
seen, the result is nearer to the original than on any other, and tuning looks like a loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llmq import hf, shards
from llmq.backends import TORCH
from llmq.blocks import logits_behind, record_calls
from llmq.curvature import forwards
from llmq.hf.saving import checkpoint_tensors
from llmq.hf.streaming import StoredModel
from llmq.journal import Workplace
from llmq.output import writing
from llmq.retry import Effort
from llmq.stream import Streamed
from llmq.tuning import Progress, ScaleTuning, tune_scales

HELD_BACK = 16


def held_back(windows: int) -> int:
    """How many of the calibration windows only judge scales: one of 16, one at least of two."""
    return min(max(1, windows // HELD_BACK), windows - 1)


def finish(
    store: Streamed,
    source: StoredModel,
    work: Workplace,
    batches: Sequence[Tensor],
    judging: Tensor,
    how: ScaleTuning | None,
    device: str,
    show: bool,
) -> tuple[dict[str, str], dict[str, Any], dict[str, Any] | None]:
    """Write the checkpoint of a finished run into `work.result`, its scales tuned.

    Args:
        store: where the flow has left the blocks; it has matched the full-precision stream.
        source: what they were made from.
        work: its journal keeps the progress.
        batches: calibration tokens, int64 (B, T) each.
        judging: tokens that were held back, int64 (B, T); B may be 0.
        how: to tune; None = not.
        device: where the whole packed model runs.
        show: a bar on standard error if that is a terminal.

    Returns:
        the SHA-256 of its shards, what the gate says, and how tuning went.
    """
    if how is None:
        return *store.finish(), None
    # Of a fresh one: this one's output layer may be packed by now.
    fresh = StoredModel(source.folder)
    states = list(store.full_states())
    if len(judging):
        batches = [*batches, judging]
        states.append(_behind_blocks(fresh, judging, torch.device(device)))
    answers = Answers(fresh, batches, states)
    digests, _ = store.finish()
    model, changed, progress = refine(source, work, batches, answers, how, device=device, show=show)
    record = {"kl_before": progress.start, "kl_after": progress.best, "steps": progress.step}
    finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
    return digests | changed, store.verdict(model), finite


@torch.no_grad()
def _behind_blocks(source: StoredModel, ids: Tensor, where: torch.device) -> Tensor:
    """What leaves the full-precision model's last block, (B, T, D)."""
    with source.outer():
        recording = record_calls(source.model, source.blocks, list(ids.split(1)), source.block(0))
    states: Sequence[Tensor] = [x.to(where) for x in recording.hidden]
    for i in range(len(source.blocks)):
        states = forwards(source.block(i), states, recording.calls[i], Effort(where, single=False))
    return torch.cat(list(states))


class Answers:
    """The logits of the full-precision model, from the states that leave its last block.

    Args:
        source: the full-precision checkpoint, before anything of its model is packed.
        batches: token ids, int64 (B, T) each.
        states: per batch, (B, T, D).
    """

    def __init__(
        self, source: StoredModel, batches: Sequence[Tensor], states: Sequence[Tensor]
    ) -> None:
        self._batches, self._states = batches, states
        with source.outer():
            recording = record_calls(
                source.model, source.blocks, [batches[0][:1, :8]], source.block(0)
            )
            self._tuple = recording.returns_tuple
            self._model = copy.deepcopy(source.model)
        self._blocks = self._model.get_submodule(source.prefix)
        where = states[0].device
        wide = torch.bfloat16 if where.type == "cuda" else torch.float32
        for parameter in self._model.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(where, wide)
        for buffer in self._model.buffers():
            buffer.data = buffer.data.to(where)

    @torch.no_grad()
    def __call__(self, batch: int, rows: slice) -> Tensor:
        """Logits (B, T, V) of rows of a batch."""
        ids, states = self._batches[batch][rows], self._states[batch][rows]
        return logits_behind(self._model, self._blocks, ids, states, self._tuple)


def refine(
    source: StoredModel,
    work: Workplace,
    batches: Sequence[Tensor],
    answers: Answers,
    how: ScaleTuning,
    *,
    device: str,
    show: bool,
) -> tuple[Any, dict[str, str], Progress]:
    """Tune the scales of the checkpoint in `work.result`.

    Args:
        source: what it was made from.
        work: its journal keeps the progress.
        batches: calibration tokens, int64 (B, T) each; the last ones only judge.
        answers: the full-precision model's.
        how: see there.
        device: where the whole packed model runs.
        show: a bar on standard error if that is a terminal.

    Returns:
        the packed model, the new SHA-256 of every shard that changed, and how it went.
    """
    model = hf.load(work.result, dtype="auto", backend=TORCH.name, fuse=False).to(device).eval()
    begun = None
    if saved := work.journal.tuning:
        tensors = load_file(work.folder / saved["file"], device)
        begun = Progress(**saved["progress"], tensors=tensors)

    def keep(progress: Progress) -> None:
        old = work.journal.tuning
        with writing(work.out):
            name = f"tuning-{progress.step:05}.safetensors"
            digest = shards.write(work.folder / name, progress.tensors)
            numbers = progress.numbers()
            work.journal.tuning = {"file": name, "sha256": digest, "progress": numbers}
            work.commit()
            if old:
                (work.folder / old["file"]).unlink()
        work.log("tuning", **numbers)

    progress = tune_scales(model, batches, answers, how, begun=begun, keep=keep, show=show)
    found = checkpoint_tensors(model, source.keys)
    scales = {key: tensor for key, tensor in found.items() if key.endswith("_scale")}
    with writing(work.out):
        return model, _replace(work.result, work.folder / "scales.safetensors", scales), progress


def _replace(folder: Path, spare: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write tensors over those of the same names in a checkpoint; SHA-256 of what has changed."""
    shards.write(spare, tensors)
    new = shards.entries(spare)
    digests = {}
    for path in shards.weight_files(folder):
        old = shards.entries(path)
        merged = {key: new.get(key, entry) for key, entry in old.items()}
        fresh = path.with_name(f"{path.name}.new")
        digests[path.name] = shards.combine(merged, fresh)
        fresh.replace(path)
    return digests
