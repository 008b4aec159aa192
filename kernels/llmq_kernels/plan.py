"""Which kernel, and with which tile, for one shape: a pure function of numbers known on the host.

A tuned table (tuned/<GPU>.json, written by `python -m llmq_kernels.tune`) answers first; for other
GPUs and shapes there is a closed form. Nothing here touches a device.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

TILE = 64  # rows per block of the layout: four m16 tiles, one warp group
UNIT = 128  # columns per block of the layout, and per step of the kernel
COUNTERS_PER_TILE = 4  # blocks of activations that may share a row tile under split-K
TUNED = Path(__file__).parent / "tuned"
M_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FUSED_LIMIT = 512  # above this, dequantizing once and a dense product are cheaper
SOLVED = 2048  # numbers in a tile of a solver's loop: 16 in the registers of each thread


class Plan(NamedTuple):
    """One launch of the fused kernel."""

    tiles: int = 1  # row tiles of 64 per program
    block_m: int = 16  # rows of x per program
    unroll: int = 1  # steps per trip of the loop
    split: int = 1  # programs that share one output tile along K
    warps: int = 4
    stages: int = 4
    maxnreg: int | None = None


def solver_tile(columns: int) -> dict[str, Any]:
    """How a loop over up to 128 columns (see `rounding`) is compiled: its tile is powers of two."""
    width = max(16, 1 << (columns - 1).bit_length())
    options = {"num_warps": 4, "enable_fp_fusion": True}  # the latter as in `launch`
    return {"COLUMNS": width, "ROWS": SOLVED // width, **options}


class Gpu(NamedTuple):
    """What the choice may depend on."""

    name: str
    capability: tuple[int, int]
    processors: int


def block_words(bits: int) -> int:
    """int32 words per block."""
    return TILE * UNIT * bits // 32


def groups_per_line(group_size: int) -> int:
    """Scales that a row has in one block of 128 columns, side by side in memory."""
    return 1 if group_size == -1 else UNIT // group_size


def choose(gpu: Gpu, bits: int, group_size: int, N: int, K: int, M: int) -> Plan | None:
    """The launch for x (M, K) against W (N, K); None: dequantize, then a dense product."""
    if M > FUSED_LIMIT or not fits(K):
        return None
    bucket = next(b for b in M_BUCKETS if b >= M)
    tuned = _table(gpu.name, gpu.capability).get(f"{bits}/{group_size}/{N}/{K}/{bucket}")
    if tuned is not None:
        return None if tuned == "dense" else Plan(**tuned)
    return closed_form(gpu, bits, group_size, N, K, M)


def fits(K: int) -> bool:
    """Whether rows of x start on the 16 bytes that the fused kernel's loads want."""
    return K % 8 == 0


def closed_form(gpu: Gpu, bits: int, group_size: int, N: int, K: int, M: int) -> Plan:
    """A launch that fills the GPU about five programs deep.

    Up to 64 rows of x, steps and split depend on the weight alone, so that a row's result does
    not depend on how many others are in the batch.
    """
    tiles = -(-N // TILE)
    block_m = next(b for b in (16, 32, 64, 128) if b >= M or b == 128)
    # Accumulators of mma.sync (everything but sm_90 and sm_100) need more registers.
    hopper = (9, 0) <= gpu.capability < (12, 0)
    # Two row tiles share the work on x and on addresses: worth it where groups are small, where
    # codes take long to unpack, or where there are rows enough for every processor. With 3 bits
    # the compiler would move operands through shared memory: a longer trip instead.
    pairs = tiles % 2 == 0 and bits != 3
    worth = group_size in (32, 64) or tiles >= 3 * gpu.processors
    if gpu.capability[0] == 9:
        many = pairs and (worth or bits == 8)
    else:
        many = pairs and worth and bits >= 4
    wide = 2 if (many and block_m == 16) or (pairs and hopper and block_m >= 64) else 1
    steps = -(-K // UNIT)
    if M <= 64:
        split = round(gpu.processors * (10 if many else 5) / tiles)
    else:
        split = gpu.processors * wide // (tiles * -(-M // block_m))
    split = max(1, min(split, 16, K // 512))
    long = bits == 3 and group_size in (32, 64) and gpu.capability[0] == 9
    unroll = next(u for u in (4 if long else 2, 2, 1) if steps % u == 0)
    if group_size == -1 and not hopper:
        unroll = 1  # registers run out
    step_bytes = UNIT * (64 * wide * bits // 8 + 2 * block_m)
    shared = shared_bytes(gpu.capability)
    if block_m == 128 or (block_m == 64 and not hopper) or 2 * unroll * step_bytes > shared:
        unroll = 1
    stages = next((s for s in (4, 3) if s * unroll * step_bytes <= shared // 2), 2)
    # Left alone, some assemblers stop at 64 registers on sm_100 and spill.
    maxnreg = 128 if hopper and gpu.capability > (9, 0) and block_m == 16 else None
    return Plan(wide, block_m, unroll, split, 8 if block_m >= 64 else 4, stages, maxnreg)


def shared_bytes(capability: tuple[int, int]) -> int:
    """Shared memory that one program may use."""
    kib = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
    return kib.get(capability, 99) * 1024


@functools.cache
def _table(name: str, capability: tuple[int, int]) -> dict:
    """Tuned launches of one GPU model, by `bits/group/N/K/M bucket`; empty if there are none."""
    path = TUNED / f"{name.replace(' ', '_')}.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    return table["plans"] if table.get("capability") == list(capability) else {}
