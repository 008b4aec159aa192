"""Mixed widths for a model on disk: how many bits there are, and what each layer would lose."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq import plan
from llmq.adapters import run_dtype
from llmq.errors import SchemeError
from llmq.number_formats import number_format
from llmq.recipe import Recipe, input_widths, quantizable
from llmq.scheme import BITS, QuantScheme, check_groups
from llmq.sensitivity import Sensitivity, allocation, predicted, sensitivities
from llmq.source import open_model
from llmq.stored import Header

WINDOWS = 32  # of calibration text, spread over all of it
SLACK = 8192  # bytes for headers that mixed widths make a little longer
BATCH_TOKENS = 1024  # whose activations are kept for a backward pass


def uniform_width(bits: float, mixed: bool) -> int:
    """The width of what is not allocated: `bits`, or the next one above an average.

    Raises:
        SchemeError: an average that widths of 2 to 8 bits cannot have.
    """
    if not is_mixed(bits, mixed):
        return int(bits)
    if not BITS[0] <= bits <= BITS[-1]:
        raise SchemeError(f"bits={bits:g}: an average lies between {BITS[0]} and {BITS[-1]}.")
    return next(width for width in BITS if width >= bits)


def is_mixed(bits: float, mixed: bool) -> bool:
    """Whether widths are to be allocated: asked for, or `bits` is no whole number."""
    return mixed or bits % 1 != 0


def common_format(
    bits: float,
    mixed: bool,
    group_size: int,
    symmetric: bool,
    book: str | None,
    outliers: float,
    k_quants: bool = False,
) -> QuantScheme:
    """The number format of all matrices, or, before widths are allocated, of one of them.

    Raises:
        SchemeError: see `number_format`; or one of the two, and an average of bits.
    """
    if (book or k_quants) and is_mixed(bits, mixed):
        raise SchemeError("Code books and K-quants have one width for all layers: give whole bits.")
    width = uniform_width(bits, mixed)
    return number_format(width, group_size, symmetric, book, outliers, k_quants)


def parse_size(text: str | int) -> int:
    """Bytes, from a number or from "500MB", "1.5 GB", "700MiB".

    Raises:
        SchemeError: something else.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(I?)B?\s*", str(text).upper())
    if found is None or found[1].count(".") > 1 or found[1] == ".":
        raise SchemeError(f"target_size={text!r}: give bytes, or a size such as 500MB or 1.5GB.")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2] or " "))


def average_for_size(
    size: int, name: str, config: Any, headers: Mapping[str, Header], recipe: Recipe
) -> float:
    """The average of bits at which the files of weights take at most `size` bytes.

    The exact sizes at 4 and at 8 bits are known from shapes alone, and what lies between is linear.

    Raises:
        SchemeError: fewer than 2 bits would be left.
    """
    bytes_at = {}
    for bits in (4, 8):
        scheme = dataclasses.replace(recipe.scheme, bits=bits)
        uniform = dataclasses.replace(recipe, scheme=scheme)
        bytes_at[bits] = plan.make(name, config, headers, uniform).output_bytes
    per_bit = (bytes_at[8] - bytes_at[4]) / 4
    average = 4 + (size - SLACK - bytes_at[4]) / per_bit
    if average < BITS[0]:
        least = int(bytes_at[4] - 2 * per_bit) + SLACK
        raise SchemeError(
            f"target_size={size}: with 2 bits everywhere {name} still takes {least} bytes. "
            "Raise the size, or quantize the output layer too."
        )
    return min(average, BITS[-1])


def allocated(
    recipe: Recipe,
    bits: float,
    widths: Sequence[int],
    name: str,
    windows: Tensor,
    device: str,
    seed: int,
) -> tuple[Recipe, float]:
    """`recipe` with a number format for every layer, in the size that `bits` on average take.

    Returns:
        also the KL divergence to the full model that is predicted, in nats per token.
    """
    units = scan(name, windows, recipe, device, seed)
    schemes = allocation(units, bits, recipe.scheme, widths)
    return dataclasses.replace(recipe, schemes=schemes), predicted(units, schemes, recipe.match)


def scan(name: str, windows: Tensor, recipe: Recipe, device: str, seed: int) -> list[Sensitivity]:
    """What every layer that `recipe` quantizes would cost at every width.

    Args:
        name: folder or Hub name of a full-precision model.
        windows: calibration tokens, int64 (samples, seq_len).
        recipe: its group size, symmetry, skipped layers and feedback between rows count.
        device: where the whole model is run.
        seed: of the labels that are drawn.

    Raises:
        SchemeError: the group size does not divide a layer.
    """
    model = open_model(name, device)
    check_groups(input_widths(quantizable(model)), recipe.scheme_for)
    for parameter in model.parameters():  # float16 has no room for gradients
        wide = torch.bfloat16 if parameter.dtype == torch.float16 else parameter.dtype
        parameter.data = parameter.data.to(run_dtype(wide, parameter.device))
    used = windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS].to(device)
    batches = used.split(max(1, BATCH_TOKENS // used.shape[1]))
    scheme = recipe.scheme
    units = sensitivities(
        model, batches, scheme.group_size, scheme.symmetric, seed, recipe.feedback
    )
    return [unit for unit in units if all(recipe.scheme_for(n) for n in unit.names)]
