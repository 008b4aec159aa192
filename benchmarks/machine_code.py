"""NVIDIA machine code: what a compiled kernel needs, and what its main loop consists of."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CLASSES = {
    "LDGSTS.128": r"LDGSTS\.\S*128",
    "LDGSTS.other": r"LDGSTS\.(?!\S*128)",
    "LDG": r"LDG\.",
    "LDS.128": r"LDS\.\S*128",
    "LDS.other": r"LDS(?!\S*128)",
    "STS": r"STS",
    "HGMMA": r"HGMMA",
    "HMMA": r"HMMA",
    "UTCHMMA": r"UTC\w*MMA",
    "STTM": r"STTM",
    "I2F": r"I2F",
    "LOP3": r"LOP3",
    "shift": r"SHF|SHL|SHR",
    "half2": r"HFMA2|HMUL2|HADD2",
    "fp32": r"FFMA|FMUL|FADD",
    "barrier": r"BAR|SYNCS|WARPSYNC|DEPBAR|WARPGROUP",
    "local": r"LDL|STL",
}


class Code(NamedTuple):
    """What the assembler made of a kernel: resources, opcodes, and those of its main loop."""

    registers: int
    stack: int
    shared: int
    local: int
    opcodes: list[str]
    loop: list[str]


def disassemble(cubin: bytes) -> Code:
    """Read a compiled kernel with the tools that come with triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(TOOLS / "cuobjdump", "-res-usage", file.name)
        listing = _run(TOOLS / "nvdisasm", "-c", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"no resource usage in cuobjdump's output: {usage[:200]}")
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in map(str.strip, listing.splitlines()):
        if label := re.match(r"(\.L_[\w.]+):", line):
            labels[label[1]] = len(opcodes)
        elif op := re.match(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            if op[1].startswith("BRA") and (target := re.search(r"`\((\.L_[\w.]+)\)", op[2])):
                jumps.append((len(opcodes), target[1]))
            opcodes.append(op[1])
    loops = [(labels[t], i + 1) for i, t in jumps if labels.get(t, i) < i]
    loops = [(a, b) for a, b in loops if any("MMA" in op for op in opcodes[a:b])]
    start, stop = min(loops, key=lambda ab: ab[1] - ab[0]) if loops else (0, len(opcodes))
    registers, stack, shared, local = map(int, match.groups())
    return Code(registers, stack, shared, local, opcodes, opcodes[start:stop])


def classes(opcodes: list[str]) -> dict[str, int]:
    """How many opcodes are of each of `CLASSES`, if any is."""
    counts = {name: sum(bool(re.match(rx, op)) for op in opcodes) for name, rx in CLASSES.items()}
    return {name: count for name, count in counts.items() if count}


def others(opcodes: list[str], most: int) -> dict[str, int]:
    """The most common opcodes of no class."""
    known = CLASSES.values()
    rest = (op for op in opcodes if not any(re.match(rx, op) for rx in known))
    return dict(collections.Counter(op.split(".")[0] for op in rest).most_common(most))


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
