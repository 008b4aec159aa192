"""How long calls take on a GPU: many launches in one CUDA graph, the median of its replays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
WARM = 0.1  # seconds of replays before any counts: an idle GPU takes a while to raise its clock


def microseconds(calls: Sequence[Call], *, device: torch.device, replays: int = 20) -> float:
    """Time per call.

    Args:
        calls: run one after the other; give each its own weights, together several times the
            second-level cache, or the weights are read from cache and not from memory.
        device: on anything but CUDA the calls are simply run and timed (for trying scripts).
        replays: of the whole sequence; the median counts.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) * 1e6 / len(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and allocate outside the capture
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    end = time.monotonic() + WARM
    while time.monotonic() < end:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times)


def copies(bytes_each: int, cache_bytes: int) -> int:
    """How many distinct weights it takes to cover the cache four times over, at most 200."""
    return max(2, min(200, -(-4 * cache_bytes // bytes_each)))
