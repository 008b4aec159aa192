"""How much every layer's rounding would move the model's predictions.

To second order, moving the outputs y of a linear by d changes KL(full || quantized) by
1/2 d^T F d, F the Fisher information of y. With its diagonal, averaged over a layer's outputs, and
labels drawn from the model itself, one backward pass gives per token the weight
w_t = mean_o (d loss / d y_to)^2, and

    KL(bits)  ~  1/2 tr(D H D^T),   H = mean_t w_t x_t x_t^T,   D = Q(W, bits) - W

D comes from GPTQ and coordinate descent, as in the flow, with this very H. Where rows make good
each other's errors (`solvers.feedback`), KL is multiplied by what that is expected to leave: most
of it for most matrices, a fraction for queries and keys. Layers are summed as if they did not
interact; a solver that takes quantized inputs into account loses `MATCHED` of that. The idea is
that of GuidedQuant (Kim et al. 2025, arXiv 2505.07004), used to allocate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq.adapters import as_linears, shared_copy
from llmq.allocate import Choice, allocate
from llmq.blocks import (
    decoder_blocks,
    drawn_loss,
    hooks,
    linears,
    record_calls,
    replaced,
    run_block,
    shared_input_groups,
)
from llmq.errors import NonFiniteError, SchemeError
from llmq.moments import capped, weight_roots
from llmq.scheme import BITS, QuantScheme, wider_groups
from llmq.solvers.descent import Polished, row_errors
from llmq.solvers.feedback import Feedback, share_left
from llmq.solvers.gptq import GPTQ

WIDTHS = BITS
PROBE = 32  # tokens with which it is observed which linears read one tensor
# What the KL of layers fitted to the full-precision stream is of that of layers solved one by one;
# see the predictions in benchmarks/results/quality.json.
MATCHED = 0.9
# Of the loss with one width for all: what several widths must get below. Predictions are good to
# about 20 %: a tenth less that was predicted (SmolLM2 at 3 bits) was measured as a tenth more.
WORTH = 0.8
# The ladder's solver, without what takes long and changes the order of layers little.
SOLVER = Polished(GPTQ(), sweeps=2)
CLIP = 50.0  # a token weighs at most so many times the mean of its batch


@dataclass(frozen=True)
class Sensitivity:
    """What rounding the linears that read one tensor is predicted to cost.

    Attributes:
        names: of the matrices; engines fuse them, so they share a number format.
        weights: how many weights they have together.
        columns: of each.
        kl: bits -> predicted KL to the full-precision model, nats per token.
        wider: the same with larger groups that divide the columns: their size -> bits -> KL.
    """

    names: tuple[str, ...]
    weights: int
    columns: int
    kl: dict[int, float]
    wider: dict[int, dict[int, float]] = field(default_factory=dict)

    def choices(self, asked: QuantScheme, widths: Sequence[int]) -> dict[QuantScheme, Choice]:
        """What each of its number formats costs, in bits with scales and zero points, and loses."""
        groups = {asked.group_size: self.kl, **self.wider}
        formats = {
            replace(asked, bits=bits, group_size=size): kl[bits]
            for size, kl in groups.items()
            for bits in widths
        }
        return {f: Choice(self.cost(f, f.bits), kl) for f, kl in formats.items()}

    def cost(self, scheme: QuantScheme, bits: float) -> int:
        """Bits that it takes with so many per code, on average."""
        few, many = (replace(scheme, bits=b).bits_per_weight(self.columns) for b in (4, 8))
        return math.floor(self.weights * (few + (many - few) * (bits - 4) / 4) + 0.5)


def sensitivities(
    model: nn.Module,
    batches: Sequence[Tensor],
    group_size: int,
    symmetric: bool,
    seed: int = 0,
    feedback: Feedback | None = None,
) -> list[Sensitivity]:
    """Measure every group of linears of the decoder blocks.

    Needs the whole model, and a float32 matrix (K, K) for each of its linears; with feedback also
    one (N, N) for each of those whose outputs are no more than the hidden states are wide.

    Args:
        model: a causal language model in float32 or bfloat16; not changed, but for its parameters
            no longer requiring gradients.
        batches: token ids, int64 (B, T) each; activations of one are kept for a backward pass.
        group_size, symmetric: of the number formats to try, at every number of `WIDTHS`.
        seed: of the labels that are drawn.
        feedback: between the rows of matrices, with which they will be solved.

    Raises:
        NonFiniteError: an activation or a gradient is NaN or infinite.
    """
    model.requires_grad_(False)
    prefix, blocks = decoder_blocks(model)
    views = [as_linears(shared_copy(block)) for block in blocks]
    modules = {
        f"{prefix}.{i}.{name}": linear
        for i, view in enumerate(views)
        for name, linear in linears(view).items()
    }
    hidden, found_groups = _groups(model, blocks, views, batches[0][:1, :PROBE])
    groups = [[f"{prefix}.{i}.{name}" for name in group] for i, group in found_groups]
    sizes = {name: linear.get_parameter("weight").shape for name, linear in modules.items()}
    narrow = {n for n, size in sizes.items() if feedback and len(size) == 2 and size[0] <= hidden}
    with replaced(blocks, views):
        moments, outputs = _moments(model, modules, batches, seed, narrow)
    left = {name: share_left(G, feedback) for name, G in outputs.items() if feedback}
    found = []
    for names in groups:
        weights = {name: modules[name].get_parameter("weight").data for name in names}
        columns = next(iter(weights.values())).shape[-1]
        kl = {}
        for size in (group_size, *wider_groups(group_size, columns)):
            parts = [
                _predict(W, moments[n] * left.get(n, 1.0), size, symmetric)
                for n, W in weights.items()
            ]
            kl[size] = {bits: sum(part[bits] for part in parts) for bits in WIDTHS}
        count = sum(W.numel() for W in weights.values())
        found.append(Sensitivity(tuple(names), count, columns, kl.pop(group_size), kl))
    return found


def allocation(
    units: Sequence[Sensitivity],
    bits: float,
    asked: QuantScheme,
    widths: Sequence[int] = WIDTHS,
) -> dict[str, QuantScheme]:
    """A number format for every matrix: least predicted KL in as many bits as an average takes.

    What is kept is the size: that of codes with `bits` on average, in groups of the size that is
    asked for, with scales (16 bits each) and zero points. Larger groups save some of these, which
    buys bits for codes. Where one width for all is predicted to lose little more, it is that.

    Args:
        units: every layer's share.
        bits: the average.
        asked: symmetry and smallest groups.
        widths: that codes may have.

    Raises:
        SchemeError: `bits` is below the smallest width, or a width was not measured.
    """
    if not widths or not set(widths) <= set(WIDTHS):
        raise SchemeError(f"widths={list(widths)}: use some of {', '.join(map(str, WIDTHS))}.")
    if bits < min(widths):
        raise SchemeError(f"bits={bits:g}: no average of widths from {min(widths)} up.")
    choices = {unit.names[0]: unit.choices(asked, widths) for unit in units}
    chosen = allocate(choices, sum(unit.cost(asked, bits) for unit in units))
    if bits in widths:
        lost = sum(choices[name][scheme].loss for name, scheme in chosen.items())
        if lost > WORTH * sum(unit.kl[int(bits)] for unit in units):
            chosen = dict.fromkeys(chosen, replace(asked, bits=int(bits)))
    return {name: chosen[unit.names[0]] for unit in units for name in unit.names}


def predicted(
    units: Sequence[Sensitivity], schemes: Mapping[str, QuantScheme], matched: bool
) -> float:
    """KL to the full-precision model that an allocation is predicted to have.

    Args:
        units: every layer's share.
        schemes: matrix -> number format.
        matched: whether layers will be fitted to the full-precision stream (`Recipe.match`).
    """
    own = [(unit, schemes[unit.names[0]]) for unit in units]
    lost = sum(unit.wider.get(s.group_size, unit.kl)[s.bits] for unit, s in own)
    return lost * (MATCHED if matched else 1)


@torch.no_grad()
def _groups(
    model: nn.Module, blocks: nn.ModuleList, views: Sequence[nn.Module], ids: Tensor
) -> tuple[int, list[tuple[int, list[str]]]]:
    """How wide hidden states are; and per block, the linears that read one tensor."""
    recording = record_calls(model, blocks, [ids])
    hidden, found = recording.hidden[0], []
    for i, view in enumerate(views):
        call = recording.calls[i][0]
        found += [(i, group) for group in shared_input_groups(view, hidden, call)]
        hidden = run_block(view, hidden, call)
    return hidden.shape[-1], found


def _moments(
    model: nn.Module,
    modules: dict[str, nn.Module],
    batches: Sequence[Tensor],
    seed: int,
    narrow: set[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per matrix, the mean over tokens of w x x^T, float32 (K, K); experts of a stack pooled.

    Returns:
        also, for those in `narrow`, the sum of g g^T, g the gradient by the outputs, (N, N).
    """
    moments: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, gradient: Tensor) -> None:
        rows, slopes = (t.detach().flatten(0, -2).float() for t in (x, gradient))
        weights = capped(slopes.square().mean(1), CLIP)
        if name not in moments:
            moments[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        moments[name].addmm_((rows * weights.unsqueeze(1)).T, rows)
        if name in narrow:
            slopes = slopes * weight_roots(slopes, CLIP)  # never in place: others read them too
            if name not in outputs:
                outputs[name] = slopes.new_zeros(slopes.shape[1], slopes.shape[1])
            outputs[name].addmm_(slopes.T, slopes)

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            one = isinstance(output, Tensor)  # else a list of one per expert
            pairs = ((args[0],), (output,)) if one else (args[0], output)
            for x, y in zip(*pairs, strict=True):
                if y.requires_grad:
                    y.register_hook(partial(note, name, x))

        return hook

    def start(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator(batches[0].device).manual_seed(seed)
    with hooks(embeddings.register_forward_hook(start), *handles), torch.enable_grad():
        for ids in batches:
            drawn_loss(model(input_ids=ids, use_cache=False).logits, generator).backward()
    tokens = sum(ids.numel() for ids in batches)
    for name, moment in moments.items():
        if not bool(moment.isfinite().all()):
            raise NonFiniteError(f"{name}: an activation or a gradient is NaN or infinite.")
    return {name: moment / tokens for name, moment in moments.items()}, outputs


def _predict(W: Tensor, H: Tensor, group_size: int, symmetric: bool) -> dict[int, float]:
    """bits -> 1/2 tr(D H D^T); for a stack of experts (E, N, K) the mean over them."""
    matrices = W if W.ndim == 3 else [W]
    kl = {}
    for bits in WIDTHS:
        scheme = QuantScheme(bits, group_size, symmetric)
        errors = [
            float(row_errors(one.to(H.device), H, SOLVER.solve(one.to(H.device), H, scheme)).sum())
            for one in matrices
        ]
        kl[bits] = sum(errors) / len(errors) / 2
    return kl
