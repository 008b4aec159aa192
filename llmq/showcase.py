"""What `llmq demo` runs: every method on the embedded model, saved, loaded back and measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq import api, demo, measure
from llmq.errors import SourceError
from llmq.evaluate import Evaluation
from llmq.generate import generate
from llmq.report import size, table, with_error
from llmq.source import open_model, open_tokenizer
from llmq.stored import inspect_checkpoint

if TYPE_CHECKING:
    from rich.table import Table

WAYS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "balanced": {"quality": "balanced"},
}
BITS = (4, 3)
SAMPLES = 64  # windows of calibration text
WINDOWS = 80  # windows of evaluation text
PROMPT = "ROMEO:\n"


@dataclass(frozen=True)
class Trial:
    """One row of the demo's table.

    Attributes:
        label: "gptq 4-bit", or "full precision".
        bytes: the checkpoint on disk.
        seconds: to quantize and save it.
        result: measured after loading it back with transformers.
    """

    label: str
    bytes: int
    seconds: float
    result: Evaluation


def run(out: Path) -> Iterator[Trial]:
    """Quantize the embedded model into folders under `out`; yield full precision, then each.

    Raises:
        LlmqError: `out` cannot be used, or this installation lacks the embedded model.
    """
    source = demo.model_path()
    if not (source / "config.json").is_file():
        raise SourceError(f"{source}: the embedded model is missing; reinstall llmq.")
    reference = open_model(str(source))
    common: dict[str, Any] = {"seq_len": 256, "windows": WINDOWS, "device": "cpu"}
    result = measure.evaluate(source, **common)
    yield Trial("full precision", _bytes(source), 0.0, result)
    for bits in BITS:
        for name, way in WAYS.items():
            folder = out / f"{name}-{bits}bit"
            start = time.perf_counter()
            api.quantize(
                source,
                folder,
                **way,
                bits=bits,
                group_size=64,
                samples=SAMPLES,
                seq_len=256,
                device="cpu",
            )
            seconds = time.perf_counter() - start
            result = measure.evaluate(folder, reference=reference, **common)
            yield Trial(f"{name} {bits}-bit g64", _bytes(folder), seconds, result)


LEGEND = (
    "bits: per weight as stored, scales and zero points included; KL: nats per token, to full "
    "precision; top-1: same likeliest token; secs: to quantize and save."
)


def as_table(trials: Sequence[Trial]) -> Table:
    """The trials as a rich table."""
    columns = ["", "bits", "size", "perplexity", "KL", "top-1", "secs"]
    rows = [
        (
            trial.label,
            with_error(trial.result.bits_per_weight, None, 2),
            size(trial.bytes),
            with_error(trial.result.perplexity, trial.result.perplexity_stderr, 2),
            with_error(trial.result.kl, trial.result.kl_stderr, 4),
            "-" if trial.result.top1 is None else f"{trial.result.top1:.1%}",
            f"{trial.seconds:.1f}" if trial.seconds else "-",
        )
        for trial in trials
    ]
    return table("llmq demo", columns, rows)


def sample(folder: Path) -> str:
    """A few lines that a model of the demo writes."""
    model, tokenizer = open_model(str(folder)), open_tokenizer(str(folder))
    return generate(model, tokenizer, PROMPT, 80, temperature=0.7)


@contextmanager
def output_folder(out: Path | None) -> Iterator[Path]:
    """`out`, or a temporary folder that is removed at the end."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="llmq-demo-") as temporary:
        yield Path(temporary)


def _bytes(folder: Path) -> int:
    return sum(layer.bytes for layer in inspect_checkpoint(folder))
