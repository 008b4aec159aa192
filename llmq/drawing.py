"""A picture of which layers have how many bits, in letters."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmq.page import block_of, kind_of


def allocation_picture(layers: Iterable[tuple[str, str]]) -> str:
    """One row per kind of layer, one character per block: its bits, or "." where it has none.

        block             0         1
                          012345678901
        self_attn.q_proj  443444444448
        mlp.down_proj     334444444448

    Args:
        layers: name and format ("int4 g64 asymmetric") of every quantized matrix.

    Returns:
        the picture; empty if all layers have the same number of bits. Experts of one layer share
        theirs.
    """
    found: dict[str, dict[int, str]] = {}
    for name, scheme in layers:
        block, bits = block_of(name), re.match(r"int(\d)", scheme)
        if block is not None and bits:
            found.setdefault(kind_of(name), {})[block] = bits[1]
    if len({bits for row in found.values() for bits in row.values()}) < 2:
        return ""
    count = 1 + max(block for row in found.values() for block in row)
    width = max(len("block"), *map(len, found))
    tens = "".join(str(i // 10 % 10) if i % 10 == 0 else " " for i in range(count)).rstrip()
    ones = "".join(str(i % 10) for i in range(count))
    lines = [f"{'block':<{width}}  {tens}", f"{'':<{width}}  {ones}"]
    for kind, row in found.items():
        lines.append(f"{kind:<{width}}  " + "".join(row.get(i, ".") for i in range(count)))
    return "\n".join(lines)
