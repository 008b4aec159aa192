"""Which kernel, and with which tile, for one shape: a pure function of numbers known on the host.

A tuned table (tuned/<GPU>.json, written by `python -m llmq_kernels.tune`) answers first; for other
GPUs and shapes there is a closed form. Nothing here touches a device.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

TILE = 64  # rows per block of the layout: four m16 tiles, one warp group
COUNTERS_PER_TILE = 4  # blocks of activations that may share a row tile under split-K
TUNED = Path(__file__).parent / "tuned"
M_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FUSED_LIMIT = 512  # above this, dequantizing once and a dense product are cheaper


class Plan(NamedTuple):
    """One launch of the fused kernel."""

    tiles: int = 1  # row tiles of 64 per program
    block_m: int = 16  # rows of x per program
    unroll: int = 1  # steps per trip of the loop
    split: int = 1  # programs that share one output tile along K
    warps: int = 4
    stages: int = 4
    maxnreg: int | None = None


class Gpu(NamedTuple):
    """What the choice may depend on."""

    name: str
    capability: tuple[int, int]
    processors: int


def unit(bits: int) -> int:
    """Columns per block of the layout: what one lane's four words of the first plane cover."""
    return 64 if bits in (4, 8) else 128


def block_words(bits: int) -> int:
    """int32 words per block."""
    return TILE * unit(bits) * bits // 32


def step_blocks(bits: int, group_size: int, K: int) -> int:
    """Blocks along K that one step of the loop reads: one group, or one block if that is more."""
    blocks = -(-K // unit(bits))
    if group_size == -1:
        return 2 if unit(bits) == 64 and blocks % 2 == 0 else 1
    return max(1, group_size // unit(bits))


def choose(gpu: Gpu, bits: int, group_size: int, N: int, K: int, M: int) -> Plan | None:
    """The launch for x (M, K) against W (N, K); None: dequantize, then a dense product."""
    if M > FUSED_LIMIT or not fits(K):
        return None
    bucket = next(b for b in M_BUCKETS if b >= M)
    tuned = _table(gpu.name).get(f"{bits}/{group_size}/{N}/{K}/{bucket}")
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
    # Two row tiles share the work on x and on addresses: worth it where groups are small or
    # there are rows enough for every processor. With 2 and 3 bits registers run out.
    pairs = tiles % 2 == 0 and bits >= 4
    many = pairs and (group_size in (32, 64) or tiles >= 3 * gpu.processors)
    # Accumulators of mma.sync (everything but sm_90 and sm_100) need more registers.
    hopper = (9, 0) <= gpu.capability < (12, 0)
    wide = 2 if (many and block_m == 16) or (pairs and hopper and block_m >= 64) else 1
    columns = unit(bits) * step_blocks(bits, group_size, K)
    steps = -(-K // columns)
    if M <= 64:
        split = round(gpu.processors * (10 if many else 5) / tiles)
    else:
        split = gpu.processors * wide // (tiles * -(-M // block_m))
    split = max(1, min(split, 16, K // 512))
    # Groups of 32 have the most to do beside unpacking; a longer trip shares more of it, where
    # two of them are left for every program.
    long = gpu.capability[0] == 9 and group_size == 32 and bits == 4 and -(-K // 512) > split
    longest = 512 if long else 256
    unroll = next(u for u in (longest // columns, 256 // columns, 2, 1) if u and steps % u == 0)
    step_bytes = columns * (64 * wide * bits // 8 + 2 * block_m)
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
def _table(name: str) -> dict:
    """Tuned launches of one GPU model, by `bits/group/N/K/M bucket`; empty if there are none."""
    path = TUNED / f"{name.replace(' ', '_')}.json"
    return json.loads(path.read_text())["plans"] if path.is_file() else {}
