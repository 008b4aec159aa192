"""Everything there is to check and measure on a machine with a GPU, in under ten minutes.

    python benchmarks/on_gpu.py                      # writes benchmarks/results/gpu_<name>.json
    python benchmarks/on_gpu.py --minutes 3 --out x.json
    python benchmarks/on_gpu.py --dry-run            # no GPU: Triton's interpreter, tiny shapes

The sections of SECTIONS, most important first, each in a process of its own with a limit on its
time: what crashes, hangs or runs out of time costs its own rows and no others. Rows are written
as they are measured; a row or a section that failed says why. Exit status 1 if a check failed.
kernels.py makes tables of the result, plot.py charts. Needs no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "kernels"), str(ROOT)]

from gpu_report import Report  # noqa: E402

SHAPES = [  # N x K: q/k/v, o, gate/up, down of 8B and 70B Llamas, a head, Qwen3-32B, 0.6B
    (28672, 4096), (4096, 4096), (4096, 14336), (57344, 8192), (8192, 8192), (6144, 4096),
    (10240, 8192), (8192, 28672), (128256, 4096), (8192, 5120), (5120, 25600), (1024, 3072),
]  # fmt: skip
FIRST_ROWS = (1, 16, 64, 256, 2048)
OTHER_ROWS = (2, 4, 8, 32, 48, 96, 128, 512, 1024, 4096, 8192)
GRACE = 20  # seconds that a section may take beyond its limit, before it is killed


@dataclasses.dataclass(frozen=True)
class Machine:
    """What sections run on."""

    device: Any
    gpu: Any
    dry: bool
    share: tuple[int, int] = (0, 1)  # this process's number, and how many share the section


def first(report: Report, on: Machine) -> None:
    """The main formats, the operators, and how fast this GPU reads."""
    from gpu_checks import all_formats, checks, operator_checks
    from gpu_times import bandwidth

    main = [f for f in all_formats(on.dry) if f[0] == 4 and f[1] in (128, 32)]
    shapes, rows = [(1030, 1536)], (1, 5, 16, 33, 64, 200, 600)
    if on.dry:
        shapes, rows = [(70, 128)], (1, 3)
    bandwidth(report, on.device, 1 << (16 if on.dry else 30))
    checks(report, on.device, on.gpu, main, shapes, rows)
    operator_checks(report, on.device)


def main_times(report: Report, on: Machine) -> None:
    """The shapes and numbers of rows that the aims are about."""
    _times(report, on, SHAPES[:5], FIRST_ROWS)


def decode(report: Report, on: Machine) -> None:
    """Whole models."""
    from gpu_decode import decoding

    decoding(report, on.device, _roof(report, on), (1, 2) if on.dry else (1, 16), dry=on.dry)


def solving(report: Report, on: Machine) -> None:
    """What quantizing consists of."""
    from gpu_solvers import solvers

    solvers(report, on.device, on.dry)


def chains(report: Report, on: Machine) -> None:
    """Layers in a row."""
    from gpu_decode import chain

    size, rows = (64, (1,)) if on.dry else (4096, (1, 16))
    chain(report, on.device, on.gpu, size, rows, dry=on.dry)


def formats(report: Report, on: Machine) -> None:
    """Every format; several processes share this, since most of it is compiling."""
    from gpu_checks import all_formats, checks

    number, count = on.share
    mine = all_formats(on.dry)[number::count]
    shapes, rows = ([(70, 128)], (1,)) if on.dry else ([(1030, 1536), (70, 96)], (1, 33, 200))
    checks(report, on.device, on.gpu, mine, shapes, rows)


def other_times(report: Report, on: Machine) -> None:
    """Other groups, zero points, fp16, other numbers of rows, other shapes."""
    _times(report, on, SHAPES[:1], FIRST_ROWS, group=32)
    _times(report, on, SHAPES[:1], FIRST_ROWS, group=64)
    _times(report, on, SHAPES[:1], (1, 16, 64), symmetric=False)
    _times(report, on, SHAPES[:1], (1, 16, 64), group=-1)
    _times(report, on, SHAPES[:2], (1, 16, 64), dtype="float16")
    _times(report, on, SHAPES[5:], FIRST_ROWS)
    _times(report, on, SHAPES[:2], OTHER_ROWS)


def peer_times(report: Report, on: Machine) -> None:
    """Kernels of other projects, where they are installed; some tune themselves, slowly."""
    from gpu_peers import present

    names = sorted(present().keys() - {"tinygemm"})  # which `main_times` has
    report.add("peers", installed=names)
    if not names and not on.dry:
        return
    _times(report, on, SHAPES[:3], (1, 16, 64), peers=True)
    _times(report, on, SHAPES[:1], (1, 16, 64), dtype="float16", peers=True)


def searching(report: Report, on: Machine) -> None:
    """What tuning would gain."""
    from gpu_times import search

    if not on.dry:
        search(report, on.device, on.gpu, SHAPES[:3], (1, 16, 64))


def sanitizing(report: Report, on: Machine) -> None:
    """Reads and writes out of bounds."""
    from gpu_checks import sanitizer

    if not on.dry:
        sanitizer(report)


def one(report: Report, on: Machine) -> None:
    """What `sanitizing` runs."""
    from gpu_checks import all_formats, checks

    checks(report, on.device, on.gpu, all_formats(on.dry)[:2], [(192, 512)], (1, 16))


class Section(NamedTuple):
    """One part of the whole."""

    run: Callable[[Report, Machine], None]
    seconds: int  # limit
    processes: int = 1


SECTIONS = {
    "first": Section(first, 110),
    "times": Section(main_times, 130),
    "decode": Section(decode, 200),
    "solvers": Section(solving, 50),
    "chains": Section(chains, 40),
    "formats": Section(formats, 120, processes=8),
    "peers": Section(peer_times, 120),
    "other-times": Section(other_times, 90),
    "search": Section(searching, 60),
    "sanitizer": Section(sanitizing, 60),
}


def _roof(report: Report, on: Machine) -> float:
    from gpu_times import bandwidth

    return bandwidth(report, on.device, 1 << (16 if on.dry else 30))


def _times(
    report: Report,
    on: Machine,
    shapes: list[tuple[int, int]],
    rows: tuple[int, ...],
    dtype: str = "bfloat16",
    **options: Any,
) -> None:
    import torch
    from gpu_times import times

    if on.dry:
        shapes, rows = [(64, 128)], (1,)
    roof = _roof(report, on)
    times(report, on.device, on.gpu, shapes, rows, roof, getattr(torch, dtype), **options)


def machine(dry: bool, share: tuple[int, int] = (0, 1)) -> Machine:
    """The GPU of this process; RuntimeError if there is none."""
    import torch

    from llmq_kernels import ops, plan

    if dry:
        return Machine(torch.device("cpu"), plan.Gpu("dry run", (9, 0), 4), dry, share)
    device = torch.device("cuda")
    return Machine(device, ops.gpu(device), dry, share)


def command(name: str, seconds: float, out: Path, share: str) -> list[str]:
    """What runs a section in a process of its own."""
    script = [sys.executable, str(Path(__file__).resolve()), "--section", name]
    return [*script, "--seconds", f"{seconds:.0f}", "--out", str(out), "--share", share]


def in_processes(
    report: Report, name: str, section: Section, command=command, grace: float = GRACE
) -> None:
    """Run a section; it adds its rows to the report's file, or to one beside it per process."""
    seconds = min(section.seconds, report.left() - grace)
    if seconds < min(10, section.seconds):
        report.add("section", name=name, error="no time was left for it")
        return
    parts = [report.path]
    if section.processes > 1:
        parts = [report.path.with_suffix(f".{name}{i}") for i in range(section.processes)]
    logs = [part.with_name(part.name + ".log") for part in parts]
    running = []
    for i, (part, log) in enumerate(zip(parts, logs, strict=True)):
        with log.open("w") as errors:
            line = command(name, seconds, part, f"{i}/{len(parts)}")
            running.append(subprocess.Popen(line, stderr=errors))
    end = time.monotonic() + seconds + grace
    endings = [_ending(process, end) for process in running]
    for part, log, ending in zip(parts, logs, endings, strict=True):
        if part == report.path:
            report.read()
        elif part.is_file():
            report.rows += json.loads(part.read_text())["rows"]
            part.unlink()
        if ending:
            report.add("section", name=name, error=ending, tail=log.read_text()[-1500:])
        log.unlink()
    report.add("section", name=name, seconds_left=round(report.left()))


