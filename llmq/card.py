"""The model card (README.md) of a checkpoint, from the report that lies beside it.

Only what was measured is stated as a number; what was not is called "not measured". The metadata
on top is what the Hub reads: base model and relation, license of the original, `model-index`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from llmq.gguf_metadata import ARCHITECTURES
from llmq.page import WORST, plus_minus
from llmq.plots import short

MARK = "<!-- This card was made from quantization_report.json by llmq push. -->"


def model_card(
    report: Mapping[str, Any],
    repo: str,
    *,
    base_model: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        report: of `llmq.quantize`, with or without "evaluations".
        repo: "user/name" under which it will be loaded.
        base_model: name on the Hub of the original, if the report does not know one.
    """
    base = base_model or report.get("base_model")
    measured = list(report.get("evaluations", []))
    title = repo.rpartition("/")[2]
    sections = [
        f"---\n{_metadata(report, repo, base, measured).to_yaml()}\n---\n\n{MARK}",
        f"# {title}",
        _introduction(report, base),
        f"## What was lost\n\n{_losses(measured)}",
        f"## How it was made\n\n{_recipe(report)}",
        f"## Worst layers\n\n{_worst(report.get('layers', []))}",
        f"## How to load it\n\n{_loading(repo, report)}",
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(
    report: Mapping[str, Any], repo: str, base: str | None, measured: Sequence[Mapping[str, Any]]
) -> ModelCardData:
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_dataset(entry),
            dataset_name=entry["protocol"].split(": ")[0],
            metric_type=metric,
            metric_name=name,
            metric_config=entry["protocol"],
            metric_value=entry[metric],
        )
        for entry in measured
        for metric, name in _METRICS.items()
        if metric in entry
    ]
    known: dict[str, Any] = dict(report.get("card", {}))
    if base:
        known |= {"base_model": base, "base_model_relation": "quantized"}
    if results:
        known |= {"eval_results": results, "model_name": repo.rpartition("/")[2]}
    special = report.get("k_quants") or ("codebook" if report.get("codebook") else None)
    stored = special or "compressed-tensors"
    tags = ["llmq", stored, report["method"], f"{report['bits']}-bit"]
    return ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=tags, **known
    )


_METRICS = {
    "perplexity": "perplexity",
    "kl": "KL divergence from the full-precision model, nats per token",
    "top1": "share of tokens where both models' likeliest token is the same",
}


def _dataset(entry: Mapping[str, Any]) -> str:
    """An identifier of the text, as metadata wants one."""
    text = entry["protocol"].split(": ")[0].split(" ")[0].lower()
    return "".join(c if c.isalnum() or c in "-_./" else "-" for c in text) or "text"


def _introduction(report: Mapping[str, Any], base: str | None) -> str:
    of = f"[{base}](https://huggingface.co/{base})" if base else f"`{report['source']}`"
    revision = report.get("base_revision")
    at = f" (revision `{revision[:12]}`)" if base and revision else ""
    size = report.get("bytes")
    stored = f", {size / 1e6:.2f} MB of weights" if size is not None else ""
    tuning = report.get("scale_tuning") or {}
    tuned = ""
    if tuning.get("kl_before") is not None and tuning.get("kl_after") is not None:
        before, after = short(tuning["kl_before"]), short(tuning["kl_after"])
        tuned = (
            " In the end all scales were tuned together: KL on held-out calibration text "
            f"{before} before, {after} after, nats per token."
        )
    return (
        f"A weight-only quantized version of {of}{at}, made with "
        f"llmq {report['llmq']}: {_format(report)}, method `{report['method']}`, "
        f"{report['bits_per_weight']:.3f} bits per quantized weight, scales included{stored}."
        f"{tuned}"
    )


def _format(report: Mapping[str, Any]) -> str:
    widths = sorted({layer["bits"] for layer in _matrices(report) if "bits" in layer})
    bits = " and ".join(map(str, widths)) if len(widths) > 1 else str(report["bits"])
    sizes = sorted({layer["group_size"] for layer in _matrices(report) if "group_size" in layer})
    sizes = sizes if len(sizes) > 1 else [report["group_size"]]
    groups = "one group per row" if sizes == [-1] else f"groups of {' and '.join(map(str, sizes))}"
    if book := report.get("codebook"):
        kind = "NF4" if book == "nf4" else f"a learned table of {bits} bits per row"
        share = report["outliers"]
        return f"{kind}, {groups}" + (f", {share:.2%} of the weights beside it" if share else "")
    if kind := report.get("k_quants"):
        return f"super-blocks of llama.cpp ({kind})"
    return f"{bits} bits in {groups}, {'symmetric' if report['symmetric'] else 'with zero points'}"


