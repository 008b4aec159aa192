"""What this machine has left, and how fast it is. Standard library and torch only."""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

_CGROUP = Path("/sys/fs/cgroup")


def resident_bytes() -> int:
    """Memory of this process now, pages of shared libraries included."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(device: str) -> int | None:
    """Bytes that can still be taken on a device; None if the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = (line.split() for line in meminfo.read_text().splitlines())
    free = next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), None)
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        # Cached files count as used there, but make room.
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        left = int(limit.read_text()) - int(used.read_text()) + int(stat.get("file", 0))
        free = left if free is None else min(free, left)
    return free


def free_disk(folder: str | os.PathLike[str]) -> int:
    """Bytes left on the disk of a folder, which need not be there yet."""
    path = Path(folder).expanduser().resolve()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def speeds(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Seconds for one unit of each kind of work in `needs.operations`; takes less than a second."""
    x = torch.rand(1 << 20, device=device)  # as many as a search of grids works on at once
    row, short = torch.rand(8, 64, device=device), torch.rand(64, device=device)
    data = bytes(1 << 21)

    def thrice() -> None:
        x.div(3).round_().clamp_(0, 1)

    def steps() -> None:
        for _ in range(100):
            row.addr_(row[:, 0], short, alpha=-1)

    def hashes() -> None:
        hashlib.sha256(data)

    work: dict[str, tuple[Callable[[], object], float]] = {
        "model": _product(768, dtype, device),
        "float32": _product(512, torch.float32, device),
        "float64": _product(384, torch.float64, device),
        "elements": (thrice, 3.0 * len(x)),
        "steps": (steps, 100.0),
        "bytes": (hashes, float(len(data))),
    }
    return {kind: _seconds(run, device) / count for kind, (run, count) in work.items()}


def _product(size: int, dtype: torch.dtype, device: str) -> tuple[Callable[[], object], float]:
    """A product as layers take it (others may have no fast path), and its operations."""
    a = torch.rand(size, size, device=device).to(dtype)
    return (lambda: F.linear(a, a)), 2.0 * size**3


def _seconds(run: Callable[[], object], device: str) -> float:
    """The median of the runs that a tenth of a second has room for, three at least.

    On a busy machine a run may wait for a core: on a CPU, where that can be told (one thread), what
    it waited does not count.
    """
    run()  # warms up
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.1 and len(times) < 100):
        start, worked = time.perf_counter(), time.process_time()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        if device == "cpu":
            times[-1] = min(times[-1], time.process_time() - worked)
    return statistics.median(times)
