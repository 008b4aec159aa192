"""Would code books be worth a format of their own? Layer by layer, against integers in groups.

    python benchmarks/codebooks.py MODEL --calibration TEXT [--blocks 0 10 20 29]

Every linear of the chosen blocks is solved for the second moment H of its inputs in the
full-precision model, in several number formats with the same column-by-column rounding (GPTQ):

    int     integers with a scale per group (llmq as it is; with and without zero points)
    nf4     the 16 normal-float levels of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E)
            times a scale per group, searched over ratios of the largest weight
    rows    2**bits free levels per row, by k-means weighted with the diagonal of H (SqueezeLLM: Kim
            et al. 2023, arXiv 2306.07629); + N%: that share of the weights, those that k-means
            misses most, kept apart in fp16 with a 16-bit index

What is compared is tr(D H D^T) / tr(W H W^T), the relative error of the layer's output, as its
geometric mean over layers, beside the bits per weight that the format takes. Writes
benchmarks/results/codebooks.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmq.moments import SecondMoment
from llmq.scheme import QuantScheme
from llmq.solvers.gptq import GPTQ, alive, column_order, inverse_factor

RESULTS = Path(__file__).resolve().parent / "results" / "codebooks.json"
NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)
Method = Callable[[Tensor, Tensor], tuple[Tensor, float]]  # W, H -> weights, bits per weight


def nearest(w: Tensor, levels: Tensor) -> Tensor:
    """The level (N, L) of its row that is nearest to each weight (N,) or (N, C)."""
    flat = w if w.ndim == 2 else w.unsqueeze(1)
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    found = levels.gather(1, torch.searchsorted(middle.contiguous(), flat.contiguous()))
    return found if w.ndim == 2 else found.squeeze(1)


def rounded(
    W: Tensor, H: Tensor, width: int, levels_of: Callable[[Tensor, Tensor, int], Tensor]
) -> Tensor:
    """GPTQ with free levels: columns by importance, errors carried to the columns still to come.

    Args:
        width: columns that stay together.
        levels_of: the columns left (N, C), their weights (C,) and the column -> levels (N, L).
    """
    H = alive(H)
    order = column_order(H.diagonal(), width, "group")
    U = inverse_factor(H, 0.01, order)
    rest, found = W[:, order].clone(), torch.empty_like(W)
    weights = U.diagonal().double().pow(-2).float()
    for j in range(W.shape[1]):
        levels = levels_of(rest, weights, j)
        found[:, j] = nearest(rest[:, j], levels)
        error = (rest[:, j] - found[:, j]) / U[j, j]
        rest[:, j + 1 :] -= error.unsqueeze(1) * U[j, j + 1 :]
    return found[:, order.argsort()]


def integers(bits: int, group: int, symmetric: bool) -> Method:
    scheme = QuantScheme(bits, group, symmetric)

    def solve(W: Tensor, H: Tensor) -> tuple[Tensor, float]:
        q = GPTQ().solve(W.bfloat16(), H, scheme)
        return q.dequantize(torch.float32), scheme.bits_per_weight(W.shape[1])

    return solve


def normal_floats(group: int) -> Method:
    table = torch.tensor(NF4)
    ratios = torch.linspace(0.6, 1.0, 17)

    def solve(W: Tensor, H: Tensor) -> tuple[Tensor, float]:
        kept: dict[int, Tensor] = {}

        def levels_of(rest: Tensor, weights: Tensor, j: int) -> Tensor:
            start = j // group * group
            if start not in kept:
                w, share = rest[:, start : start + group], weights[start : start + group]
                best = torch.full((len(w), 1), torch.inf)
                chosen = torch.ones(len(w), 1)
                for ratio in ratios:
                    scale = (w.abs().amax(1, keepdim=True) * ratio).bfloat16().float()
                    error = ((nearest(w, scale * table) - w).square() * share).sum(1, keepdim=True)
                    chosen = torch.where(error < best, scale, chosen)
                    best = torch.minimum(error, best)
                kept[start] = chosen * table
            return kept[start]

        return rounded(W, H, group, levels_of), 4 + 16 / group

    return solve


def k_means(W: Tensor, share: Tensor, count: int, rounds: int = 20) -> Tensor:
    """Levels (N, count) of each row, weighted k-means from quantiles of the weights."""
    ordered, order = W.sort(dim=1)
    mass = share.expand_as(W).gather(1, order).cumsum(1)
    wanted = (torch.arange(count) + 0.5) / count * mass[:, -1:]
    at = torch.searchsorted(mass.contiguous(), wanted.contiguous()).clamp(max=W.shape[1] - 1)
    levels = ordered.gather(1, at)
    for _ in range(rounds):
        middle = (levels[:, 1:] + levels[:, :-1]) / 2
        near = torch.searchsorted(middle.contiguous(), W.contiguous())
        total = torch.zeros_like(levels).scatter_add_(1, near, share.expand_as(W).contiguous())
        moment = torch.zeros_like(levels).scatter_add_(1, near, W * share)
        levels = torch.where(total > 0, moment / total, levels).sort(dim=1).values
    return levels.half().float()


def rows(bits: int, outliers: float) -> Method:
    def solve(W: Tensor, H: Tensor) -> tuple[Tensor, float]:
        share = alive(H).diagonal()
        kept = torch.zeros_like(W)
        if outliers:
            levels = k_means(W, share, 2**bits)
            missed = (nearest(W, levels) - W).square() * share
            count = int(outliers * W.numel())
            kept.view(-1)[missed.flatten().topk(count).indices] = 1
        # The rest is solved as if outliers were levels of their own: their residue is 0.
        dense = W * (1 - kept)
        levels = k_means(dense, share, 2**bits)
        mask = kept[:, column_order(share, 64, "group")].bool()

        def levels_of(rest: Tensor, weights: Tensor, j: int) -> Tensor:
            exact = rest[:, j : j + 1].expand_as(levels)
            return torch.where(mask[:, j : j + 1], exact, levels)

        found = rounded(W, H, 64, levels_of)
        size = bits + 16 * 2**bits / W.shape[1] + outliers * (16 + 16)
        return found, size

    return solve


METHODS: dict[str, Method] = {
    "int4 g64 symmetric": integers(4, 64, True),
    "int4 g64": integers(4, 64, False),
    "int4 g32": integers(4, 32, False),
    "nf4 g64": normal_floats(64),
    "nf4 g32": normal_floats(32),
    "rows 4 bits": rows(4, 0),
    "rows 4 bits + 0.5%": rows(4, 0.005),
    "int3 g64": integers(3, 64, False),
    "int3 g32": integers(3, 32, False),
    "rows 3 bits": rows(3, 0),
    "rows 3 bits + 0.5%": rows(3, 0.005),
}


@torch.no_grad()
def inputs(model: nn.Module, names: list[str], windows: Tensor) -> dict[str, Tensor]:
    """H of every named linear, in one pass over the windows."""
    moments = {n: SecondMoment(model.get_submodule(n).in_features) for n in names}  # type: ignore[arg-type]
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, x, n=n: moments[n].add(x[0]))
        for n in names
    ]
    for batch in windows.split(4):
        model(batch)
    for hook in hooks:
        hook.remove()
    return {n: moment.mean() for n, moment in moments.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 10, 20, 29])
    parser.add_argument("--samples", type=int, default=16)
    arguments = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(arguments.calibration.read_text()[:600_000]).input_ids
    count = arguments.samples * 512
    windows = torch.tensor(ids[:count]).view(-1, 512)
    wanted = tuple(f"model.layers.{block}." for block in arguments.blocks)
    names = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(wanted)
    ]
    moments = inputs(model, names, windows)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for layer in names:
        W, H = model.get_submodule(layer).weight.float(), moments[layer]
        size = float(((W @ H) * W).sum())
        for name, method in METHODS.items():
            weights, bits = method(W, H)
            delta = weights - W
            found[name].append((float(((delta @ H) * delta).sum()) / size, bits))
        print(layer, *(f"{errors[-1][0]:.2e}" for errors in found.values()), flush=True)
    table = [
        {
            "format": name,
            "bits_per_weight": sum(bits for _, bits in errors) / len(errors),
            "relative_error": math.exp(sum(math.log(e) for e, _ in errors) / len(errors)),
        }
        for name, errors in found.items()
    ]
    for row in table:
        print(json.dumps(row))
    setting = {"model": arguments.model.name, "blocks": arguments.blocks, "tokens": count}
    result = {**environment(torch.get_num_threads()), "setting": setting, "rows": table}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
