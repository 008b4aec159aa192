"""Super-blocks solved on their own grid: GPTQ whose groups have integers for scales and offsets.

Super-blocks are visited by importance, groups inside them too, columns inside those. When a
super-block is reached its two fp16 steps are chosen, from the best real scales and offsets of its
groups as the weights are by then. When a group is reached its two integers are: the real optimum
is rounded, and its neighbours are tried in earnest, as in `trials`, by rounding the group with
them. `superblock_descent` then improves codes, integers and steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from llmq.errors import SchemeError
from llmq.factor import factor
from llmq.formats.kquants import MIDDLE, TOP, WIDTH, multiples
from llmq.scheme import QuantizedWeight, QuantScheme, grouped
from llmq.solvers import Solver
from llmq.solvers.affine import encoded, fitted, in_parts, reciprocal, rounded_pass
from llmq.solvers.babai import Pass
from llmq.solvers.descent import Polished, descend
from llmq.solvers.gptq import alive, column_order
from llmq.solvers.superblock_descent import Descent
from llmq.superblocks import KINDS, SuperBlockScheme, SuperBlockWeight

LARGEST = 65504.0  # of fp16
NEAR = (-1, 0, 1)


@dataclass(frozen=True)
class OnSuperBlocks:
    """Solver for `SuperBlockScheme`.

    Args:
        plain: what solves matrices in another scheme, those whose rows have no whole super-blocks.
        feedback: round as GPTQ does; else every weight on its own.
        damp: see `GPTQ`.
        sweeps: of descent afterwards, see `Polished`.
    """

    plain: Solver = field(default_factory=Polished)
    feedback: bool = True
    damp: float = 0.01
    sweeps: int = 5

    def solve(self, W: Tensor, H: Tensor, scheme: QuantScheme) -> QuantizedWeight:
        """See `solvers.Solver.solve`.

        Raises:
            SchemeError: a weight is too large for fp16, or K no multiple of 256.
        """
        if not isinstance(scheme, SuperBlockScheme):
            return self.plain.solve(W, H, scheme)
        grouped(W, scheme)
        if float(W.abs().amax()) > LARGEST:
            raise SchemeError(f"a weight of {float(W.abs().amax()):g} is too large for float16.")
        H = alive(H)
        if self.feedback:
            order = block_order(H.diagonal(), scheme.group_size)
            R = factor(H, self.damp, order)
        else:
            order = torch.arange(len(H), device=H.device)
            R = H.diagonal().sqrt().diag()
        q = _Pass(W, R, order, scheme).solve()
        return descend(W, H, q, self.sweeps, Descent) if self.sweeps else q


def block_order(importance: Tensor, width: int) -> Tensor:
    """Permutation (K,) in which columns are rounded: super-blocks, groups of `width`, columns."""
    blocks = importance.unflatten(0, (-1, WIDTH))
    ranked = blocks.amax(1).argsort(descending=True, stable=True).tolist()
    return torch.cat([column_order(blocks[b], width, "group") + b * WIDTH for b in ranked])


class _Pass:
    """One pass over the columns. Weights are held transposed: one contiguous row per column."""

    def __init__(self, W: Tensor, R: Tensor, order: Tensor, scheme: SuperBlockScheme):
        kind = KINDS[scheme.bits]
        self.scheme, self.order, self.middle, self.top = scheme, order, MIDDLE.get(kind), TOP[kind]
        self.babai = Pass(W, R, order)
        self.pivots = R.diagonal()
        self.codes = torch.empty_like(self.babai.columns, dtype=torch.uint8)  # (K, N)
        K, N = self.codes.shape
        self.steps = torch.zeros(2, K // WIDTH, N, dtype=torch.half, device=W.device)
        self.whole = torch.zeros(2, K // scheme.group_size, N, dtype=torch.int16, device=W.device)

    def solve(self) -> SuperBlockWeight:
        for start in range(0, len(self.codes), WIDTH):
            debt = self.babai.debt(start, start + WIDTH)
            steps = self.choose_steps(start, debt)
            for inside in range(0, WIDTH, self.scheme.group_size):
                self.round_group(start + inside, debt[inside:], steps)
        step, low_step = (t.T.contiguous() for t in self.steps)
        whole, lows = (t.T.contiguous() for t in self.whole)
        zero = torch.full_like(step, self.scheme.middle, dtype=torch.uint8)
        codes = self.codes[self.order.argsort()].T.contiguous()
        return SuperBlockWeight(
            self.scheme, codes, step, zero, multiples=whole, low_step=low_step, lows=lows
        )

    def choose_steps(self, start: int, debt: Tensor) -> tuple[Tensor, Tensor]:
        """Both steps of the super-block that begins at column `start`, float32 (N,).

        `debt` (256, N) is what was lost before, see `babai.Pass.debt`.
        """
        own, G = slice(start, start + WIDTH), self.scheme.group_size
        x = self.babai.wanted(own.start, own.stop, debt).T.unflatten(1, (-1, G))  # (N, C, G)
        weights = self.pivots[own].square().view(-1, G).expand_as(x)
        flat = x.flatten(0, 1), weights.flatten(0, 1)
        scale, offset = (t.view(x.shape[:2]) for t in fitted(*flat, self.scheme.qmax, self.middle))
        codes = encoded(x, scale, offset, self.scheme.qmax)
        total = weights.sum(-1, keepdim=True)
        centre = (weights * codes).sum(-1, keepdim=True) / total
        if self.middle is not None:
            centre = torch.full_like(centre, self.middle)
        spread = (weights * (codes - centre).square()).sum(-1)
        step, _ = multiples(scale.abs().clamp(max=LARGEST * self.top), spread, self.top)
        low_step = torch.zeros_like(step)
        if self.middle is None:
            limited = offset.clamp(max=LARGEST * self.top)
            low_step, _ = multiples(limited, total.squeeze(-1), self.top)
        block = int(self.order[start]) // WIDTH
        self.steps[0, block], self.steps[1, block] = step.squeeze(-1), low_step.squeeze(-1)
        return step.squeeze(-1).float(), low_step.squeeze(-1).float()

    def round_group(self, start: int, debt: Tensor, steps: tuple[Tensor, Tensor]) -> None:
        """Choose the integers of the group that begins at `start` and round it.

        `debt` is that of its columns and of all later ones of the super-block, which take in what
        this group loses.
        """
        G = self.scheme.group_size
        own, later = slice(start, start + G), slice(start + G, start + len(debt))
        columns, wanted = self.babai.columns[own], self.babai.wanted(start, own.stop, debt[:G])
        real = fitted(wanted.T, self.pivots[own].square(), self.scheme.qmax, self.middle)
        R = self.babai.R[own, own].contiguous()
        chosen = torch.empty(2, len(real[0]), device=R.device)
        for rows in in_parts(len(real[0]), len(NEAR) ** 2 * G):
            guess = [r[rows] * reciprocal(step[rows]) for r, step in zip(real, steps, strict=True)]
            pairs = self.near(torch.stack(guess).round_())  # (2, C, n)
            scale, offset = self.grid(pairs, steps, rows)
            *_, error = rounded_pass(
                columns[:, rows].repeat(1, len(scale)),
                debt[:G, rows].repeat(1, len(scale)),
                R,
                scale.flatten(),
                offset.flatten(),
                self.scheme.qmax,
            )
            best = error.view_as(scale).argmin(0).expand(2, 1, -1)
            chosen[:, rows] = pairs.gather(1, best).squeeze(1)
        g = int(self.order[start]) // G
        self.whole[:, g] = chosen.short()
        scale, offset = self.grid(chosen.unsqueeze(1), steps, slice(None))
        codes, lost, _ = rounded_pass(columns, debt[:G], R, scale[0], offset[0], self.scheme.qmax)
        self.codes[own] = codes.byte()
        columns.copy_(lost)
        debt[G:].addmm_(self.babai.R[own, later].T, lost)

    def near(self, pairs: Tensor) -> Tensor:
        """Integers around `pairs` (2, N), as the kind can hold them: (2, C, N)."""
        if self.middle is not None:
            scales = torch.stack([pairs[0] + s for s in (-2, -1, 0, 1, 2)])
            return torch.stack([scales.clamp_(-self.top - 1, self.top), torch.zeros_like(scales)])
        moves = list(product(NEAR, NEAR))
        return torch.stack([pairs + pairs.new_tensor(m).unsqueeze(1) for m in moves], 1).clamp_(
            0, self.top
        )

    def grid(
        self, pairs: Tensor, steps: tuple[Tensor, Tensor], rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Scale and offset (C, n) of integers (2, C, n)."""
        scale = pairs[0] * steps[0][rows]
        offset = pairs[1] * steps[1][rows] if self.middle is None else scale * self.middle
        return scale, offset
