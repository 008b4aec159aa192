"""From a checkpoint to a finished folder: what `api.quantize` does once it is known what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import llmq
from llmq import ranks
from llmq.errors import SchemeError
from llmq.gate import Gate
from llmq.hf.streaming import StoredModel
from llmq.inputs import Calibration, identity, share
from llmq.journal import Workplace
from llmq.objective import HELD_OUT
from llmq.output import enough_memory, writing
from llmq.progress import progress_bar
from llmq.quantize import LayerReport, Recipe, check_experts, check_groups, quantizable, quantize
from llmq.report import (
    expert_coverage,
    layer_entry,
    read_report,
    write_report,
)
from llmq.stored import bits_per_weight, inspect_checkpoint
from llmq.stream import Streamed, stack_name
from llmq.verify import check, seal

_BATCH_TOKENS = 2048


def begin(
    source: StoredModel,
    recipe: Recipe,
    method: str,
    text: Calibration,
    device: str,
    work: Workplace,
) -> dict[str, Any] | None:
    """Begin or continue a run; its report, if nothing but the last rename was missing.

    Raises:
        SchemeError: the recipe does not fit the model.
        OutputError: an unfinished run was another one.
    """
    names = quantizable(source.model, recipe.lm_head)
    check_groups(names, recipe)
    check_experts(source.model, recipe)
    if not any(recipe.scheme_for(n) for n in names):
        raise SchemeError(f"skip={list(recipe.skip)}: nothing is left to quantize.")
    share(text.windows, recipe)
    if ranks.number() == 0:
        work.begin(identity(source, recipe, method, text, device))
    work.journal = ranks.of_the_first(getattr(work, "journal", None))
    report = read_report(work.result) if work.journal.complete else None
    if report and ranks.number() == 0:
        work.publish()
    return report


def solve(
    source: StoredModel,
    recipe: Recipe,
    text: Calibration,
    device: str,
    work: Workplace,
    *,
    spill: bool,
    show: bool,
) -> tuple[list[LayerReport], dict[str, str], dict[str, Any]] | None:
    """Quantize every block that is not finished, and write the checkpoint into `work.result`.

    Returns:
        reports of the layers, the SHA-256 of every shard, and what the gate says; None in a
        process that does not write.
    """
    first = ranks.number() == 0
    mine = share(text.windows, recipe)
    seq_len = mine.shape[1]
    names = quantizable(source.model, recipe.lm_head)
    with enough_memory():
        gate = Gate(source, text.judge, device) if first else None
        store = Streamed(source, work, gate, spill=spill)
        size = min(_BATCH_TOKENS // seq_len, len(mine) // HELD_OUT)
        reports = quantize(source.model, mine.split(max(1, size)), recipe, device, store)
        total = sum(map(bool, map(recipe.scheme_for, names)))
        layers = list(_watched(reports, total, show and first, store.done))
        return (layers, *store.finish()) if first else None


def outcome(folder: Path, layers: Sequence[LayerReport]) -> dict[str, Any]:
    """What a report says about versions and layers."""
    stored = inspect_checkpoint(folder)
    return {
        "llmq": llmq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bits_per_weight": bits_per_weight(stored),
        "bytes": sum(layer.bytes for layer in stored),
        "expert_coverage": expert_coverage(layers),
        "layers": [layer_entry(layer) for layer in layers],
    }


def publish(work: Workplace, report: dict[str, Any], digests: dict[str, str]) -> None:
    """Write the report and the checksums, read everything again, and let the folder appear.

    Raises:
        OutputError: nothing can be written any more.
        IntegrityError: what was written is not what was meant.
    """
    with writing(work.out):
        write_report(work.result, report)
        seal(work.result, digests)
        check(work.result)
        work.log("end", seconds=report["seconds"], **report["judged"])
        work.publish()


def _watched(
    reports: Iterable[LayerReport], total: int, show: bool, done: Iterable[LayerReport]
) -> Iterator[LayerReport]:
    """Pass reports on under a progress bar; all experts of a stack count as one matrix."""
    seen: set[str] = set()
    before = len({stack_name(report.name) for report in done})
    with progress_bar("Quantizing", total, show=show, before=before) as advance:
        for report in reports:
            seen.add(stack_name(report.name))
            advance(len(seen))
            yield report
