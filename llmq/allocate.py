"""Which format for which layers: the exact minimum of predicted loss under a budget of bits.

A multiple-choice knapsack: one choice per unit (layers that must share a number format),
the sum of costs at most the budget. Solved by dynamic programming over the budget.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from llmq.errors import SchemeError

STEPS = 40_000  # the budget is cut into at most so many steps; costs are rounded up to them


Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Choice:
    """One way to store a unit.

    Attributes:
        cost: what it uses of the budget, an integer.
        loss: what it is predicted to do to the model.
    """

    cost: int
    loss: float


def allocate(units: Mapping[str, Mapping[Key, Choice]], budget: int) -> dict[str, Key]:
    """The key of the best choice for every unit.

    Exact where the budget is at most `STEPS` times the greatest common divisor of all costs;
    else costs are rounded up by less than budget / STEPS each, and the budget is still kept.

    Raises:
        SchemeError: even the cheapest choices cost more than the budget.
    """
    cheapest = sum(min(c.cost for c in choices.values()) for choices in units.values())
    if cheapest > budget:
        raise SchemeError(
            f"A budget of {budget} bits is too small: the least that these layers take is "
            f"{cheapest}. Raise the bits or the size."
        )
    step = _step(units, budget)
    size = budget // step + 1
    best = torch.zeros(size, dtype=torch.float64)  # least loss within each budget
    taken: list[tuple[list[Key], torch.Tensor]] = []
    for choices in units.values():
        keys = list(choices)
        rows = torch.full((len(keys), size), math.inf, dtype=torch.float64)
        for row, key in zip(rows, keys, strict=True):
            cost = -(-choices[key].cost // step)
            if cost < size:
                row[cost:] = best[: size - cost] + choices[key].loss
        best, which = rows.min(0)
        taken.append((keys, which.to(torch.uint8)))
    if not math.isfinite(float(best[-1])):  # only rounding up can have left nothing
        return {
            name: min(choices, key=lambda k: choices[k].cost) for name, choices in units.items()
        }
    left, result = size - 1, {}
    for (name, choices), (keys, which) in reversed(list(zip(units.items(), taken, strict=True))):
        result[name] = keys[int(which[left])]
        left -= -(-choices[result[name]].cost // step)
    return {name: result[name] for name in units}


def _step(units: Mapping[str, Mapping[Key, Choice]], budget: int) -> int:
    """The greatest common divisor of all costs, if that is fine enough."""
    divisor = math.gcd(*(c.cost for choices in units.values() for c in choices.values()))
    return max(divisor, -(-budget // STEPS))
