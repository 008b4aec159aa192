"""Compile the kernels for GPUs that are not here and count what the compiler made of them.

    python benchmarks/aot.py                       # every configuration, sm_80 sm_89 sm_90 sm_100
    python benchmarks/aot.py --arch 90 --only g128 --out benchmarks/results/aot.json

Needs triton and nothing else (no torch, no driver, no GPU): triton's wheel holds the assembler and
the disassembler. Says nothing about speed; it says what the main loop consists of.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import triton
from machine_code import classes, disassemble, others
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmq_kernels.dequant import dequantize_kernel
from llmq_kernels.gemm import linear_kernel
from llmq_kernels.plan import SOLVED, UNIT, Gpu, closed_form, shared_bytes, solver_tile
from llmq_kernels.rounding import moves_kernel, round_kernel, trials_kernel

LIMIT = 3.2  # instructions per weight and thread on sm_90, up to 16 rows of x, every format
POINTERS = {
    "x_ptr": "*{x}", "qw_ptr": "*i32", "s_ptr": "*{s}", "z_ptr": "*u8", "bias_ptr": "*{x}",
    "y_ptr": "*{x}", "partial_ptr": "*fp32", "counter_ptr": "*i32", "pair_ptr": "*i32",
    "expert_ptr": "*i32",
    **dict.fromkeys(("column_ptr", "debt_ptr", "r_ptr", "u_ptr", "scale_ptr", "zero_ptr"), "*fp32"),
    **dict.fromkeys(("error_ptr", "moved_ptr", "away_ptr", "follow_ptr", "pivot_ptr"), "*fp32"),
    "group_ptr": "*i64", "code_ptr": "*u8",
}  # fmt: skip


class Config(NamedTuple):
    """One compilation of the fused kernel."""

    bits: int = 4
    group: int = 128
    symmetric: bool = True
    dtype: str = "bf16"
    tiles: int = 1
    block_m: int = 16
    unroll: int = 2
    warps: int = 4
    stages: int = 4
    pdl: bool = False
    top_k: int = 0
    maxnreg: int | None = None

    def name(self) -> str:
        """A short name, also the key in the report."""
        return (
            f"w{self.bits} g{self.group} {'sym' if self.symmetric else 'asym'} {self.dtype} "
            f"BN{64 * self.tiles} BM{self.block_m} u{self.unroll} warps{self.warps} s{self.stages}"
            + (" pdl" if self.pdl else "")
            + (" experts" if self.top_k else "")
        )


def small(arch: int) -> list[Config]:
    """The small-M main loop in every format, as the closed form launches it."""
    gpu = Gpu("unknown", divmod(arch, 10), 132)
    found = []
    for bits, group, symmetric, dtype in itertools.product(
        (4, 8, 3, 2), (128, 64, 32, -1), (True, False), ("bf16", "fp16")
    ):
        if arch != 90 and (dtype == "fp16" or (bits != 4 and group != 128)):
            continue  # the same code but for the matrix instruction
        for size in (8192, 4096):
            plan = closed_form(gpu, bits, group, size, size, 16)
            found.append(
                Config(bits, group, symmetric, dtype, plan.tiles, plan.block_m, plan.unroll,
                       plan.warps, plan.stages, maxnreg=plan.maxnreg)
            )  # fmt: skip
    return list(dict.fromkeys(found))


def variants(arch: int) -> list[Config]:
    """Other launches of 4 bits in groups of 128: larger batches, PDL, stacked experts."""
    gpu = Gpu("unknown", divmod(arch, 10), 132)
    found = []
    if arch == 90:
        found = [Config(pdl=True), Config(top_k=2), Config(unroll=4)]
    for N, M in ((57344, 16), (8192, 32), (57344, 32), (8192, 64), (57344, 64), (8192, 256)):
        plan = closed_form(gpu, 4, 128, N, 8192, M)
        found.append(
            Config(4, 128, True, "bf16", plan.tiles, plan.block_m, plan.unroll, plan.warps,
                   plan.stages, maxnreg=plan.maxnreg)
        )  # fmt: skip
    return list(dict.fromkeys(found))


def facts(config: Config, arch: int) -> dict:
    """Compile one configuration for one architecture and read its machine code."""
    constants = {
        "BITS": config.bits, "GROUP": max(0, config.group), "SYMMETRIC": config.symmetric,
        "BIAS": False, "TILES": config.tiles, "BLOCK_M": config.block_m,
        "UNROLL": config.unroll, "SPLIT": True, "EVEN_K": True, "PDL": config.pdl,
        "TOP_K": config.top_k,
    }  # fmt: skip
    weights = 64 * config.tiles * UNIT * config.unroll
    options = {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }
    if config.pdl:
        options["launch_pdl"] = True
    if config.maxnreg:
        options["maxnreg"] = config.maxnreg
    return _compile(linear_kernel, config.dtype, constants, arch, options, weights)


def dequantize_facts(config: Config, arch: int) -> dict:
    """The same for the dequantizing kernel; its "loop" is the whole program."""
    constants = {
        "BITS": config.bits, "GROUP": max(0, config.group), "SYMMETRIC": config.symmetric,
    }  # fmt: skip
    options = {"num_warps": 4, "enable_fp_fusion": True}
    weights = 64 * UNIT
    row = _compile(dequantize_kernel, config.dtype, constants, arch, options, weights)
    return row | {"complaints": ["spills"] * bool(row["spills"] or row["stack"] or row["local"])}


SOLVING = {"round": round_kernel, "trials": trials_kernel, "moves": moves_kernel}


def solver_facts(name: str, columns: int, arch: int) -> dict:
    """The same for a loop of the solvers; its tile has to stay in registers."""
    options = solver_tile(columns)
    constants = {key: options.pop(key) for key in ("COLUMNS", "ROWS")}
    row = _compile(SOLVING[name], "fp32", constants, arch, options, SOLVED)
    return row | {"complaints": ["spills"] * bool(row["spills"] or row["stack"] or row["local"])}


def _compile(kernel, dtype: str, constants: dict, arch: int, options: dict, weights: int) -> dict:
    names = kernel.arg_names
    signature = {n: POINTERS[n].format(x=dtype, s=dtype) if n in POINTERS else "i32" for n in names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    if "qmax" in signature:
        signature["qmax"] = "fp32"
    # What the launcher would find: aligned pointers, N, K and the stride multiples of 16.
    aligned = [*POINTERS, "N", "K", "stride_x"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned if n in names},
    )
    started = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - started
    code = disassemble(compiled.asm["cubin"])
    return {
        "arch": arch,
        "registers": code.registers,
        "stack": code.stack,
        "local": code.local,
        "shared_bytes": max(code.shared, compiled.metadata.shared),
        "instructions": len(code.opcodes),
        "spills": classes(code.opcodes).get("local", 0),
        "loop": len(code.loop),
        "loop_counts": classes(code.loop) | others(code.loop, 8),
        "rounding": sorted(
            set(re.findall(r"cvt\.(r\w)\.(?:bf16|f16)(?:x2)?\.f32", compiled.asm["ptx"]))
        ),
        "per_weight": round(len(code.loop) * 32 * options["num_warps"] / weights, 3),
        "compile_seconds": round(seconds, 2),
    }


def complaints(config: Config, row: dict) -> list[str]:
    """What is wrong with one compilation; empty if nothing is."""
    loop, arch = row["loop_counts"], row["arch"]
    wrong = []
    if row["stack"] or row["local"] or row["spills"]:
        wrong.append("spills")
    if loop.get("I2F"):
        wrong.append("integer to float conversion")
    if not loop.get({90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")):
        wrong.append("no tensor-core instruction in the loop")
    if row["shared_bytes"] > shared_bytes(divmod(arch, 10)):
        wrong.append("too much shared memory")
    if not loop.get("LDGSTS.128"):
        wrong.append("no 128-bit asynchronous load")
    if row["rounding"] != ["rn"]:
        wrong.append("results are not rounded to nearest")
    if arch == 90 and config.block_m <= 16:
        if loop.get("STS"):
            wrong.append("shared-memory stores in the loop")
        if row["per_weight"] > LIMIT:
            wrong.append(f"more than {LIMIT} instructions per weight")
    return wrong


def line(name: str, row: dict, wrong: list[str]) -> str:
    """One row of the printed table."""
    c = row["loop_counts"]
    mma = next((k for k in ("HGMMA", "UTCHMMA", "HMMA") if k in c), "-")
    return (
        f"sm_{row['arch']:<4} {name:48} {row['per_weight']:6.2f} {row['registers']:5} "
        f"{row['shared_bytes'] // 1024:4}K {c.get(mma, 0):3}x{mma:8} {c.get('STS', 0):4} "
        f"{c.get('LDGSTS.128', 0):3}/{c.get('LDGSTS.other', 0):<3} {row['compile_seconds']:5.1f}s "
        f"{'; '.join(wrong) or 'ok'}"
    )


HEADER = (
    f"{'':7} {'configuration':48} {'i/w':>6} {'regs':>5} {'smem':>5} {'mma':12} {'STS':>4} "
    f"{'LDGSTS 128/other':>7}"
)


def save(path: Path, rows: dict[str, dict]) -> None:
    """Merge rows into the report; after every one, so that a stopped run keeps them."""
    report = json.loads(path.read_text()) if path.is_file() else {}
    version = f"triton {triton.__version__}"
    report[version] = report.get(version, {}) | rows
    versions = []
    for name in sorted(report):
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(report[name].items())]
        versions.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n")  # one row, one line


def main() -> int:
    """Print the table; write the report; exit status 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 89, 90, 100])
    parser.add_argument("--only", default="", help="substring of a configuration's name")
    parser.add_argument("--out", type=Path, help="JSON report; other rows in it are kept")
    arguments = parser.parse_args()
    bad = 0
    print(f"triton {triton.__version__}; i/w = instructions per weight and thread in the main loop")
    print(HEADER)
    for arch in arguments.arch:
        for name, row in compiled(arch, arguments.only):
            bad += bool(row["complaints"])
            print(line(name, row, row["complaints"]), flush=True)
            if arguments.out:
                save(arguments.out, {f"sm_{arch} {name}": row})
    return int(bad > 0)


def compiled(arch: int, only: str) -> Iterator[tuple[str, dict]]:
    """Every configuration for one architecture whose name holds `only`: (name, facts)."""
    for config in [*small(arch), *variants(arch)]:
        if only in config.name():
            row = facts(config, arch)
            yield config.name(), row | {"complaints": complaints(config, row)}
    for bits, group in itertools.product((4, 8, 3, 2), (128, 64, 32, -1)):
        name = f"dequantize w{bits} g{group} asym bf16"
        if only in name:
            yield name, dequantize_facts(Config(bits, group, symmetric=False), arch)
    for kernel, columns in itertools.product(SOLVING, (32, 64, 128)):
        name = f"solve {kernel} {columns} columns"
        if only in name:
            yield name, solver_facts(kernel, columns, arch)


if __name__ == "__main__":
    sys.exit(main())
