"""Integers, K-quants projected from them and K-quants solved on their grid: KL to full precision.

    python benchmarks/kquants.py [MODEL --calibration TEXT --text TEXT] [--bits 2 3 4 5 6]

Every row quantizes MODEL, converts it to GGUF and judges the matrices that the package `gguf` reads
there, in float32, on the same held-out windows. Without a model it is the demo model with every
width doubled (engine_models.py), whose rows are multiples of 256. "plain" and "projected" are
one checkpoint in groups of 32; "solved" is made with --k-quants. Rows that are measured again are
replaced in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from engine_models import WIDE, fill, sources
from environment import environment
from transformers import AutoModelForCausalLM

from llmq import api, demo, measure
from llmq.formats.gguf import block_type
from llmq.gguf_file import FILE, write_gguf
from llmq.scheme import QuantScheme
from llmq.source import open_tokenizer

TAKEN = ("kl", "kl_stderr", "perplexity", "perplexity_stderr", "reference_perplexity", "protocol")
KEYS = ("bits", "quality", "stored", "symmetric")
PLAIN = {2: [False], 3: [True, False], 4: [False], 5: [False], 6: [True]}  # bits -> symmetric


def judged(options: argparse.Namespace, source: Path, folder: Path) -> dict[str, Any]:
    """What the matrices in a GGUF file lose."""
    dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    fill(dense, folder / FILE)
    found = measure.evaluate(
        dense,
        options.text,
        reference=full,
        tokenizer=open_tokenizer(str(source)),
        seq_len=256,
        windows=options.windows,
        device="cpu",
    ).to_json()
    return {key: found[key] for key in TAKEN}


def rows(options: argparse.Namespace, source: Path, bits: int) -> Iterator[dict[str, Any]]:
    """Plain integers, the same codes projected where a kind takes them, and what was solved."""
    given = {
        "quality": options.quality,
        "bits": bits,
        "calibration": options.calibration,
        "samples": options.samples,
        "seq_len": 256,
        "device": "cpu",
    }
    with tempfile.TemporaryDirectory() as work:
        packed = Path(work) / "solved"
        report = api.quantize(source, packed, k_quants=True, **given)
        per_weight = report["bits_per_weight"]
        head = {"bits": bits, "quality": options.quality, "kind": report["k_quants"]}
        made = head | {"stored": "solved", "symmetric": report["symmetric"]}
        made |= {"bits_per_weight": per_weight, "seconds": report["seconds"]}
        yield made | judged(options, source, gguf(packed))
        for symmetric in PLAIN[bits]:
            packed = Path(work) / f"plain-{symmetric}"
            report = api.quantize(source, packed, group_size=32, symmetric=symmetric, **given)
            made = head | {"stored": "plain", "symmetric": symmetric, "kind": None}
            made |= {"bits_per_weight": report["bits_per_weight"], "seconds": report["seconds"]}
            yield made | judged(options, source, gguf(packed))
            if block_type(QuantScheme(bits, 32, symmetric), 256, True) == head["kind"]:
                made |= head | {"stored": "projected", "bits_per_weight": per_weight}
                yield made | judged(options, source, gguf(packed, k_quants=True))


def gguf(packed: Path, k_quants: bool = False) -> Path:
    """A checkpoint as GGUF; the folder."""
    out = packed.with_name(f"{packed.name}-gguf-{k_quants}")
    write_gguf(packed, out, k_quants=k_quants)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calibration", default=str(demo.calibration_path()))
    parser.add_argument("--text", default=str(demo.evaluation_path()))
    parser.add_argument("--quality", default="fast")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kquants.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        source = options.model or sources(Path(made))[WIDE]
        name = source.name
        head = {"environment": environment(1), "model": name, "samples": options.samples}
        known = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
        for bits in options.bits:
            for new in rows(options, source, bits):
                known = [old for old in known if any(old[key] != new[key] for key in KEYS)] + [new]
                print(json.dumps({k: v for k, v in new.items() if k != "protocol"}), flush=True)
                options.out.write_text(json.dumps({**head, "rows": known}, indent=1) + "\n")


if __name__ == "__main__":
    main()
