"""Other engines against llmq on the same quantized model: greedy tokens and log-probabilities.

    python benchmarks/compare_engines.py --venvs engines/ [--engines llama.cpp ...]

The demo model is quantized (4 bits, groups of 32, symmetric), converted to what each engine
reads, and continued greedily by it in a process of its own, in a virtual environment that is made
on first use (or taken from --python NAME=PATH). Then llmq reads the engine's tokens and says how
likely it finds them and whether it would have chosen them. Writes benchmarks/results/engines.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from environment import environment

import llmq
from llmq import demo
from llmq.gguf_file import write_gguf
from llmq.source import open_tokenizer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "engines.json"
ENGINES = {  # name -> (script, layout on disk, packages)
    "transformers + compressed-tensors": (
        "transformers_stock.py",
        "compressed-tensors",
        ["torch", "transformers==5.23.0", "compressed-tensors==0.20.0", "accelerate"],
    ),
    "GPTQModel": ("gptq_model.py", "gptq", ["torch", "gptqmodel==7.7.0"]),
    "llama.cpp": ("llama_cpp.py", "gguf", ["xllamacpp"]),
}
PROMPTS = (
    "Once upon a time",
    "The little girl went to the",
    "One day, a dog named",
    "Tom was sad because",
)
COUNT = 24  # tokens added to each prompt


def python_of(name: str, venvs: Path) -> Path:
    """The interpreter of an engine's environment, made if it is not there."""
    folder = venvs / name.replace(" ", "")
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", *ENGINES[name][2]], check=True)
    return python


def prepare(folder: Path) -> dict[str, Path]:
    """Layout -> folder of the quantized demo model."""
    packed = folder / "compressed-tensors"
    llmq.quantize(demo.model_path(), packed, method="gptq", group_size=32, lm_head=False)
    write_gguf(packed, folder / "gguf")
    llmq.convert(packed, folder / "gptq", "gptq")
    return {path.name: path for path in folder.iterdir()}


@torch.no_grad()
def compare(model: Any, prompts: list[list[int]], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """How an engine's tokens and log-probabilities compare with the model's own."""
    same, total, differences = 0, 0, []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt + answer["tokens"]])
        scores = model(tokens).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        chosen = tokens[0, len(prompt) :]
        same += int((scores.argmax(-1) == chosen).sum())
        total += len(chosen)
        own = scores.gather(1, chosen.unsqueeze(1)).squeeze(1)
        differences += (own - torch.tensor(answer["logprobs"])).abs().tolist()
    return {
        "tokens": total,
        "greedy_tokens_equal": same,
        "mean_abs_logprob_difference": sum(differences) / total,
        "max_abs_logprob_difference": max(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venvs", type=Path, default=Path("engines"))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--python", nargs="*", default=[], metavar="NAME=PATH")
    arguments = parser.parse_args()
    pythons = dict(entry.split("=", 1) for entry in arguments.python)
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = prepare(Path(temporary))
        tokenizer = open_tokenizer(str(demo.model_path()))
        prompts = [tokenizer(text).input_ids for text in PROMPTS]
        listed = Path(temporary) / "prompts.json"
        listed.write_text(json.dumps(prompts))
        model = llmq.load(folders["compressed-tensors"], dtype=torch.float32, backend="torch")
        for name in arguments.engines:
            script, layout, _ = ENGINES[name]
            python = pythons.get(name) or python_of(name, arguments.venvs)
            command = [python, HERE / "engines" / script, folders[layout], listed, str(COUNT)]
            run = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
            if run.returncode:
                print(f"{name} failed:\n{run.stderr[-3000:]}", file=sys.stderr)
                continue
            answer = json.loads(run.stdout.strip().splitlines()[-1])
            rows[name] = {
                "version": answer["version"],
                "layout": layout,
                **compare(model, prompts, answer["answers"]),
            }
            print(name, json.dumps(rows[name]))
    setting = {"model": "llmq/demo/model", "bits": 4, "group_size": 32, "symmetric": True}
    result = {**environment(torch.get_num_threads()), "setting": setting, "engines": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    if len(rows) < len(arguments.engines):
        sys.exit(1)


if __name__ == "__main__":
    main()
