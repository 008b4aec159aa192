"""From a checkpoint to a finished folder: what `api.quantize` does once it is known what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import llmq
from llmq import plan, ranks
from llmq.ahead import read_ahead
from llmq.errors import SchemeError
from llmq.gate import Gate
from llmq.hf.streaming import StoredModel
from llmq.inputs import Calibration, identity, share
from llmq.journal import Workplace
from llmq.origin import public_name
from llmq.outlook import batch_windows, job
from llmq.output import enough_memory, writing
from llmq.progress import progress_bar
from llmq.quantize import quantize
from llmq.recipe import Recipe, input_widths, quantizable
from llmq.refine import finish
from llmq.report import (
    expert_coverage,
    layer_entry,
    read_report,
    write_report,
)
from llmq.scheme import check_groups
from llmq.store import LayerReport
from llmq.stored import bits_per_weight, inspect_checkpoint, tensor_headers
from llmq.stream import Streamed
from llmq.verify import check, seal


def preflight(
    name: str,
    source: StoredModel,
    config: Any,
    recipe: Recipe,
    text: Calibration,
    device: str,
    work: Workplace,
    *,
    spill: bool,
    average: float | None,
    tell: Callable[[str], None] | None,
) -> None:
    """Refuse what cannot work before anything is computed, and tell what it will take.

    Args:
        name: of the model, as the user gave it.
        average: bits that matrices shall have on average, if their widths are still to be chosen.
        tell: is called with one line.

    Raises:
        SchemeError: the recipe does not fit the model.
        MemoryLimitError, OutputError: there is too little memory, or room on the disk.
    """
    names = quantizable(source.model, recipe.lm_head)
    check_groups(input_widths(names), recipe.scheme_for)
    if not any(recipe.scheme_for(n) for n in names):
        raise SchemeError(f"skip={list(recipe.skip)}: nothing is left to quantize.")
    windows, seq_len = share(text.windows, recipe).shape
    ahead = plan.make(
        public_name(name),
        config,
        tensor_headers(source.folder),
        recipe,
        out=work.out,
        job=job(recipe, windows, seq_len, spill, average is not None, device),
        device=device,
        average=average,
        timed=tell is not None,
    )
    plan.refuse(ahead)
    if tell and ranks.number() == 0:
        tell(ahead.line())


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
        OutputError: an unfinished run was another one.
    """
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
) -> tuple[list[LayerReport], dict[str, str], dict[str, Any], dict[str, Any] | None] | None:
    """Quantize every block that is not finished, and write the checkpoint into `work.result`.

    Returns:
        reports of the layers, the SHA-256 of every shard, what the gate says, and how scales were
        tuned, if they were; None in a process that does not write.
    """
    first = ranks.number() == 0
    mine = share(text.windows, recipe)
    batches = mine.split(batch_windows(*mine.shape))
    blocks, before = len(source.blocks), len(work.journal.blocks)
    with enough_memory():
        gate = Gate(source, text.judge, device) if first else None
        with (
            progress_bar("Quantizing", blocks, show=show and first, before=before) as finished,
            read_ahead(source.block, blocks, device) as read,
        ):
            store = Streamed(source, work, gate, spill, finished, read)
            layers = list(quantize(source.model, batches, recipe, device, store))
        if not first:
            return None
        return layers, *finish(store, source, work, batches, recipe.scales, device, show)


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
