"""Mixed widths for a model on disk: open it, measure its layers, allocate bits."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import SchemeError
from llmq.quantize import Recipe, check_groups, quantizable
from llmq.scheme import BITS
from llmq.sensitivity import Sensitivity, sensitivities
from llmq.source import open_model

WINDOWS = 32  # of calibration text, spread over all of it
BATCH_TOKENS = 1024  # whose activations are kept for a backward pass


def uniform_width(bits: float, mixed: bool) -> int:
    """The width of what is not allocated: `bits`, or the next one above an average.

    Raises:
        SchemeError: an average that widths of 2 to 8 bits cannot have.
    """
    if not is_mixed(bits, mixed):
        return int(bits)
    if not BITS[0] <= bits <= BITS[-1]:
        raise SchemeError(f"bits={bits}: an average lies between {BITS[0]} and {BITS[-1]}.")
    return next(width for width in BITS if width >= bits)


def is_mixed(bits: float, mixed: bool) -> bool:
    """Whether widths are to be allocated: asked for, or `bits` is no whole number."""
    return mixed or bits != int(bits)


def scan(name: str, windows: Tensor, recipe: Recipe, device: str, seed: int) -> list[Sensitivity]:
    """What every layer that `recipe` quantizes would cost at every width.

    Args:
        name: folder or Hub name of a full-precision model.
        windows: calibration tokens, int64 (samples, seq_len).
        recipe: its group size, symmetry and skipped layers count.
        device: where the whole model is run.
        seed: of the labels that are drawn.

    Raises:
        SchemeError: the group size does not divide a layer.
    """
    model = open_model(name, device)
    check_groups(quantizable(model), recipe)
    for parameter in model.parameters():  # float16 has no room for gradients
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.to(torch.bfloat16)
    used = windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS].to(device)
    batches = used.split(max(1, BATCH_TOKENS // used.shape[1]))
    units = sensitivities(model, batches, recipe.scheme.group_size, recipe.scheme.symmetric, seed)
    return [unit for unit in units if all(recipe.scheme_for(n) for n in unit.names)]
