"""What is done with a finished checkpoint: `llmq convert`, `push`, `compare`, `correct`."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from llmq.cli_common import (
    AsJson,
    Calibration,
    NewFolder,
    Original,
    Samples,
    SeqLen,
    finish,
    source,
    start,
)
from llmq.errors import SchemeError


class Format(str, Enum):
    """Layouts on disk."""

    compressed_tensors = "compressed-tensors"
    gptq = "gptq"
    awq = "awq"
    gguf = "gguf"


class Embeddings(str, Enum):
    """How GGUF stores embeddings."""

    f16 = "f16"
    q8_0 = "q8_0"
    q6_k = "q6_k"


def convert(
    src: Annotated[str, typer.Argument(metavar="IN", help="Quantized: folder or Hub name.")],
    out: NewFolder,
    format: Annotated[Format, typer.Option(help="Layout of the result, see above.")],
    embeddings: Annotated[
        Embeddings | None, typer.Option(help="gguf: type of embeddings and head. (default: f16)")
    ] = None,
    k_quants: Annotated[
        bool, typer.Option("--k-quants", help="gguf: smaller blocks with rounded scales.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    console = start(as_json)
    from llmq.convert import convert as rewrite
    from llmq.gguf_file import write_gguf

    if format is Format.gguf:
        kind = embeddings.value if embeddings else "f16"
        done = write_gguf(src, out, embeddings=kind, k_quants=k_quants, progress=True)
    elif embeddings or k_quants:
        raise SchemeError("--embeddings and --k-quants: for --format gguf only.")
    else:
        done = rewrite(src, out, format.value, progress=True)
    lost = "codes are as they were." if format is Format.gguf else "nothing was lost."
    if done.rounded_scales:
        lost = f"{done.rounded_scales} scales rounded, by {done.largest_change:.1e} at most."
    console.print(
        f"{out}: {done.modules} matrices, {done.source} to {done.target}; {lost}",
        *(f"Note: {note}." for note in done.notes),
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
    finish(asdict(done), as_json)


def push(
    folder: Annotated[Path, typer.Argument(help="What llmq quantize wrote.")],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; created if not there.")],
    private: Annotated[bool, typer.Option("--private", help="Only you can see it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show the card; send and write nothing.")
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="The original, if it was read from a folder."),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Another Hub than huggingface.co.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    console = start(as_json)
    from llmq import hub
    from llmq.report import size

    done = hub.push(
        folder, repo, private=private, dry_run=dry_run, base_model=base_model, endpoint=endpoint
    )
    if dry_run:
        console.print(done.card, markup=False, highlight=False, soft_wrap=True)
        console.print("Would upload:", style="bold")
        for name, length in done.files.items():
            console.print(f"  {name}  {size(length)}", markup=False, highlight=False)
    total = f"{len(done.files)} files, {size(sum(done.files.values()))}"
    where = f"Nothing was sent to {repo}" if dry_run else done.url
    console.print(f"{where}: {total}.", highlight=False, soft_wrap=True)
    if "\nlicense:" not in done.card:
        console.print("The card names no license: the original's was not found.", style="yellow")
    finish({"repo": repo, "url": done.url, "files": done.files, "private": private}, as_json)


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Checkpoints of one model.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
    as_json: AsJson = False,
) -> None:
    console = start(as_json)
    from llmq import comparison
    from llmq.report import size, table, with_error

    entries, protocol = comparison.collect(folders)
    comparison.write(out, entries, protocol)
    rows = [
        (
            entry["name"],
            size(entry["bytes"]),
            f"{entry['bits_per_weight']:.2f}",
            with_error(entry["kl"], entry["kl_stderr"], 4),
            with_error(entry["perplexity"], entry["perplexity_stderr"]),
        )
        for entry in entries
    ]
    console.print(table("", ["checkpoint", "size", "bits", "KL", "perplexity"], rows))
    console.print(f"{protocol}\n{out}", highlight=False, soft_wrap=True)
    finish({"protocol": protocol, "checkpoints": entries, "page": str(out)}, as_json)


def correct(
    original: Original,
    quantized: Annotated[str, typer.Argument(help="What was made of it.")],
    out: Annotated[Path, typer.Argument(help="Folder to create, for the adapter.")],
    rank: Annotated[int, typer.Option(help="Of the correction; its size grows with it.")] = 32,
    calibration: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...; auto = the GPU if any.")] = "auto",
    as_json: AsJson = False,
) -> None:
    console = start(as_json)
    from llmq import api
    from llmq.report import size

    api.correct(
        original,
        quantized,
        out,
        rank=rank,
        calibration=source(calibration),
        samples=samples,
        seq_len=seq_len,
        device=device,
    )
    taken = sum(path.stat().st_size for path in out.iterdir())
    console.print(
        f"{out}: a LoRA adapter of rank {rank}, {size(taken)}.\n"
        f"Next: llmq eval {quantized} --adapter {out} --text HELD_OUT.txt --reference {original}",
        highlight=False,
        soft_wrap=True,
    )
    finish({"adapter": str(out), "rank": rank, "bytes": taken}, as_json)
