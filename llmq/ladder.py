"""Named recipes: the methods of papers, and a ladder of quality.

All of them write the same plain checkpoints. A rung of the ladder is made of parts that can be
used on their own in a `quantize.Recipe`:

    rung        solver                                 asks for
    fast        GPTQ, then coordinate descent          what this layer would answer
    balanced    the same                               what the full-precision model has here
    best        the same, then all scales are tuned    and the full-precision model's answers

`fast` costs little more than `gptq`. `balanced` carries the full-precision activations along: it
runs every block twice and keeps a second copy of one block and of the hidden states, and so takes
a few times as long. `best` is `balanced` and after it `tuning.ScaleTuning`: at most 120 forward and
backward passes of the whole packed model over 2048 tokens each, which take a byte per weight.
"""

from __future__ import annotations

import dataclasses

from llmq.codebook import CodebookScheme
from llmq.errors import SchemeError
from llmq.recipe import Recipe
from llmq.scheme import QuantScheme
from llmq.solvers.awq import AWQ
from llmq.solvers.books import Codebook
from llmq.solvers.descent import Polished
from llmq.solvers.gptq import GPTQ
from llmq.solvers.rtn import RTN
from llmq.tuning import ScaleTuning

METHODS = {
    "rtn": Recipe(solver=RTN()),
    "gptq": Recipe(solver=GPTQ()),
    "awq": Recipe(solver=RTN(search=True), awq=AWQ()),
    "awq+gptq": Recipe(solver=GPTQ(), awq=AWQ()),
}
QUALITIES = {
    "fast": Recipe(solver=Polished()),
    "balanced": Recipe(solver=Polished(), match=True),
    "best": Recipe(solver=Polished(), match=True, scales=ScaleTuning()),
}
DEFAULT = "balanced"


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
    """`recipe` for another number format; for a code book with the solver that makes one.

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
        recipe = dataclasses.replace(recipe, solver=Codebook(feedback=not rounded))
    return dataclasses.replace(recipe, scheme=scheme)
