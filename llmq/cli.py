"""The command `llmq`: a thin shell over `llmq.api`.

Nothing heavy is imported before a command runs, so that `llmq --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from llmq import cli_help, cli_share
from llmq.cli_common import AsJson, finish as _finish, start as _start
from llmq.errors import LlmqError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: [bold]llmq demo[/bold]",
)


class Quality(str, Enum):
    """Rungs of the ladder."""

    fast = "fast"
    balanced = "balanced"


class Method(str, Enum):
    """How codes are found."""

    rtn = "rtn"
    gptq = "gptq"
    awq = "awq"
    awq_gptq = "awq+gptq"


class Format(str, Enum):
    """Layouts on disk."""

    compressed_tensors = "compressed-tensors"
    gptq = "gptq"
    awq = "awq"
    gguf = "gguf"


class Join(str, Enum):
    """How documents become one text."""

    documents = "documents"
    wikitext = "wikitext"


class Activations(str, Enum):
    """Where hidden states are kept."""

    memory = "memory"
    disk = "disk"


class Protocol(str, Enum):
    """Which windows of a text are read, and which of their tokens count."""

    windows = "windows"
    wikitext2 = "wikitext2"
    c4 = "c4"
    llama_cpp = "llama.cpp"


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto = the GPU if there is one.")]
JoinOption = Annotated[
    Join, typer.Option(help="wikitext: the text is a raw file of wikitext; join rows as papers do.")
]
Bos = Annotated[bool | None, typer.Option("--bos/--no-bos", help="Start windows with BOS.")]


@app.callback(invoke_without_command=True, help=cli_help.ROOT)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from llmq import __version__

        print(f"llmq {__version__}")
        raise typer.Exit


@app.command(help=cli_help.QUANTIZE)
def quantize(
    src: Annotated[str, typer.Argument(help="Full-precision model: folder or Hub name.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    quality: Annotated[
        Quality | None, typer.Option(help="How much effort, see above. (default: balanced)")
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="Instead of a quality: a method by name.")
    ] = None,
    bits: Annotated[
        float, typer.Option(help="8, 4, 3 or 2 bits per weight; between them, an average.")
    ] = 4,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Bits are an average even if a whole number.")
    ] = False,
    group_size: Annotated[
        int, typer.Option(help="Weights that share a scale: 32, 64, 128; -1 = a whole row.")
    ] = 128,
    symmetric: Annotated[
        bool,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Without zero points (every engine loads it) or with (loses less).",
        ),
    ] = True,
    calibration: Annotated[
        str | None, typer.Option(help=f"Text to calibrate on: {cli_help.TEXT}")
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per window. (default: 512, or the model's limit)")
    ] = None,
    lm_head: Annotated[
        bool, typer.Option("--lm-head/--no-lm-head", help="Quantize the output layer too.")
    ] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Layers to leave as they are; repeatable."),
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Which windows of the text are used.")] = 0,
    join: JoinOption = Join.documents,
    bos: Bos = None,
    activations: Annotated[
        Activations, typer.Option(help="Where the calibration's hidden states are kept.")
    ] = Activations.memory,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget an unfinished run; else it is continued.")
    ] = False,
    eval_text: Annotated[
        str | None, typer.Option(help="Held-out text: measure what was lost, and report it.")
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Push the result to the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to.")] = False,
    as_json: AsJson = False,
) -> None:
    console = _start(as_json)
    if calibration is None and method is not Method.rtn:
        console.print(
            "Calibrating on the small text that comes with llmq: "
            "--calibration with text of your own domain is better.",
            style="yellow",
            soft_wrap=True,
        )
    from llmq import api, hub
    from llmq.report import size, table

    if push_to is not None:
        hub.check_access(push_to)  # before the work, not after it
    report = api.quantize(
        src,
        out,
        quality=quality.value if quality else None,
        method=method.value if method else None,
        bits=bits,
        mixed=mixed,
        group_size=group_size,
        symmetric=symmetric,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        lm_head=lm_head,
        skip=skip or (),
        device=device,
        seed=seed,
        join=join.value,
        bos=bos,
        activations=activations.value,
        fresh=fresh,
        progress=True,
    )
    layers = report.pop("layers")
    worst = sorted(layers, key=lambda layer: -layer["error"])[:5]
    rows = [(layer["name"], f"{layer['error']:.2e}") for layer in worst]
    console.print(table("Largest relative output errors", ["layer", "error"], rows))
    if coverage := report["expert_coverage"]:
        heads = ["layer", "experts", "fewest", "median", "most", "starved"]
        rows = [(*map(str, list(c.values())[:-1]), str(len(c["starved"]))) for c in coverage]
        console.print(table("Calibration tokens per expert", heads, rows))
    used = report["calibration"]
    console.print(
        f"{out}: {len(layers)} matrices at {report['bits_per_weight']:.2f} bits per weight, "
        f"{used['windows']} windows of {used['seq_len']} tokens, {report['seconds']:.1f} s, "
        f"peak memory {size(report['peak_memory_bytes'])}.\n"
        f"Next: llmq eval {out} --text HELD_OUT.txt --reference {src}",
        highlight=False,
        soft_wrap=True,
    )
    if eval_text is not None:
        found = api.evaluate(
            str(out), eval_text, reference=src, record=True, device=device, progress=True
        )
        _show(console, found)
        report["evaluations"] = [found.to_json()]
    if push_to is not None:
        pushed = hub.push(out, push_to, private=private)
        console.print(f"Pushed to {pushed.url}", highlight=False, soft_wrap=True)
    _finish(report, as_json)


@app.command(help=cli_help.PLAN)
def plan(
    src: Annotated[str, typer.Argument(help="Full-precision model: folder or Hub name.")],
    bits: Annotated[int, typer.Option(help="8, 4, 3 or 2 bits per weight.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Weights that share a scale: 32, 64, 128; -1 = a whole row.")
    ] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric")] = True,
    lm_head: Annotated[bool, typer.Option("--lm-head/--no-lm-head")] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Layers to leave as they are; repeatable."),
    ] = None,
    tensor_parallel: Annotated[
        str, typer.Option(metavar="N,N...", help="GPUs that shall share the result.")
    ] = "1,2,4,8",
    out: Annotated[Path, typer.Option(help="Where it shall be written.")] = Path(),
    as_json: AsJson = False,
) -> None:
    console = _start(as_json)
    from llmq import api
    from llmq.report import size, table

    try:
        ranks = [int(part) for part in tensor_parallel.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{tensor_parallel!r}: numbers, as in 1,2,4") from None
    found = api.plan(
        src,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        lm_head=lm_head,
        skip=skip or (),
        tensor_parallel=ranks,
        out=out,
    )
    rows = [
        ("weights", f"{found.parameters:,}"),
        ("matrices to quantize", f"{found.matrices} ({found.quantized_weights:,} weights)"),
        ("bits per quantized weight", f"{found.bits_per_weight:.3f}"),
        ("files now", size(found.source_bytes)),
        ("files afterwards", f"{size(found.output_bytes)} ({found.output_bytes:,} bytes)"),
    ]
    console.print(table("", ["plan", ""], rows))
    words = {True: "yes", False: "no", None: "?"}
    rows = [(engine.name, words[engine.loads], engine.note) for engine in found.engines]
    console.print(table("", ["engine", "loads it", "limits"], rows))
    for problem in found.problems:
        text = f"{problem.where}: {problem.what}. Use {problem.fix}."
        style = "red" if problem.fatal else "yellow"
        console.print(text, style=style, highlight=False, soft_wrap=True)
    _finish(found.to_json(), as_json)
    if any(problem.fatal for problem in found.problems):
        raise typer.Exit(1)


@app.command(help=cli_help.SENSITIVITY)
def sensitivity(
    src: Annotated[str, typer.Argument(help="Full-precision model: folder or Hub name.")],
    bits: Annotated[float, typer.Option(help="Average for the allocation shown.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric")] = True,
    calibration: Annotated[str | None, typer.Option(help=f"Text: {cli_help.TEXT}")] = None,
    samples: Annotated[int, typer.Option(help="Windows of text, 32 at most are used.")] = 32,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Layers to leave as they are.")
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Which windows of the text are used.")] = 0,
    join: JoinOption = Join.documents,
    bos: Bos = None,
    as_json: AsJson = False,
) -> None:
    console = _start(as_json)
    from llmq import api
    from llmq.report import sensitivity_table
    from llmq.sensitivity import allocation, predicted

    units = api.sensitivity(
        src,
        group_size=group_size,
        symmetric=symmetric,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        skip=skip or (),
        device=device,
        seed=seed,
        join=join.value,
        bos=bos,
    )
    widths = allocation(units, bits)
    kl = predicted(units, widths)
    console.print(sensitivity_table(units, widths))
    gain = sorted(units, key=lambda unit: -unit.kl[4] / unit.weights)[:3]
    console.print(
        f"Predicted KL {kl:.4f} at {bits:g} bits on average, for layers that are solved one by "
        "one: it ranks layers and widths; measure the result with llmq eval.\n"
        "Most lost per weight at 4 bits (keep these higher): "
        f"{'; '.join(', '.join(unit.names) for unit in gain)}.\n"
        f"Next: llmq quantize {src} OUT --bits {bits:g}{'' if bits % 1 else ' --mixed'}",
        highlight=False,
        soft_wrap=True,
    )
    entries = [{**asdict(unit), "bits": widths[unit.names[0]]} for unit in units]
    _finish({"bits": bits, "predicted_kl": kl, "layers": entries}, as_json)


@app.command("eval", help=cli_help.EVAL)
def evaluate(
    model: Annotated[str, typer.Argument(help="Quantized or not: folder or Hub name.")],
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
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    console = _start(as_json)
    from llmq import api

    found = api.evaluate(
        model,
        text,
        seq_len=seq_len,
        windows=windows,
        reference=reference,
        join=join.value,
        bos=bos,
        protocol=protocol.value,
        record=record,
        device=device,
        progress=True,
    )
    _show(console, found)
    _finish(found.to_json(), as_json)


def _show(console: Any, found: Any) -> None:
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


@app.command(help=cli_help.GENERATE)
def generate(
    model: Annotated[str, typer.Argument(help="Quantized or not: folder or Hub name.")],
    prompt: Annotated[str, typer.Option(help="Where the text starts.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 = always the likeliest token; 0.7 = livelier.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    chat: Annotated[bool, typer.Option(help="Use the chat template; for instruct models.")] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Static cache; CUDA graph, or compiled on a CPU.")
    ] = False,
    device: Device = "auto",
) -> None:
    _start(False)
    from llmq import generate as writer
    from llmq.source import check_path, open_model, open_tokenizer, pick_device

    name, where = check_path(model), pick_device(device)
    tokenizer = open_tokenizer(name)
    loaded = open_model(name, where)
    print(
        writer.generate(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            fast=fast,
        )
    )


@app.command(help=cli_help.INSPECT)
def inspect(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, quantized or not.")],
    as_json: AsJson = False,
) -> None:
    console = _start(as_json)
    from llmq.report import bits_per_weight, inspect_checkpoint, size, table

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
    console.print(f"{size(total)}; {bits:.3f} bits per quantized weight.", highlight=False)
    entries = [asdict(layer) for layer in layers]
    _finish({"bits_per_weight": bits, "bytes": total, "layers": entries}, as_json)


@app.command(help=cli_help.BENCH)
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
    console = _start(as_json)
    from llmq.bench import bench as run
    from llmq.report import bench_table

    found = run(
        model,
        reference=reference,
        batches=_numbers("--batch", batch),
        prompts=_numbers("--prompt", prompt),
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
    _finish(found, as_json)


@app.command(help=cli_help.VERIFY)
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that llmq wrote.")],
    as_json: AsJson = False,
) -> None:
    console = _start(as_json)
    from llmq.verify import check

    names = check(folder)
    console.print(
        f"{folder}: {len(names)} files are as they were written; all values are finite.",
        highlight=False,
        soft_wrap=True,
    )
    _finish({"files": names}, as_json)


@app.command(help=cli_help.CONVERT)
def convert(
    src: Annotated[str, typer.Argument(metavar="IN", help="Quantized: folder or Hub name.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    format: Annotated[Format, typer.Option(help="Layout of the result, see above.")],
    as_json: AsJson = False,
) -> None:
    console = _start(as_json)
    from llmq.convert import convert as rewrite
    from llmq.gguf_file import write_gguf

    if format is Format.gguf:
        done = write_gguf(src, out, progress=True)
    else:
        done = rewrite(src, out, format.value, progress=True)
    lost = "nothing was lost."
    if done.rounded_scales:
        lost = f"{done.rounded_scales} scales rounded, by {done.largest_change:.1e} at most."
    console.print(
        f"{out}: {done.modules} matrices, {done.source} to {done.target}; {lost}",
        *(f"Note: {note}." for note in done.notes),
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
    _finish(asdict(done), as_json)


@app.command(help=cli_help.DEMO)
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Keep the checkpoints here. (default: a temporary folder)")
    ] = None,
    as_json: AsJson = False,
) -> None:
    console = _start(as_json)
    from llmq import showcase

    with showcase.output_folder(out) as folder:
        trials = []
        for trial in showcase.run(folder):
            trials.append(trial)
            if len(trials) > 1:
                console.print(f"{trial.label}: quantized, saved, loaded, measured.", style="dim")
        text = showcase.sample(folder / "gptq-4bit")
    console.print(showcase.as_table(trials))
    console.print(f"{showcase.LEGEND}\n{trials[0].result.protocol}", highlight=False)
    console.print("\ngptq 4-bit g64 writes:", style="bold")
    console.print(text, markup=False, highlight=False)
    entries = [
        {"label": t.label, "bytes": t.bytes, **t.result.to_json(), "seconds": t.seconds}
        for t in trials
    ]
    _finish({"trials": entries}, as_json)


def _numbers(option: str, text: str) -> list[int]:
    """ "1,4,16" -> [1, 4, 16]"""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"{text!r}: positive numbers with commas, such as 1,4,16.", param_hint=option
        )
    return [int(part) for part in parts]


app.command(help=cli_help.PUSH)(cli_share.push)
app.command(help=cli_help.COMPARE)(cli_share.compare)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every failure that is the user's becomes one line and status 1."""
    try:
        app(arguments)
    except LlmqError as error:
        print("llmq: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from None
