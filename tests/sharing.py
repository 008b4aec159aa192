"""A decoder block without transformers, solved by every process that torchrun starts: FOLDER.

Each writes what it has solved itself, and what it got from all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmq import ranks
from llmq.blockwise import BlockJob
from llmq.calls import Call
from llmq.recipe import Recipe
from llmq.retry import Effort, Retries
from llmq.scheme import QuantizedWeight, QuantScheme
from llmq.solvers.gptq import GPTQ

WIDTH, INNER, EXPERTS = 256, 64, 5  # of which the second has one group of 64
SCHEME = QuantScheme(4, 64)
CPU = torch.device("cpu")


class Experts(nn.Module):
    """Stacked as transformers 5 does it."""

    is_transposed = has_bias = False

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / 16)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 11)

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError  # llmq runs it unstacked


class Block(nn.Module):
    """Something like attention over one token, then experts."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.v = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(torch.tanh(self.q(x)) * torch.cat([self.k(x), self.v(x)], -1))
        flat = x.flatten(0, -2)
        chosen = torch.stack([(flat[:, 0] > 0).long(), 2 + (flat[:, 1:3] > 0).sum(1)], 1)
        y = self.experts(flat, chosen, torch.full(chosen.shape, 0.5))
        return x + y.view(x.shape)


def block() -> Block:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Block().requires_grad_(False)


def texts() -> list[Tensor]:
    """Hidden states of 8 batches."""
    return list(torch.randn(8, 2, 40, WIDTH, generator=torch.Generator().manual_seed(1)))


@dataclass(frozen=True)
class Noted:
    """GPTQ that keeps what it is given, and may run out of memory at some calls."""

    full: Sequence[int] = ()
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def solve(self, W: Tensor, H: Tensor, scheme: QuantScheme) -> QuantizedWeight:
        self.calls.append((W.clone(), H.clone()))
        if len(self.calls) in self.full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return GPTQ().solve(W, H, scheme)


def job(solver: Noted, hidden: list[Tensor], match: bool = False) -> BlockJob:
    calls, recipe = [Call((), {})] * len(hidden), Recipe(SCHEME, solver, match=match)
    streams = [hidden, [x + 0.01 for x in hidden]] if match else [hidden]
    return BlockJob(block(), "block", streams, calls, Call((), {}), recipe, lean=False)


@torch.no_grad()
def main(folder: Path) -> None:
    ranks.join("cpu")
    me = ranks.number()
    mine = texts()[me :: ranks.count()]
    found = {}
    for name, match in (("plain", False), ("matched", True)):
        solver = Noted()
        solution = job(solver, mine, match).solve(Effort(CPU, single=False))
        solved = {n: [(q.codes, q.scale, q.zero) for q in qs] for n, qs in solution.solved.items()}
        found[name] = {"calls": solver.calls, "solved": solved, "errors": solution.reports}
    hungry = Noted((2,) if me == ranks.count() - 1 else ())
    retried = Retries(CPU).run("block", job(hungry, mine).solve, together=True)
    single = job(Noted(), mine).solve(Effort(CPU, single=True))
    for n, results in single.solved.items():
        for a, b in zip(results, retried.solved[n], strict=True):
            assert torch.equal(a.codes, b.codes)
            assert torch.equal(a.scale, b.scale)
    assert retried.effort.single
    torch.save(found, folder / f"{me}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
