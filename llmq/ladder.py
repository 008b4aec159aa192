"""Named recipes: the methods of papers, and a ladder of quality.

All of them write the same plain checkpoints. A rung of the ladder is made of parts that can be
used on their own in a `quantize.Recipe`:

    rung        solver                                 asks for
    fast        GPTQ, then coordinate descent          what this layer would answer
    balanced    the same, with feedback between rows   what the full-precision model has here
    best        the same, then all scales are tuned    and the full-precision model's answers

`fast` costs little more than `gptq`. `balanced` carries the full-precision activations along: it
runs every block twice and keeps a second copy of one block and of the hidden states, and so takes
a few times as long. Before that it goes once through the model and back, on 8 K tokens: rows of a
matrix make good each other's errors, weighed by what the loss feels of its outputs, and are visited
twice more when all are rounded (integers only: code books and super-blocks go without). `best` is
`balanced` and after it `tuning.ScaleTuning`: at most 240 forward and backward passes of the whole
packed model over 512 tokens each, which take a byte per weight. Below 3 bits, and at 3 on average,
`balanced` makes 90 of these: there they are worth it (see `with_tuning`).
"""

from __future__ import annotations

import dataclasses

from torch import nn

from llmq.codebook import CodebookScheme
from llmq.errors import SchemeError
from llmq.recipe import Recipe, input_widths, quantizable
from llmq.scheme import QuantScheme
from llmq.solvers.awq import AWQ
from llmq.solvers.books import Codebook
from llmq.solvers.descent import Polished
from llmq.solvers.feedback import Feedback
from llmq.solvers.gptq import GPTQ
from llmq.solvers.rtn import RTN
from llmq.solvers.superblocks import OnSuperBlocks
from llmq.superblocks import SuperBlockScheme
from llmq.tuning import ScaleTuning

METHODS = {
    "rtn": Recipe(solver=RTN()),
    "gptq": Recipe(solver=GPTQ()),
    "awq": Recipe(solver=RTN(search=True), awq=AWQ()),
    "awq+gptq": Recipe(solver=GPTQ(), awq=AWQ()),
}
QUALITIES = {
    "fast": Recipe(solver=Polished()),
    "balanced": Recipe(solver=Polished(), match=True, feedback=Feedback()),
    "best": Recipe(solver=Polished(), match=True, feedback=Feedback(), scales=ScaleTuning()),
}
DEFAULT = "balanced"
BRIEF = ScaleTuning(steps=90, every=90)
# Bits of super-blocks -> those of rows that are none: Q4_0, Q5_0 or Q8_0 in GGUF, exactly.
PLAIN_BITS = {2: 4, 3: 4, 4: 4, 5: 5, 6: 8}


def chosen(method: str | None, quality: str | None) -> tuple[str, Recipe]:
    """The recipe that a method or a rung stands for, and its name; with neither, the default.

    Raises:
        SchemeError: there is no such name, or both are given.
    """
    if method is not None and quality is not None:
        raise SchemeError(f"method={method!r} and quality={quality!r}: give one of the two.")
    if method is not None and method not in METHODS:
        raise SchemeError(f"method={method!r}: use one of {', '.join(METHODS)}.")
    if quality is not None and quality not in QUALITIES:
        raise SchemeError(f"quality={quality!r}: use one of {', '.join(QUALITIES)}.")
    name = method or quality or DEFAULT
    return name, (METHODS | QUALITIES)[name]