def _ending(process: subprocess.Popen, end: float) -> str:
    """Wait; what went wrong, if anything."""
    try:
        status = process.wait(timeout=max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "was stopped: it took too long"
    return f"ended with status {status}" if status else ""


def main() -> int:
    """Run the sections in order of importance, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, tiny")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--section", choices=(*SECTIONS, "one"), help="only this, in this process")
    parser.add_argument("--seconds", type=float, default=60, help="limit of --section")
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch
    from environment import environment

    if not options.dry_run and not torch.cuda.is_available():
        print("No CUDA GPU here. --dry-run tries the script without one.", file=sys.stderr)
        return 1
    number, count = map(int, options.share.split("/"))
    on = machine(options.dry_run, (number, count))
    name = on.gpu.name.replace(" ", "_")
    out = options.out or ROOT / f"benchmarks/results/gpu_{name}.json"
    if options.section:
        run = one if options.section == "one" else SECTIONS[options.section].run
        report = Report(out, options.seconds)
        run(report, on)
        return 0
    head = environment() | {"gpu": on.gpu._asdict()}
    report = Report(out, 60 * options.minutes, head)
    for name, section in SECTIONS.items():
        if options.dry_run:
            section.run(report, on)
        else:
            in_processes(report, name, section)
    print(f"{report.failed()} checks failed; wrote {out}")
    return int(report.failed() > 0)


if __name__ == "__main__":
    sys.exit(main())
