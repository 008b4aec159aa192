"""Before quantizing: `llmq plan`, `llmq sensitivity`, `llmq write`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llmq.cli_common import (
    Activations,
    ActivationsOption,
    AsJson,
    Bits,
    Bos,
    Calibration,
    Device,
    GroupSize,
    Join,
    JoinOption,
    Method,
    Mixed,
    Original,
    Quality,
    Samples,
    Seed,
    SeqLen,
    Skip,
    Symmetric,
    TuneScales,
    finish,
    numbers,
    source,
    start,
)


def plan(
    src: Original,
    quality: Annotated[
        Quality | None, typer.Option(help="How much effort. (default: balanced)")
    ] = None,
    method: Annotated[Method | None, typer.Option(help="Instead of a quality.")] = None,
    bits: Bits = 4,
    mixed: Mixed = False,
    group_size: GroupSize = 128,
    symmetric: Symmetric = True,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    lm_head: Annotated[bool, typer.Option("--lm-head/--no-lm-head")] = False,
    embeddings: Annotated[int | None, typer.Option(metavar="BITS")] = None,
    tune_scales: TuneScales = None,
    codebook: Annotated[str | None, typer.Option(metavar="BOOK")] = None,
    outliers: Annotated[float, typer.Option(metavar="SHARE")] = 0.0,
    k_quants: Annotated[bool, typer.Option("--k-quants")] = False,
    skip: Skip = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes that torchrun shall start; memory is of each.")
    ] = 1,
    tensor_parallel: Annotated[
        str, typer.Option(metavar="N,N...", help="GPUs that shall share the result.")
    ] = "1,2,4,8",
    activations: ActivationsOption = Activations.memory,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Where it shall be written.")] = Path(),
    as_json: AsJson = False,
) -> None:
    console = start(as_json)
    from llmq import api

    found = api.plan(
        src,
        quality=quality.value if quality else None,
        method=method.value if method else None,
        bits=bits,
        mixed=mixed,
        group_size=group_size,
        symmetric=symmetric,
        samples=samples,
        seq_len=seq_len,
        activations=activations.value,
        device=device,
        lm_head=lm_head,
        embeddings=embeddings,
        tune_scales=tune_scales,
        codebook=codebook,
        outliers=outliers,
        k_quants=k_quants,
        skip=skip or (),
        processes=ranks,
        tensor_parallel=numbers("--tensor-parallel", tensor_parallel),
        out=out,
    )
    _show(console, found)
    finish(found.to_json(), as_json)
    if any(problem.fatal for problem in found.problems):
        raise typer.Exit(1)


def _show(console: Any, found: Any) -> None:
    """A plan as tables, and its problems."""
    from llmq.progress import duration
    from llmq.report import size, table

    rows = [
        ("weights", f"{found.parameters:,}"),
        ("matrices to quantize", f"{found.matrices} ({found.quantized_weights:,} weights)"),
        ("bits per quantized weight", f"{found.bits_per_weight:.3f}"),
        ("files now", size(found.source_bytes)),
        ("files afterwards", f"{size(found.output_bytes)} ({found.output_bytes:,} bytes)"),
    ]
    if ahead := found.outlook:
        rows.append(("memory", f"about {size(ahead.memory_bytes)} (most while {ahead.phase})"))
        if ahead.gpu_bytes:
            rows.append(("GPU memory", f"about {size(ahead.gpu_bytes)}"))
        rows.append(("disk while it runs", f"about {size(ahead.disk_bytes)}"))
        rows.append(("time on this machine", f"about {duration(ahead.seconds or 0)}"))
    console.print(table("", ["plan", ""], rows))
    words = {True: "yes", False: "no", None: "?"}
    rows = [(engine.name, words[engine.loads], engine.note) for engine in found.engines]
    console.print(table("", ["engine", "loads it", "limits"], rows))
    for problem in found.problems:
        text = f"{problem.where}: {problem.what}. Use {problem.fix}."
        style = "red" if problem.fatal else "yellow"
        console.print(text, style=style, highlight=False, soft_wrap=True)


def sensitivity(
    src: Original,
    bits: Annotated[float, typer.Option(help="Average for the allocation shown.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 128,
    symmetric: Symmetric = True,
    calibration: Calibration = None,
    samples: Annotated[int, typer.Option(help="Windows of text, 32 at most are used.")] = 32,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Layers to leave as they are.")
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    join: JoinOption = Join.documents,
    bos: Bos = None,
    as_json: AsJson = False,
) -> None:
    console = start(as_json)
    from llmq import api
    from llmq.report import sensitivity_table
    from llmq.scheme import QuantScheme
    from llmq.sensitivity import allocation, predicted

    units = api.sensitivity(
        src,
        group_size=group_size,
        symmetric=symmetric,
        calibration=source(calibration),
        samples=samples,
        seq_len=seq_len,
        skip=skip or (),
        device=device,
        seed=seed,
        join=join.value,
        bos=bos,
    )
    schemes = allocation(units, bits, QuantScheme(4, group_size, symmetric))
    kl = predicted(units, schemes, matched=True)
    several = bits % 1 == 0 and len(set(schemes.values())) > 1
    console.print(sensitivity_table(units, schemes))
    gain = sorted(units, key=lambda unit: -unit.kl[4] / unit.weights)[:3]
    console.print(
        f"Predicted KL {kl:.4f} at {bits:g} bits on average with --quality balanced, on text like "
        "this; on other text it may be twice that. Measure the result with llmq eval.\n"
        "Most lost per weight at 4 bits (keep these higher): "
        f"{'; '.join(', '.join(unit.names) for unit in gain)}.\n"
        f"Next: llmq quantize {src} OUT --bits {bits:g}{' --mixed' if several else ''}",
        highlight=False,
        soft_wrap=True,
    )
    given = {name: vars(scheme) for name, scheme in schemes.items()}
    entries = [{**asdict(unit), **given[unit.names[0]]} for unit in units]
    finish({"bits": bits, "predicted_kl": kl, "layers": entries}, as_json)


def write(
    src: Original,
    out: Annotated[Path, typer.Argument(help="File to create, .jsonl.")],
    samples: Annotated[int, typer.Option(min=1, help="Windows of text to write.")] = 128,
    seq_len: SeqLen = None,
    temperature: Annotated[
        float, typer.Option(help="1 = the model's own distribution; less: more of the same.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    console = start(as_json)
    from llmq import api

    found = api.write(
        src,
        out,
        samples=samples,
        seq_len=seq_len,
        temperature=temperature,
        seed=seed,
        device=device,
        progress=True,
    )
    console.print(
        f"{out}: {found['documents']} documents, {found['tokens']} tokens.\n"
        f"Next: llmq quantize {src} OUT --calibration {out}",
        highlight=False,
        soft_wrap=True,
    )
    finish(found, as_json)
