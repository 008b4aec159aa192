"""One CUDA graph of a step that is always the same: its kernels are launched in one go.

Batch-1 decoding is hundreds of kernels of a few microseconds; launched one by one, the processor
would be the limit. A step must read and write the same tensors every time and leave no trace in
Python; what it changes in place (a cache, a position) moves on with every replay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Step = Callable[[], None]


def captured(step: Step, device: torch.device) -> Step:
    """Record `step`, which is not carried out by that; the result carries it out.

    Args:
        step: has run on this device before, so that everything is compiled and allocated.
        device: CUDA.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            step()
    return graph.replay


def beside(step: Step, device: torch.device) -> None:
    """Carry out `step` on a side stream, as torch asks for what is captured afterwards."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Operations of torch that wait for the GPU raise RuntimeError, as they would in a capture.

    A capture that fails can leave CUDA in no state to go on; this does not.
    """
    before = torch.cuda.get_sync_debug_mode()
    _wait(2)
    try:
        yield
    finally:
        _wait(before)


def _wait(mode: int) -> None:
    """0: silently, 2: never. Torch warns that it may not see every operation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)