def in_scheme(recipe: Recipe, scheme: QuantScheme) -> Recipe:
    """`recipe` for another number format, with the solver that makes it.

    Raises:
        SchemeError: a recipe that knows integers only.
    """
    if isinstance(scheme, CodebookScheme):
        if recipe.awq or recipe.scales:
            raise SchemeError(
                "Code books are made by --quality fast or balanced and --method rtn or gptq: the "
                "others scale or tune integers."
            )
        rounded = isinstance(recipe.solver, RTN)
        book = Codebook(feedback=not rounded)
        recipe = dataclasses.replace(recipe, solver=book, feedback=None)
    if isinstance(scheme, SuperBlockScheme):
        if recipe.awq or recipe.scales:
            raise SchemeError(
                "K-quants are made by --quality fast or balanced and --method rtn or gptq: the "
                "others scale channels or tune scales of plain integers."
            )
        plain = recipe.solver
        sweeps = plain.sweeps if isinstance(plain, Polished) else 0
        own = OnSuperBlocks(plain, feedback=not isinstance(plain, RTN), sweeps=sweeps)
        recipe = dataclasses.replace(recipe, solver=own, feedback=None)
    return dataclasses.replace(recipe, scheme=scheme)


def with_tuning(recipe: Recipe, bits: float, mixed: bool, steps: int | None) -> Recipe:
    """`recipe` with scales tuned for as many steps as asked for, or as it is done at that width.

    Fewer than 3 bits leave so much to gain that `balanced` tunes briefly: 90 steps lower the KL
    of 2 bits by about an eighth, for a third of the time.

    Args:
        recipe: its rung's; a number format is already chosen.
        bits: of its matrices, on average if it is `mixed`.
        mixed: whether they may have several widths.
        steps: None = as its rung has it, 0 = none.

    Raises:
        SchemeError: steps of something that cannot be tuned, or fewer than none.
    """
    integers = not isinstance(recipe.scheme, CodebookScheme | SuperBlockScheme)
    if steps is None:
        low = bits < 3 or (mixed and bits <= 3)
        brief = low and integers and recipe.feedback is not None and recipe.scales is None
        return dataclasses.replace(recipe, scales=BRIEF) if brief else recipe
    if steps < 0:
        raise SchemeError(f"tune_scales={steps}: give a number of steps, 0 for none.")
    if steps and not (integers and recipe.match):
        raise SchemeError("Scales are tuned after --quality balanced or best, with plain integers.")
    how = dataclasses.replace(recipe.scales or ScaleTuning(), steps=steps)
    return dataclasses.replace(recipe, scales=how if steps else None)


def with_plain_rows(recipe: Recipe, model: nn.Module) -> tuple[Recipe, str | None]:
    """`recipe` with a plain scheme for matrices whose rows are no whole super-blocks.

    Returns:
        also a line that names them, if there are some.

    Raises:
        SchemeError: no matrix has rows of whole super-blocks, or some fit no block of GGUF.
    """
    if not isinstance(recipe.scheme, SuperBlockScheme):
        return recipe, None
    plain_scheme = QuantScheme(PLAIN_BITS[recipe.scheme.bits], 32, symmetric=True)
    shapes = quantizable(model, recipe.lm_head)
    widths = {n: K for n, K in input_widths(shapes).items() if recipe.scheme_for(n)}
    plain = {n: plain_scheme for n, K in widths.items() if not recipe.scheme.divides(K)}
    if not plain:
        return recipe, None
    kinds = sorted({f"{n.rpartition('.')[2]} ({widths[n]} inputs)" for n in plain})
    if len(plain) == len(widths):
        raise SchemeError(
            f"{recipe.scheme.kind} has blocks of 256 weights of a row, which no layer divides "
            f"into: {', '.join(kinds)}. Use --group-size 32 without --k-quants."
        )
    if odd := sorted({n.rpartition(".")[2] for n in plain if not plain_scheme.divides(widths[n])}):
        raise SchemeError(
            f"{', '.join(kinds)}: not divisible by 32, as every block of GGUF has to be. Leave "
            f"them in full precision: {' '.join(f'--skip {leaf}' for leaf in odd)}"
        )
    bits = plain_scheme.bits
    line = (
        f"{recipe.scheme.kind} has blocks of 256 weights of a row, which do not divide "
        f"{', '.join(kinds)}: these {len(plain)} matrices get {bits} symmetric bits in groups of "
        f"32 (Q{bits}_0 in GGUF)."
    )
    return dataclasses.replace(recipe, schemes={**recipe.schemes, **plain}), line
