"""From a checkpoint to a finished folder: what `api.quantize` does once it is known what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers

import llmq
from llmq import plan, ranks
from llmq.ahead import read_ahead
from llmq.curvature import prepare
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
from llmq.recipe import Recipe, embedding_scheme, input_widths, quantizable
from llmq.refine import finish, held_back
from llmq.report import (
    expert_coverage,
    layer_entry,
    peak_memory_bytes,
    read_report,
    write_report,
)
from llmq.scheme import check_groups
from llmq.store import LayerReport
from llmq.stored import bits_per_weight, inspect_checkpoint, tensor_headers
from llmq.stream import Streamed
from llmq.verify import check, seal


@dataclass(frozen=True)
class Run:
    """What is to be done.

    Attributes:
        name: of the model, as the user gave it.
        config: of transformers.
        source: its weights.
        method: name of the recipe.
        recipe: what to do to it.
        text: what it is calibrated on.
        device: where blocks are solved.
        work: where the result is made.
        spill: hidden states are kept in files.
    """

    name: str
    config: Any
    source: StoredModel
    method: str
    recipe: Recipe
    text: Calibration
    device: str
    work: Workplace
    spill: bool


class Solved(NamedTuple):
    """What `solve` did.

    Attributes:
        layers: reports.
        digests: the SHA-256 of every shard.
        verdict: what the gate says.
        tuned: how scales were tuned, if they were.
    """

    layers: list[LayerReport]
    digests: dict[str, str]
    verdict: dict[str, Any]
    tuned: dict[str, Any] | None


def preflight(run: Run, average: float | None, tell: Callable[[str], None] | None) -> None:
    """Refuse what cannot work before anything is computed, and tell what it will take.

    Args:
        run: widths of its matrices may still have to be chosen.
        average: bits that matrices shall have on average then.
        tell: is called with one line.

    Raises:
        SchemeError: the recipe does not fit the model.
        MemoryLimitError, OutputError: there is too little memory, or room on the disk.
    """
    recipe = run.recipe
    names = quantizable(run.source.model, recipe.lm_head)
    check_groups(input_widths(names), recipe.scheme_for)
    embedding_scheme(run.source.model, recipe)
    if not any(recipe.scheme_for(n) for n in names):
        raise SchemeError(f"skip={list(recipe.skip)}: nothing is left to quantize.")
    windows, seq_len = share(run.text.windows, recipe).shape
    ahead = plan.make(
        public_name(run.name),
        run.config,
        tensor_headers(run.source.folder),
        recipe,
        out=run.work.out,
        job=job(
            recipe, windows, seq_len, run.spill, average is not None, run.device, ranks.count()
        ),
        device=run.device,
        average=average,
        timed=tell is not None,
    )
    plan.refuse(ahead)
    if tell and ranks.number() == 0:
        tell(ahead.line())


def begin(run: Run) -> dict[str, Any] | None:
    """Begin or continue a run; its report, if nothing but the last rename was missing.

    Raises:
        OutputError: an unfinished run was another one.
    """
    work = run.work
    if ranks.number() == 0:
        work.begin(identity(run.source, run.recipe, run.method, run.text, run.device))
    work.journal = ranks.of_the_first(getattr(work, "journal", None))
    report = read_report(work.result) if work.journal.complete else None
    if report and ranks.number() == 0:
        work.publish()
    return report


def solve(run: Run, *, show: bool) -> Solved | None:
    """Quantize every block that is not finished, and write the checkpoint into `work.result`.

    Returns:
        None in a process that does not write.
    """
    first = ranks.number() == 0
    source, recipe, work, device = run.source, run.recipe, run.work, run.device
    mine = share(run.text.windows, recipe)
    aside = held_back(len(mine)) if recipe.scales else 0
    mine, judging = mine[: len(mine) - aside], mine[len(mine) - aside :]
    batches = mine.split(batch_windows(*mine.shape))
    blocks, before = len(source.blocks), len(work.journal.blocks)
    with enough_memory():
        gate = Gate(source, run.text.judge, device) if first else None
        with progress_bar("Going backwards", 2 * blocks, show=show and first) as passed:
            prepare(source.model, batches, recipe, device, Streamed(source, work, None), passed)
        with (
            progress_bar("Quantizing", blocks, show=show and first, before=before) as finished,
            read_ahead(source.block, blocks, device) as read,
        ):
            store = Streamed(source, work, gate, run.spill, finished, read)
            layers = list(quantize(source.model, batches, recipe, device, store))
        if not first:
            return None
        tuned = finish(store, source, work, batches, judging, recipe.scales, device, show)
        return Solved(layers, *tuned)


def outcome(run: Run, solved: Solved) -> dict[str, Any]:
    """What a report says about the result, and about memory and versions."""
    stored = inspect_checkpoint(run.work.result)
    return {
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "judged": {**solved.verdict, "held_out": run.text.held_out},
        "scale_tuning": solved.tuned,
        "llmq": llmq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bits_per_weight": bits_per_weight(stored),
        "bytes": sum(layer.bytes for layer in stored),
        "expert_coverage": expert_coverage(solved.layers),
        "layers": [layer_entry(layer) for layer in solved.layers],
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