def _matrices(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Entries of all layers but the embeddings, which are the last if they are quantized."""
    layers = report.get("layers", [])
    return layers[:-1] if report.get("embeddings") else layers


def _losses(measured: Sequence[Mapping[str, Any]]) -> str:
    if not measured:
        return (
            "Perplexity: not measured. KL divergence from the original: not measured. "
            "Top-1 agreement: not measured."
        )
    parts = []
    for entry in measured:
        rows = [("perplexity", plus_minus(entry["perplexity"], entry.get("perplexity_stderr")))]
        before = entry.get("reference_perplexity")
        rows.append(
            ("perplexity of the original", "not measured" if before is None else short(before))
        )
        if "nll_difference" in entry:
            change = plus_minus(entry["nll_difference"], entry.get("nll_difference_stderr"))
            rows.append(("paired change, nats per token", change))
        kl, top1 = entry.get("kl"), entry.get("top1")
        said = "not measured" if kl is None else plus_minus(kl, entry.get("kl_stderr"))
        rows.append(("KL from the original, nats per token", said))
        rows.append(("top-1 agreement", "not measured" if top1 is None else f"{top1:.2%}"))
        parts.append(f"{_table(('measure', 'value'), rows)}\n\n{entry['protocol']}")
    return "\n\n".join(parts)


def _recipe(report: Mapping[str, Any]) -> str:
    used = report.get("calibration", {})
    lines = []
    if command := report.get("command"):
        lines.append(f"```sh\n{command}\n```")
    if used:
        lines.append(
            f"Calibrated on {used.get('windows')} windows of {used.get('seq_len')} tokens of "
            f"`{used.get('text')}`; SHA-256 of the token ids: `{used.get('sha256', 'not known')}`."
        )
    memory = report["peak_memory_bytes"] / 1e9
    lines.append(
        f"Versions: llmq {report['llmq']}, torch {report['torch']}, "
        f"transformers {report['transformers']}. "
        f"It took {report['seconds']:.0f} s; peak memory {memory:.2f} GB."
    )
    skipped = ", ".join(f"`{pattern}`" for pattern in report.get("skip", []))
    rounded = report.get("embeddings")
    if rounded:
        lines.append(f"The input embeddings are rounded to nearest at {rounded} bits.")
    if skipped:
        embeddings = "" if rounded else ", embeddings"
        lines.append(f"Left in full precision: {skipped}{embeddings} and norms.")
    return "\n\n".join(lines)


def _worst(layers: Sequence[Mapping[str, Any]]) -> str:
    worst = sorted(layers, key=lambda layer: -layer["error"])[:WORST]
    finite = [(f"`{w['name']}`", short(w["error"])) for w in worst if math.isfinite(w["error"])]
    note = "Expected squared error of a layer's output on the calibration text, over the output's."
    return f"{note}\n\n{_table(('layer', 'relative error'), finite)}"


def _loading(repo: str, report: Mapping[str, Any]) -> str:
    symmetric = bool(report["symmetric"])
    more = "`quantization_report.json` has every number of the run."
    packed = (
        "```python\nimport llmq\n\n"
        f'model = llmq.load("{repo}", dtype="bfloat16")  # weights stay packed\n```'
    )
    if report.get("codebook"):
        why = "Only llmq reads its code books: transformers alone, vLLM and llama.cpp do not."
        return "\n\n".join([packed, why, more])
    if report.get("k_quants"):
        why = "Transformers alone and vLLM do not read its super-blocks."
        return "\n\n".join([packed, why, _llama_cpp(repo, report), more])
    stock = (
        "Without llmq, with the package `compressed-tensors`:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")\n```'
        if symmetric
        else "transformers alone refuses checkpoints with zero points in this format: `import "
        "llmq.hf` first."
    )
    served = (
        f"vLLM reads this format (compressed-tensors, `pack-quantized`): `vllm serve {repo}`. "
        "This checkpoint has not been run there by the program that wrote this card."
    )
    if report.get("embeddings"):
        served = "vLLM does not read quantized embeddings in the layout that transformers reads."
    return "\n\n".join([packed, stock, served, _llama_cpp(repo, report), more])


def _llama_cpp(repo: str, report: Mapping[str, Any]) -> str:
    """How llama.cpp runs it, if llmq can write it as GGUF."""
    widths = {report["bits"], *(layer.get("bits") for layer in _matrices(report))}
    if report.get("model_type") not in ARCHITECTURES:
        return f"llama.cpp: llmq writes GGUF for {', '.join(ARCHITECTURES)} only."
    if 8 in widths and not report["symmetric"]:
        return "llama.cpp: no block of GGUF holds 8 bits with zero points."
    return (
        "llama.cpp, after a conversion that leaves all codes as they are "
        "(`pip install 'llmq-quant[gguf]'`):\n\n"
        f"```sh\nllmq convert {repo} gguf --format gguf --embeddings q8_0\n"
        'llama-cli -m gguf/model.gguf -p "Once upon a time"\n```'
    )


def _table(heads: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join(lines)
