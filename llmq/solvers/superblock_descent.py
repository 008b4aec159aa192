"""Coordinate descent on super-blocks: steps, then each group's integers together with its codes.

As in `descent`, with R = (W - Q) H the effect of a move on tr(D H D^T) is known exactly. The two
steps of a super-block go to the optimum of a quadratic in two unknowns, rounded to fp16. A group
is visited with its own integers and with their neighbours; for each, all its codes are visited in
turn, and per row the one that ends lowest is kept.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from llmq.formats.kquants import MIDDLE, TOP, WIDTH
from llmq.scheme import QuantizedWeight
from llmq.solvers.affine import in_parts, reciprocal
from llmq.superblocks import KINDS, SuperBlockWeight

MOST = 2.0  # a step changes at most by this factor at once
# (multiple, low): the first is no move. Where there is no offset, lows stay 0.
MOVES = sorted(product((-1, 0, 1), repeat=2), key=lambda move: move != (0, 0))


class Descent:
    """Weights and codes held transposed: one contiguous row per column of the matrix."""

    def __init__(self, W: Tensor, H: Tensor, q: QuantizedWeight):
        assert isinstance(q, SuperBlockWeight)
        kind = KINDS[q.scheme.bits]
        self.H, self.q, self.middle, self.top = H, q, MIDDLE.get(kind), TOP[kind]
        self.W = W.T.float().contiguous()  # (K, N)
        self.codes = q.codes.T.float().contiguous()  # (K, N)
        self.steps = torch.stack([q.scale.T, q.low_step.T]).float()  # (2, S, N)
        self.whole = torch.stack([q.multiples.T, q.lows.T]).float()  # (2, K/G, N)
        self.width = q.scheme.group_size
        self.pivots = H.diagonal().tolist()

    def sweep(self) -> None:
        """One pass over all super-blocks."""
        delta = self.W - self.value().dequantize().T  # (K, N)
        for b in range(self.steps.shape[1]):
            own = slice(b * WIDTH, (b + 1) * WIDTH)
            residual = self.H[own] @ delta  # (256, N)
            self.move_steps(b, delta[own], residual)
            for start in range(0, WIDTH, self.width):
                group = slice(start, start + self.width)
                columns = slice(own.start + start, own.start + group.stop)
                moves = self.visit(b, columns, residual[group])
                delta[columns] += moves
                later = slice(columns.stop, own.stop)
                residual[group.stop :].addmm_(self.H[later, columns], moves)

    def directions(self, b: int) -> Tensor:
        """How the weights of super-block `b` change with its two steps, (2, 256, N)."""
        own = slice(b * WIDTH // self.width, (b + 1) * WIDTH // self.width)
        whole = self.whole[:, own].repeat_interleave(self.width, 1)  # (2, 256, N)
        codes = self.codes[b * WIDTH : (b + 1) * WIDTH]
        return torch.stack([whole[0] * (codes - (self.middle or 0)), -whole[1]])

    def move_steps(self, b: int, delta: Tensor, residual: Tensor) -> None:
        """Give super-block `b` its best steps; its `delta` and `residual` (256, N) follow."""
        own = slice(b * WIDTH, (b + 1) * WIDTH)
        ways = self.directions(b)
        images = torch.stack([self.H[own, own] @ way for way in ways])
        slope = (ways * residual).sum(1)  # (2, N)
        a, c = ((way * image).sum(0) for way, image in zip(ways, images, strict=True))
        mixed = (ways[0] * images[1]).sum(0)
        determinant = a * c - mixed * mixed
        both = torch.stack([slope[0] * c - slope[1] * mixed, slope[1] * a - slope[0] * mixed])
        alone = torch.stack([slope[0] / a, torch.zeros_like(a)])
        old, best = self.steps[:, b], self.steps[:, b].clone()
        least = torch.zeros_like(a)
        for change in (both / determinant, alone):
            new = (old + change).half().float()
            near = (new >= old / MOST) & (new <= old * MOST)  # False where it is NaN
            new = torch.where(near.all(0), new, old)
            x, y = new - old
            gain = x * (a * x + 2 * mixed * y - 2 * slope[0]) + y * (c * y - 2 * slope[1])
            best = torch.where(gain < least, new, best)
            least = torch.minimum(gain, least)
        change = best - old
        for way, image, moved in zip(ways, images, change, strict=True):
            delta.addcmul_(way, moved, value=-1)
            residual.addcmul_(image, moved, value=-1)
        self.steps[:, b] = best

    def visit(self, b: int, own: slice, residual: Tensor) -> Tensor:
        """Move integers and codes of the columns `own`, a group; their changes in delta, (G, N).

        `residual` holds (delta H) of these columns; it stays as it is.
        """
        H, g = self.H[own, own].contiguous(), own.start // self.width
        moves = torch.empty_like(residual)
        wide = len(MOVES) * self.width
        for rows in in_parts(residual.shape[1], wide):
            whole = self.near(self.whole[:, g, rows])  # (2, C, n)
            codes, change = self.tried(
                H, own, residual[:, rows], self.codes[own, rows], whole, self.steps[:, b, rows]
            )  # (G, C, n)
            gain = (change * ((H @ change.flatten(1)).view_as(change))).sum(0)
            gain += 2 * (change * residual[:, rows].unsqueeze(1)).sum(0)
            best = gain.argmin(0)  # (n,)
            index = best.expand(self.width, 1, -1)
            moves[:, rows] = change.gather(1, index).squeeze(1)
            self.codes[own, rows] = codes.gather(1, index).squeeze(1)
            self.whole[:, g, rows] = whole.gather(1, best.expand(2, 1, -1)).squeeze(1)
        return moves

    def near(self, whole: Tensor) -> Tensor:
        """The integers (2, n) and their neighbours, (2, C, n)."""
        if self.middle is not None:
            scales = torch.stack([whole[0] + move for move in (0, -1, 1)])
            return torch.stack([scales.clamp_(-self.top - 1, self.top), torch.zeros_like(scales)])
        moved = [whole + whole.new_tensor(move).unsqueeze(1) for move in MOVES]
        return torch.stack(moved, 1).clamp_(0, self.top)

    def grid(self, whole: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and offsets (..., n) of integers (2, ..., n)."""
        scale = whole[0] * steps[0]
        return scale, whole[1] * steps[1] if self.middle is None else scale * self.middle

    def tried(
        self,
        H: Tensor,
        own: slice,
        residual: Tensor,
        codes: Tensor,
        whole: Tensor,
        steps: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Codes and changes in delta, (G, C, n), with each of C pairs of integers (2, C, n).

        The first pair is the present one, of which `codes` and `residual` (G, n) are.
        """
        scale, offset = self.grid(whole, steps)  # (C, n)
        codes = codes.unsqueeze(1)
        before = codes * scale[0] - offset[0]
        change = before - (codes * scale - offset)  # (G, C, n)
        follows = (H @ change.flatten(1)).view_as(change).add_(residual.unsqueeze(1))
        codes, inverse = codes.expand_as(change).clone(), reciprocal(scale)
        for i, pivot in enumerate(self.pivots[own]):
            code = codes[i]
            new = (
                follows[i]
                .mul(inverse)
                .div_(pivot)
                .add_(code)
                .round_()
                .clamp_(0, self.q.scheme.qmax)
            )
            moved = (code - new) * scale
            change[i] += moved
            codes[i] = new
            follows[i + 1 :].flatten(1).addr_(H[i, i + 1 :], moved.flatten())
        return codes, change

    def value(self) -> SuperBlockWeight:
        step, low_step = (t.T.half().contiguous() for t in self.steps)
        whole, lows = (t.T.short().contiguous() for t in self.whole)
        codes = self.codes.T.byte().contiguous()
        return SuperBlockWeight(
            self.q.scheme,
            codes,
            step,
            self.q.zero,
            multiples=whole,
            low_step=low_step,
            lows=lows,
        )
