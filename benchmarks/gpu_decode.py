"""Rows of `on_gpu.py` that time whole models and chains of layers, as decoding runs them.

chain     layers in a row, each reading what the one before wrote, with and without
          programmatic dependent launch
decode    a model of the shape of Llama-3.1-8B with random weights, made on the device: packed
          layer by layer, never stored in full precision, nothing downloaded
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from gpu_checks import failures, ours
from torch import nn

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


def chain(report, device, gpu, size: int, rows, *, dry: bool = False) -> None:
    """Square layers in a row: what a dependent launch hides, and what cuBLAS takes for the same."""
    from llmq_kernels import tune
    from llmq_kernels.timing import copies, microseconds

    cache = 1 << 11 if dry else torch.cuda.get_device_properties(device).L2_cache_size
    weight = tune.random_weight(size, size, 4, 128 if size % 128 == 0 else 32, True, device)
    # Codes are spread over +-8, so that this keeps the size of x from layer to layer.
    scale = torch.full_like(weight.scale, 1 / (4.6 * size**0.5))
    weight = dataclasses.replace(weight, scale=scale)
    weights = tune.clones(weight, copies(weight.qweight.nbytes, cache))
    W = torch.randn(size, size, device=device, dtype=torch.bfloat16) / size**0.5
    dense = [W.clone() for _ in range(copies(W.nbytes, cache))]
    for M in rows:
        start = torch.randn(M, size, device=device, dtype=torch.bfloat16)
        kinds: dict[str, Any] = {
            "dense": [lambda x, W=W: torch.nn.functional.linear(x, W) for W in dense],
            "ours": [lambda x, w=w: ours(x, w, gpu) for w in weights],
        }
        if not dry and torch.cuda.get_device_capability(device) >= (9, 0):
            kinds["ours pdl"] = [lambda x, w=w: ours(x, w, gpu, pdl=True) for w in weights]
        for name, layers in kinds.items():

            def through(layers=layers, x=start):
                for layer in layers:
                    x = layer(x)
                return x

            row = {"name": name, "N": size, "K": size, "M": M, "layers": len(layers)}
            try:
                us = microseconds([through], device=device) / len(layers)
            except failures() as error:
                report.add("chain", **row, error=str(error)[:200])
                continue
            report.add("chain", **row, us_per_layer=us)


def random_model(sizes: dict[str, Any], device: torch.device, bits: int | None, group: int) -> Any:
    """A Llama of these sizes on `device` with random weights; packed if `bits` is given.

    The output layer of the packed one has 8 bits. Norms are 1 and weights keep the size of what
    passes through, so that no number overflows.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmq.fuse import fuse_on_gpu, head_scheme
    from llmq.nn import PackedLinear, prepare
    from llmq.scheme import QuantScheme

    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and bits is not None:
            K, N = layer.in_features, layer.out_features
            scheme = QuantScheme(bits, group, symmetric=True)
            if name == "lm_head":
                scheme = head_scheme(K)
            model.set_submodule(name, packed := PackedLinear(scheme, K, N, device=device))
            packed.weight_packed.copy_(
                torch.randint(-(2**31), 2**31, packed.weight_packed.shape, device=device)
            )
            packed.weight_scale.fill_(2 * 3**0.5 / 2**scheme.bits / K**0.5)
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            if tensor.is_meta:
                made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                made = made.fill_(1) if made.ndim == 1 else made.normal_(std=made.shape[1] ** -0.5)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.eval()
    prepare(model)
    fuse_on_gpu(model)
    return model


def decoding(report, device, roof: float, batches, *, dry: bool = False) -> None:
    """Tokens per second of the whole model, packed and in bf16."""
    sizes = TINY if dry else LLAMA_8B
    models: dict[str, Any] = {}
    for name, mode, batch in order(batches, dry):
        head = {"name": name, "shape": "tiny" if dry else "Llama-3.1-8B", "mode": mode}
        if report.left() < (60 if mode == "compiled graph" else 5):
            report.add("stopped", **head, batch=batch, why="out of time")
            continue
        try:
            if name not in models:
                bits = 4 if name == "packed" else None
                models[name] = random_model(sizes, device, bits, 32 if dry else 128)
        except failures() as error:
            report.add("decode", **head, batch=batch, error=str(error)[:300])
            continue
        _decode_row(report, models[name], head, batch, roof, dry)


def order(batches, dry: bool) -> list[tuple[str, str, int]]:
    """(model, how a step is taken, batch), most important first: compiling takes a minute each."""
    first, *others = batches
    if dry:
        return list(itertools.product(("packed", "dense"), ("eager",), batches))
    return [
        *(("packed", "graph", batch) for batch in batches),
        ("packed", "compiled graph", first),
        *(("dense", "graph", batch) for batch in batches),
        ("dense", "compiled graph", first),
        *itertools.product(("packed", "dense"), ("compiled graph",), others),
    ]


def backends_of(model) -> dict[str, Any]:
    """What multiplies by the packed matrices, and why some are left to plain torch, if any are."""
    from llmq import backends
    from llmq.nn import PackedLinear, packed_modules

    layers = [layer for _, layer in packed_modules(model) if isinstance(layer, PackedLinear)]
    plain = [layer for layer in layers if layer.backend == backends.TORCH]
    found: dict[str, Any] = {"backends": sorted({layer.backend.name for layer in layers})}
    return found | ({"why_plain": backends.why_plain(plain[0])} if plain else {})


def _decode_row(report, model, head: dict[str, Any], batch: int, roof: float, dry: bool) -> None:
    from llmq.bench import measure

    prompt, tokens = (8, 4) if dry else (128, 128)
    try:
        row = measure(model, head["name"], batch, prompt, tokens, 3, head["mode"], 1e9 * roof)
        values = dataclasses.asdict(row) | backends_of(model)
        values.pop("model")
    except failures() as error:
        values = {"batch": batch, "error": str(error)[:300]}
    report.add("decode", **head | values)
