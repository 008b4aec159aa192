"""The models that compare_engines.py asks, quantized and converted to what each engine reads.

Those that are always there: the trained demo model as Llama; its weights as Mistral (the same
function), as Qwen 2 (with small biases), as Qwen 3 (with norms of queries and keys) and with the
rotary embeddings of Llama 3.1 and of YaRN; and the demo model with every width doubled, again the
same function, because K-quants need rows of 256.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
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

SCHEMES = {  # layout -> bits, symmetric
    "GGUF Q4_1": (4, False),
    "GGUF Q8_0": (8, True),
}
K_QUANTS = "GGUF K-quants"
WIDE = "llama, doubled"  # the model for K-quants
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


def save(
    config: PreTrainedConfig, weights: dict[str, torch.Tensor], folder: Path, tokenizer: Path
) -> Path:
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
    open_tokenizer(str(tokenizer)).save_pretrained(folder)
    return folder


def trained(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of a Llama, and those of its sizes that other architectures have too."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
            "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id",
            "pad_token_id")  # fmt: skip
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return weights, {key: getattr(model.config, key) for key in keep}


def hosted(name: str, llama: Path, folder: Path) -> dict[str, Path]:
    """A trained Llama in bf16, and its weights in other architectures as for the demo model."""
    weights, sizes = trained(llama)

    def other(config: PreTrainedConfig) -> Path:
        return save(config, weights, folder / f"{name}-{config.model_type}", llama)

    return {
        name: other(LlamaConfig(**sizes)),
        f"{name} as mistral": other(MistralConfig(**sizes, sliding_window=None)),
        f"{name} as qwen2": other(Qwen2Config(**sizes)),
        f"{name} as qwen3": other(Qwen3Config(**sizes)),
    }


def sources(folder: Path) -> dict[str, Path]:
    """Name -> folder of the models that are always there."""
    demo_model = demo.model_path()
    weights, sizes = trained(demo_model)
    wide = sizes | {key: 2 * sizes[key] for key in ("hidden_size", "intermediate_size")}
    wide |= {key: 2 * sizes[key] for key in ("num_attention_heads", "num_key_value_heads")}

    def made(config: PreTrainedConfig, name: str) -> Path:
        return save(config, weights, folder / name, demo_model)

    return {
        "llama": demo_model,
        "mistral": made(MistralConfig(**sizes, sliding_window=None), "mistral"),
        "qwen2": made(Qwen2Config(**sizes), "qwen2"),
        "qwen3": made(Qwen3Config(**sizes), "qwen3"),
        "llama-3.1": made(LlamaConfig(**sizes, rope_parameters=LLAMA3), "llama-3.1"),
        "qwen2, YaRN": made(Qwen2Config(**sizes, rope_parameters=YARN), "qwen2-yarn"),
        WIDE: save(LlamaConfig(**wide), doubled(weights), folder / WIDE, demo_model),
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
        """What llmq quantized, in compressed-tensors, or in the super-blocks of Q4_K."""
        bits, symmetric = SCHEMES.get(layout, (4, True))
        source, k_quants = self.models[model], layout == K_QUANTS
        name = f"{model}-{bits}{'k' if k_quants else 's' if symmetric else 'a'}"
        out = self.folder / name.replace(" ", "").replace(",", "-")
        if not out.exists():
            llmq.quantize(
                source,
                out,
                method="gptq",
                bits=bits,
                symmetric=symmetric,
                group_size=32,
                k_quants=k_quants,
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
            if layout == K_QUANTS:
                write_gguf(packed, out, embeddings="q6_k")
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
