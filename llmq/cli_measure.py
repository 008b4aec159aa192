"""What is asked of a checkpoint: `llmq eval`, `inspect`, `bench`, `verify`."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from llmq import cli_help
from llmq.cli_common import AnyModel, AsJson, Bos, Device, Join, JoinOption, finish, numbers, start


class Protocol(str, Enum):
    """Which windows of a text are read, and which of their tokens count."""

    windows = "windows"
    wikitext2 = "wikitext2"
    c4 = "c4"
    llama_cpp = "llama.cpp"


def evaluate(
    model: AnyModel,
    text: Annotated[
        str | None, typer.Option(help=f"Text the model has not seen: {cli_help.TEXT}")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Window length. (default: 2048, or the model's limit)")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="How many, from the start. (default: all)")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The full-precision model, for KL and top-1 agreement.")
    ] = None,
    join: JoinOption = Join.documents,
    bos: Bos = None,
    protocol: Annotated[
        Protocol, typer.Option(help="Which windows, and which tokens of them, see above.")
    ] = Protocol.windows,
    record: Annotated[
        bool, typer.Option("--record", help="Add the result to MODEL's report, page and card.")
    ] = False,
    adapter: Annotated[
        Path | None, typer.Option(help="A LoRA adapter to put on MODEL first.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME...", help="Run these tasks of lm_eval instead."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="With --tasks: examples of each.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    console = start(as_json)
    from llmq import measure

    if tasks is not None:
        if record or adapter is not None:
            raise typer.BadParameter("not with --tasks.", param_hint="--record, --adapter")
        scores = measure.evaluate_tasks(
            model, tasks.split(","), limit=limit, reference=reference, device=device
        )
        _show_tasks(console, scores)
        finish({"tasks": scores}, as_json)
        return
    found = measure.evaluate(
        model,
        text,
        seq_len=seq_len,
        windows=windows,
        reference=reference,
        join=join.value,
        bos=bos,
        protocol=protocol.value,
        record=record,
        adapter=adapter,
        device=device,
        progress=True,
    )
    show(console, found)
    finish(found.to_json(), as_json)


def _show_tasks(console: Any, scores: dict[str, dict[str, Any]]) -> None:
    """Scores of lm_eval with their standard errors, and paired differences to a reference."""
    from llmq.report import table, with_error

    beside = ("_stderr", "_reference", "_difference", "_difference_95")
    rows, paired = [], []
    for task, values in scores.items():
        for metric, value in values.items():
            if metric == "n" or metric.endswith(beside):
                continue
            error = values.get(f"{metric}_stderr")
            rows.append((task, metric, with_error(value, error, 4), str(values["n"])))
            if f"{metric}_difference" in values:
                change = values[f"{metric}_difference"]
                low, high = values.get(f"{metric}_difference_95", (change, change))
                was = f"{values[f'{metric}_reference']:.4f}"
                paired.append((task, metric, was, f"{change:+.4f}", f"{low:+.4f} to {high:+.4f}"))
    console.print(table("", ["task", "metric", "value", "examples"], rows))
    if paired:
        heads = ["task", "metric", "reference", "difference", "95% (bootstrap)"]
        console.print(table("Example by example", heads, paired))


def show(console: Any, found: Any) -> None:
    """A measurement as a table, and how it was made."""
    from llmq.report import table, with_error

    rows = [("perplexity", with_error(found.perplexity, found.perplexity_stderr))]
    if found.kl is not None:
        rows += [
            ("perplexity of the reference", with_error(found.reference_perplexity, None)),
            (
                "paired difference (nats per token)",
                with_error(found.nll_difference, found.nll_difference_stderr, 5),
            ),
            ("KL to the reference (nats per token)", with_error(found.kl, found.kl_stderr, 5)),
            ("top-1 agreement", with_error(found.top1, found.top1_stderr, 4)),
        ]
        if found.nll_difference_95 is not None:
            low, high = found.nll_difference_95
            rows.insert(3, ("  95% interval (bootstrap)", f"{low:+.5f} to {high:+.5f}"))
    if found.bits_per_weight is not None:
        rows.append(("bits per weight", f"{found.bits_per_weight:.2f}"))
    console.print(table("", ["measure", "value"], rows))
    console.print(found.protocol, highlight=False, soft_wrap=True)


def inspect(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, quantized or not.")],
    as_json: AsJson = False,
) -> None:
    console = start(as_json)
    from llmq.drawing import allocation_picture
    from llmq.report import size, table
    from llmq.stored import bits_per_weight, inspect_checkpoint

    layers = inspect_checkpoint(model)
    rows = [
        (
            layer.name,
            layer.scheme,
            "x".join(map(str, layer.shape)) if layer.shape else f"{layer.weights} weights",
            size(layer.bytes),
            "-" if layer.error is None else f"{layer.error:.2e}",
        )
        for layer in layers
    ]
    console.print(table("", ["layer", "format", "shape", "size", "error"], rows))
    total = sum(layer.bytes for layer in layers)
    bits = bits_per_weight(layers)
    if picture := allocation_picture((layer.name, layer.scheme) for layer in layers):
        title = "Bits of every layer:\n"
        console.print(title, picture, sep="", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{size(total)}; {bits:.3f} bits per quantized weight.", highlight=False)
    entries = [asdict(layer) for layer in layers]
    finish({"bits_per_weight": bits, "bytes": total, "layers": entries}, as_json)


def bench(
    model: Annotated[str, typer.Argument(help="Quantized model: folder or Hub name.")],
    reference: Annotated[
        str | None, typer.Option(help="The full-precision model, to stand beside it.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences at once, with commas.")] = "1,4,16",
    prompt: Annotated[str, typer.Option(help="Tokens per prompt, with commas.")] = "128,2048",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per sequence.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="The median of so many counts.")] = 3,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the step: a minute more for every row.")
    ] = False,
    head_bits: Annotated[
        int | None, typer.Option(help="8 or 4: round the output layer of the model too.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    console = start(as_json)
    from llmq.bench import bench as run
    from llmq.report import bench_table

    found = run(
        model,
        reference=reference,
        batches=numbers("--batch", batch),
        prompts=numbers("--prompt", prompt),
        tokens=tokens,
        repeats=repeats,
        compiled=compiled,
        head_bits=head_bits,
        device=device,
        progress=True,
    ).to_json()
    console.print(bench_table(found["rows"]))
    console.print(
        f"{found['device']}: reads {found['bandwidth'] / 1e9:.1f} GB/s; "
        f"mode: {found['rows'][0]['mode']}.",
        highlight=False,
    )
    if found["left_out"]:
        skipped = ", ".join(map(str, found["left_out"]))
        console.print(f"Left out, beyond the model's context: prompts of {skipped} tokens.")
    finish(found, as_json)


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that llmq wrote.")],
    as_json: AsJson = False,
) -> None:
    console = start(as_json)
    from llmq.verify import check

    names = check(folder)
    console.print(
        f"{folder}: {len(names)} files are as they were written; all values are finite.",
        highlight=False,
        soft_wrap=True,
    )
    finish({"files": names}, as_json)
