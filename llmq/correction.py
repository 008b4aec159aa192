"""Low-rank correction of what quantization lost, without training, as a standard LoRA adapter.

For every packed linear the rank-r matrix BA is found that makes the layer's expected output error

    E |(W - Q - BA) x|^2  =  |(W - Q - BA) H^1/2|_F^2,      H = E[x x^T],

smallest: with the singular value decomposition (W - Q) H^1/2 = U S V^T,

    B = U_r S_r^1/2,      A = S_r^1/2 V_r^T H^-1/2.

This is EoRA (Liu et al. 2024, arXiv:2410.21271, section 3); that it is the best possible BA is the
Eckart-Young theorem. x are the inputs that the quantized model itself feeds to the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmq.errors import SchemeError, SourceError
from llmq.moments import SecondMoment
from llmq.nn import PackedLinear
from llmq.output import staged_folder, writing
from llmq.peft import packed_linears, peft

_BUDGET = 2**31  # bytes of second moments that are collected at once
_BATCH_TOKENS = 2048
_EPSILON = 1e-6  # directions that carry less than this share of the largest are left alone


def low_rank(E: Tensor, H: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-r product BA nearest to E in the norm that H defines.

    Args:
        E: what is to be corrected (N, K).
        H: second moment of the layer's input (K, K).
        rank: r, at most min(N, K).

    Returns:
        A (r, K) and B (N, r), float32.
    """
    values, vectors = torch.linalg.eigh(H.double())
    kept = values > _EPSILON * values[-1]
    roots = values[kept].sqrt()
    directions = vectors[:, kept]  # (K, k)
    U, S, V = torch.linalg.svd((E.double() @ directions) * roots, full_matrices=False)
    r = min(rank, len(S))
    scale = S[:r].sqrt()
    A = torch.zeros(rank, E.shape[1], dtype=torch.float64, device=E.device)
    B = torch.zeros(E.shape[0], rank, dtype=torch.float64, device=E.device)
    A[:r] = scale[:, None] * ((V[:r] / roots) @ directions.T)
    B[:, :r] = U[:, :r] * scale
    return A.float(), B.float()


@torch.no_grad()
def corrections(
    original: nn.Module, quantized: nn.Module, windows: Tensor, rank: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, A, B) of every packed linear of `quantized`.

    Args:
        original: the full-precision model, with the same names.
        quantized: the packed model.
        windows: calibration tokens, int64 (windows, T).
        rank: r.

    Raises:
        SourceError: `original` is not what `quantized` was made from.
        SchemeError: weights that were rescaled before rounding (AWQ).
    """
    layers = packed_linears(quantized)
    weights = {name: _weight(original, name, layer) for name, layer in layers.items()}
    for group in _groups(layers):
        moments = _moments(quantized, group, windows)
        for name, layer in group.items():
            H = moments[name]
            W = weights[name].to(H.device).float()
            E = W - layer.dequantize(torch.float32)
            if float(((E @ H) * E).sum()) > float(((W @ H) * W).sum()):
                raise SchemeError(
                    f"{name}: its packed weights are no rounding of the original's. Layers that "
                    "AWQ has rescaled cannot be corrected in this way; use --method gptq."
                )
            A, B = low_rank(E, H, rank)
            yield name, A, B


def correct(
    original: nn.Module,
    quantized: Any,
    windows: Tensor,
    out: str | Path,
    *,
    rank: int = 32,
    base_model: str | None = None,
) -> Path:
    """Write the corrections as an adapter folder that `peft` loads.

    Args:
        original, quantized, windows, rank: see `corrections`.
        out: the folder to write; must not exist or be empty.
        base_model: name of the quantized model, for adapter_config.json.

    Raises:
        SchemeError: the rank is not positive.
        SourceError, SchemeError: see `corrections`.
        OutputError: `out` is in the way or cannot be written.
    """
    if rank < 1:
        raise SchemeError(f"rank={rank}: must be 1 or more.")
    with staged_folder(out) as folder:
        tensors = {}
        for name, A, B in corrections(original, quantized, windows, rank):
            tensors[f"base_model.model.{name}.lora_A.weight"] = A.cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = B.cpu().contiguous()
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,  # scaling 1
            target_modules=sorted(packed_linears(quantized)),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_model,
            inference_mode=True,
        )
        with writing(out):
            save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
            config.save_pretrained(str(folder))
    return Path(out)


def _weight(original: nn.Module, name: str, layer: PackedLinear) -> Tensor:
    """The full-precision matrix (N, K) that became `layer`."""
    try:
        module = original.get_submodule(name)
        weight = module.get_parameter("weight").detach()
    except AttributeError as error:
        raise SourceError(f"{name}: the original has no such layer; give the right one.") from error
    if not isinstance(module, nn.Linear):
        weight = weight.T  # Conv1D
    if weight.shape != (layer.out_features, layer.in_features):
        raise SourceError(
            f"{name}: is {tuple(weight.shape)} in the original and "
            f"{(layer.out_features, layer.in_features)} in the quantized model."
        )
    return weight


def _groups(layers: Mapping[str, PackedLinear]) -> Iterator[dict[str, PackedLinear]]:
    """Layers whose second moments fit into the budget together."""
    group: dict[str, PackedLinear] = {}
    used = 0
    for name, layer in layers.items():
        needed = 4 * layer.in_features**2
        if group and used + needed > _BUDGET:
            yield group
            group, used = {}, 0
        group[name] = layer
        used += needed
    yield group


def _add(moment: SecondMoment, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    moment.add(args[0])


def _moments(
    model: nn.Module, layers: Mapping[str, PackedLinear], windows: Tensor
) -> dict[str, Tensor]:
    """H (K, K) of the input of each layer while `model` reads the windows."""
    sums = {
        name: SecondMoment(layer.in_features, layer.weight_packed.device)
        for name, layer in layers.items()
    }
    hooks = [
        layer.register_forward_pre_hook(partial(_add, sums[name])) for name, layer in layers.items()
    ]
    try:
        device = next(model.parameters()).device
        for ids in windows.split(max(1, _BATCH_TOKENS // windows.shape[1])):
            model(input_ids=ids.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: moment.mean() for name, moment in sums.items()}
