"""What to do to a model, and which of its matrices that is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from llmq.adapters import as_linears, shared_copy
from llmq.blocks import decoder_blocks, linears
from llmq.codebook import CodebookScheme
from llmq.errors import SchemeError
from llmq.nn import STACKS, is_stacked_experts
from llmq.scheme import QuantScheme, check_groups
from llmq.solvers import Solver
from llmq.solvers.awq import AWQ
from llmq.solvers.feedback import Feedback
from llmq.solvers.gptq import GPTQ
from llmq.superblocks import SuperBlockScheme
from llmq.tuning import ScaleTuning
from llmq.tuning_blocks import BlockTuning


@dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Attributes:
        scheme: number format of every quantized linear.
        solver: how codes are found.
        awq: scale channels before solving, or None.
        schemes: number formats of matrices that have one of their own, by module name.
        match: ask for the full-precision outputs, given the inputs behind quantized layers
            (see `objective`); else for the outputs that these inputs have in full precision.
        feedback: how rows of a matrix make good each other's errors, weighed by what the loss feels
            of the matrix's outputs (see `curvature`), or None. Experts have none.
        block: how codes and scales of a finished block are tuned towards the full-precision
            block's output, or None; needs `match`. Reports tell of the codes before that.
        scales: how scales are tuned when the last block is finished. That is done by who calls
            `quantize`, since it needs the whole packed model (see `tuning` and `refine`).
        lm_head: whether the output layer is quantized too. If it is tied to the embeddings they
            are untied: the embeddings stay as they are, or become what `embeddings` says.
        embeddings: bits of the input embeddings: 8, or None to leave them as they are. They are
            rounded to nearest, in groups and with zero points as `scheme` has them; beside
            super-blocks in groups of 32 without.
        skip: patterns of linears to leave as they are: a module name or the end of one, with
            shell wildcards ("model.layers.0.*", "down_proj", "*.mlp.*").

    Raises:
        SchemeError: tuning without `match`, feedback beside AWQ, or embeddings of other than 8
            bits.
    """

    scheme: QuantScheme = QuantScheme()
    solver: Solver = GPTQ()
    awq: AWQ | None = None
    skip: tuple[str, ...] = ()
    lm_head: bool = False
    embeddings: int | None = None
    match: bool = False
    feedback: Feedback | None = None
    block: BlockTuning | None = None
    scales: ScaleTuning | None = None
    schemes: Mapping[str, QuantScheme] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.block or self.scales) and not self.match:
            raise SchemeError("Tuning compares with the full-precision stream: use match=True.")
        if self.feedback and self.awq:
            raise SchemeError("AWQ scales outputs: no feedback by what the loss felt before.")
        if self.embeddings not in (None, 8):
            raise SchemeError(
                f"embeddings={self.embeddings}: use 8, or leave them as they are. transformers "
                "loads quantized embeddings with one byte per weight only."
            )

    def scheme_for(self, name: str) -> QuantScheme | None:
        """The number format of the linear called `name`; None if it is skipped."""
        skipped = any(fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}") for p in self.skip)
        return None if skipped else self.schemes.get(name, self.scheme)


def quantizable(model: nn.Module, lm_head: bool = False) -> dict[str, tuple[int, int]]:
    """Names and shapes (N, K) of all matrices in the decoder blocks; stacks count once.

    With `lm_head`, the output layer too.
    """
    name, blocks = decoder_blocks(model)
    found = {}
    for i, block in enumerate(blocks):
        view = as_linears(shared_copy(block))
        for linear in linears(view):
            N, K = view.get_parameter(f"{linear}.weight").shape[-2:]
            found[f"{name}.{i}.{linear}"] = (N, K)
    if lm_head:
        head = head_name(model)
        N, K = model.get_parameter(f"{head}.weight").shape
        found[head] = (N, K)
    return found


def input_widths(shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """K of every matrix, from its (N, K)."""
    return {name: K for name, (_, K) in shapes.items()}


def check_experts(model: nn.Module, recipe: Recipe) -> None:
    """Refuse to quantize one of an expert module's two stacks: they are packed together.

    Raises:
        SchemeError: names the module; or it shall be in a code book or in super-blocks,
            which hold no stacks.
    """
    for name, module in model.named_modules():
        if is_stacked_experts(module):
            schemes = [recipe.scheme_for(f"{name}.{stack}") for stack in STACKS]
            if any(isinstance(scheme, CodebookScheme) for scheme in schemes):
                raise SchemeError(
                    f"{name}: code books do not hold stacked experts. Leave --codebook away, or "
                    f"skip them (--skip '{name.split('.')[-1]}.*')."
                )
            if any(isinstance(scheme, SuperBlockScheme) for scheme in schemes):
                raise SchemeError(
                    f"{name}: super-blocks do not hold stacked experts. Leave --k-quants away, or "
                    f"skip them (--skip '{name.split('.')[-1]}.*')."
                )
            if any(schemes) and not all(schemes):
                raise SchemeError(
                    f"{name}: only one of {' and '.join(STACKS)} is skipped, but stacked experts "
                    f"are packed together. Skip both (--skip '{name.split('.')[-1]}.*') or none."
                )


def embedding_scheme(model: nn.Module, recipe: Recipe) -> dict[str, QuantScheme]:
    """Name and number format of the input embeddings; empty if they stay as they are.

    Raises:
        SchemeError: they cannot be packed, or the output layer shares them and is not quantized.
    """
    if recipe.embeddings is None:
        return {}
    table, head = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    name = next(name for name, module in model.named_modules() if module is table)
    if not isinstance(table, nn.Embedding):
        raise SchemeError(f"{name}: {type(table).__name__} is no nn.Embedding: it stays as it is.")
    tied = getattr(head, "weight", None) is table.weight
    if tied and not (recipe.lm_head and recipe.scheme_for(head_name(model))):
        raise SchemeError(
            f"{name} is also the output layer, which cannot use a packed table. Quantize the "
            "output layer too (--lm-head), which gives it weights of its own."
        )
    blocks = isinstance(recipe.scheme, SuperBlockScheme)
    group_size = 32 if blocks else recipe.scheme.group_size
    scheme = QuantScheme(8, group_size, blocks or recipe.scheme.symmetric)
    check_groups({name: table.embedding_dim}, lambda _: scheme)
    return {name: scheme}


def head_name(model: nn.Module) -> str:
    """Name of the output layer."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next(name for name, module in model.named_modules() if module is head)
