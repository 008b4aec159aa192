"""What quantization costs on a real model: every method, bits and group size, one table.

    python benchmarks/perplexity.py MODEL --calibration TEXT --text TEXT [--join wikitext]

The model is read once; every configuration works on a copy of it. Weights are quantized in the
dtype of the checkpoint (so scales are stored in it) and then judged in float32: perplexity with
its standard error over windows, KL(full || quantized) and top-1 agreement with the full model on
the same tokens. Layers that a group size does not divide stay in full precision and are counted.

Rows go into one JSON file as soon as they are measured; what is there already is not measured
again, so an interrupted run goes on where it stopped and several models share one file.

If both texts are the same file, its first half calibrates and its second half evaluates.
`--separator` names the mark between documents; each then starts with BOS, as the models of the
TinyStories family were trained.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import environment
from peers.judge import wikitext_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmq.evaluate import Evaluation, evaluate
from llmq.nn import PackedLinear
from llmq.quantize import Recipe, quantizable, quantize
from llmq.scheme import QuantScheme
from llmq.solvers.awq import AWQ
from llmq.solvers.gptq import GPTQ
from llmq.solvers.rtn import RTN

METHODS = {
    "rtn": (None, RTN()),
    "gptq": (None, GPTQ()),
    "awq": (AWQ(), RTN(search=True)),
    "awq+gptq": (AWQ(), GPTQ()),
}
CALIBRATION_BATCH = 4096  # tokens


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    method: str
    bits: int
    group_size: int
    symmetric: bool


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--name", help="of the model in the table (default: its folder's)")
    parser.add_argument("--join", choices=["plain", "wikitext"], default="plain")
    parser.add_argument("--separator", help="mark between documents, for example <|endoftext|>")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--groups", nargs="+", type=int, default=[128, 64, 32])
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/perplexity.json"))
    return parser.parse_args()


def encode(tokenizer: Any, text: str, separator: str | None) -> list[int]:
    """All token ids of a text; with a separator, documents that start with BOS."""
    if separator is None:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    documents = [part.strip() for part in text.split(separator)]
    encoded = [tokenizer(d, add_special_tokens=False).input_ids for d in documents if d]
    return [token for ids in encoded for token in (tokenizer.bos_token_id, *ids)]


def windows_of(ids: list[int], count: int, seq_len: int, name: str) -> Tensor:
    """The first windows, int64 (count, seq_len)."""
    if len(ids) < count * seq_len:
        raise SystemExit(f"{name}: {len(ids)} tokens, {count * seq_len} needed.")
    return torch.tensor(ids[: count * seq_len]).view(count, seq_len)


def read_texts(tokenizer: Any, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Calibration (samples, seq_len) and evaluation (windows, seq_len)."""
    calibration = args.calibration.read_text(encoding="utf-8")
    text = args.text.read_text(encoding="utf-8")
    if args.calibration.resolve() == args.text.resolve():
        mark = args.separator or "\n\n"
        half = text.index(mark, len(text) // 2)
        calibration, text = text[:half], text[half:]
    if args.join == "wikitext":
        text = wikitext_rows(text)
    ids = [encode(tokenizer, part, args.separator) for part in (calibration, text)]
    return (
        windows_of(ids[0], args.samples, args.seq_len, str(args.calibration)),
        windows_of(ids[1], args.windows, args.seq_len, str(args.text)),
    )


def settings(args: argparse.Namespace, shapes: dict[str, tuple[int, int]]) -> Iterator[Setting]:
    """Every setting that quantizes at least one layer of these shapes."""
    for group, bits, method in itertools.product(args.groups, args.bits, args.methods):
        if any(QuantScheme(bits, group).divides(K) for _, K in shapes.values()):
            yield Setting(method, bits, group, args.symmetric)


def undivided(shapes: dict[str, tuple[int, int]], scheme: QuantScheme) -> tuple[str, ...]:
    """Names of the layers that the group size does not divide."""
    return tuple(name for name, (_, K) in shapes.items() if not scheme.divides(K))


def in_float32(model: nn.Module) -> nn.Module:
    """The same function computed in float32: packed layers become dense ones again, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            weight = module.quantized().dequantize()
            linear = nn.Linear(weight.shape[1], weight.shape[0], module.bias is not None)
            linear.weight.data = weight
            if module.bias is not None:
                linear.bias.data = module.bias.data
            model.set_submodule(name, linear)
    return model.float()


def bits_per_weight(reports: list[Any], scale_bits: int) -> float:
    """Stored bits per weight of the quantized matrices, scales and zero points included."""
    sizes = [report.shape[0] * report.shape[1] for report in reports]
    bits = [r.scheme.bits_per_weight(r.shape[1], scale_bits) for r in reports]
    return sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)


def measure(
    original: nn.Module, full: nn.Module, calibration: Tensor, windows: Tensor, setting: Setting
) -> dict[str, Any]:
    """One row."""
    scheme = QuantScheme(setting.bits, setting.group_size, setting.symmetric)
    skip = undivided(quantizable(original), scheme)
    awq, solver = METHODS[setting.method]
    recipe = Recipe(scheme, solver, awq, skip)
    model = copy.deepcopy(original)
    batches = calibration.split(max(1, CALIBRATION_BATCH // calibration.shape[1]))
    start = time.perf_counter()
    reports = list(quantize(model, batches, recipe))
    seconds = time.perf_counter() - start
    result = evaluate(in_float32(model), windows, full)
    scale_bits = torch.finfo(next(original.parameters()).dtype).bits
    return {
        **vars(setting),
        "bits_per_weight": bits_per_weight(reports, scale_bits),
        "quantized_layers": len(reports),
        "skipped_layers": len(skip),
        "seconds": seconds,
        **scores(result),
    }


def scores(result: Evaluation) -> dict[str, float | None]:
    names = ("perplexity", "perplexity_stderr", "kl", "kl_stderr", "top1", "top1_stderr")
    return {name: getattr(result, name) for name in names}


class Table:
    """Rows in one JSON file, rewritten whole after each so that it is valid at any time."""

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path = path
        self.environment = environment
        self.data: dict[str, Any] = {"environments": [], "rows": []}
        if path.is_file():
            self.data = json.loads(path.read_text())

    def has(self, key: dict[str, Any]) -> bool:
        return any(key.items() <= row.items() for row in self.data["rows"])

    def add(self, row: dict[str, Any]) -> None:
        environments = self.data["environments"]
        if self.environment not in environments:
            environments.append(self.environment)
        row["environment"] = environments.index(self.environment)
        self.data["rows"].append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        temporary.replace(self.path)


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['model']:<20} {row['method']:<9} {row['bits']} bits g{row['group_size']:<4}"
        f"{row['bits_per_weight']:6.3f} b/w  ppl {row['perplexity']:9.3f} "
        f"+- {row['perplexity_stderr']:<8.3f} KL {row['kl']:.5f} +- {row['kl_stderr']:.5f}  "
        f"top-1 {row['top1']:.4f}  {row['seconds']:6.1f} s  skipped {row['skipped_layers']}",
        flush=True,
    )


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    name = args.name or args.model.resolve().name
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration, windows = read_texts(tokenizer, args)
    original = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    full = copy.deepcopy(original).float()
    table = Table(args.out, environment(args.threads))
    identity = {
        "model": name,
        "calibration": f"{args.calibration.name}: {args.samples} x {args.seq_len}",
        "text": f"{args.text.name}: {args.windows} x {args.seq_len}, join {args.join}",
    }
    key = {**identity, "method": "full"}
    if not table.has(key):
        table.add({**key, **scores(evaluate(full, windows))})
    for setting in settings(args, quantizable(original)):
        key = {**identity, **vars(setting)}
        if table.has(key):
            continue
        row = measure(original, full, calibration, windows, setting)
        table.add({**identity, **row})
        show({**identity, **row})


if __name__ == "__main__":
    main()
