"""Several processes that make one run: each reads a share of the calibration text.

They are started by torchrun and talk through torch.distributed (gloo on CPUs, NCCL on GPUs). With
one process nothing here does anything.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import torch
from torch import Tensor, distributed

from llmq.errors import ProcessError

T = TypeVar("T")
_ENDED = (
    "Another process of this run has ended. Its own message says why; the same command goes on "
    "after the last finished block."
)


def join(device: str) -> None:
    """Join the processes that torchrun has started; nothing if it has not.

    If one of them ends, torchrun stops the others with a signal, which becomes a ProcessError: what
    they have finished is kept, and their locks are freed.
    """
    if distributed.is_available() and distributed.is_torchelastic_launched():
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, _stopped)


def _stopped(*_: object) -> NoReturn:
    raise ProcessError(_ENDED)


def count() -> int:
    """How many processes there are."""
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def number() -> int:
    """Which of them this one is: 0 is the one that writes."""
    return distributed.get_rank() if count() > 1 else 0


def add_up(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if count() > 1:
        with _others_alive():
            distributed.all_reduce(tensor)
    return tensor


def add_up_number(value: int, device: torch.device) -> int:
    """The sum of a number over all processes."""
    return int(add_up(torch.tensor([value], device=device)))


def everyones(value: T) -> list[T]:
    """This value of every process, in their order."""
    values: list[T] = [value] * count()
    if count() > 1:
        with _others_alive():
            distributed.all_gather_object(values, value)
    return values


def of_the_first(value: T | None) -> T:
    """The value that process 0 gives."""
    values = [value]
    if count() > 1:
        with _others_alive():
            distributed.broadcast_object_list(values)
    return values[0]  # type: ignore[return-value]


@contextmanager
def _others_alive() -> Iterator[None]:
    """Turn a broken connection into a ProcessError."""
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise if another process has died
        raise ProcessError(_ENDED) from error
