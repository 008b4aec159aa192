"""The command `llmq`: a thin shell over `llmq.api`.

Nothing heavy is imported before a command runs, so that `llmq --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llmq import cli_help, cli_measure, cli_plan, cli_share
from llmq.cli_common import (
    Activations,
    ActivationsOption,
    AnyModel,
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
    NewFolder,
    Original,
    Quality,
    Samples,
    Seed,
    SeqLen,
    Skip,
    TuneScales,
    finish,
    numbers,
    source,
    start,
)
from llmq.errors import LlmqError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: [bold]llmq demo[/bold]",
)


@app.callback(invoke_without_command=True, help=cli_help.ROOT)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from llmq import __version__

        print(f"llmq {__version__}")
        raise typer.Exit


def quantize(
    src: Original,
    out: NewFolder,
    quality: Annotated[
        Quality | None, typer.Option(help="How much effort, see above. (default: balanced)")
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="Instead of a quality: a method by name.")
    ] = None,
    bits: Bits = 4,
    mixed: Mixed = False,
    target_size: Annotated[
        str | None, typer.Option(help="Instead of bits: what the weights may take, as 500MB.")
    ] = None,
    widths: Annotated[
        str, typer.Option(metavar="N,N...", help="What an average is made of; vLLM reads 4,8.")
    ] = "2,3,4,5,6,8",
    group_size: GroupSize = 128,
    symmetric: Annotated[
        bool,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Without zero points (every engine loads it) or with (loses less).",
        ),
    ] = True,
    calibration: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    lm_head: Annotated[
        bool, typer.Option("--lm-head/--no-lm-head", help="Quantize the output layer too.")
    ] = False,
    embeddings: Annotated[
        int | None,
        typer.Option(metavar="BITS", help="8: round the input embeddings too; not for vLLM."),
    ] = None,
    tune_scales: TuneScales = None,
    codebook: Annotated[
        str | None,
        typer.Option(metavar="BOOK", help="nf4 or learned, instead of integers; only for llmq."),
    ] = None,
    outliers: Annotated[
        float, typer.Option(help="With a code book: share of weights kept beside it, as 0.005.")
    ] = 0.0,
    k_quants: Annotated[
        bool,
        typer.Option("--k-quants", help="Solve in Q2_K to Q6_K (by --bits), for llama.cpp."),
    ] = False,
    skip: Skip = None,
    device: Device = "auto",
    seed: Seed = 0,
    join: JoinOption = Join.documents,
    bos: Bos = None,
    activations: ActivationsOption = Activations.memory,
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
    console = start(as_json)
    if calibration is None and method is not Method.rtn:
        console.print(
            "Calibrating on the small text that comes with llmq: "
            "--calibration with text of your own domain is better.",
            style="yellow",
            soft_wrap=True,
        )
    from llmq import api, hub, measure

    if push_to is not None:
        hub.check_access(push_to)  # before the work, not after it
    report = api.quantize(
        src,
        out,
        quality=quality.value if quality else None,
        method=method.value if method else None,
        bits=bits,
        mixed=mixed,
        target_size=target_size,
        widths=numbers("--widths", widths),
        group_size=group_size,
        symmetric=symmetric,
        calibration=source(calibration),
        samples=samples,
        seq_len=seq_len,
        lm_head=lm_head,
        embeddings=embeddings,
        tune_scales=tune_scales,
        codebook=codebook,
        outliers=outliers,
        k_quants=k_quants,
        skip=skip or (),
        device=device,
        seed=seed,
        join=join.value,
        bos=bos,
        activations=activations.value,
        fresh=fresh,
        progress=True,
        tell=lambda line: console.print(line, highlight=False, soft_wrap=True),
    )
    _show(console, report, report.pop("layers"), out, src)
    if eval_text is not None:
        found = measure.evaluate(
            str(out), eval_text, reference=src, record=True, device=device, progress=True
        )
        cli_measure.show(console, found)
        report["evaluations"] = [found.to_json()]
    if push_to is not None:
        pushed = hub.push(out, push_to, private=private)
        console.print(f"Pushed to {pushed.url}", highlight=False, soft_wrap=True)
    finish(report, as_json)


def _show(
    console: Any, report: dict[str, Any], layers: list[dict[str, Any]], out: Path, src: str
) -> None:
    """What was done: the worst layers, the experts, and one line."""
    from llmq.report import size, table

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


def generate(
    model: AnyModel,
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
    start(False)
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


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Keep the checkpoints here. (default: a temporary folder)")
    ] = None,
    as_json: AsJson = False,
) -> None:
    console = start(as_json)
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
    finish({"trials": entries}, as_json)


for _command, _help in (
    (quantize, cli_help.QUANTIZE),
    (cli_plan.plan, cli_help.PLAN),
    (cli_plan.sensitivity, cli_help.SENSITIVITY),
    (cli_measure.evaluate, cli_help.EVAL),
    (cli_plan.write, cli_help.WRITE),
    (generate, cli_help.GENERATE),
    (cli_measure.inspect, cli_help.INSPECT),
    (cli_measure.bench, cli_help.BENCH),
    (cli_measure.verify, cli_help.VERIFY),
    (cli_share.convert, cli_help.CONVERT),
    (demo, cli_help.DEMO),
    (cli_share.push, cli_help.PUSH),
    (cli_share.compare, cli_help.COMPARE),
    (cli_share.correct, cli_help.CORRECT),
):
    _name = "eval" if _command is cli_measure.evaluate else None
    app.command(_name, help=_help)(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every failure that is the user's becomes one line and status 1."""
    try:
        app(arguments)
    except LlmqError as error:
        print("llmq: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from None
