"""dequantize.py SOURCE QUANTIZED OUT: turn a quantized checkpoint into a plain float32 folder.

Reads the tensors itself, with the documented bit layouts and nothing of llmq or of a peer, so
that one stock transformers model judges every quantizer:

    GPTQ v1, v2          qweight (K*b/32, N), qzeros (G, N*b/32), scales (G, N), g_idx (K)
    auto-round           the same, as its packing_format says
    compressed-tensors   weight_packed (N, K*b/32), weight_scale (N, G), weight_zero_point

Everything that is not quantized is taken from QUANTIZED too (a method may fold scales into
norms); a tensor that is missing there, such as a tied head, from SOURCE. Prints one JSON line.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def unpack(words: Tensor, bits: int, size: int) -> Tensor:
    """int32 (R, W) -> int64 (R, size): element i is the `bits` bits from bit i * bits of its row.

    A row is one little-endian bit stream; for 3 bits an element may straddle two words.
    """
    stream = words.long() & 0xFFFFFFFF  # (R, W)
    first = torch.arange(size) * bits
    word, shift = first // 32, first % 32
    padded = torch.cat([stream, stream.new_zeros(len(stream), 1)], dim=1)
    both = padded[:, word] | (padded[:, word + 1] << 32)
    return (both >> shift) & (2**bits - 1)


def from_gptq(tensors: dict[str, Tensor], name: str, config: dict) -> Tensor:
    """Weight (N, K) of one GPTQ module."""
    bits = config["bits"]
    scales = tensors[f"{name}.scales"].float()  # (G, N)
    N, K = scales.shape[1], len(tensors[f"{name}.qweight"]) * 32 // bits
    g_idx = tensors.get(f"{name}.g_idx", torch.arange(K) // (K // len(scales))).long()  # (K,)
    codes = unpack(tensors[f"{name}.qweight"].T.contiguous(), bits, K).T  # (K, N)
    zeros = unpack(tensors[f"{name}.qzeros"], bits, N)  # (G, N)
    if config.get("checkpoint_format", "gptq") == "gptq":  # v1 stores zero - 1
        zeros = (zeros + 1) % 2**bits
    return ((codes - zeros[g_idx]) * scales[g_idx]).T.contiguous()


def from_auto_round(tensors: dict[str, Tensor], name: str, config: dict) -> Tensor:
    """Weight (N, K) of one module of AutoRound's own format."""
    versions = {"auto_round:gptqmodel": "gptq_v2", "auto_round:auto_gptq": "gptq"}
    version = versions[config["packing_format"]]
    return from_gptq(tensors, name, {**config, "checkpoint_format": version})


def from_compressed_tensors(tensors: dict[str, Tensor], name: str, _: dict) -> Tensor:
    """Weight (N, K) of one pack-quantized module."""
    N, K = tensors[f"{name}.weight_shape"].tolist()
    scale = tensors[f"{name}.weight_scale"].float()  # (N, G)
    packed = tensors[f"{name}.weight_packed"]
    bits = packed.shape[1] * 32 // K  # modules may differ; groups of 32 fill whole words
    codes = unpack(packed, bits, K)  # (N, K)
    if f"{name}.weight_zero_point" in tensors:
        packed = tensors[f"{name}.weight_zero_point"]  # (N*b/32, G)
        zero = unpack(packed.T.contiguous(), bits, N).T  # (N, G)
    else:
        zero = torch.full(scale.shape, 2 ** (bits - 1))
    width = K // scale.shape[1]
    centred = codes - zero.repeat_interleave(width, dim=1)
    return centred * scale.repeat_interleave(width, dim=1)


READERS: dict[str, tuple[str, Callable[[dict[str, Tensor], str, dict], Tensor]]] = {
    "gptq": (".qweight", from_gptq),
    "auto-round": (".qweight", from_auto_round),
    "compressed-tensors": (".weight_packed", from_compressed_tensors),
}
PARTS = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_shape",
)


def relative_error(weight: Tensor, original: Tensor) -> float:
    return ((weight - original).norm() / original.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("source", "quantized", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()

    config = json.loads((args.quantized / "config.json").read_text())["quantization_config"]
    suffix, read = READERS[config["quant_method"]]
    tensors: dict[str, Tensor] = {}
    for file in sorted(args.quantized.glob("*.safetensors")):
        tensors |= load_file(file)

    model = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32)
    weights = dict(model.state_dict())
    names = [key.removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    if not names:
        raise SystemExit(f"{args.quantized}: no quantized tensor found.")
    errors = []
    for name in names:
        weight = read(tensors, name, config)
        errors.append(relative_error(weight, weights[f"{name}.weight"]))
        weights[f"{name}.weight"] = weight
    for key, tensor in tensors.items():
        if not key.endswith(PARTS):
            weights[key] = tensor.float()
    # A wrong layout gives an error near 1.4 everywhere. One matrix of 2 bits may be as far off and
    # yet right, where inputs have few directions and targets are not the weights.
    typical = statistics.median(errors)
    if typical > 1 or not all(w.isfinite().all() for w in weights.values()):
        raise SystemExit(f"{args.quantized}: not what it claims to be (error {typical:.2f}).")

    model.load_state_dict(weights)
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.source).save_pretrained(args.out)
    mean = sum(errors) / len(errors)
    print(json.dumps({"modules": len(names), "mean_relative_error": mean}))


if __name__ == "__main__":
    main()
