"""Which process of a run solves which matrices, and how the others get to know the results.

Matrices that read one tensor do not wait for each other. Every process solves its part of them for
the same second moment, and all go on with all results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmq import ranks
from llmq.scheme import QuantizedWeight

TILE = 64  # rows; a matrix is cut at multiples of it: the same products as in the whole one


@dataclass(frozen=True)
class Piece:
    """Rows of a matrix.

    Attributes:
        name: of the linear, or of the stack of experts.
        expert: which of these; 0 if there are none.
        start, stop: rows.
    """

    name: str
    expert: int
    start: int
    stop: int


@dataclass(frozen=True)
class Solved:
    """What became of a piece.

    Attributes:
        value: its codes.
        lost, size: tr(D H D^T) and tr(W H W^T), see `blockwise.squares`.
        seconds: spent in the solver.
    """

    value: QuantizedWeight
    lost: float
    size: float
    seconds: float


def divide(
    rows: Mapping[str, int], K: int, experts: int, processes: int, whole: bool = False
) -> list[list[Piece]]:
    """The pieces that each process solves; every matrix whole, unless they are too few for that.

    The largest piece comes first, and goes to the process that would then be done first: N K^2
    operations, and K^3 for a factor of H if that process has not made it for another piece.

    Args:
        rows: N of every matrix, or of every expert's matrix of a stack.
        K: their columns.
        experts: how many of them a stack has, else 1.
        processes: how many share the work.
        whole: no matrix is cut, however few they are.
    """
    parts = 1 if whole or experts * len(rows) >= processes else processes
    pieces = [
        Piece(name, e, start, min(start + step, N))
        for name, N in rows.items()
        for step in [N if parts == 1 else -(-N // (parts * TILE)) * TILE]
        for e in range(experts)
        for start in range(0, N, step)
    ]
    shares: list[list[Piece]] = [[] for _ in range(processes)]
    for piece in sorted(pieces, key=lambda p: p.start - p.stop):
        min(shares, key=lambda share: _cost([*share, piece], K)).append(piece)
    return [sorted(share, key=pieces.index) for share in shares]


def _cost(share: Sequence[Piece], K: int) -> int:
    """In units of K^2."""
    rows = sum(piece.stop - piece.start for piece in share)
    return rows + K * len({piece.expert for piece in share})


def exchange(
    shares: Sequence[Sequence[Piece]],
    mine: Mapping[Piece, Solved],
    blank: Callable[[Piece], QuantizedWeight],
) -> dict[Piece, Solved]:
    """What all processes have solved, in every one of them.

    Args:
        shares: the pieces of every process.
        mine: what this one has solved.
        blank: makes tensors like those of a piece's result, to be filled.

    Raises:
        torch.OutOfMemoryError: in this process or in another one.
        ProcessError: another process has ended.
    """
    if len(shares) == 1:
        return dict(mine)
    owners = {piece: owner for owner, share in enumerate(shares) for piece in share}
    values = {p: mine[p].value if p in mine else blank(p) for p in owners}
    ranks.meet()
    numbers = {p: (s.lost, s.size, s.seconds) for p, s in mine.items()}
    told = {p: found for each in ranks.everyones(numbers) for p, found in each.items()}
    for piece, owner in owners.items():
        value = values[piece]
        for tensor in (value.codes, value.scale, value.zero):
            ranks.fill_from(owner, tensor)
    return {piece: Solved(values[piece], *told[piece]) for piece in owners}
