"""The matrices of a block are shared out, solved in several processes, and known to all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from sharing import EXPERTS, INNER, SCHEME, WIDTH, Noted, block, job, texts
from torch import Tensor

from llmq.division import TILE, divide
from llmq.retry import Effort
from llmq.solvers.gptq import GPTQ

HERE = Path(__file__).parent
SIZES = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 3000), min_size=1)


@given(SIZES, st.sampled_from([64, 1024]), st.integers(1, 9), st.integers(1, 8))
def test_every_row_has_one_solver_and_none_has_much_more_to_do(rows, K, experts, processes) -> None:
    shares = divide(rows, K, experts, processes)
    assert shares == divide(rows, K, experts, processes)
    pieces = [piece for share in shares for piece in share]
    for name, N in rows.items():
        for e in range(experts):
            own = sorted((p.start, p.stop) for p in pieces if (p.name, p.expert) == (name, e))
            starts, stops = zip(*own, strict=True)
            assert (0, *stops) == (*starts, N)
            assert all(start % TILE == 0 for start in starts)
            assert experts * len(rows) < processes or len(own) == 1  # cut only if it must be
    costs = [
        sum(p.stop - p.start for p in share) + K * len({p.expert for p in share})
        for share in shares
    ]
    largest = max(p.stop - p.start for p in pieces)
    assert max(costs) <= sum(costs) / processes + largest + K


def test_shares_of_a_llama_block() -> None:
    def names(shares: Any) -> list[list[str]]:
        return [[p.name for p in share] for share in shares]

    assert names(divide({"q": 4096, "k": 1024, "v": 1024}, 4096, 1, 2)) == [["q"], ["k", "v"]]
    assert names(divide({"gate": 14336, "up": 14336}, 4096, 1, 2)) == [["gate"], ["up"]]
    [[a], [b]] = divide({"down": 4096}, 14336, 1, 2)
    assert (a.start, a.stop, b.start, b.stop) == (0, 2048, 2048, 4096)
    assert [len(s) for s in divide({"gate_up": 1536}, 2048, 128, 4)] == [32] * 4
    assert names(divide({"q": 512, "k": 128}, 512, 1, 1)) == [["q", "k"]]


def launch(processes: int, folder: Path) -> list[dict[str, Any]]:
    """What each process found."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(HERE / "sharing.py"), str(folder)]
    path = f"{HERE.parent}{os.pathsep}{HERE.parent / 'kernels'}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=1500)
    return [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(processes)]


def rows_of(calls: list[tuple[Tensor, Tensor]]) -> set[bytes]:
    return {row.numpy().tobytes() for W, _ in calls for row in W}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_process_solves_its_part_and_all_get_the_whole(processes: int, tmp_path: Path) -> None:
    found = launch(processes, tmp_path)
    for kind in ("plain", "matched"):
        first = found[0][kind]
        for other in found[1:]:  # to the bit
            for name, results in first["solved"].items():
                for a, b in zip(results, other[kind]["solved"][name], strict=True):
                    assert all(map(torch.equal, a, b))
            assert [r.error for r in first["errors"]] == [r.error for r in other[kind]["errors"]]
    # The last process does not solve what the others do: no row of a matrix comes twice.
    own = [rows_of(each["plain"]["calls"]) for each in found]
    assert all(own)
    total = 3 * WIDTH + EXPERTS * (2 * INNER + WIDTH)
    assert sum(len(rows) for rows in own) == len(set.union(*own)) == total
    assert max(len(rows) for rows in own) < 0.75 * total
    # One process gets the same bytes from the same second moments, and it does so in tall matrices.
    moments = {H.numpy().tobytes(): H for each in found for _, H in each["plain"]["calls"]}
    assert len(moments) == 2 + 2 * EXPERTS
    solved = found[0]["plain"]["solved"]
    weights = dict(block().named_parameters())
    for names in (("q", "k", "v"), ("o",)):
        tall = torch.cat([weights[f"{n}.weight"] for n in names])
        H = moment_of(found, weights[f"{names[0]}.weight"])
        q = GPTQ().solve(tall, H, SCHEME)
        assert torch.equal(torch.cat([solved[n][0][0] for n in names]), q.codes)
        assert torch.equal(torch.cat([solved[n][0][1] for n in names]), q.scale)
    for stack in ("gate_up_proj", "down_proj"):
        for e, (codes, scale, _) in enumerate(solved[f"experts.{stack}"]):
            W = weights[f"experts.{stack}"][e]
            q = GPTQ().solve(W, moment_of(found, W), SCHEME)
            assert torch.equal(codes, q.codes)
            assert torch.equal(scale, q.scale)


def moment_of(found: list[dict[str, Any]], W: Tensor) -> Tensor:
    """The second moment for which the first row of W was solved."""
    row = W[0].detach().numpy().tobytes()
    calls = (call for each in found for call in each["plain"]["calls"])
    return next(H for rows, H in calls if row in rows_of([(rows, H)]))


@torch.no_grad()
def test_one_process_solves_tall_matrices() -> None:
    solver = Noted()
    solution = job(solver, texts()).solve(Effort(torch.device("cpu"), single=False))
    sizes = [len(W) for W, _ in solver.calls]
    assert sizes == [2 * WIDTH, WIDTH, *[2 * INNER] * EXPERTS, *[WIDTH] * EXPERTS]
    assert [report.name for report in solution.reports][:4] == [f"block.{n}" for n in "qkvo"]
